# SPDX-License-Identifier: Apache-2.0
"""Offline PPO of a 7B model, as HALOs has it: fixed answers, rewards +1 and -1, the reference as
the old policy.

    python -m align_jax.train --config=configs/ppo_offline_7b.py --workdir=gs://BUCKET/ppo_offline_7b
    python -m align_jax.plan --config=configs/ppo_offline_7b.py --topology=v5e:4x8

Recipe: the offline PPO of the KTO paper (arXiv 2402.01306, section 4.1) with the figures of
ContextualAI/HALOs (config/loss/ppo.yaml and the defaults): ratio clipped to [0.5, 1 / 0.5], lambda
0.95, gamma 0.99, value loss 0.01, KL 0.1, one pass over each batch of 32 answers, learning rate
5e-6, 150 steps of warm-up and then constant, gradients clipped at 5, one epoch, 1,024 tokens of
which 512 prompt; values from a three-layer head on detached states.
Differences: parameters and moments are float32; one clip for all gradients (HALOs clips the value
head's at 0.1).
Topology: v5e:4x8.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import MISTRAL_7B


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 32
    config.max_length = 1024

    config.model.path = "alignment-handbook/zephyr-7b-sft-full"
    # what align_jax.plan compiles without the checkpoint
    config.model.family, config.model.config = "mistral", ConfigDict(MISTRAL_7B)
    config.model.value_head = "value_mlp"

    config.data.train = "set:ultrafeedback:train"
    config.data.eval = "set:ultrafeedback:test"
    config.data.max_prompt_length = 512

    config.objective = ConfigDict(
        losses.options(
            "ppo_offline",
            clip=0.5,
            clip_form="reciprocal",
            gamma=0.99,
            lam=0.95,
            critic_coef=0.01,
            kl_coef=0.1,
        )
    )

    config.optimizer.learning_rate = 5e-6
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 150
    config.optimizer.clip_norm = 5.0

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 500
    config.checkpoint.best_metric = "eval/rewards/margins"
    config.eval.every_steps = 500
    config.eval.max_examples = 1024
    return config

# SPDX-License-Identifier: Apache-2.0
"""SPIN of a 7B model: in rounds, DPO of the data's answers against the model's own samples.

    python -m align_jax.train --config=configs/spin_7b.py --workdir=gs://BUCKET/spin_7b
    python -m align_jax.plan --config=configs/spin_7b.py --topology=v5e:8x8

Recipe: Chen et al. 2024, arXiv 2401.01335, section 6.1: zephyr-7b-sft-full on 50k of the prompts
that it was fine-tuned on (UltraChat), beta 0.1, learning rate 5e-7 after 10 % warm-up, batch 64,
two epochs a round, three rounds; in each the opponent and the reference are the model that the
round begins with (rollout.against, reference.sync_every_rollouts).
Differences: AdamW, not RMSProp; one schedule over all rounds; each round has new prompts, and the
samples of the rounds before are not kept.
Topology: v5e:8x8.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import MISTRAL_7B

ROUNDS, BATCH, STEPS = 3, 64, 781  # STEPS of a pass over a round's prompts


def get_config() -> ConfigDict:
    config = defaults()
    config.total_steps = ROUNDS * 2 * STEPS
    config.batch_size = BATCH
    config.max_length = 2048

    config.model.path = "alignment-handbook/zephyr-7b-sft-full"
    # what align_jax.plan compiles without the checkpoint
    config.model.family, config.model.config = "mistral", ConfigDict(MISTRAL_7B)
    config.reference.sync_every_rollouts = 1

    config.data.train = "set:ultrachat:train"
    config.data.eval = "set:ultrachat:test"

    config.objective = ConfigDict(losses.options("dpo", beta=0.1))
    config.rollout.against = "data"
    config.rollout.responses_per_prompt = 1
    config.rollout.prompts = BATCH * STEPS
    config.rollout.epochs = 2
    config.rollout.max_new_tokens = 512
    config.rollout.tensor = 4

    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_fraction = 0.1

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = STEPS
    config.eval.every_steps = 2 * STEPS
    config.eval.max_examples = 256
    return config

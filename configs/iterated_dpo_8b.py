# SPDX-License-Identifier: Apache-2.0
"""Iterated DPO of an 8B model: in rounds, the best of eight samples against the worst, by a reward
model.

    python -m align_jax.train --config=configs/iterated_dpo_8b.py --workdir=gs://BUCKET/iterated_dpo
    python -m align_jax.plan --config=configs/iterated_dpo_8b.py --topology=v5e:8x8

Recipe: Dong et al. 2024, arXiv 2405.07863 (RLHF workflow), section 3: three rounds of 20k prompts,
eight samples each, batch 128, learning rate 5e-7, beta 0.1, two passes over a round; the reference
is the starting model in all rounds.  --config.reference.sync_every_rollouts=1 moves it to the model
that each round begins with.
Differences: prompts of UltraFeedback, not of the paper's collection; one schedule for all rounds.
Topology: v5e:8x8.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import LLAMA_3_8B

ROUNDS, BATCH, STEPS = 3, 128, 156  # STEPS of a pass over a round's prompts


def get_config() -> ConfigDict:
    config = defaults()
    config.total_steps = ROUNDS * 2 * STEPS
    config.batch_size = BATCH
    config.max_length = 2048

    config.model.path = "RLHFlow/LLaMA3-SFT"
    # what align_jax.plan compiles without the checkpoint
    config.model.family, config.model.config = "llama", ConfigDict(LLAMA_3_8B)

    config.data.train = "set:ultrafeedback:train"
    config.data.eval = "set:ultrafeedback:test"

    config.objective = ConfigDict(losses.options("dpo", beta=0.1))
    config.rollout.responses_per_prompt = 8
    config.rollout.prompts = BATCH * STEPS
    config.rollout.epochs = 2
    config.rollout.max_new_tokens = 1024
    config.rollout.tensor = 4
    reward_model = {"path": "sfairXC/FsfairX-LLaMA3-RM-v0.1", "rows": 64, "max_length": 2048}
    config.rewards = ConfigDict({"model": {**reward_model, "compute_dtype": "bfloat16"}})

    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.03

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = STEPS
    config.eval.every_steps = 2 * STEPS
    config.eval.max_examples = 256
    return config

# SPDX-License-Identifier: Apache-2.0
"""A 7B reward model: Mistral-Instruct with a score head, by Bradley and Terry's likelihood on
700,000 pairs.

    python -m align_jax.train --config=configs/reward_7b.py --workdir=gs://BUCKET/reward_7b
    python -m align_jax.plan --config=configs/reward_7b.py --topology=v5e:8x8

Recipe: RLHFlow (Dong et al. 2024, arXiv 2405.07863, section 2; RLHFlow/RLHF-Reward-Modeling,
bradley-terry-rm/mistral_7B_rm.py): learning rate 5e-6, batch 64 * 8 = 512 pairs, weight decay
0.001, cosine, 3 % warm-up, one epoch, 4,096 tokens.
Differences: weights and AdamW's moments are float32, not bfloat16 and 32-bit paged; embeddings keep
their size (no padding token is needed); 500 prompts are held out instead of evaluated after being
trained on.
Topology: v5e:8x8.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import MISTRAL_7B


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 512
    config.microbatches = 8
    config.max_length = 4096

    config.model.path = "mistralai/Mistral-7B-Instruct-v0.2"
    # what align_jax.plan compiles without the checkpoint: v0.2 attends to all, from 1e6
    config.model.family = "mistral"
    config.model.config = ConfigDict({**MISTRAL_7B, "sliding_window": None, "rope_theta": 1e6})

    config.data.train = "hf:hendrydong/preference_700K:train"
    config.data.eval_fraction = 0.001

    config.objective = ConfigDict(losses.options("reward"))

    config.optimizer.learning_rate = 5e-6
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.03
    config.optimizer.weight_decay = 0.001

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 200
    config.checkpoint.best_metric = "eval/accuracy"
    config.eval.every_steps = 200
    config.eval.max_examples = 500
    config.eval.batch_size = 128
    return config

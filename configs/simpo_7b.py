# SPDX-License-Identifier: Apache-2.0
"""SimPO of a 7B model: Zephyr's SFT checkpoint on UltraFeedback, without a reference model.

    python -m align_jax.train --config=configs/simpo_7b.py --workdir=gs://BUCKET/simpo_7b
    python -m align_jax.plan --config=configs/simpo_7b.py --topology=v5e:8x8

Recipe: SimPO (Meng et al. 2024, arXiv 2405.14734), setting Mistral-Base of the repository's README
and of its training_configs/mistral-7b-base-simpo.yaml: beta 2.0, gamma 1.6 (gamma / beta 0.8),
learning rate 3e-7, batch 2 * 8 * 8 = 128 pairs, cosine, 10 % warm-up, one epoch, 1,024 tokens of
which 512 prompt.
Topology: v5e:8x8.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import MISTRAL_7B


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 128
    config.max_length = 1024

    config.model.path = "alignment-handbook/zephyr-7b-sft-full"
    # what align_jax.plan compiles without the checkpoint
    config.model.family, config.model.config = "mistral", ConfigDict(MISTRAL_7B)

    config.data.train = "set:ultrafeedback:train"
    config.data.eval = "set:ultrafeedback:test"
    config.data.max_prompt_length = 512

    config.objective = ConfigDict(losses.options("simpo", beta=2.0, gamma_beta_ratio=0.8))

    config.optimizer.learning_rate = 3e-7
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 100
    config.checkpoint.best_metric = "eval/rewards/accuracies"
    config.eval.every_steps = 100
    config.eval.max_examples = 1024
    return config

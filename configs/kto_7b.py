# SPDX-License-Identifier: Apache-2.0
"""KTO of a 7B model: Zephyr's SFT checkpoint on UltraFeedback, each pair split into a good and a
bad answer.

    python -m align_jax.train --config=configs/kto_7b.py --workdir=gs://BUCKET/kto_7b
    python -m align_jax.plan --config=configs/kto_7b.py --topology=v5e:4x8

Recipe: KTO (Ethayarajh et al. 2024, arXiv 2402.01306) with the defaults of ContextualAI/HALOs
(config/config.yaml, config/loss/kto.yaml, config/model/base_model.yaml): beta 0.1, both weights 1,
AdamW, learning rate 5e-6, batch 32 answers, 150 steps of warm-up and then constant, gradients
clipped at 5, one epoch, 1,024 tokens of which 512 prompt.
Differences: parameters and moments are float32 (HALOs: bfloat16); the KL term is over the whole
global batch, with one pairing that never meets its own prompt (HALOs: over each device's
microbatch).
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

    config.data.train = "set:ultrafeedback:train"
    config.data.eval = "set:ultrafeedback:test"
    config.data.max_prompt_length = 512

    config.objective = ConfigDict(
        losses.options("kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
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

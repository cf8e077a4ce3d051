# SPDX-License-Identifier: Apache-2.0
"""DPO of a 7B model by low-rank adapters: one frozen copy of the weights is the policy's base and
the reference.

    python -m align_jax.train --config=configs/dpo_lora_7b.py --workdir=gs://BUCKET/dpo_lora_7b
    python -m align_jax.plan --config=configs/dpo_lora_7b.py --topology=v5e:2x4

Recipe: the alignment-handbook's recipes/zephyr-7b-beta/dpo/config_qlora.yaml: rank 16, alpha 16,
dropout 0.05 on all seven matrices of a layer, beta 0.01, learning rate 5e-6, batch 4 * 8 = 32
pairs, cosine, 10 % warm-up, one epoch, 1,024 tokens of which 512 prompt.
Differences: the base is held in bfloat16 (--config.model.quantize=nf4 holds it in 4 bits, as the
handbook does), and the SFT checkpoint is the full fine-tune, not the handbook's adapter.
Topology: v5e:2x4.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import MISTRAL_7B


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 32
    config.microbatches = 2
    config.max_length = 1024

    config.model.path = "alignment-handbook/zephyr-7b-sft-full"
    # what align_jax.plan compiles without the checkpoint
    config.model.family, config.model.config = "mistral", ConfigDict(MISTRAL_7B)
    config.model.lora.rank = 16
    config.model.lora.alpha = 16.0
    config.model.lora.dropout = 0.05

    config.data.train = "set:ultrafeedback:train"
    config.data.eval = "set:ultrafeedback:test"
    config.data.max_prompt_length = 512

    config.objective = ConfigDict(losses.options("dpo", beta=0.01))

    config.optimizer.learning_rate = 5e-6
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 200
    config.checkpoint.best_metric = "eval/rewards/accuracies"
    config.eval.every_steps = 200
    config.eval.max_examples = 1024
    return config

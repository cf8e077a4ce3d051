# SPDX-License-Identifier: Apache-2.0
"""DPO of a 7B model by Muon: dpo_7b with its matrices' momenta orthogonalized.

    python -m align_jax.train --config=configs/dpo_muon_7b.py --workdir=gs://BUCKET/dpo_muon_7b
    python -m align_jax.plan --config=configs/dpo_muon_7b.py --topology=v5e:8x8

Recipe: Muon as in Liu et al. 2025 (arXiv 2502.16982, section 2.2): momentum 0.95, updates scaled
to AdamW's size, so that AdamW's learning rate and weight decay are kept, and AdamW for embeddings,
output head and norms; the rest is configs/dpo_7b.py (Zephyr, arXiv 2310.16944).
Difference: they trained with Muon from the start; this checkpoint comes from AdamW.
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

    config.objective = ConfigDict(losses.options("dpo", beta=0.01))

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 100
    config.checkpoint.best_metric = "eval/rewards/accuracies"
    config.eval.every_steps = 100
    config.eval.max_examples = 1024
    return config

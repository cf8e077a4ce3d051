# SPDX-License-Identifier: Apache-2.0
"""DPO of an 8B model on rows of 8,192 tokens, each row split over four chips.

    python -m align_jax.train --config=configs/dpo_7b_8k.py --workdir=gs://BUCKET/dpo_7b_8k
    python -m align_jax.plan --config=configs/dpo_7b_8k.py --topology=v5e:16x16

Recipe: OpenRLHF/OpenRLHF, examples/scripts/train_dpo_llama.sh: Llama 3 8B after SFT, beta 0.1,
learning rate 5e-7, batch 256 pairs, one epoch, 8,192 tokens, on a mixture of 555,000 pairs;
OpenRLHF's cosine to a tenth of the peak after 3 % warm-up.
Topology: v5e:16x16.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import LLAMA_3_8B


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 256
    config.microbatches = 4
    config.max_length = 8192

    config.model.path = "OpenRLHF/Llama-3-8b-sft-mixture"
    # what align_jax.plan compiles without the checkpoint
    config.model.family, config.model.config = "llama", ConfigDict(LLAMA_3_8B)

    config.data.train = "hf:OpenRLHF/preference_dataset_mixture2_and_safe_pku:train"
    config.data.eval_fraction = 0.005

    config.objective = ConfigDict(losses.options("dpo", beta=0.1))

    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "cosine"
    config.optimizer.final_fraction = 0.1
    config.optimizer.warmup_fraction = 0.03

    config.mesh.fsdp = -1
    config.mesh.sequence = 4

    config.checkpoint.every_steps = 200
    config.checkpoint.best_metric = "eval/rewards/accuracies"
    config.eval.every_steps = 200
    config.eval.max_examples = 1024
    config.eval.batch_size = 64
    return config

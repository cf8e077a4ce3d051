# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of a 7B model: Mistral on UltraChat, the first stage of Zephyr.

    python -m align_jax.train --config=configs/sft_7b.py --workdir=gs://BUCKET/sft_7b
    python -m align_jax.plan --config=configs/sft_7b.py --topology=v5e:8x8

Recipe: the alignment-handbook's recipes/zephyr-7b-beta/sft/config_full.yaml: learning rate 2e-5,
batch 16 * 8 = 128 rows of 2,048 tokens, cosine, 10 % warm-up, one epoch, every answer of a
conversation learned.
Differences: whole conversations are packed into rows, two to a row, where the handbook cuts a
stream of tokens; the chat template comes with Zephyr's tokenizer, since Mistral's has none.
Topology: v5e:8x8.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import MISTRAL_7B


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 256
    config.max_length = 2048
    config.row_length = 2048
    config.tokenizer = "alignment-handbook/zephyr-7b-sft-full"

    config.model.path = "mistralai/Mistral-7B-v0.1"
    # what align_jax.plan compiles without the checkpoint
    config.model.family, config.model.config = "mistral", ConfigDict(MISTRAL_7B)

    config.data.train = "set:ultrachat:train"
    config.data.eval = "set:ultrachat:test"
    config.data.layout = "packed"
    config.data.groups_per_row = 2

    config.objective = ConfigDict(losses.options("sft"))

    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 200
    config.checkpoint.best_metric = "-eval/nll"
    config.eval.every_steps = 200
    config.eval.max_examples = 1024
    return config

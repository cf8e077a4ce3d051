# SPDX-License-Identifier: Apache-2.0
"""Any objective on a CPU in under a minute: a tiny byte-level Llama on preferences made by code.

    python -m align_jax.train --config=configs/tiny.py:dpo --workdir=runs/tiny

The argument after the colon is any name of ``python -m align_jax.objectives``, or a sum such as ``dpo+sft``.  The
rule behind the made data is known (see data.builtin), so the held-out metrics have a true answer.  To start from a real
model, or from your own data:

    --config.model.path=DIRECTORY_OR_HUB_ID --config.data.train=pairs.jsonl

Hardware: two CPU cores.
"""
from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.losses.objective import data_kind

LLAMA = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, tie_word_embeddings=True)

MADE = {"pairs": "preferences", "completions": "completions", "unpaired": "unpaired", "ranked": "ranked",
        "rollout": "arithmetic"}  # the objective's kind of data -> the data set made by code


def get_config(objective: str = "dpo") -> ConfigDict:
    config = defaults()
    made = MADE[data_kind(losses.resolve(objective))]
    config.total_steps = 200
    config.batch_size = 32
    config.max_length = 128

    config.model.family = "llama"
    config.model.config = ConfigDict(LLAMA)
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.reference.dtype = "float32"

    config.data.train = f"builtin:{made}:train"
    config.data.eval = f"builtin:{made}:eval"

    config.objective = ConfigDict(losses.options(objective))

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1

    config.checkpoint.every_steps = 100
    config.eval.every_steps = 50
    config.eval.max_examples = 256
    config.log.every_steps = 10
    return config

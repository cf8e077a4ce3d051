# SPDX-License-Identifier: Apache-2.0
"""The smallest run that still has all the parts: for starting, killing and restarting processes
again and again."""

from align_jax.core.config import ConfigDict, defaults


def get_config(data: str) -> ConfigDict:
    """Train one narrow layer on the pairs in ``data``."""
    config = defaults()
    config.total_steps = 60
    config.batch_size = 8
    config.max_length = 48
    config.tokenizer = "byte"
    config.model.config = ConfigDict(
        dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        )
    )
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.reference.dtype = "float32"
    config.data.train = data
    config.data.eval_fraction = 0.1
    config.eval.every_steps = 7
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 5
    config.checkpoint.every_steps = 5
    config.log.every_steps = 1
    return config

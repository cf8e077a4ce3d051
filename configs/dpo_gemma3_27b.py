# SPDX-License-Identifier: Apache-2.0
"""DPO of Gemma 3 27B on text; what sees images is carried to the export.

    python -m align_jax.train --config=configs/dpo_gemma3_27b.py --workdir=gs://BUCKET/dpo_gemma3_27b
    python -m align_jax.plan --config=configs/dpo_gemma3_27b.py --topology=v5p:4x4x4

Recipe: no figures are published for it; these are Zephyr's (arXiv 2310.16944, section 4, and the
alignment-handbook's batch): beta 0.1, learning rate 5e-7, 10 % warm-up, one epoch, here 128 pairs a
batch and 2,048 tokens of which 1,024 prompt.  The model is described in
arXiv 2503.19786.
Topology: v5p:4x4x4.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 128
    config.max_length = 2048

    config.model.path = "google/gemma-3-27b-it"
    # with the fields below: what align_jax.plan compiles without the checkpoint
    config.model.family = "gemma3"
    config.model.config = ConfigDict(
        dict(
            text_config=dict(
                vocab_size=262208,
                hidden_size=5376,
                intermediate_size=21504,
                num_hidden_layers=62,
                num_attention_heads=32,
                num_key_value_heads=16,
                head_dim=128,
                query_pre_attn_scalar=168,
                sliding_window=1024,
                max_position_embeddings=131072,
                rope_scaling=dict(rope_type="linear", factor=8.0),
            )
        )
    )

    config.data.train = "set:ultrafeedback:train"
    config.data.eval = "set:ultrafeedback:test"
    config.data.max_prompt_length = 1024

    config.objective = ConfigDict(losses.options("dpo", beta=0.1))

    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_fraction = 0.1

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 100
    config.checkpoint.best_metric = "eval/rewards/accuracies"
    config.eval.every_steps = 100
    config.eval.max_examples = 1024
    return config

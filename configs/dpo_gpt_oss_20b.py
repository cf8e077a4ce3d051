# SPDX-License-Identifier: Apache-2.0
"""DPO of gpt-oss 20B: 32 experts, attention with sinks; MXFP4 is read as bfloat16.

    python -m align_jax.train --config=configs/dpo_gpt_oss_20b.py --workdir=gs://BUCKET/dpo_gpt_oss_20b
    python -m align_jax.plan --config=configs/dpo_gpt_oss_20b.py --topology=v5p:2x2x4

Recipe: no figures are published for it; these are Zephyr's (arXiv 2310.16944, section 4, and the
alignment-handbook's batch): beta 0.1, learning rate 5e-7, 10 % warm-up, one epoch, here 128 pairs a
batch and 2,048 tokens of which 1,024 prompt.  The model is described in
OpenAI 2025, arXiv 2508.10925; the export is bfloat16.
Topology: v5p:2x2x4.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 128
    config.max_length = 2048

    config.model.path = "openai/gpt-oss-20b"
    # with the fields below: what align_jax.plan compiles without the checkpoint
    config.model.family = "gpt_oss"
    config.model.config = ConfigDict(
        dict(
            vocab_size=201088,
            hidden_size=2880,
            intermediate_size=2880,
            num_hidden_layers=24,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            num_local_experts=32,
            num_experts_per_tok=4,
            sliding_window=128,
            max_position_embeddings=131072,
            rope_theta=150000.0,
            rms_norm_eps=1e-05,
            rope_scaling=dict(
                rope_type="yarn",
                factor=32.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=4096,
            ),
        )
    )
    config.model.load_balancing = 0.001

    config.data.train = "set:ultrafeedback:train"
    config.data.eval = "set:ultrafeedback:test"
    config.data.max_prompt_length = 1024

    config.objective = ConfigDict(losses.options("dpo", beta=0.1))

    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_fraction = 0.1

    config.mesh.fsdp = -1
    config.mesh.expert = 2

    config.checkpoint.every_steps = 100
    config.checkpoint.best_metric = "eval/rewards/accuracies"
    config.eval.every_steps = 100
    config.eval.max_examples = 1024
    return config

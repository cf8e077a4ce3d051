# SPDX-License-Identifier: Apache-2.0
"""DPO of DeepSeek V3, all of its 671 billion parameters: latent attention, 256 experts.

    python -m align_jax.train --config=configs/dpo_deepseek_v3.py --workdir=gs://BUCKET/dpo_deepseek_v3
    python -m align_jax.plan --config=configs/dpo_deepseek_v3.py --topology=v5p:8x8x8

Recipe: no figures are published for it; these are Zephyr's (arXiv 2310.16944, section 4, and the
alignment-handbook's batch): beta 0.1, learning rate 5e-7, 10 % warm-up, one epoch, here 256 pairs a
batch and 2,048 tokens of which 1,024 prompt.  The model is described in
arXiv 2412.19437; its fp8 blocks are read as bfloat16, which is what the export is.
Topology: v5p:8x8x8.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 256
    config.max_length = 2048

    config.model.path = "deepseek-ai/DeepSeek-V3"
    # with the fields below: what align_jax.plan compiles without the checkpoint
    config.model.family = "deepseek_v3"
    config.model.config = ConfigDict(
        dict(
            vocab_size=129280,
            hidden_size=7168,
            intermediate_size=18432,
            moe_intermediate_size=2048,
            num_hidden_layers=61,
            num_attention_heads=128,
            num_key_value_heads=128,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
            n_routed_experts=256,
            num_experts_per_tok=8,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            first_k_dense_replace=3,
            max_position_embeddings=163840,
            rope_theta=10000.0,
            rms_norm_eps=1e-06,
            rope_scaling=dict(
                type="yarn",
                factor=40.0,
                mscale=1.0,
                mscale_all_dim=1.0,
                original_max_position_embeddings=4096,
            ),
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
    config.mesh.expert = 8
    config.mesh.tensor = 2

    config.checkpoint.every_steps = 100
    config.checkpoint.best_metric = "eval/rewards/accuracies"
    config.eval.every_steps = 100
    config.eval.max_examples = 1024
    return config

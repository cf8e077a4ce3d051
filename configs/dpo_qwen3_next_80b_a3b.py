# SPDX-License-Identifier: Apache-2.0
"""DPO of Qwen 3 Next 80B-A3B: three of four layers keep a state, 512 experts, of which a token
passes 10.

    python -m align_jax.train --config=configs/dpo_qwen3_next_80b_a3b.py --workdir=gs://BUCKET/dpo_qwen3_next_80b_a3b
    python -m align_jax.plan --config=configs/dpo_qwen3_next_80b_a3b.py --topology=v5p:4x4x4

Recipe: no figures are published for it; these are Zephyr's (arXiv 2310.16944, section 4, and the
alignment-handbook's batch): beta 0.1, learning rate 5e-7, 10 % warm-up, one epoch, here 128 pairs a
batch and 2,048 tokens of which 1,024 prompt.  Its layers are described in arXiv 2412.06464.
Topology: v5p:4x4x4.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 128
    config.max_length = 2048

    config.model.path = "Qwen/Qwen3-Next-80B-A3B-Instruct"
    # with the fields below: what align_jax.plan compiles without the checkpoint
    config.model.family = "qwen3_next"
    config.model.config = ConfigDict(
        dict(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=5120,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
            num_hidden_layers=48,
            full_attention_interval=4,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_conv_kernel_dim=4,
            num_experts=512,
            num_experts_per_tok=10,
            norm_topk_prob=True,
            partial_rotary_factor=0.25,
            max_position_embeddings=262144,
            rope_theta=10000000.0,
            rms_norm_eps=1e-06,
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
    config.mesh.expert = 8

    config.checkpoint.every_steps = 100
    config.checkpoint.best_metric = "eval/rewards/accuracies"
    config.eval.every_steps = 100
    config.eval.max_examples = 1024
    return config

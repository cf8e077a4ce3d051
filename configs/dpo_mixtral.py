# SPDX-License-Identifier: Apache-2.0
"""DPO of Mixtral 8x7B, a mixture of eight experts, each expert on chips of its own.

    python -m align_jax.train --config=configs/dpo_mixtral.py --workdir=gs://BUCKET/dpo_mixtral
    python -m align_jax.plan --config=configs/dpo_mixtral.py --topology=v5p:4x4x4

Recipe: Mistral made Mixtral-Instruct by SFT and DPO and gives no figures (Jiang et al. 2024, arXiv
2401.04088, section 4); these are Zephyr's (arXiv 2310.16944, section 4, and the
alignment-handbook's batch): beta 0.1, learning rate 5e-7, batch 128 pairs, 10 % warm-up, one epoch,
1,024 tokens of which 512 prompt.  The load-balancing coefficient is the checkpoint's own
(router_aux_loss_coef 0.02).
Topology: v5p:4x4x4.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 128
    config.max_length = 1024

    config.model.path = "mistralai/Mixtral-8x7B-Instruct-v0.1"
    # with the fields below: what align_jax.plan compiles without the checkpoint
    config.model.family = "mixtral"
    config.model.config = ConfigDict(
        dict(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=32768,
            sliding_window=None,
            rope_theta=1e6,
            rms_norm_eps=1e-5,
        )
    )
    config.model.load_balancing = 0.02

    config.data.train = "set:ultrafeedback:train"
    config.data.eval = "set:ultrafeedback:test"
    config.data.max_prompt_length = 512

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

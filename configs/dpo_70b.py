# SPDX-License-Identifier: Apache-2.0
"""DPO of Llama 3.1 70B, as Tülu 3 did it: log-probabilities normalized by length.

    python -m align_jax.train --config=configs/dpo_70b.py --workdir=gs://BUCKET/dpo_70b
    python -m align_jax.plan --config=configs/dpo_70b.py --topology=v5p:8x8x8

Recipe: Tülu 3 (Lambert et al. 2024, arXiv 2411.15124, section 5; allenai/open-instruct,
docs/tulu3.md, "Llama-3.1- Tulu-3-70B-DPO"): dpo_norm with beta 5, learning rate 2e-7, batch 64 * 2
= 128 pairs, linear, 10 % warm-up, one epoch, 2,048 tokens.
Difference: the reference runs in the graph; there its log-probabilities are computed beforehand,
which --config.reference.mode=cached does here.
Topology: v5p:8x8x8.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 128
    config.max_length = 2048

    config.model.path = "allenai/Llama-3.1-Tulu-3-70B-SFT"
    # with the fields below: what align_jax.plan compiles without the checkpoint
    config.model.family = "llama"
    config.model.config = ConfigDict(
        dict(
            vocab_size=128264,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rope_theta=500000.0,
            rms_norm_eps=1e-5,
            rope_scaling=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        )
    )

    config.data.train = "hf:allenai/llama-3.1-tulu-3-70b-preference-mixture:train"
    config.data.eval_fraction = 0.005

    config.objective = ConfigDict(losses.options("dpo_norm", beta=5.0))

    config.optimizer.learning_rate = 2e-7
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_fraction = 0.1

    config.mesh.fsdp = -1
    config.mesh.tensor = 8

    config.checkpoint.every_steps = 200
    config.checkpoint.best_metric = "eval/rewards/accuracies"
    config.eval.every_steps = 200
    config.eval.max_examples = 1024
    return config

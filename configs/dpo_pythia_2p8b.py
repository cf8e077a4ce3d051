# SPDX-License-Identifier: Apache-2.0
"""The DPO authors' own example: Pythia 2.8B on Anthropic's HH pairs, supervised stage first, then
DPO from it.

    python -m align_jax.train --config=configs/dpo_pythia_2p8b.py:sft --workdir=gs://BUCKET/hh_sft
    python -m align_jax.export --workdir=gs://BUCKET/hh_sft --output=exports/pythia_2p8b_hh_sft
    python -m align_jax.train --config=configs/dpo_pythia_2p8b.py --workdir=gs://BUCKET/hh_dpo
    python -m align_jax.plan --config=configs/dpo_pythia_2p8b.py --topology=v5e:4x4

Recipe: eric-mitchell/direct-preference-optimization, README ("a complete example") and
config/config.yaml: beta 0.1, batch 64, RMSprop, learning rate 5e-7, 150 steps of warm-up and then
constant, gradients clipped at 10, one epoch, 512 tokens of which 256 prompt; the same figures for
both stages.
Difference: the reference is held in bfloat16 (there: float16).
Topology: v5e:4x4.  Not yet run (the authors: 2 h 45 min for DPO on four A100).
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults


def get_config(stage: str = "dpo") -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 64
    config.max_length = 512
    config.tokenizer = "EleutherAI/pythia-2.8b"

    config.model.path = {"sft": "EleutherAI/pythia-2.8b", "dpo": "exports/pythia_2p8b_hh_sft"}[
        stage
    ]
    # with the fields below: what align_jax.plan compiles without the checkpoint
    config.model.family = "gpt_neox"
    config.model.config = ConfigDict(
        dict(
            vocab_size=50304,
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=2048,
            rotary_pct=0.25,
            rotary_emb_base=10000,
            use_parallel_residual=True,
            layer_norm_eps=1e-5,
        )
    )

    config.data.train = "set:hh:train"
    config.data.eval = "set:hh:test"
    config.data.max_prompt_length = 256

    config.objective = ConfigDict(
        losses.options("sft") if stage == "sft" else losses.options("dpo", beta=0.1)
    )

    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 150
    config.optimizer.clip_norm = 10.0

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 500
    config.checkpoint.best_metric = "-eval/loss"
    config.eval.every_steps = 300  # the authors: every 20,000 examples
    config.eval.max_examples = 256
    return config

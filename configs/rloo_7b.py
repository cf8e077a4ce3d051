# SPDX-License-Identifier: Apache-2.0
"""RLOO of a 7B model: Pythia 6.9B summarizes Reddit posts, each sample judged against its three
fellows.

    python -m align_jax.train --config=configs/rloo_7b.py --workdir=gs://BUCKET/rloo_7b
    python -m align_jax.plan --config=configs/rloo_7b.py --topology=v5e:8x8

Recipe: RLOO (Ahmadian et al. 2024, arXiv 2402.14740, section 4: Pythia 6.9B on TL;DR, k = 4) with
the figures of TRL's benchmark (docs/source/rloo_trainer.md, "Benchmark experiments"; there Pythia
1B): learning rate 3e-6 with linear decay, KL 0.03 inside the reward, 2 passes of 2 minibatches, 53
new tokens, a penalty of 1 for a summary that does not end, 1,000,000 episodes.  512 samples a step
= 128 posts; 256 posts a rollout; 976 rollouts = 3,904 steps.
Difference: samples are drawn at temperature 1 (TRL: 0.7, in the loss too).
Topology: v5e:8x8.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import PYTHIA_6_9B


def get_config() -> ConfigDict:
    config = defaults()
    config.total_steps = 3904
    config.batch_size = 128
    config.microbatches = 2
    config.max_length = 640

    config.model.path = "trl-lib/pythia-6.9b-deduped-tldr-sft"
    # what align_jax.plan compiles without the checkpoint
    config.model.family, config.model.config = "gpt_neox", ConfigDict(PYTHIA_6_9B)

    config.data.train = "hf:trl-lib/tldr:train"
    config.data.eval = "hf:trl-lib/tldr:validation"

    config.objective = ConfigDict(
        losses.options("rloo", kl_coef=0.03, epochs=2, minibatches=2, missing_eos_penalty=1.0)
    )
    config.rollout.responses_per_prompt = 4
    config.rollout.max_new_tokens = 53
    config.rollout.tensor = 4
    config.rollout.rows = 512
    config.rewards = ConfigDict(
        {
            "model": {
                "path": "trl-lib/pythia-6.9b-deduped-tldr-rm",
                "rows": 64,
                "max_length": 640,
                "compute_dtype": "bfloat16",
            }
        }
    )

    config.optimizer.learning_rate = 3e-6
    config.optimizer.schedule = "linear"

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 200
    return config

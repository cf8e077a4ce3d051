# SPDX-License-Identifier: Apache-2.0
"""PPO of a 7B model: Pythia 6.9B summarizes Reddit posts for a reward model trained on people's
comparisons.

    python -m align_jax.train --config=configs/ppo_7b.py --workdir=gs://BUCKET/ppo_7b
    python -m align_jax.plan --config=configs/ppo_7b.py --topology=v5e:8x8

Recipe: "The N+ implementation details of RLHF with PPO" (Huang et al. 2024, arXiv 2403.17031), with
the figures of vwxyzjn/summarize_from_feedback_details (sbatches/ppo_left_padding6b.sbatch,
new/ppo_left_padding.py): learning rate 3e-6 with cosine decay, Adam epsilon 1e-5, batch 64 * 8 =
512 posts, 4 passes, KL 0.05, clips 0.2, value loss 0.1, gamma 1, lambda 0.95, rewards whitened, 53
new tokens, 1,000,000 episodes = 1,953 rollouts = 7,812 steps.
Differences: the values come from a head on the policy (there: a model of its own, started from the
reward model); samples are drawn at temperature 1, the policy that is trained (there: 0.7, in the
loss too); a summary that does not end loses 1 (there: gets -1).
Topology: v5e:8x8.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import PYTHIA_6_9B


def get_config() -> ConfigDict:
    config = defaults()
    config.total_steps = 7812
    config.batch_size = 512
    config.microbatches = 2
    config.max_length = 640

    config.model.path = "trl-lib/pythia-6.9b-deduped-tldr-sft"
    # what align_jax.plan compiles without the checkpoint
    config.model.family, config.model.config = "gpt_neox", ConfigDict(PYTHIA_6_9B)

    config.data.train = "hf:trl-lib/tldr:train"
    config.data.eval = "hf:trl-lib/tldr:validation"

    config.objective = ConfigDict(
        losses.options(
            "ppo",
            clip=0.2,
            value_clip=0.2,
            vf_coef=0.1,
            gamma=1.0,
            lam=0.95,
            kl_coef=0.05,
            epochs=4,
            minibatches=1,
            whiten_rewards=True,
            missing_eos_penalty=1.0,
        )
    )
    config.rollout.responses_per_prompt = 1
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
    config.optimizer.schedule = "cosine"
    config.optimizer.eps = 1e-5

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 400
    return config

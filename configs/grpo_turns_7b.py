# SPDX-License-Identifier: Apache-2.0
"""GRPO of a 7B model over several turns: a wrong solution is told so, and may be mended once.

    python -m align_jax.train --config=configs/grpo_turns_7b.py --workdir=gs://BUCKET/grpo_turns_7b
    python -m align_jax.plan --config=configs/grpo_turns_7b.py --topology=v5e:8x8

Recipe: grpo_7b.py (volcengine/verl, examples/grpo_trainer/run_qwen2_5-7b_math.sh), with two
attempts at each question as in SCoRe (Kumar et al. 2024, arXiv 2409.12917, section 3), between
which the environment ``align_jax.online.tools:SecondTry`` answers.
Differences: the second attempt is asked for only where the first is wrong (SCoRe: always, without
saying so); GRPO in place of SCoRe's two stages of REINFORCE with a KL.  The reward reads the last
number of the whole response, so a solution that needed the second attempt is worth as much.
For a tool in place of the second attempt, with a column of ``tools`` that the chat template shows:

    --config.rollout.environment=align_jax.online.tools:calculator --config.rollout.max_turns=4

Topology: v5e:8x8.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import QWEN_2_5_7B


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 15.0
    config.batch_size = 256
    config.microbatches = 4
    config.max_length = 1536

    config.model.path = "Qwen/Qwen2.5-7B-Instruct"
    # what align_jax.plan compiles without the checkpoint
    config.model.family, config.model.config = "qwen2", ConfigDict(QWEN_2_5_7B)

    config.data.train = "set:gsm8k:train"
    config.data.eval = "set:gsm8k:test"

    config.objective = ConfigDict(
        losses.options("grpo", loss_type="dapo", beta=0.001, epochs=1, minibatches=4)
    )
    config.rollout.environment = "align_jax.online.tools:SecondTry"
    config.rollout.max_turns = 2
    config.rollout.max_turn_tokens = 480
    config.rollout.max_new_tokens = 1024
    config.rollout.responses_per_prompt = 5
    config.rollout.tensor = 4
    config.rollout.rows = 2560
    config.rewards = ConfigDict({"numeric": 1.0})

    config.optimizer.learning_rate = 1e-6
    config.optimizer.schedule = "constant"

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 20
    return config

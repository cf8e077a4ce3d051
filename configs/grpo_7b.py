# SPDX-License-Identifier: Apache-2.0
"""GRPO of a 7B model on school mathematics: a solution is worth 1 if its number is GSM8K's, else 0.

    python -m align_jax.train --config=configs/grpo_7b.py --workdir=gs://BUCKET/grpo_7b
    python -m align_jax.plan --config=configs/grpo_7b.py --topology=v5e:8x8

Recipe: GRPO (Shao et al. 2024, arXiv 2402.03300) with the figures of volcengine/verl,
examples/grpo_trainer/ run_qwen2_5-7b_math.sh: Qwen2.5 7B Instruct, 1,024 questions a rollout with 5
solutions each, steps of 256 questions, learning rate 1e-6, KL 0.001 in the loss (k3), no entropy
term, 1,024 tokens of solution, 15 epochs; the loss is a mean over the step's tokens, clipped at 0.2
on both sides.
Differences: GSM8K alone (there: MATH too); the question is asked as it is, and the reward reads the
number from "\boxed{...}", "#### ...", "the answer is ..." or, failing these, the last number
(there: the prompt asks for "####").
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
        losses.options(
            "grpo",
            loss_type="dapo",
            epsilon_low=0.2,
            epsilon_high=0.2,
            beta=0.001,
            epochs=1,
            minibatches=4,
        )
    )
    config.rollout.responses_per_prompt = 5
    config.rollout.max_new_tokens = 1024
    config.rollout.tensor = 4
    config.rollout.rows = 2560
    config.rewards = ConfigDict({"numeric": 1.0})

    config.optimizer.learning_rate = 1e-6
    config.optimizer.schedule = "constant"

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 20
    return config

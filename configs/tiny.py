# SPDX-License-Identifier: Apache-2.0
"""Any objective on a CPU in under a minute: a tiny byte-level Llama on data made by code.

    python -m align_jax.train --config=configs/tiny.py:dpo --workdir=runs/tiny

The argument after the colon is any name of ``python -m align_jax.objectives``, or a sum such as
``dpo+sft``.  An objective of pairs or unpaired answers after ``online_`` (``online_dpo``) learns
from the policy's own samples, as the policy gradients do.  The rule behind the made data is known
(see data.synthetic), so the held-out metrics have a true answer; samples are worth their share of
lower-case letters.  To start from a real model, or from your own data, a part of which is then held
out:

    --config.model.path=DIRECTORY_OR_HUB_ID --config.data.train=pairs.jsonl

Hardware: two CPU cores.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.losses.objective import data_kind

LLAMA = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
MADE = {
    "completions": "completions",
    "pairs": "preferences",
    "ranked": "ranked",
    "unpaired": "unpaired",
    "scored": "ranked",
    "stepwise": "verified_steps",
    "rollout": "arithmetic",
}  # the objective's kind of data -> the data set made by code
LEARNING_RATE = {"ppo_offline": 3e-4}  # where 1e-3 is not a good one: all log-probabilities fall


def get_config(objective: str = "dpo") -> ConfigDict:
    name = objective.removeprefix("online_")
    kind = data_kind(losses.resolve(name))
    online = kind == "rollout" or name != objective
    config = defaults()
    config.total_steps = 30
    config.batch_size = 32
    config.max_length = 128

    config.model.family = "llama"
    config.model.config = ConfigDict(LLAMA)
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.reference.dtype = "float32"

    config.data.train = f"builtin:{MADE['rollout' if online else kind]}:train"

    config.objective = ConfigDict(losses.options(name))
    if online:
        config.rewards = ConfigDict(
            {"regex": {"pattern": "[a-z]", "count": True, "reward": 1 / 16}}
        )
        config.rollout.responses_per_prompt = 4
        config.rollout.max_new_tokens = 16
        config.max_length = 64
    if name == "rpo":  # learns by how much the chosen answer is better
        config.data.columns = ConfigDict({"margin": "gap"})
    if "ptx" in name.split("+"):
        config.data.text = f"builtin:{MADE['completions']}:train"
    config.eval.max_examples = 64 if online else 128

    config.optimizer.learning_rate = LEARNING_RATE.get(objective, 1e-3)
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1

    config.checkpoint.every_steps = 100
    config.eval.every_steps = 15
    config.log.every_steps = 10
    return config

# SPDX-License-Identifier: Apache-2.0
"""Any objective on your model and your data: an adapter, which is small, quick and forgiving.

    align-jax train dpo --model=DIRECTORY_OR_HUB_ID --data=pairs.jsonl

is the short form of

    align-jax train --config=start:dpo --config.model.path=DIRECTORY_OR_HUB_ID \
        --config.data.train=pairs.jsonl --workdir=runs/dpo

The argument is any name of ``align-jax objectives``, a sum such as ``dpo+sft``, or an objective of
pairs or unpaired answers after ``online_``; online ones need ``--config.rewards``.  One epoch; a
part of the prompts is held out.  All weights instead of an adapter: ``--config.model.lora.rank=0``
and a tenth of the learning rate.

Hardware: one accelerator, or two CPU cores for a model of 135M parameters.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.losses.objective import data_kind

# Of an adapter, by the objective's kind of data: ten times what whole weights take.
LEARNING_RATE = {"completions": 1e-4, "rollout": 1e-5}
OTHERS = 5e-5


def get_config(objective: str = "dpo") -> ConfigDict:
    name = objective.removeprefix("online_")
    kind = "rollout" if name != objective else data_kind(losses.resolve(name))
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 16

    config.model.lora.rank = 16
    config.model.lora.alpha = 16.0

    config.objective = ConfigDict(losses.options(name))

    config.optimizer.learning_rate = LEARNING_RATE.get(kind, OTHERS)
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1

    config.checkpoint.every_steps = 200
    config.eval.every_steps = 50
    config.eval.max_examples = 256
    return config

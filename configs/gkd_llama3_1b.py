# SPDX-License-Identifier: Apache-2.0
"""Distillation of Llama 3.1 8B Instruct into Llama 3.2 1B, on UltraChat: whole distributions.

    python -m align_jax.train --config=configs/gkd_llama3_1b.py --workdir=gs://BUCKET/gkd_llama3_1b
    python -m align_jax.plan --config=configs/gkd_llama3_1b.py --topology=v5e:4x4

Recipe: Agarwal et al. 2023, arXiv 2306.13649 (generalized Jensen-Shannon divergence, beta 0.5), on
a data set's answers.  Half of the prompts on the student's own samples (the paper's lambda):
--config.objective.on_policy=0.5 --config.rollout.responses_per_prompt=1, of at most
--config.rollout.max_new_tokens; what is held out is then sampled, and has no divergence to be best
by: --config.checkpoint.best_metric="".
Differences: the paper's models are T5; the learning rate is that of supervised fine-tuning of a
model of this size.
Topology: v5e:4x4.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import LLAMA_3_1B, LLAMA_3_8B


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 64
    config.max_length = 2048

    config.model.path = "meta-llama/Llama-3.2-1B"
    # what align_jax.plan compiles without the checkpoints
    config.model.family, config.model.config = "llama", ConfigDict(LLAMA_3_1B)

    # the teacher, of the same tokenizer
    config.reference.path = "meta-llama/Llama-3.1-8B-Instruct"
    config.reference.family, config.reference.config = "llama", ConfigDict(LLAMA_3_8B)
    config.tokenizer = "meta-llama/Llama-3.1-8B-Instruct"

    config.data.train = "set:ultrachat:train"
    config.data.eval = "set:ultrachat:test"

    config.objective = ConfigDict(losses.options("gkd", beta=0.5))

    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 500
    config.checkpoint.best_metric = "-eval/divergence"
    config.eval.every_steps = 500
    config.eval.max_examples = 1024
    return config

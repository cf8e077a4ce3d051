# SPDX-License-Identifier: Apache-2.0
"""KTO of Llama 3 8B: the example of HALOs' README, from an SFT checkpoint, on UltraFeedback.

    python -m align_jax.train --config=configs/kto_llama3_8b.py --workdir=gs://BUCKET/kto_llama3_8b
    python -m align_jax.plan --config=configs/kto_llama3_8b.py --topology=v5e:4x8

Recipe: ContextualAI/HALOs, README ("loss=kto model=llama datasets=[ultrabin]" on
meta-llama/Meta-Llama-3-8B, with ++lr=5e-6 and ++loss.beta=0.1) and its defaults: batch 32 answers,
150 steps of warm-up and then constant, gradients clipped at 5, one epoch, 1,024 tokens of which 512
prompt.
Differences: HALOs makes the SFT checkpoint itself; this starts from a public one (Llama 3 8B on
UltraChat, of the SimPO authors).  Parameters and moments are float32.
Topology: v5e:4x8.  Not yet run.
"""

from align_jax import losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.models.shapes import LLAMA_3_8B


def get_config() -> ConfigDict:
    config = defaults()
    config.total_epochs = 1.0
    config.batch_size = 32
    config.max_length = 1024

    config.model.path = "princeton-nlp/Llama-3-Base-8B-SFT"
    # what align_jax.plan compiles without the checkpoint
    config.model.family, config.model.config = "llama", ConfigDict(LLAMA_3_8B)

    config.data.train = "set:ultrafeedback:train"
    config.data.eval = "set:ultrafeedback:test"
    config.data.max_prompt_length = 512

    config.objective = ConfigDict(losses.options("kto", beta=0.1))

    config.optimizer.learning_rate = 5e-6
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 150
    config.optimizer.clip_norm = 5.0

    config.mesh.fsdp = -1

    config.checkpoint.every_steps = 500
    config.checkpoint.best_metric = "eval/rewards/margins"
    config.eval.every_steps = 500
    config.eval.max_examples = 1024
    return config

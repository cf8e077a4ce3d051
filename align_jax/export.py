# SPDX-License-Identifier: Apache-2.0
"""Write a trained policy as a Hugging Face checkpoint: safetensors, config and tokenizer.

    python -m align_jax.export --workdir=DIR --output=HF_DIR [--step=latest|best|N] [--dtype=bfloat16] [--adapter]
    python -m align_jax.export --model=HF_DIR --output=HF_DIR          the round trip through our weights
"""
from __future__ import annotations

from collections.abc import Sequence
import json
from typing import Any, NamedTuple

from absl import app, flags, logging
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax import train
from align_jax.core import config as configs
from align_jax.data.tokenizer import load_tokenizer
from align_jax.models import hf, peft
from align_jax.models.lora import fold, merge
from align_jax.parallel import distributed
from align_jax.parallel.mesh import AXES, make_mesh
from align_jax.training import assembly
from align_jax.training.checkpoint import Checkpoints
from align_jax.training.placement import ADAPTER, flatten, unflatten


class Trained(NamedTuple):
    """A run's policy, read back."""

    config: ConfigDict
    setting: train.Setting
    mesh: Mesh
    params: Any  # the whole policy: base, adapters and heads
    step: int


def restore(workdir: str, which: str = "latest") -> Trained:
    """Read back the policy that a run has trained, onto whatever devices there are.

    Args:
        workdir: the run's folder.
        which: "latest", "best" or a step.

    Raises:
        FileNotFoundError: no run, or no such checkpoint, in the folder.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} is not a run's folder: it has no config.json")
    config = configs.from_dict(json.loads(path.read_text())["config"])
    config.mesh.update({axis: 1 for axis in AXES} | {"fsdp": -1})
    setting = train.settle(config, jax.device_count())
    mesh = make_mesh(config.mesh.to_dict())
    recipe = train.make_recipe(config, setting, total_steps=1)
    plan = train.make_plan(config, recipe, mesh)
    c = config.checkpoint
    with jax.set_mesh(mesh), Checkpoints(workdir, keep=c.keep, best_metric=c.best_metric.lstrip("-"),
                                         best_mode="min" if c.best_metric.startswith("-") else "max") as checkpoints:
        restored = checkpoints.restore(plan.state, which)
        if restored is None:
            raise FileNotFoundError(f"{workdir} has no checkpoint")
        frozen = assembly.load_frozen(recipe, plan, path=config.model.path, seed=config.seed,
                                      reference_path=config.reference.path)
        return Trained(config, setting, mesh, merge(frozen["base"], restored.state["params"]), restored.step)


def export_run(workdir: str, output: str, *, step: str = "latest", dtype: str | None = None,
               adapter: bool = False) -> int:
    """Export a run's policy; adapters are merged unless asked for.

    Args:
        workdir: the run's folder.
        output: folder to make.
        step: "latest", "best" or a step.
        dtype: type of the stored tensors; None: the starting checkpoint's.
        adapter: write the adapter alone, in PEFT's form.

    Returns:
        The exported checkpoint's step.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: ``adapter`` of a run without one.
    """
    trained = restore(workdir, step)
    policy, config = trained.setting.models.policy, trained.setting.model_config
    lora = policy.options.lora
    if adapter:
        if lora is None:
            raise ValueError(f"{workdir} is a full fine-tune (model.lora.rank = 0): it has no adapter to export")
        leaves = {name: leaf for name, leaf in flatten(trained.params).items() if ADAPTER.search(name)}
        peft.save(output, config, lora, unflatten(leaves), base_name=trained.config.model.path)
    else:
        params = fold(trained.params, lora) if lora is not None else trained.params
        hf.save(output, config, params, dtype=dtype, heads=policy.options.heads, unembed=policy.options.unembed)
    trained.setting.tokenizer.save_pretrained(output)
    return trained.step


def export_model(model: str, output: str, *, dtype: str | None = None) -> None:
    """Read a Hugging Face checkpoint and write it again: byte for byte the same tensors."""
    config, params = hf.load(model)
    hf.save(output, config, params, dtype=dtype)
    load_tokenizer(model).save_pretrained(output)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    values = flags.FLAGS
    if bool(values.workdir) == bool(values.model):
        raise app.UsageError("give one of --workdir and --model")
    logging.set_verbosity(logging.WARNING)
    distributed.start()
    if values.model:
        export_model(values.model, values.output, dtype=values.dtype)
        print(f"{values.model} written to {values.output}")
        return
    step = export_run(values.workdir, values.output, step=values.step, dtype=values.dtype, adapter=values.adapter)
    if distributed.is_main():
        print(f"{values.workdir}, step {step}, written to {values.output}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run to export.")
    flags.DEFINE_string("model", None, "Hugging Face checkpoint to pass through instead of a run.")
    flags.DEFINE_string("output", None, "Folder to write.", required=True)
    flags.DEFINE_string("step", "latest", "Checkpoint of the run: latest, best or a step.")
    flags.DEFINE_string("dtype", None, "Type of the stored tensors; default: as the starting checkpoint's.")
    flags.DEFINE_bool("adapter", False, "Write the low-rank adapter in PEFT's form instead of merging it.")
    app.run(main)

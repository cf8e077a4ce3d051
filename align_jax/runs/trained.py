# SPDX-License-Identifier: Apache-2.0
"""What a run has trained: its checkpoints opened, its policy read back."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from align_jax.core import config as configs
from align_jax.core.options import Config, MeshOptions
from align_jax.models.lora import merge
from align_jax.parallel.mesh import make_mesh
from align_jax.runs import early, memory, weights
from align_jax.runs.setup import ResolvedConfig, make_step_spec, resolve_config
from align_jax.storage import workdir as record
from align_jax.storage.checkpoint import FOLDER, Checkpoints
from align_jax.training.initialize import make_state_specs


def open_checkpoints(config: Config, workdir: str, *, reading: bool = False) -> Checkpoints:
    """Open a run's checkpoints as its config says; to read alone, without a trace."""
    digest = record.digest(configs.to_dict(config), configs.may_change())
    return Checkpoints(workdir, config.checkpoint, digest=digest, reading=reading)


class Trained(NamedTuple):
    """A run's policy, read back."""

    config: Config
    resolved: ResolvedConfig
    mesh: Mesh
    params: Any  # the whole policy: base, adapters and heads
    step: int
    reference: Any | None = None  # the same of a reference that moved with it


def restore(workdir: str, which: str = "latest", *, speaks: bool = False) -> Trained:
    """Read back the policy that a run has trained, onto whatever devices there are.

    Args:
        workdir: the run's folder.
        which: "latest", "best" or a step.
        speaks: it is wanted for what it says: no reward model will do.

    Raises:
        FileNotFoundError: no run, or no such checkpoint, in the folder.
        ValueError: neither "latest" nor "best" nor a step; a config that this version refuses; more
            than these devices can hold; a reward model where one that speaks is wanted.
    """
    if which not in ("latest", "best") and not which.isdigit():
        raise ValueError(f"--step={which}: expected latest, best or a step, such as 100")
    path = early.find_record(workdir)
    found = record.read_record(path)["config"]
    try:
        config = configs.read(configs.from_dict(found))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # whatever devices there are; the local tier is the trainer's hosts' own
    config = dataclasses.replace(
        config, mesh=MeshOptions(), checkpoint=dataclasses.replace(config.checkpoint, local="")
    )
    # the checkpoints of the reference and of the value head's start, which may be gone by now, say
    # nothing of the policy
    alone = dataclasses.replace(
        config,
        reference=dataclasses.replace(config.reference, path=""),
        model=dataclasses.replace(config.model, value_path=""),
    )
    resolved = resolve_config(alone, jax.device_count())
    if speaks and not resolved.models.policy.options.unembed:
        raise ValueError(
            f"{workdir} has trained a reward model (config.objective.name = "
            f"{config.objective.name!r}), which says nothing: export it, and name the export among "
            "rewards"
        )
    mesh = make_mesh(dataclasses.asdict(config.mesh))
    step_spec = make_step_spec(alone, resolved, total_steps=1 + config.optimizer.warmup_steps)
    specs = make_state_specs(step_spec, mesh, config.model, alone.reference, with_reference=False)
    memory.check_weights((specs.state, specs.frozen), mesh, workdir)
    restored = None
    if (epath.Path(workdir) / FOLDER).exists():
        with jax.set_mesh(mesh), open_checkpoints(config, workdir, reading=True) as checkpoints:
            restored = checkpoints.restore(specs.state, which)
    if restored is None:
        raise FileNotFoundError(
            f"{workdir} has no checkpoint: a run saves one at its end, when it is stopped, and "
            f"every config.checkpoint.every_steps = {config.checkpoint.every_steps} steps"
        )
    with jax.set_mesh(mesh):
        frozen = weights.load_frozen(step_spec, specs, config)
        base, state = frozen["base"], restored.state
        moving = merge(base, state["reference"]) if "reference" in state else None
        params = merge(base, state["params"])
        return Trained(config, resolved, mesh, params, restored.step, moving)

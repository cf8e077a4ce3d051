# SPDX-License-Identifier: Apache-2.0
"""What a workdir says of its run: ``config.json``, and whether a configuration may go on in it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any

import jax
from etils import epath

from align_jax.core import typed
from align_jax.core.files import read_json, write_text

PACKAGES = (
    "align_jax",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "numpy",
)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: ``{"model": {"path": "x"}}`` -> ``{"model.path": "x"}``; values as
    JSON gives them back.

    >>> flat({"model": {"path": "x"}, "betas": (1, 2)})
    {'model.path': 'x', 'betas': [1, 2]}
    """
    items: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            items |= flat(value, f"{prefix}{key}.")
        else:
            items[prefix + key] = json.loads(json.dumps(value, default=str))
    return items


def differing(
    config: Mapping[str, Any], recorded: Mapping[str, Any], may_change: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """List the keys whose values differ and may not: key -> (recorded value, this run's value).

    A key that only one of the two has counts as None on the other side: a version may have brought
    new keys.
    """
    old, new = flat(recorded), flat(config)
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in may_change
    }


def digest(config: Mapping[str, Any], may_change: Collection[str]) -> str:
    """Name a configuration by all that a resumed run may not change in it.

    >>> runs = [{"seed": 0, "log": {"every_steps": n}} for n in (1, 5)]
    >>> digest(runs[0], {"log.every_steps"}) == digest(runs[1], {"log.every_steps"})
    True
    """
    fixed = {key: value for key, (_, value) in differing(config, {}, may_change).items()}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def check(workdir: epath.PathLike, config: Mapping[str, Any], may_change: Collection[str]) -> None:
    """Refuse a workdir that holds another configuration's checkpoints; before anything is compiled.

    Args:
        workdir: local path or ``gs://...``; it need not exist.
        config: the resolved configuration as nested mappings.
        may_change: dotted keys in which a resumed run may differ.

    Raises:
        ValueError: there are checkpoints, and ``config.json`` beside them differs, every differing
            key is named; or it is gone.
    """
    folder = epath.Path(workdir)
    record, checkpoints = folder / "config.json", folder / "checkpoints"
    if not checkpoints.exists() or not any(child.name.isdigit() for child in checkpoints.iterdir()):
        return
    begin = f"--config.checkpoint.restore={shlex.quote(str(checkpoints))}"
    if not record.exists():
        raise ValueError(
            f"workdir {workdir} holds checkpoints, and no config.json that says of which run: put "
            f"it back, or use another --workdir (to begin from these weights: {begin})"
        )
    changes = differing(config, read_record(record)["config"], may_change)
    if changes:
        here = flat(config)
        lines = "\n".join(
            f"  {key}: {was!r} there, {repr(now) if key in here else 'no such key'} here"
            for key, (was, now) in changes.items()
        )
        was = [
            f"--config.{key}={old}"
            for key, (old, _) in changes.items()
            if old is not None and key in here
        ]
        raise ValueError(
            f"workdir {workdir} holds the checkpoints of another configuration:\n{lines}\n"
            f"Go on with {shlex.join(was) or 'its values'}, or use another --workdir (to begin "
            f"from these weights: {begin})"
        )


def read_record(path: epath.PathLike) -> dict[str, Any]:
    """Read a run's ``config.json``, as ``write_record`` wrote it.

    Raises:
        ValueError: it is damaged, or another program's (a model's, say).
    """
    record = read_json(path)
    if not isinstance(record.get("config"), dict):
        model = "model_type" in record
        raise ValueError(
            f"{path}: expected a run's record, with 'config' and 'versions'"
            + ("; this is a model's config.json" if model else f"; got {sorted(record)[:10]}")
        )
    return record


def write_record(
    workdir: epath.PathLike, config: Mapping[str, Any], steps: int = 0
) -> dict[str, Any]:
    """Write ``config.json``: the resolved configuration, versions, devices, git commit and command.

    Only the first process of a pod should.

    Args:
        workdir: local path or ``gs://...``.
        config: the resolved configuration as nested mappings.
        steps: that the run is to make, which a config may count in epochs; 0 = unknown.

    Returns:
        What was written.
    """
    devices = jax.devices()
    record = {
        "config": json.loads(json.dumps(config, default=str)),
        "steps": steps,
        "versions": {"python": sys.version.split()[0], **versions()},
        "devices": {
            "count": len(devices),
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "processes": jax.process_count(),
        },
        "git_commit": git_commit(),
        "command": [*typed.program().split(), *sys.argv[1:]],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "config.json.partial"  # a kill here leaves the old file
    write_text(partial, json.dumps(record, indent=1) + "\n")
    partial.replace(folder / "config.json")
    return record


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that a result may depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """Return the commit of this source tree, with "+" where it was changed since.

    Outside a repository it is $ALIGN_JAX_COMMIT, which launch/tpu.sh sets on the hosts it copies
    the tree to; else "".
    """
    unknown = os.environ.get("ALIGN_JAX_COMMIT", "")
    found = []
    # a status without locks: one that is killed would leave its lock, and no commit could be made
    for asked in (["rev-parse", "HEAD"], ["--no-optional-locks", "status", "--porcelain", "-uno"]):
        try:
            result = subprocess.run(
                ["git", *asked],
                cwd=pathlib.Path(__file__).parent,
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return unknown
        if result.returncode != 0:
            return unknown
        found.append(result.stdout.strip())
    return found[0] + ("+" if found[1] else "")

# SPDX-License-Identifier: Apache-2.0
"""What is wrong in a command is told before all that a run needs is imported, which takes seconds.

    keys on the command line
      │ check             without JAX: values, names of keys, files and folders that are not there
    the recipe, which may import JAX
      │ check             the same
      │ check_objective   with JAX
      │ check_model       with Flax and transformers
      │ check_mesh        with the devices
    the program           with Grain, Orbax and the rest

What is refused here the run would refuse, too; the functions that know are the run's own.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from etils import epath

from align_jax.core.choose import nearest
from align_jax.core.options import Checked, Config
from align_jax.data import sources
from align_jax.interop import hub

if TYPE_CHECKING:
    from align_jax.models.config import ModelConfig

ALSO = {"align_jax.data.formats:FORMATS": "align_jax.data.named:DATASETS"}  # names that will do


@functools.cache
def names_in(table: str) -> tuple[str, ...]:
    """Return the names in a table, read from its file: importing it may import JAX.

    Args:
        table: ``module:NAME``, a dict whose keys are texts; "" has none.
    """
    if not table:
        return ()
    module, _, name = table.partition(":")
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    for node in ast.parse(pathlib.Path(found.origin).read_text("utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            assert isinstance(node.value, ast.Dict)
            return tuple(sorted(ast.literal_eval(key) for key in node.value.keys if key))
    raise AssertionError(f"no table {table}")


def check(options: Config, *, reads: bool) -> None:
    """Refuse names that no table has, and files and folders that are not there.

    Args:
        options: of a run; the defaults with what the command line says, before there is a recipe.
        reads: the program reads the model and the data that are named.

    Raises:
        ValueError, FileNotFoundError: as the run.
    """
    for key, name, table in _named(options):
        if key == "objective.name" and "+" in name:  # a sum of names
            continue
        known = {*names_in(table), *names_in(ALSO.get(table, ""))}
        if name not in known:
            raise ValueError(f"config.{key} = {name!r:.60} is unknown{nearest(name, known)}")
    if not reads:
        return
    data, model = options.data, options.model
    if model.path:
        hub.is_here(model.path)
    if (path := options.tokenizer).startswith((".", "/", "~")) and not os.path.exists(path):
        raise ValueError(
            f"tokenizer {path!r}: expected 'byte', a directory, a tokenizer.json or a hub id"
            f"{hub.near_folder(path)}"
        )
    if data.format not in names_in(ALSO["align_jax.data.formats:FORMATS"]):  # which take a split
        for spec in [*data.train.split(","), *data.eval.split(","), *data.text.split(",")]:
            check_source(spec)


def check_objective(options: Config) -> None:
    """Refuse what an objective says of its options; this imports JAX, though nothing more.

    Raises:
        ValueError: as the run.
    """
    from align_jax import losses

    chosen = options.objective
    losses.resolve(chosen.name, chosen.options, chosen.weights or None)


def check_model(options: Config) -> None:
    """Refuse a model's folder that holds none, and texts that are longer than its positions; of a
    model on the hub the run finds out.

    Raises:
        ValueError, FileNotFoundError: as the run.
    """
    from align_jax.interop import hf

    path = options.model.path
    if path and hub.is_here(path):
        found = hf.load_config(path, family=options.model.family)
        check_positions(options, dataclasses.replace(found, run_length=options.max_length))


def check_positions(options: Config, model: ModelConfig) -> None:
    """Refuse texts that are longer than a model's positions.

    Raises:
        ValueError: the key, and the most.
    """
    if options.max_length > model.max_positions:
        raise ValueError(
            f"config.max_length = {options.max_length} exceeds the {model.max_positions} "
            "positions of the model (max_position_embeddings): "
            f"--config.max_length={model.max_positions} is the most"
        )


def check_mesh(options: Config) -> None:
    """Refuse a mesh that these devices do not make up; this starts them.

    Raises:
        ValueError: as the run.
    """
    import jax

    from align_jax.parallel import distributed, mesh

    distributed.start()
    mesh.mesh_shape(dataclasses.asdict(options.mesh), len(jax.devices()))


def _named(options: Checked, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Return each key that is not at its default and names a table's row: key, name, table."""
    unset = type(options)()
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Checked):
            yield from _named(value, f"{prefix}{field.name}.")
        elif isinstance(value, str) and value != getattr(unset, field.name) and ":" not in value:
            if table := field.metadata["table"]:
                yield prefix + field.name, value, table


def check_source(spec: str) -> None:
    """Refuse a data source that is a file here, and is not there; others are left to the run.

    Raises:
        FileNotFoundError, ValueError: as ``sources.find_source``.
    """
    scheme = spec.partition(":")[0]
    if spec and "://" not in spec and scheme not in (*sources.SCHEMES, "set"):
        sources.find_source(spec)


def find_record(workdir: str) -> epath.Path:
    """Return the file in which a run's config stands.

    Raises:
        FileNotFoundError: the folder is no run's.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} is not a run's folder: it has no config.json")
    return path

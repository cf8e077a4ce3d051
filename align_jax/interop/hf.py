# SPDX-License-Identifier: Apache-2.0
"""Weights both ways between Hugging Face checkpoints and our parameters.

    folder or hub id -> config.json -> ModelConfig -> the family's tensor map -> parameters,
    streamed into shardings

A parameter of the layers is filled one layer at a time, and of each tensor a process reads only
what its devices hold.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
from collections.abc import Container, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from align_jax.core.tree import flatten, unflatten
from align_jax.interop import tensor_files as files
from align_jax.models import FAMILIES, Family
from align_jax.models.config import ModelConfig
from align_jax.models.model import build
from align_jax.models.tensor_map import AxisMap, TensorMap, linear, names, parse

SHARD_BYTES = 5 * 10**9  # a file's size, as transformers' default
CHUNK_BYTES = 1 << 26  # what is read of a tensor at once

HEAD_TENSORS: Mapping[str, tuple[TensorMap, ...]] = {
    "score": (TensorMap("score.weight", "score/out/kernel", "1 D -> D 1"),),
    "value": tuple(linear("v_head.summary", "value/out", "1 D -> D 1", "1 -> 1")),
    "value_mlp": (
        *linear("v_head.summary.0", "value_mlp/first", "d D -> D d", "d -> d"),
        *linear("v_head.summary.2", "value_mlp/second", "d D -> D d", "d -> d"),
        *linear("v_head.summary.4", "value_mlp/out", "1 D -> D 1", "1 -> 1"),
    ),
}


def family(model_type: str) -> Family:
    """Return the row of a Hugging Face ``model_type``.

    Raises:
        ValueError: an unknown one; the message lists the known and names the nearest.
    """
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, 1, cutoff=0.0)
        raise ValueError(
            f"unknown model_type {model_type!r}; known: {', '.join(FAMILIES)}; the "
            f"nearest is {near[0]!r} "
            "(a family is one file in models/families and one row in models.FAMILIES)"
        )
    return FAMILIES[model_type]


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """Turn a Hugging Face configuration into ours.

    Raises:
        ValueError: no or an unknown ``model_type``, or a feature that the family's file does not
            support.
    """
    if not hf.get("model_type"):
        raise ValueError(f"config.json has no model_type; known: {', '.join(FAMILIES)}")
    return family(hf["model_type"]).from_hf(hf)


def locate(path: str, file: str = "") -> str:
    """Return the local folder of a checkpoint, downloading a hub id into Hugging Face's cache if it
    is none.

    Args:
        path: folder or hub id.
        file: the only file that is needed; "" = all of the checkpoint's.

    Raises:
        FileNotFoundError: neither a folder nor a hub id that can be had.
    """
    if os.path.isdir(path):
        return path
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"no model folder at {path!r} (nor is that a hub id, owner/name)")
    import huggingface_hub  # here, because importing it is slow and most runs are local

    wanted = [file] if file else ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return huggingface_hub.snapshot_download(path, allow_patterns=wanted)
    except (
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.LocalEntryNotFoundError,
        OSError,
    ) as error:
        raise FileNotFoundError(
            f"no model folder at {path!r}, and the hub has no such model or "
            "cannot be reached: "
            f"{error}"
        ) from error


def load_config(path: str) -> ModelConfig:
    """Read the configuration of a checkpoint folder or hub id."""
    folder = locate(path, "config.json")
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        return config_from(json.load(file))


def tensor_maps(
    config: ModelConfig, heads: tuple[str, ...] = (), unembed: bool = True
) -> list[TensorMap]:
    """Return the tensor map of a model with these heads."""
    out = [
        entry
        for entry in FAMILIES[config.family].tensor_maps(config)
        if unembed or not entry.path.startswith("output/")
    ]
    return out + [entry for head in heads for entry in HEAD_TENSORS[head]]


def load(
    path: str,
    *,
    config: ModelConfig | None = None,
    shardings: Any = None,
    dtype: Any = None,
    heads: tuple[str, ...] = (),
    unembed: bool | None = None,
    only: Container[str] | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a checkpoint into parameters, tensor by tensor, straight into their shardings.

    Args:
        path: folder, or hub id.
        config: what to read it as; default: the checkpoint's own.  Its vocabulary may differ from
            that: rows that the checkpoint lacks get the mean of those it has (new tokens), rows
            that pad the table are zero.
        shardings: tree of jax.sharding.Sharding parallel to the parameters; None: the first device.
        dtype: the parameters' type; None: as stored.
        heads: scalar heads to read as well; one that the checkpoint lacks is left out of the
            result, one that is not asked for is not read.
        unembed: whether to read a language-model head; default: not beside a "score" head.
        only: paths of the parameters to read; None: all.

    Returns:
        The configuration and the parameters as nested dicts.

    Raises:
        FileNotFoundError: no such folder, id or shard.
        ValueError: an unknown family, a configuration of another model, or tensors missing,
            unexpected or mis-shaped: all of them in one message.
    """
    folder = locate(path)
    own = load_config(folder)
    config = config or own
    _check_config(config, own, path)
    unembed = "score" not in heads if unembed is None else unembed
    model = build(config, heads=heads, unembed=unembed)
    flat_shapes = flatten(model.shapes())
    flat_shardings = flatten(shardings) if shardings is not None else {}
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    out: dict[str, Any] = {}
    with files.Reader(folder) as reader:
        present = [head for head in heads if HEAD_TENSORS[head][0].name in reader.names]
        entries = _renamed(
            tensor_maps(config, tuple(present), unembed), reader.names, FAMILIES[config.family].base
        )
        _check(reader, entries, own, path)
        for entry in entries:
            if only is not None and entry.path not in only:
                continue
            shape = flat_shapes[entry.path].shape
            kind = reader.dtype(names(entry, config)[0]) if dtype is None else jnp.dtype(dtype)
            sharding = flat_shardings.get(entry.path, default)
            value = _fill(reader, entry, own, shape, kind, sharding)
            letters = parse(entry, own).ours
            if "V" in letters and config.vocab_size > own.vocab_size:
                value = _grown(letters.index("V"), own.vocab_size, config.vocab_size, sharding)(
                    value
                )
            out[entry.path] = value
    return config, unflatten(out)


def stored_heads(path: str) -> tuple[str, ...]:
    """Return the scalar heads that a checkpoint holds: what ``load`` needs to read all of it."""
    with files.Reader(locate(path)) as reader:
        found = [head for head, entries in HEAD_TENSORS.items() if entries[0].name in reader.names]
    return tuple(found)


def _check_config(config: ModelConfig, own: ModelConfig, path: str) -> None:
    same = dataclasses.replace(own, vocab_size=config.vocab_size, vocab_rows=config.vocab_rows)
    differing = [
        field.name
        for field in dataclasses.fields(own)
        if field.name != "hf" and getattr(same, field.name) != getattr(config, field.name)
    ]
    if differing:
        raise ValueError(
            f"the checkpoint {path!r} is another model than the one asked for: "
            + "; ".join(
                f"{name} is {getattr(own, name)!r}, expected {getattr(config, name)!r}"
                for name in differing
            )
        )


@functools.lru_cache
def _grown(axis: int, had: int, wanted: int, sharding: jax.sharding.Sharding) -> Any:
    """Return a function that gives rows [had, wanted) of a vocabulary's table the mean of the rows
    before them."""

    def grow(table: jax.Array) -> jax.Array:
        row = jnp.expand_dims(
            jnp.arange(table.shape[axis]), tuple(i for i in range(table.ndim) if i != axis)
        )
        known = jnp.where(row < had, table.astype(jnp.float32), 0)
        mean = jnp.sum(known, axis=axis, keepdims=True) / had
        return jnp.where((row >= had) & (row < wanted), mean, known).astype(table.dtype)

    return jax.jit(grow, donate_argnums=0, out_shardings=sharding)


def _renamed(entries: list[TensorMap], present: set[str], base: str) -> list[TensorMap]:
    """Drop the base prefix where the checkpoint is of the bare decoder (as GPT-2's on the hub)."""
    if not base or any(name.startswith(base) for name in present):
        return entries
    return [dataclasses.replace(entry, name=entry.name.removeprefix(base)) for entry in entries]


def tensor_shapes(
    config: ModelConfig, heads: tuple[str, ...] = (), unembed: bool = True
) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors of a model's checkpoint, in the order in which
    they are written."""
    return _expected(
        tensor_maps(config, heads, unembed),
        dataclasses.replace(config, vocab_rows=config.vocab_size),
    )


def _expected(entries: list[TensorMap], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the checkpoint's tensors and their shapes; spans of one tensor add up."""
    out: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        shape = parse(entry, config).their_shape
        for name in names(entry, config):
            rows = (
                max(out[name][0], sum(entry.span))
                if entry.span and name in out
                else (sum(entry.span) if entry.span else shape[0])
            )
            out[name] = (rows, *shape[1:])
    return out


def _check(reader: files.Reader, entries: list[TensorMap], config: ModelConfig, path: str) -> None:
    expected = _expected(entries, config)
    row = FAMILIES[config.family]
    # another use of the same decoder may have other heads
    other = {entry.name for head in HEAD_TENSORS.values() for entry in head}
    other |= {
        entry.name
        for entry in row.tensor_maps(dataclasses.replace(config, tied=False))
        if entry.path.startswith("output/")
    }
    missing = sorted(set(expected) - reader.names)
    unexpected = sorted(
        name for name in reader.names - set(expected) - other if not re.search(row.ignored, name)
    )
    wrong = [
        f"{name}: expected {shape}, got {reader.shape(name)}"
        for name, shape in sorted(expected.items())
        if name in reader.names and reader.shape(name) != shape
    ]
    if missing or unexpected or wrong:
        parts = [
            f"  {len(found)} {what}:\n    " + "\n    ".join(found)
            for what, found in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("mis-shaped", wrong),
            )
            if found
        ]
        raise ValueError(
            f"the checkpoint {path!r} does not hold a {config.family} model as its "
            "config.json says:\n" + "\n".join(parts)
        )


def _fill(
    reader: files.Reader,
    entry: TensorMap,
    config: ModelConfig,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    axes = parse(entry, config)
    if not entry.stacked:
        return _block(reader, entry, axes, 0, shape, dtype, sharding)
    whole = _zeros(shape, jnp.dtype(dtype), sharding)()
    put = _put(sharding)
    for layer in range(config.num_layers):
        block = _block(reader, entry, axes, layer, (1, *shape[1:]), dtype, sharding)
        # one layer at a time: waiting here is what bounds the host's memory
        whole = jax.block_until_ready(put(whole, block, layer))
    return whole


@functools.lru_cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache
def _put(sharding: jax.sharding.Sharding) -> Any:
    return jax.jit(
        lambda whole, block, layer: jax.lax.dynamic_update_slice_in_dim(whole, block, layer, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )


def _block(
    reader: files.Reader,
    entry: TensorMap,
    axes: AxisMap,
    layer: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """Make one parameter (one layer of it) from what this process's devices hold of it."""
    read: dict[tuple, np.ndarray] = {}  # devices that hold the same part share one copy

    def part(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(slice_.indices(size)[:2] for slice_, size in zip(index, shape))
        if key not in read:
            read[key] = _piece(
                reader, entry, axes, layer, [slice(*bounds) for bounds in key], dtype
            )
        return read[key]

    return jax.make_array_from_callback(shape, sharding, part)


def _piece(
    reader: files.Reader,
    entry: TensorMap,
    axes: AxisMap,
    layer: int,
    index: list[slice],
    dtype: np.dtype,
) -> np.ndarray:
    inner = index[entry.stacked :]
    experts = range(inner[0].start, inner[0].stop) if entry.by_expert else (0,)
    inner = inner[entry.by_expert :]
    # rows that pad the vocabulary stand in no tensor and stay zero
    wanted = [
        slice(min(part.start, size), min(part.stop, size))
        for part, size in zip(inner, axes.our_shape)
    ]
    out = np.zeros((len(experts), *(part.stop - part.start for part in inner)), dtype)
    for row, expert in enumerate(experts):
        name = entry.name.format(layer=layer, expert=expert)
        for chunk in _chunks(wanted, axes, out[row].nbytes):
            bounds = axes.bounds(chunk)
            if entry.span:
                bounds = (
                    slice(bounds[0].start + entry.span[0], bounds[0].stop + entry.span[0]),
                    *bounds[1:],
                )
            place = tuple(
                slice(part.start - whole.start, part.stop - whole.start)
                for part, whole in zip(chunk, inner)
            )
            out[row][place] = axes.to_ours(reader.read(name, bounds), chunk)
    out = out if entry.by_expert else out[0]
    return out[None] if entry.stacked else out


def _chunks(wanted: list[slice], axes: AxisMap, size: int) -> Iterator[list[slice]]:
    """Cut a part of ours along the tensor's first axis, so that what is read at once stays
    small."""
    letter = axes.theirs[0][0]
    if letter not in axes.ours:
        yield wanted
        return
    axis = axes.ours.index(letter)
    start, stop = wanted[axis].start, wanted[axis].stop
    step = max(1, (stop - start) * CHUNK_BYTES // max(size, 1))
    for begin in range(start, stop, step):
        yield [*wanted[:axis], slice(begin, min(begin + step, stop)), *wanted[axis + 1 :]]


def save(
    path: str,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    heads: tuple[str, ...] = (),
    unembed: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters as a Hugging Face checkpoint: config.json and safetensors (tokenizer files
    are not ours).

    Args:
        path: folder to make, local or in a bucket.
        config: what the model is.
        params: nested dicts without adapters (see ``lora.fold``).
        dtype: type of the stored tensors; default: what the configuration says, else the
            parameters'.
        heads: scalar heads to write.
        unembed: whether to write a language-model head; default: not beside a "score" head.
        shard_bytes: largest file, in bytes.
        changes: further keys of config.json (``pad_token_id``, which sequence classifiers need).

    Every process of a run calls this; process 0 writes.

    Raises:
        ValueError: the parameters are not those of this model.
    """
    unembed = "score" not in heads if unembed is None else unembed
    flat = flatten(params)
    hf = json.loads(config.hf)
    dtype = jnp.dtype(
        dtype or hf.get("dtype") or hf.get("torch_dtype") or next(iter(flat.values())).dtype
    )
    stored = dataclasses.replace(config, vocab_rows=config.vocab_size)
    entries = tensor_maps(config, heads, unembed)
    extra, missing = (
        sorted(set(flat) - {one.path for one in entries}),
        sorted({one.path for one in entries} - set(flat)),
    )
    if extra or missing:
        raise ValueError(
            f"cannot write a {config.family} checkpoint: parameters unexpected "
            f"{extra}, missing {missing}"
        )
    sources: dict[str, list[tuple[TensorMap, int, int]]] = {}
    for entry in entries:
        for layer in range(config.num_layers) if entry.stacked else (0,):
            for expert in range(config.num_experts) if entry.by_expert else (0,):
                name = entry.name.format(layer=layer, expert=expert)
                sources.setdefault(name, []).append((entry, layer, expert))
    shapes = _expected(entries, stored)

    def make(name: str) -> np.ndarray:
        tensor = np.empty(shapes[name], dtype)
        for entry, layer, expert in sources[name]:
            value = flat[entry.path][layer] if entry.stacked else flat[entry.path]
            value = _host(value[expert] if entry.by_expert else value)
            axes = parse(entry, stored)
            rows = slice(entry.span[0], sum(entry.span)) if entry.span else slice(None)
            axes.to_theirs(
                value[tuple(slice(size) for size in axes.our_shape)].astype(dtype), tensor[rows]
            )
        return tensor

    files.write(
        path,
        {name: shapes[name] for name in sources},
        dtype,
        make,
        shard_bytes,
        jax.process_index() == 0,
    )
    if jax.process_index() == 0:
        row = FAMILIES[config.family]
        text = json.dumps(
            config.to_hf(
                architecture=row.classifier if "score" in heads else row.architecture,
                dtype=dtype.name,
                **(
                    {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
                    if "score" in heads
                    else {}
                ),
                **(changes or {}),
            ),
            indent=2,
            sort_keys=True,
        )
        (epath.Path(path) / "config.json").write_text(text + "\n")


def _host(value: jax.Array | np.ndarray) -> np.ndarray:
    """Bring an array to this host, from all processes if it spans them (they all call this)."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(jax.device_get(value))

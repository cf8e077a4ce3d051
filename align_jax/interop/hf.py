# SPDX-License-Identifier: Apache-2.0
"""Weights both ways between Hugging Face checkpoints and our parameters.

folder or hub id ─► config.json ─► ModelConfig ─► the family's tensor map ─► parameters

A parameter of the layers is filled one layer at a time, and of each tensor a process reads only
what its devices hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from align_jax.core.choose import choose
from align_jax.core.files import json_kind, read_json
from align_jax.core.tree import flatten, unflatten
from align_jax.interop import hub, tensor_files
from align_jax.interop.streaming import read_parameter
from align_jax.models import FAMILIES, find_family, own_family, unread
from align_jax.models.config import OWN_FAMILY, RUN_LENGTH, ModelConfig
from align_jax.models.hf_fields import check, quantization
from align_jax.models.layers import ACTIVATIONS
from align_jax.models.model import build
from align_jax.models.roles import role_of
from align_jax.models.tensor_map import TensorMap, fused, linear, names, parse

ADAPTER = "adapter_config.json"
GENERATION = "generation_config.json"
SHARD_BYTES = 5 * 10**9  # a file's size, as transformers' default

STEP = "step"  # label of a process reward model's score, where other reward models have "reward"

ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function")

HEAD_TENSORS: Mapping[str, tuple[TensorMap, ...]] = {
    "score": (TensorMap("score.weight", "score/out/kernel", "1 D -> D 1"),),
    "value": tuple(linear("v_head.summary", "value/out", "1 D -> D 1", "1 -> 1")),
    "value_mlp": (
        *linear("v_head.summary.0", "value_mlp/first", "d D -> D d", "d -> d"),
        *linear("v_head.summary.2", "value_mlp/second", "d D -> D d", "d -> d"),
        *linear("v_head.summary.4", "value_mlp/out", "1 D -> D 1", "1 -> 1"),
    ),
}


# ------------------------------------------------------------------------------- configurations


def config_from(hf: Mapping[str, Any], family: str = "") -> ModelConfig:
    """Turn a Hugging Face configuration into ours.

    Args:
        hf: the configuration.
        family: the user's own that reads it, ``module:name``; else as ``hf`` says.

    Raises:
        ValueError: no or an unknown ``model_type``, a field of a wrong type or an impossible value,
            or a feature that the family's file does not support.
    """
    if named := own_family.named(hf, family):
        return own_family.read(hf, named)
    kind = hf.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ValueError(
            f"model_type: expected one of {', '.join(FAMILIES)}; got {json_kind(kind)}"
        )
    if kind not in FAMILIES:
        raise ValueError(_unknown_family(kind, hf))
    row = FAMILIES[kind]
    check(hf)
    if isinstance(text := hf.get("text_config"), Mapping):
        try:
            check(text)
        except ValueError as error:
            raise ValueError(f"text_config: {error}") from error
    config = row.from_hf(hf)
    unread.check(hf, config)
    if config.activation not in ACTIVATIONS:
        given = [key for key in ACTIVATION_FIELDS if hf.get(key) == config.activation]
        choose(ACTIVATIONS, config.activation, *(given or ["activation"])[:1])
    return config


def _unknown_family(kind: str, hf: Mapping[str, Any]) -> str:
    """Say what is not read, and the family that was meant only where it is spelled nearly so."""
    said = f"model_type = {kind!r:.60}"  # whole pages have been pasted there
    parts = [key for key in ("vision_config", "audio_config") if key in hf]
    if parts:
        text = hf.get("text_config")
        own = text.get("model_type") if isinstance(text, Mapping) else None
        return (
            f"{said} is a multimodal model ({', '.join(parts)}), which is not read"
            + (f"; its text_config is a {own}" if own else "")
            + f"; known: {', '.join(FAMILIES)}"
        )
    plain = {re.sub(r"[^a-z0-9]", "", name): name for name in FAMILIES}
    spelled = re.sub(r"[^a-z0-9]", "", kind.lower())
    digits = re.sub(r"[^0-9]", "", spelled)
    near = [
        plain[name]
        for name in difflib.get_close_matches(spelled, plain, n=len(plain), cutoff=0.8)
        if re.sub(r"[^0-9]", "", name) == digits
    ]
    near = [name for name in near if abs(len(name) - len(kind)) <= 1]  # a typo, not a relative
    from transformers import CONFIG_MAPPING  # here, because importing it takes seconds

    if near and kind not in CONFIG_MAPPING:  # which is a name of its own: olmo
        return f"{said} is unknown; did you mean {near[0]!r}?"
    return (
        f"{said} is unknown; known: {', '.join(FAMILIES)}; or your own: "
        f"config.model.family = 'module:name' of a Family, or {OWN_FAMILY!r} in config.json"
    )


def config_of(family: str, fields: Mapping[str, Any]) -> ModelConfig:
    """Turn fields of a family's Hugging Face configuration into ours, for random weights.

    Args:
        family: a name of ``models.FAMILIES``, or the user's own, ``module:name``, whose module is
            the ``model_type`` that an export has.
        fields: those that are not as the family has them by default.

    Raises:
        ValueError: as ``config_from``.
    """
    return config_from({"model_type": family.partition(":")[0], **fields}, family)


def locate(path: str, file: str = "") -> str:
    """Return the local folder of a checkpoint, downloading a hub id into Hugging Face's cache if it
    is none.

    Args:
        path: folder or hub id.
        file: pattern of the only files that are needed; "" = all of the checkpoint's.

    Raises:
        FileNotFoundError: neither a folder nor a hub id that can be had.
    """
    if hub.is_here(path):
        return path
    near = hub.near_folder(path)
    import huggingface_hub  # here, because importing it is slow and most runs are local

    wanted = "*.json *.safetensors *.model *.model.v* *.txt *.jinja *.tiktoken *.spm".split()
    wanted += [*hub.CODE, "README.md", "LICENSE*"]
    errors = huggingface_hub.errors
    try:
        return huggingface_hub.snapshot_download(
            path,
            allow_patterns=[file] if file else wanted,
            ignore_patterns=["*/*.safetensors"],  # further copies, as their makers train them
        )
    except errors.HFValidationError:
        raise FileNotFoundError(
            f"no model folder at {path!r:.100} (nor is that a hub id, owner/name){near}"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no model folder at {path!r}{near}; the hub has no such model or cannot be "
            f"reached: {error}"
        ) from error


def load_config(path: str, run_length: int = 0, family: str = "") -> ModelConfig:
    """Read the configuration of a checkpoint folder or hub id.

    Args:
        path: folder or hub id.
        run_length: tokens of the longest text that is computed with; 0: as the checkpoint's own run
            had it, else within the original context.
        family: as ``config_from`` takes it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or not one that ``config_from`` takes; with the file's path.
    """
    file = os.path.join(locate(path, "*config.json"), "config.json")
    if not os.path.exists(file):
        raise FileNotFoundError(f"no model in {path!r}: there is no {file}{_instead(path)}")
    found = read_json(file)
    if "config" in found and "versions" in found:
        raise ValueError(f"{file}: expected a model's, got a run's{_of_a_run(path)}")
    try:
        config = config_from(found, family)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    folder = os.path.dirname(file)
    if os.path.exists(os.path.join(folder, ADAPTER)):
        raise ValueError(
            f"{file}: beside it is {ADAPTER}, a PEFT adapter's, which transformers would add to "
            "the model: take it away; or, if the adapter is what was meant, it is "
            "config.model.lora.path, and its base config.model.path"
        )
    if config.tied and not _is_tied(folder, config):
        config = config.untied()
    return dataclasses.replace(
        config, end_tokens=end_tokens(folder), run_length=run_length or found.get(RUN_LENGTH) or 0
    )


def end_tokens(path: str) -> tuple[int, ...]:
    """Return the tokens that end a text by config.json and generation_config.json.

    Args:
        path: folder or hub id of a model, also of a family that is not known.

    Raises:
        ValueError: one of the files says something else than tokens' ids.
    """
    folder, ids = locate(path, "*config.json"), set()
    for name in ("config.json", GENERATION):
        file = os.path.join(folder, name)
        found = read_json(file) if os.path.exists(file) else {}
        text = found.get("text_config")
        for part in (found, text if isinstance(text, Mapping) else {}):
            said = part.get("eos_token_id")
            listed = said if isinstance(said, list) else [] if said is None else [said]
            if not all(type(one) is int and one >= 0 for one in listed):
                raise ValueError(
                    f"{file}: eos_token_id: expected a token's id, or a list of them, got "
                    f"{json.dumps(said)}"
                )
            ids |= set(listed)
    return tuple(sorted(ids))


def _reader(folder: str, config: ModelConfig) -> tensor_files.Reader:
    """Open a checkpoint's tensors, codes as what they stand for."""
    return tensor_files.Reader(folder, quantization=quantization(json.loads(config.hf)))


def _is_tied(folder: str, config: ModelConfig) -> bool:
    """Tell whether the head is the embedding: not where the checkpoint stores a head that is
    another, whatever its flag says."""
    files = (tensor_files.SINGLE, tensor_files.INDEX)
    if not any(os.path.exists(os.path.join(folder, file)) for file in files):
        return True
    try:
        reader = tensor_files.Reader(folder)
    except (ValueError, FileNotFoundError):
        return True  # damaged or parted from its shards, which who reads the weights says
    with reader:
        embed, heads = _ends(config, reader.names)
        there = heads & reader.names
        return embed not in reader.names or all(reader.equal(head, embed) for head in there)


def _ends(config: ModelConfig, present: set[str]) -> tuple[str, set[str]]:
    """Return the names of a tied model's embedding, and of what its head would have apart, as a
    checkpoint with these tensors spells them."""
    entries, untied = (
        _with_base(tensor_maps(dataclasses.replace(config, tied=tied)), present, config.family)
        for tied in (True, False)
    )
    (embed,) = (entry.name for entry in entries if entry.path == "embed/tokens")
    return embed, {entry.name for entry in set(untied) - set(entries)}


def _stored(config: ModelConfig, present: set[str]) -> dict[str, str]:
    """Return what a tied model's embedding is called where its head stands for both, as programs
    write it that keep one name of what is shared."""
    if not config.tied:
        return {}
    embed, heads = _ends(config, present)
    there = heads & present
    return {embed: there.pop()} if embed not in present and len(there) == 1 else {}


def _instead(folder: str) -> str:
    """Say what a folder without a model's config.json holds that was perhaps meant."""
    if os.path.exists(os.path.join(folder, ADAPTER)):
        return (
            "; it holds a PEFT adapter: that is config.model.lora.path, its base config.model.path"
        )
    steps = os.path.abspath(folder)
    if os.path.exists(os.path.join(folder, "state")):  # WORKDIR/checkpoints/120
        return _of_a_run(os.path.dirname(os.path.dirname(steps)))
    return tensor_files.others(folder)


def _of_a_run(workdir: str) -> str:
    return f": python -m align_jax.export --workdir={workdir} --output=DIR makes a model of it"


# ---------------------------------------------------------------------------------- tensor maps


def tensor_maps(
    config: ModelConfig, heads: tuple[str, ...] = (), unembed: bool = True
) -> list[TensorMap]:
    """Return the tensor map of a model with these scalar heads, with or without a language-model
    head."""
    entries = find_family(config.family).tensor_maps(config)
    if not unembed:
        roles = flatten(build(config, unembed=True).roles())
        entries = [entry for entry in entries if role_of(roles, entry.path).part != "output"]
    return entries + [entry for head in heads for entry in HEAD_TENSORS[head]]


def tensor_shapes(entries: list[TensorMap], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return a checkpoint's tensors and their shapes, in the order in which they are written.

    Args:
        entries: from ``tensor_maps``; spans of one tensor add up.
        config: the checkpoint's, its vocabulary not padded.
    """
    out: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        rows, *rest = parse(entry, config).their_shape
        if entry.span:
            rows = sum(entry.span)
        for name in names(entry, config):
            before = out[name][0] if entry.span and name in out else 0
            out[name] = (max(rows, before), *rest)
    return out


# --------------------------------------------------------------------------------------- import


def load(
    path: str,
    *,
    config: ModelConfig | None = None,
    shardings: Any = None,
    dtype: DTypeLike | None = None,
    heads: tuple[str, ...] = (),
    unembed: bool | None = None,
    only: Container[str] | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a checkpoint into parameters, tensor by tensor, straight into their shardings.

    Args:
        path: folder, or hub id.
        config: what to read it as; default: the checkpoint's own.  Its vocabulary may differ from
            that: rows that the checkpoint lacks get the mean of those it has (new tokens), rows
            that pad the table are zero.  Untied, a tied checkpoint's head is its embedding.
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
        ValueError: a damaged file, an unknown family, a configuration of another model; or tensors
            missing, unexpected, mis-shaped, no floats or not finite: all of a kind in one message.
    """
    folder = locate(path)
    own = load_config(folder, family=config.family if config else "")
    config = config or own
    _check_config(config, own, path)
    unembed = "score" not in heads if unembed is None else unembed
    shapes = flatten(build(config, heads=heads, unembed=unembed).shapes())
    lies = flatten(shardings) if shardings is not None else {}
    default = SingleDeviceSharding(jax.devices()[0])
    out: dict[str, Any] = {}
    with _reader(folder, own) as reader:
        for entry in _checked_entries(reader, config, own, heads, unembed, path):
            if only is not None and entry.path not in only:
                continue
            stored = {reader.dtype(name) for name in names(entry, own)}
            kind = jnp.dtype(functools.reduce(np.promote_types, stored) if dtype is None else dtype)
            shape, sharding = shapes[entry.path].shape, lies.get(entry.path, default)
            value = read_parameter(reader, entry, own, shape, kind, sharding)
            letters = parse(entry, own).ours
            if "V" in letters and config.vocab_size > own.vocab_size:
                grow = _grow(letters.index("V"), own.vocab_size, config.vocab_size, sharding)
                value = grow(value)
            out[entry.path] = value
        reader.check_finite()
    return config, unflatten(out)


def check_headers(path: str, config: ModelConfig, heads: tuple[str, ...], unembed: bool) -> str:
    """Check a checkpoint as ``load`` does, but for its values, of which none is read.

    Args:
        path: folder, or hub id.
        config, heads, unembed: as ``load`` takes them.

    Returns:
        What it is, in a line.

    Raises:
        FileNotFoundError, ValueError: as ``load`` does.
    """
    folder = locate(path)
    own = load_config(folder, family=config.family)
    _check_config(config, own, path)
    with _reader(folder, own) as reader:
        entries = _checked_entries(reader, config, own, heads, unembed, path)
        found = {name for entry in entries for name in names(entry, own)}
        kinds = ", ".join(sorted({str(reader.dtype(name)) for name in found}))
    return f"{path}: {own.family}, {len(found)} tensors, {kinds}"


def _checked_entries(
    reader: tensor_files.Reader,
    config: ModelConfig,
    own: ModelConfig,
    heads: tuple[str, ...],
    unembed: bool,
    path: str,
) -> list[TensorMap]:
    """Return the tensor map of what is to be read of a checkpoint, its tensors having been
    checked."""
    present = tuple(head for head in heads if HEAD_TENSORS[head][0].name in reader.names)
    entries = _with_base(tensor_maps(config, present, unembed), reader.names, config.family)
    stored = _stored(own, reader.names)
    entries = [
        dataclasses.replace(entry, name=stored.get(entry.name, entry.name)) for entry in entries
    ]
    if own.tied and not config.tied:
        (embed,) = (entry.name for entry in entries if entry.path == "embed/tokens")
        entries = [
            TensorMap(embed, entry.path, "V D -> D V") if entry.path == "output/kernel" else entry
            for entry in entries
        ]
    _check_tensors(reader, entries, own, path)
    return entries


def _check_config(config: ModelConfig, own: ModelConfig, path: str) -> None:
    """Refuse a checkpoint of another model than the one asked for; its vocabulary may grow, and
    its head part from the embedding."""
    same = dataclasses.replace(
        own,
        vocab_size=config.vocab_size,
        vocab_rows=config.vocab_rows,
        tied=own.tied and config.tied,
    )
    if differing := same.differences(config):
        raise ValueError(
            f"the checkpoint {path!r} is another model than the one asked for: "
            + "; ".join(f"{name} is {a!r}, expected {b!r}" for name, a, b in differing)
        )


@functools.lru_cache
def _grow(axis: int, had: int, wanted: int, sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """Return a function that gives rows [had, wanted) of a vocabulary's table the mean of the rows
    before them."""

    def grow(table: jax.Array) -> jax.Array:
        others = tuple(i for i in range(table.ndim) if i != axis)
        row = jnp.expand_dims(jnp.arange(table.shape[axis]), others)
        known = jnp.where(row < had, table.astype(jnp.float32), 0)
        mean = jnp.sum(known, axis=axis, keepdims=True) / had
        return jnp.where((row >= had) & (row < wanted), mean, known).astype(table.dtype)

    return jax.jit(grow, donate_argnums=0, out_shardings=sharding)


def _with_base(entries: list[TensorMap], present: set[str], family: str) -> list[TensorMap]:
    """Spell the names as the checkpoint does: without the base prefix where it is of the bare
    decoder (as GPT-2's on the hub), or with that of transformers' modules; a layer's experts as
    one where it has them so."""
    base, modules = find_family(family).base, find_family(family).modules
    if modules and any(name.startswith(modules) for name in present):
        spelled = [as_module(entry.name, family) for entry in entries]
    elif not base or any(name.startswith(base) for name in present):
        return fused(entries, present)
    else:
        spelled = [entry.name.removeprefix(base) for entry in entries]
    both = zip(entries, spelled)
    return fused([dataclasses.replace(entry, name=name) for entry, name in both], present)


def as_module(name: str, family: str) -> str:
    """Return the name that transformers' module has for what a checkpoint's tensor holds."""
    row = find_family(family)
    if not row.modules:
        return name
    if name.startswith(row.base):
        return row.modules + name.removeprefix(row.base)
    return name.removeprefix("language_model.")


def _other_heads(config: ModelConfig) -> set[str]:
    """Return the tensors that another use of the same decoder may have beside it."""
    untied = dataclasses.replace(config, tied=False)
    output = set(tensor_maps(untied)) - set(tensor_maps(untied, unembed=False))
    return {entry.name for entry in (*output, *sum(HEAD_TENSORS.values(), ()))}


def _check_tensors(
    reader: tensor_files.Reader, entries: list[TensorMap], config: ModelConfig, path: str
) -> None:
    expected = tensor_shapes(entries, config)
    unexpected = reader.names - expected.keys()
    if unexpected:
        unexpected -= _other_heads(config)
    row = find_family(config.family)
    ignored = "|".join(filter(None, (row.ignored, row.carried)))
    wrong = {
        "missing": sorted(expected.keys() - reader.names),
        "unexpected": sorted(name for name in unexpected if not re.search(ignored, name)),
        "mis-shaped": [
            f"{name}: expected {shape}, got {reader.shape(name)}"
            for name, shape in sorted(expected.items())
            if name in reader.names and reader.shape(name) != shape
        ],
        tensor_files.NO_FLOATS: [
            f"{name}: {reader.code(name)}"
            for name in sorted(expected)
            if name in reader.names and reader.code(name) not in tensor_files.DTYPES
        ],
    }
    if any(wrong.values()):
        head = {*wrong["missing"]} & _ends(config, reader.names)[1]
        way = (
            "\n  if the head is the embedding, config.json says so: tie_word_embeddings true"
            if head
            else ""
        )
        raise ValueError(
            f"the checkpoint {path!r} does not hold a {config.family} model as its config.json "
            f"says:\n{tensor_files.listed(wrong)}{way}"
        )


# --------------------------------------------------------------------------------------- export


def not_exported(config: ModelConfig, heads: tuple[str, ...]) -> str:
    """Say why a model with these heads cannot be exported; "" where it can."""
    if "score" not in heads or find_family(config.family).classifier:
        return ""
    return (
        f"transformers has no sequence classifier of {config.family}: a reward model of it is used "
        "from its run's folder, and not exported"
    )


def save(
    path: str,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
    heads: tuple[str, ...] = (),
    unembed: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
    changes: Mapping[str, Any] | None = None,
    like: str = "",
    beside: str = "",
) -> None:
    """Write parameters as a Hugging Face checkpoint: config.json and safetensors (tokenizer files
    are not ours).

    Every process of a run calls this; process 0 writes.

    Args:
        path: folder to make, local or in a bucket.
        config: what the model is.
        params: nested dicts without adapters (see ``lora.fold``).
        dtype: type of the stored tensors; default: what the configuration says, else the
            parameters'.
        heads: scalar heads to write.
        unembed: whether to write a language-model head; default: not beside a "score" head.
        shard_bytes: largest file, in bytes.
        changes: further keys of config.json.
        like: folder of a checkpoint whose tensors' types are kept, one by one, where ``dtype`` is
            None.
        beside: folder or hub id of the checkpoint that the model came from: what it holds beside
            the decoder (``Family.carried``) is written along as it is.

    Raises:
        ValueError: the parameters are not those of this model; transformers has no class for a
            score head on it.
    """
    unembed = "score" not in heads if unembed is None else unembed
    if why := not_exported(config, heads):
        raise ValueError(why)
    flat, hf = flatten(params), json.loads(config.hf)
    first = next(iter(flat.values()))
    stored = jnp.dtype(dtype or hf.get("dtype") or hf.get("torch_dtype") or first.dtype)
    entries = tensor_maps(config, heads, unembed)
    expected = {entry.path for entry in entries}
    if flat.keys() != expected:
        raise ValueError(
            f"cannot write a {config.family} checkpoint: parameters unexpected "
            f"{sorted(flat.keys() - expected)}, missing {sorted(expected - flat.keys())}"
        )
    bare = dataclasses.replace(config, vocab_rows=config.vocab_size)
    shapes = tensor_shapes(entries, bare)
    sources = _sources(entries, config)
    dtypes = dict.fromkeys(shapes, stored)
    if like and dtype is None:
        dtypes |= _types(like, config, shapes)

    def make(name: str) -> np.ndarray:
        tensor = np.empty(shapes[name], dtypes[name])
        for entry, index in sources[name]:
            axes = parse(entry, bare)
            rows = slice(entry.span[0], sum(entry.span)) if entry.span else slice(None)
            real = tuple(slice(size) for size in axes.our_shape)  # without rows of padding
            axes.to_theirs(
                _on_host(flat[entry.path][index])[real].astype(tensor.dtype), tensor[rows]
            )
        return tensor

    main, row = jax.process_index() == 0, find_family(config.family)
    with contextlib.ExitStack() as stack:
        others: dict[str, Callable[[str], np.ndarray]] = {}
        if beside and row.carried:
            reader = stack.enter_context(tensor_files.Reader(locate(beside)))
            others = {x: reader.read for x in sorted(reader.names) if re.search(row.carried, x)}
            others = {x: read for x, read in others.items() if x not in shapes}
            shapes |= {name: reader.shape(name) for name in others}
            dtypes |= {name: reader.dtype(name) for name in others}
        tensor_files.write(
            path, shapes, dtypes, lambda name: others.get(name, make)(name), shard_bytes, main
        )
    if main:
        more = dict(changes or {})
        if "score" in heads:
            more = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}} | more
        text = json.dumps(
            config.to_hf(
                architecture=row.classifier if "score" in heads else row.architecture,
                dtype=stored.name,
                **more,
            ),
            indent=2,
            sort_keys=True,
        )
        (epath.Path(path) / "config.json").write_text(text + "\n")


def _types(folder: str, config: ModelConfig, wanted: Iterable[str]) -> dict[str, np.dtype]:
    """Return the types that a checkpoint stores these tensors in, of those that it has."""
    out: dict[str, np.dtype] = {}
    with _reader(folder, config) as reader:
        base, stored = find_family(config.family).base, _stored(config, reader.names)
        for name in wanted:
            spelled = [name, as_module(name, config.family), name.removeprefix(base)]
            spelled += [stored[one] for one in spelled if one in stored]
            if there := next((one for one in spelled if one in reader.names), ""):
                out[name] = reader.dtype(there)
    return out


def _sources(
    entries: list[TensorMap], config: ModelConfig
) -> dict[str, list[tuple[TensorMap, tuple[int, ...]]]]:
    """Return of each tensor which parameters it holds, and which layer and expert of them."""
    out: dict[str, list[tuple[TensorMap, tuple[int, ...]]]] = {}
    for entry in entries:
        experts = range(config.num_experts) if entry.by_expert else (0,)
        for place, layer in enumerate(entry.numbers(config)):
            for expert in experts:
                index = (place,) * entry.stacked + (expert,) * entry.by_expert
                name = entry.name.format(layer=layer, expert=expert)
                out.setdefault(name, []).append((entry, index))
    return out


def _on_host(value: jax.Array | np.ndarray) -> np.ndarray:
    """Bring an array to this host, from all processes if it spans them (they all call this)."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(jax.device_get(value))

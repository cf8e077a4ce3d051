# SPDX-License-Identifier: Apache-2.0
"""Weights from checkpoints: the trees of a run, and whole models for the programs.

load_model                       a checkpoint over a mesh: to sample, evaluate, judge with
load_start                       what ``training.initialize`` says that a run holds, at its start
load_frozen, load_trained        the two parts of it
save_policy                      a policy's newest weights, for a server to read
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from align_jax.core.options import Config
from align_jax.core.tree import flatten, unflatten
from align_jax.interop import hf, peft
from align_jax.models.config import ModelConfig
from align_jax.models.lora import fold, merge
from align_jax.models.model import LoadedModel, Model, build
from align_jax.models.quantize import Quantized, quantize
from align_jax.parallel.compile_cache import jit_once
from align_jax.parallel.sharding import tree_shardings
from align_jax.runs import memory
from align_jax.training.initialize import StateSpecs, own_dtype
from align_jax.training.partitioning import abstract_params
from align_jax.training.steps import StepSpec

Tree = Any


def load_model(
    path: str,
    *,
    mesh: Mesh | None = None,
    compute_dtype: str = "",
    param_dtype: str | None = None,
    heads: Sequence[str] = (),
    steps: bool = False,
    attention: str = "auto",
    max_length: int = 0,
) -> LoadedModel:
    """Load a Hugging Face checkpoint for inference, each tensor straight into its sharding.

    Args:
        path: directory or hub id.
        mesh: where it lies, the embedding's rows padded to what the tensor axis divides; None: the
            default device.
        compute_dtype: of activations and matrix products; "" = on a CPU the checkpoint's own (its
            config.json's, float32 where that says none), elsewhere bfloat16.
        param_dtype: of the stored weights; None: ``compute_dtype``.
        heads: scalar heads; a reward model's is ``("score",)``, and it has no language-model head.
        steps: the score head is to score steps (a process reward model), not whole answers.
        attention: a key of ``models.attention.ATTENTION``, or "auto".
        max_length: tokens of the longest text (``ModelConfig.run_length``); 0: as the checkpoint's
            own run had it, else within the original context.

    Raises:
        FileNotFoundError: no such folder, id or shard.
        ValueError: an unknown family, a head that the checkpoint lacks or that scores something
            else, weights that the mesh cannot hold, or tensors missing, unexpected or mis-shaped.
    """
    config = hf.load_config(path)
    if max_length:
        length = min(max_length, config.max_positions)
        config = dataclasses.replace(config, run_length=length)
    if "score" in heads:
        _check_score_head(json.loads(config.hf), path, steps)
    else:
        check_speaks(config, path)
    config = config.padded(1 if mesh is None else mesh.shape["tensor"])
    compute_dtype = compute_dtype or _own_dtype(json.loads(config.hf))
    model = build(
        config, compute_dtype=compute_dtype, remat="none", attention=attention, heads=tuple(heads)
    )
    dtype, shardings = param_dtype or compute_dtype, None
    if mesh is not None:
        shardings = tree_shardings(mesh, model.axes())
        half = ", or --dtype=bfloat16 beside --model" if dtype == "float32" else ""
        memory.check_weights(_shapes(model, dtype, shardings), mesh, path, half)
    _, params = hf.load(
        path, config=config, dtype=dtype, heads=model.options.heads, shardings=shardings
    )
    if missing := [head for head in heads if head not in params]:
        raise ValueError(f"the checkpoint {path!r} has no {' and no '.join(missing)} head")
    return LoadedModel(model, params)


def check_speaks(config: ModelConfig, path: str) -> None:
    """Refuse a reward model where one that speaks is wanted: with tied embeddings nothing else
    would tell.

    Args:
        config: of the checkpoint.
        path: where it lies.

    Raises:
        ValueError: it is a sequence classifier.
    """
    kinds = json.loads(config.hf).get("architectures") or []
    if any("SequenceClassification" in kind for kind in kinds):
        raise ValueError(
            f"{path} is a reward model ({', '.join(kinds)}), which says nothing: name it among "
            "rewards, and here a language model"
        )


def _check_score_head(found: Mapping[str, Any], path: str, steps: bool) -> None:
    """Refuse a checkpoint without a score head, or whose head scores something else.

    Raises:
        ValueError: what it is, and the reward that takes it.
    """
    kinds = found.get("architectures") or []
    if not any("SequenceClassification" in kind for kind in kinds):
        raise ValueError(
            f"{path} is a checkpoint of {kinds}; expected a sequence classifier with one label, "
            "which has a score head (ours are exported as such)"
        )
    label = (found.get("id2label") or {}).get("0")  # as align_jax.export names it
    if steps and label == "reward":
        raise ValueError(
            f"{path} is a reward model of whole answers, which says nothing of a step: its kind of "
            "reward is 'model'; a process reward model is trained by objective.name = "
            "'reward_process' and exported"
        )
    if not steps and label == hf.STEP:
        raise ValueError(
            f"{path} is a process reward model, which says nothing of a whole answer: its kind of "
            "reward is 'process', with aggregate = 'min' for one number an answer"
        )


def _shapes(model: Model, dtype: str, shardings: Tree) -> Tree:
    """Return a model's parameters as shapes in one type, where they are to lie."""
    drawn = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where),
        drawn,
        shardings,
    )


def _own_dtype(hf_config: Mapping[str, Any]) -> str:
    """Return the type to compute in where none is asked for."""
    if jax.default_backend() != "cpu":
        return "bfloat16"
    return hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"


def load_params(model: Model, shapes: Tree, *, path: str, key: jax.Array) -> Tree:
    """Fill a tree of parameters: from a checkpoint what it has, at random what it lacks (new
    heads).

    Args:
        model: the model of these parameters; it also says how they are initialized.
        shapes: shapes with shardings; may be a part of the model's tree.
        path: directory or hub id of a Hugging Face checkpoint; "" = all at random.
        key: of the random weights.

    Returns:
        The same tree with arrays, each of its dtype and sharding.
    """
    if not (wanted := flatten(shapes)):
        return {}
    codes = [name for name, leaf in wanted.items() if isinstance(leaf, Quantized)]
    loaded: dict[str, Any] = {}
    if path:
        # a tensor that is to be quantized is read alone, so that only one of them is ever held at
        # full size
        for names in ([name for name in wanted if name not in codes], *([name] for name in codes)):
            _, params = hf.load(
                path,
                config=model.config,
                shardings=unflatten({name: wanted[name].sharding for name in names}),
                dtype=next(iter(wanted.values())).dtype,
                heads=model.options.heads,
                unembed=model.options.unembed,
                only=names,
            )
            loaded |= {name: _stored(leaf, wanted[name]) for name, leaf in flatten(params).items()}
    missing = {name: leaf for name, leaf in wanted.items() if name not in loaded}
    if missing:

        def draw(key: jax.Array) -> dict[str, Any]:
            drawn = flatten(model.init(key))
            return {
                name: _as(drawn[name].astype(leaf.dtype), leaf) for name, leaf in missing.items()
            }

        loaded |= jit_once(draw, out_shardings=_shardings(missing))(key)
    return unflatten({name: loaded[name] for name in wanted})


def _shardings(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _as(kernel: jax.Array, leaf: Any) -> Any:
    return quantize(kernel, leaf) if isinstance(leaf, Quantized) else kernel


def _stored(kernel: jax.Array, leaf: Any) -> Any:
    """Return a parameter as its leaf of the specs says: quantized, or as it is."""
    if not isinstance(leaf, Quantized):
        return kernel
    pack = jax.jit(functools.partial(quantize, like=leaf), out_shardings=_shardings(leaf))
    return jax.block_until_ready(pack(kernel))


def check_headers(spec: StepSpec, config: Config) -> list[str]:
    """Check the checkpoints that a run begins with by their headers alone, as they will be read.

    Returns:
        What each of them is, in a line.

    Raises:
        FileNotFoundError, ValueError: as ``interop.hf.load`` does.
    """
    read = ((config.model.path, spec.policy), (config.reference.path, spec.reference))
    found = [
        hf.check_headers(path, model.config, model.options.heads, model.options.unembed)
        for path, model in read
        if path
    ]
    if path := config.model.value_path:
        found.append(hf.check_headers(path, hf.load_config(path), ("score",), False))
    return found


def check_value_path(path: str, policy: ModelConfig) -> None:
    """Check that a reward model's head fits the policy's decoder.

    Args:
        path: of its checkpoint.
        policy: what the policy is.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has no score head of whole answers, or is of another size.
    """
    config = hf.load_config(path)
    _check_score_head(json.loads(config.hf), path, steps=False)
    if config.hidden_size != policy.hidden_size:
        raise ValueError(
            f"config.model.value_path = {path!r} has a head for states of {config.hidden_size}, "
            f"the policy's have {policy.hidden_size}: the value head stands on the policy's "
            "decoder, so a reward model that began as the same model is needed"
        )


def _value_head(path: str, shapes: Tree) -> Tree:
    """Start a linear value head from a reward model's score head, without bias.

    Args:
        path: of the reward model's checkpoint.
        shapes: of the value head, with shardings.
    """
    leaf = shapes["out"]["kernel"]
    where = {"score": {"out": {"kernel": leaf.sharding}}}
    _, found = hf.load(
        path, shardings=where, dtype=leaf.dtype, heads=("score",), only=("score/out/kernel",)
    )
    bias = shapes["out"]["bias"]
    zeros = jax.jit(lambda: jnp.zeros(bias.shape, bias.dtype), out_shardings=bias.sharding)
    return {"out": {"kernel": found["score"]["out"]["kernel"], "bias": zeros()}}


def load_start(spec: StepSpec, specs: StateSpecs, config: Config) -> tuple[Tree, Tree]:
    """Load or draw what a run begins with, reading each of the policy's weights once.

    Args:
        spec, specs, config: as ``load_frozen`` takes them.

    Returns:
        (frozen, trained parameters).
    """
    if spec.policy.options.lora is not None:  # an adapter is drawn for the base that is there
        frozen = load_frozen(spec, specs, config)
        return frozen, load_trained(spec, specs, frozen, config)
    trained = load_trained(spec, specs, {}, config)
    return load_frozen(spec, specs, config, trained), trained


def load_frozen(
    spec: StepSpec, specs: StateSpecs, config: Config, trained: Tree | None = None
) -> Tree:
    """Load or draw the weights that are not trained.

    Args:
        spec: what the step is compiled from.
        specs: from ``training.initialize.make_state_specs``.
        config: of the run: where the starting weights and the reference's are, and the seed of
            random ones.
        trained: the policy's parameters as they were just loaded; the reference's copies of them
            are taken from there, where their type holds them.
    """
    key = jax.random.key(config.seed)
    frozen: dict[str, Tree] = {"base": {}}
    if specs.base:
        copied = _copies(flatten(specs.base), flatten(trained or {}))
        left = {name: leaf for name, leaf in flatten(specs.base).items() if name not in copied}
        read = load_params(spec.base, unflatten(left), path=config.model.path, key=key)
        base = unflatten(copied | flatten(read))
        frozen["base"] = _with_replaced(base, spec.policy, config)
    if specs.reference is not None:
        path = config.reference.path
        frozen["reference"] = load_params(spec.reference, specs.reference, path=path, key=key)
    return frozen


def _copies(wanted: Mapping[str, Any], given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Copy, rounded to the wanted type, the parameters whose own type is at least as wide."""
    found = {
        name: leaf
        for name, leaf in wanted.items()
        if name in given
        and not isinstance(leaf, Quantized)
        and np.can_cast(leaf.dtype, given[name].dtype)
    }

    def copy(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: jnp.array(values[name], leaf.dtype) for name, leaf in found.items()}

    placed = jax.jit(copy, out_shardings=_shardings(found))
    return placed({name: given[name] for name in found}) if found else {}


def draw_start(model: Model, mesh: Mesh, config: Config) -> LoadedModel:
    """Draw anew the random weights that a run without a checkpoint has started from.

    Args:
        model: the run's base.
        mesh: where they are to lie.
        config: of the run: its seed, and the type of what is frozen.
    """
    shapes = abstract_params(mesh, model.shapes(own_dtype(config.reference.dtype)), model.axes())
    key = jax.random.key(config.seed)
    return LoadedModel(model, load_params(model, shapes, path="", key=key))


def _with_replaced(base: Tree, policy: Model, config: Config) -> Tree:
    """Put into the base what came with the adapter in its place."""
    if policy.options.lora is None or not policy.options.lora.replaced:
        return base
    given = flatten(peft.load(config.model.lora.path, policy.config)[1])
    leaves = flatten(base)
    replaced = {
        path: _from_host(given[path], leaves[path])
        for path in policy.options.lora.replaced
        if path in leaves
    }
    return merge(base, unflatten(replaced))


def load_moving_reference(spec: StepSpec, specs: StateSpecs, config: Config) -> Tree | None:
    """Load where a reference that moves starts; None where it starts from the policy.

    Heads, which it lacks, are the policy's.
    """
    if not (spec.sync_every_steps and config.reference.path):
        return None
    base = flatten(spec.base.shapes())
    shapes = {name: leaf for name, leaf in flatten(specs.trained).items() if name in base}
    key, path = jax.random.key(config.seed), config.reference.path
    return load_params(spec.base, unflatten(shapes), path=path, key=key)


def load_trained(spec: StepSpec, specs: StateSpecs, frozen: Tree, config: Config) -> Tree:
    """Load or draw the trained parameters; they share no buffer with what is frozen, so the state
    can be donated.

    Args:
        spec, specs, config: as ``load_frozen`` takes them; ``config.model.lora.path`` is the PEFT
            adapter to start from, "" = a fresh one.
        frozen: from ``load_frozen``.
    """
    trained = _load_trained(spec, specs, frozen, config)
    if path := config.model.value_path:
        trained["value"] = _value_head(path, specs.trained["value"])
    return trained


def _load_trained(spec: StepSpec, specs: StateSpecs, frozen: Tree, config: Config) -> Tree:
    """Load or draw them as the policy's checkpoint and the adapter have them."""
    key, path = jax.random.key(config.seed), config.model.path
    if spec.policy.options.lora is None:
        return load_params(spec.policy, specs.trained, path=path, key=key)
    shapes, roles = flatten(specs.trained), flatten(spec.policy.roles())
    if config.model.lora.path:
        given = flatten(peft.load(config.model.lora.path, spec.policy.config)[1])
        trained = {
            name: _from_host(given[name], leaf) for name, leaf in shapes.items() if name in given
        }
    else:
        adapter = {name: leaf for name, leaf in shapes.items() if roles[name].part == "adapter"}

        def draw(base: Tree, key: jax.Array) -> dict[str, jax.Array]:
            drawn = flatten(spec.policy.init_adapter(key, base))
            return {name: drawn[name].astype(leaf.dtype) for name, leaf in adapter.items()}

        trained = jit_once(draw, out_shardings=_shardings(adapter))(frozen["base"], key)
    heads = unflatten({name: leaf for name, leaf in shapes.items() if name not in trained})
    if heads:
        heads = load_params(spec.policy, heads, path=path, key=key)
    return merge(unflatten(trained), heads)


def _from_host(value: np.ndarray, leaf: jax.ShapeDtypeStruct | jax.Array) -> jax.Array:
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: value[index].astype(leaf.dtype)
    )


def save_policy(policy: Model, folder: str, params: Tree) -> None:
    """Write a policy's weights for a server: adapters merged, scalar heads left out; the tokenizer
    stays as it is."""
    merged = fold(params, policy.options.lora) if policy.options.lora is not None else params
    headless = {name: leaf for name, leaf in merged.items() if name not in policy.options.heads}
    hf.save(folder, policy.config, headless)

# SPDX-License-Identifier: Apache-2.0
"""Weights from checkpoints: the trees of a run, and whole models for the programs.

load_model                       a checkpoint over a mesh: to sample, evaluate, judge with
load_frozen, load_trained        what ``training.initialize`` says that a run holds
save_policy                      a policy's newest weights, for a server to read
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.core.tree import flatten, unflatten
from align_jax.interop import hf, peft
from align_jax.models.lora import fold, merge
from align_jax.models.model import LoadedModel, Model, build
from align_jax.models.quantize import Quantized, quantize
from align_jax.parallel.sharding import tree_shardings
from align_jax.training.initialize import StateSpecs
from align_jax.training.steps import StepSpec

Tree = Any


def load_model(
    path: str,
    *,
    mesh: Mesh | None = None,
    compute_dtype: str,
    param_dtype: str | None = None,
    heads: Sequence[str] = (),
    attention: str = "auto",
) -> LoadedModel:
    """Load a Hugging Face checkpoint for inference, each tensor straight into its sharding.

    Args:
        path: directory or hub id.
        mesh: where it lies, the embedding's rows padded to what the tensor axis divides; None: the
            default device.
        compute_dtype: of activations and matrix products.
        param_dtype: of the stored weights; None: ``compute_dtype``.
        heads: scalar heads; a reward model's is ``("score",)``, and it has no language-model head.
        attention: a key of ``models.attention.ATTENTION``, or "auto".

    Raises:
        FileNotFoundError: no such folder, id or shard.
        ValueError: an unknown family, a head that the checkpoint lacks, or tensors missing,
            unexpected or mis-shaped.
    """
    config = hf.load_config(path)
    kinds = json.loads(config.hf).get("architectures") or []
    if "score" in heads and not any("SequenceClassification" in kind for kind in kinds):
        raise ValueError(
            f"{path} is a checkpoint of {kinds}; expected a sequence classifier with one label, "
            "which has a score head (ours are exported as such)"
        )
    config = config.padded(1 if mesh is None else mesh.shape["tensor"])
    model = build(
        config, compute_dtype=compute_dtype, remat="none", attention=attention, heads=tuple(heads)
    )
    _, params = hf.load(
        path,
        config=config,
        dtype=param_dtype or compute_dtype,
        heads=model.options.heads,
        shardings=None if mesh is None else tree_shardings(mesh, model.axes()),
    )
    if missing := [head for head in heads if head not in params]:
        raise ValueError(f"the checkpoint {path!r} has no {' and no '.join(missing)} head")
    return LoadedModel(model, params)


def load_params(model: Model, shapes: Tree, *, path: str, key: jax.Array) -> Tree:
    """Fill a tree of parameters: from a checkpoint what it has, at random what it lacks (new
    heads).

    Args:
        model: the model of these parameters; it also says how they are initialized.
        shapes: shapes with shardings; may be a part of the model's tree.
        path: directory or hub id of a Hugging Face checkpoint; "" = all at random.
        key: of the random weights.

    Returns:
        The same tree with arrays, each at its dtype and in its place.
    """
    wanted = flatten(shapes)
    codes = [name for name, leaf in wanted.items() if isinstance(leaf, Quantized)]
    loaded: dict[str, Any] = {}
    if path:
        # a tensor that is to be quantized is read alone, so that only one of them is ever held at
        # full size
        for names in ([name for name in wanted if name not in codes], *([name] for name in codes)):
            places = unflatten({name: wanted[name].sharding for name in names})
            _, params = hf.load(
                path,
                config=model.config,
                shardings=places,
                dtype=next(iter(wanted.values())).dtype,
                heads=model.options.heads,
                unembed=model.options.unembed,
                only=names,
            )
            loaded |= {name: _packed(leaf, wanted[name]) for name, leaf in flatten(params).items()}
    missing = {name: leaf for name, leaf in wanted.items() if name not in loaded}
    if missing:

        def draw(key: jax.Array) -> dict[str, Any]:
            drawn = flatten(model.init(key))
            return {
                name: _as(drawn[name].astype(leaf.dtype), leaf) for name, leaf in missing.items()
            }

        loaded |= jax.jit(draw, out_shardings=jax.tree.map(lambda x: x.sharding, missing))(key)
    return unflatten({name: loaded[name] for name in wanted})


def _as(kernel: jax.Array, leaf: Any) -> Any:
    return quantize(kernel, leaf) if isinstance(leaf, Quantized) else kernel


def _packed(kernel: jax.Array, leaf: Any) -> Any:
    if not isinstance(leaf, Quantized):
        return kernel
    places = jax.tree.map(lambda x: x.sharding, leaf)
    return jax.block_until_ready(
        jax.jit(functools.partial(quantize, like=leaf), out_shardings=places)(kernel)
    )


def load_frozen(
    spec: StepSpec, specs: StateSpecs, *, path: str, reference_path: str = "", seed: int = 0
) -> Tree:
    """Load or draw the weights that are not trained.

    Args:
        spec: what the step is compiled from.
        specs: from ``make_state_specs``.
        path: checkpoint of the starting weights; "" = random.
        reference_path: checkpoint of the reference, where it is another one.
        seed: of random weights.
    """
    key = jax.random.key(seed)
    frozen = {"base": load_params(spec.base, specs.base, path=path, key=key) if specs.base else {}}
    if specs.reference is not None:
        frozen["reference"] = load_params(spec.base, specs.reference, path=reference_path, key=key)
    return frozen


def load_trained(
    spec: StepSpec,
    specs: StateSpecs,
    frozen: Tree,
    *,
    path: str,
    adapter_path: str = "",
    seed: int = 0,
) -> Tree:
    """Load or draw the trained parameters; they share no buffer with what is frozen, so the state
    can be donated.

    Args:
        spec: what the step is compiled from.
        specs: from ``make_state_specs``.
        frozen: from ``load_frozen``.
        path: checkpoint of the starting weights; "" = random.
        adapter_path: PEFT adapter to start from; "" = a fresh one.
        seed: of random weights.
    """
    key = jax.random.key(seed)
    if spec.policy.options.lora is None:
        return load_params(spec.policy, specs.trained, path=path, key=key)
    shapes = flatten(specs.trained)
    adapter = {
        name: leaf for name, leaf in shapes.items() if name.split("/")[-1].startswith("lora_")
    }
    if adapter_path:
        given = flatten(peft.load(adapter_path, spec.policy.config)[1])
        trained = {
            name: _spread(given[name], leaf) for name, leaf in shapes.items() if name in given
        }
    else:

        def draw(base: Tree, key: jax.Array) -> dict[str, jax.Array]:
            drawn = flatten(spec.policy.init_adapter(key, base))
            return {name: drawn[name].astype(leaf.dtype) for name, leaf in adapter.items()}

        places = {name: leaf.sharding for name, leaf in adapter.items()}
        trained = jax.jit(draw, out_shardings=places)(frozen["base"], key)
    heads = unflatten({name: leaf for name, leaf in shapes.items() if name not in trained})
    return merge(
        unflatten(trained), load_params(spec.policy, heads, path=path, key=key) if heads else {}
    )


def _spread(value: np.ndarray, leaf: Any) -> jax.Array:
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: value[index].astype(leaf.dtype)
    )


def save_policy(policy: Model, folder: str, params: Tree) -> None:
    """Write a policy's weights for a server: adapters merged, scalar heads left out; the tokenizer
    stays as it is."""
    merged = fold(params, policy.options.lora) if policy.options.lora is not None else params
    headless = {name: leaf for name, leaf in merged.items() if name not in policy.options.heads}
    hf.save(folder, policy.config, headless)

# SPDX-License-Identifier: Apache-2.0
"""A run put together: its models, its trees of parameters with their places, and the weights that
fill them.

                     full fine-tune            low-rank adapters            nothing frozen needed (sft, reward, simpo)
    state.params     all parameters            adapters and heads           all parameters
    frozen.base      the starting weights      the starting weights,        {} (what config.model.freeze names, if any)
                                               quantized if asked for
    reference        frozen.base               frozen.base                  none
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from align_jax.core.tree import flatten, unflatten
from align_jax.interop import hf, peft
from align_jax.losses.objective import Term
from align_jax.models.config import ModelConfig
from align_jax.models.lora import LoraConfig, merge
from align_jax.models.model import Model, build
from align_jax.models.quantize import Quantized, quantize, quantized_shapes
from align_jax.training.partitioning import (
    abstract_params,
    abstract_state,
    check_divisible,
    trainable,
)
from align_jax.training.steps import StepSpec, init_state

Tree = Any


class Models(NamedTuple):
    """The policy (with its adapter and heads) and the base alone, which is the reference."""

    policy: Model
    base: Model


class StateSpecs(NamedTuple):
    """What lies where: shapes with shardings."""

    trained: Tree  # the trained parameters
    base: Tree  # frozen["base"], {} where nothing frozen is needed
    reference: Tree | None  # frozen["reference"], where it is another checkpoint
    state: Tree

    @property
    def frozen(self) -> dict[str, Tree]:
        """The second argument of every step."""
        return {"base": self.base} | (
            {} if self.reference is None else {"reference": self.reference}
        )


def make_models(
    config: ModelConfig,
    terms: Sequence[Term],
    *,
    compute_dtype: str,
    remat: str,
    attention: str,
    lora: LoraConfig | None = None,
    value_head: str = "value",
    unembed: bool = False,
) -> Models:
    """Build the policy and the base for these objectives.

    Args:
        config: what the model is.
        terms: the objectives; a term that needs scores or values brings that head.
        compute_dtype, remat, attention: as ``models.model.build`` takes them.
        lora: the policy's adapter.
        value_head: the head for objectives with values.
        unembed: keep the output head even where no term looks at log-probabilities (the policy will
            generate).
    """
    needs = {need for term in terms for need in term.needs}
    heads = (("score",) if "scores" in needs else ()) + ((value_head,) if "values" in needs else ())
    unembed = unembed or any(term.needs != ("scores",) for term in terms)
    shared = dict(compute_dtype=compute_dtype, remat=remat, attention=attention, unembed=unembed)
    return Models(build(config, lora=lora, heads=heads, **shared), build(config, **shared))


def make_state_specs(
    spec: StepSpec,
    mesh: Mesh,
    *,
    param_dtype: str,
    frozen_dtype: str,
    freeze: Sequence[str] = (),
    other_reference: bool = False,
    with_reference: bool | None = None,
    quantization: str = "",
) -> StateSpecs:
    """Say what is trained, what is frozen, and where each lies.

    Args:
        spec: what the step is compiled from.
        mesh: the mesh.
        param_dtype: of what is trained.
        frozen_dtype: of what is not.
        freeze: patterns of parameters that are not trained.
        other_reference: the reference is another checkpoint than the starting weights.
        with_reference: whether the reference's weights are needed (not where its log-probabilities
            are cached); None: where some objective compares with a reference.
        quantization: "int8" or "nf4": hold the base's linear maps so (another checkpoint's
            reference stays as it is).

    Raises:
        ValueError: the mesh does not divide a parameter, or its blocks; nothing is left to train.
    """
    axes = spec.policy.axes()
    adapter = spec.policy.options.lora is not None
    trained, rest = trainable(
        spec.policy.shapes(jnp.dtype(param_dtype)), adapter=adapter, freeze=freeze
    )
    base_shapes = spec.base.shapes(jnp.dtype(frozen_dtype))
    with_reference = spec.wants_reference if with_reference is None else with_reference
    whole = with_reference and not other_reference and not spec.sync_every_steps
    base_leaves = flatten(base_shapes)
    if not whole:  # what is trained is not needed beside itself
        base_leaves = {path: leaf for path, leaf in base_leaves.items() if path in flatten(rest)}
    trained = abstract_params(mesh, trained, axes)
    base = abstract_params(mesh, unflatten(base_leaves), axes)
    reference = (
        abstract_params(mesh, base_shapes, axes) if with_reference and other_reference else None
    )
    check_divisible(trained)
    check_divisible(base)
    base = quantized_shapes(base, quantization) if quantization else base
    return StateSpecs(trained, base, reference, abstract_state(spec, trained, mesh))


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


def first_state(spec: StepSpec, specs: StateSpecs, trained: Tree) -> Tree:
    """Make the state of step 0 in its place on the mesh; the trained parameters' buffers are given
    away."""
    shardings = jax.tree.map(lambda x: x.sharding, specs.state)
    return jax.jit(functools.partial(init_state, spec), donate_argnums=0, out_shardings=shardings)(
        trained
    )


def count(tree: Tree) -> int:
    """Return the number of parameters of a tree."""
    return sum(leaf.size for leaf in flatten(tree).values())

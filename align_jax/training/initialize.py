# SPDX-License-Identifier: Apache-2.0
"""What a run's steps are made of before any weight is read: its models, and what lies where.

                 full fine-tune         low-rank adapters      no reference (sft, reward, simpo)
state.params     all parameters         adapters and heads     all parameters
frozen.base      the starting weights   the starting weights   {}, or what model.freeze names
reference        frozen.base            frozen.base            none
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from align_jax.core.options import ModelOptions, ReferenceOptions
from align_jax.core.tree import flatten, unflatten
from align_jax.losses.objective import Term
from align_jax.models.config import ModelConfig
from align_jax.models.lora import LoraConfig
from align_jax.models.model import Model, build
from align_jax.models.quantize import quantized_shapes
from align_jax.training.partitioning import (
    abstract_params,
    abstract_state,
    check_divisible,
    trainable,
)
from align_jax.training.steps import StepSpec, init_state

Tree = Any


class Models(NamedTuple):
    """The policy (with its adapter and heads), the base alone, and the reference where it is
    another model than the base."""

    policy: Model
    base: Model
    other: Model | None = None


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
    options: ModelOptions,
    lora: LoraConfig | None = None,
    *,
    unembed: bool = False,
    reference: ModelConfig | None = None,
) -> Models:
    """Build the models for these objectives.

    Args:
        config: what the model is.
        terms: the objectives; a term that needs scores or values brings that head.
        options: how it is computed, and which head gives values.
        lora: the policy's adapter.
        unembed: keep the output head even where no term looks at log-probabilities (the policy will
            generate).
        reference: what the reference is, where it is another model.
    """
    needs = {need for term in terms for need in term.needs}
    scored = bool({"scores", "step_scores"}.intersection(needs))
    heads = ("score",) * scored + (options.value_head,) * ("values" in needs)
    make = functools.partial(
        build,
        compute_dtype=own_dtype(options.compute_dtype),
        remat=options.remat,
        attention=options.attention,
        unembed=unembed or not all(term.scores_alone for term in terms),
    )
    other = None if reference is None else make(reference)
    return Models(make(config, lora=lora, heads=heads), make(config, beside=lora), other)


def own_dtype(name: str) -> str:
    """Return the type that a config names; what "auto" is on this platform."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def make_state_specs(
    spec: StepSpec,
    mesh: Mesh,
    model: ModelOptions,
    reference: ReferenceOptions,
    with_reference: bool | None = None,
) -> StateSpecs:
    """Say what is trained, what is frozen, and where each lies.

    Args:
        spec: what the step is compiled from.
        mesh: the mesh.
        model: its ``param_dtype``, ``freeze`` and ``quantize`` (of the base's linear maps alone).
        reference: its ``dtype`` (of all that is frozen).
        with_reference: whether the reference's weights are needed (not where its log-probabilities
            are cached); None: where some objective compares with a reference.

    Raises:
        ValueError: the mesh does not divide a parameter, or its blocks; nothing is left to train.
    """
    axes = spec.policy.axes()
    lora = spec.policy.options.lora
    trained, rest = trainable(
        spec.policy.shapes(model.param_dtype),
        spec.policy.roles(),
        adapter=lora is not None,
        freeze=model.freeze,
        whole=() if lora is None else lora.whole,
    )
    frozen_dtype = own_dtype(reference.dtype)
    base_shapes = spec.base.shapes(frozen_dtype)
    with_reference = spec.wants_reference if with_reference is None else with_reference
    whole = with_reference and spec.other is None and not spec.sync_every_steps
    base_leaves = flatten(base_shapes)
    if not whole:  # what is trained is not needed beside itself
        base_leaves = {path: leaf for path, leaf in base_leaves.items() if path in flatten(rest)}
    trained = abstract_params(mesh, trained, axes)
    base = abstract_params(mesh, unflatten(base_leaves), axes)
    other = None
    if with_reference and spec.other is not None:
        shapes = spec.reference.shapes(frozen_dtype)
        other = abstract_params(mesh, shapes, spec.reference.axes())
        check_divisible(other)
    check_divisible(trained)
    check_divisible(base)
    if model.quantize:
        base = quantized_shapes(base, model.quantize, spec.base.roles())
    return StateSpecs(trained, base, other, abstract_state(spec, trained, mesh))


def first_state(
    spec: StepSpec, specs: StateSpecs, trained: Tree, reference: Tree | None = None
) -> Tree:
    """Make the state of step 0 in its place on the mesh.

    Args:
        spec: what the step is compiled from.
        specs: what lies where.
        trained: the trained parameters, whose buffers are given away.
        reference: where a moving reference starts; None: where the policy does.
    """
    shardings = jax.tree.map(lambda x: x.sharding, specs.state)
    made = jax.jit(functools.partial(init_state, spec), donate_argnums=0, out_shardings=shardings)
    return made(trained, reference)


def count(tree: Tree) -> int:
    """Return the number of parameters of a tree."""
    return sum(leaf.size for leaf in flatten(tree).values())

# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, on optax: schedule, clipping by the global norm, decay of matrices alone.

A row of ``OPTIMIZERS`` may be any optax transformation, masked and partitioned ones too: its state
is sharded by where the parameters stand in it (``state_shardings``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from align_jax.core import own
from align_jax.core.choose import choose
from align_jax.core.options import OptimizerOptions
from align_jax.core.tree import flatten
from align_jax.models.roles import Role, role_of

Tree = Any
Roles = Mapping[str, Any]  # a tree of Role, as ``Model.roles()``
Schedule = Callable[[Any], Any]  # step, counted from 0 -> learning rate

# ------------------------------------------------------------------------------ schedules


def constant(options: OptimizerOptions, steps: int) -> Schedule:
    """Stay at the peak."""
    return optax.constant_schedule(options.learning_rate)


def linear(options: OptimizerOptions, steps: int) -> Schedule:
    """Fall from the peak to ``final_fraction`` of it along a line."""
    peak = options.learning_rate
    return optax.linear_schedule(peak, options.final_fraction * peak, steps)


def cosine(options: OptimizerOptions, steps: int) -> Schedule:
    """Fall from the peak to ``final_fraction`` of it along half a cosine."""
    return optax.cosine_decay_schedule(options.learning_rate, steps, alpha=options.final_fraction)


# (options, steps after the warm-up) -> the rate there
SCHEDULES: Mapping[str, Callable[[OptimizerOptions, int], Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}


def make_schedule(options: OptimizerOptions, total_steps: int) -> Schedule:
    """Make the learning rate as a function of the step, counted from 0.

    A linear warm-up from ``peak / w`` at step 0 to the peak at step w - 1 (w = warm-up steps), so
    that no step is spent at zero; then the decay over the steps that are left.

    Raises:
        ValueError: an unknown schedule, or a warm-up longer than the run.
    """
    decay = choose(SCHEDULES, options.schedule, "config.optimizer.schedule")
    warmup = options.warmup_steps or round(options.warmup_fraction * total_steps)
    if warmup > total_steps:
        raise ValueError(
            f"config.optimizer.warmup_steps = {warmup} is longer than the run's {total_steps} steps"
        )
    after = decay(options, max(total_steps - warmup, 1))
    if not warmup:
        return after
    peak = options.learning_rate
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


# ------------------------------------------------------------------------------ optimizers


def by_role(roles: Roles, read: Callable[[Role, Any], Any]) -> Callable[[Tree], Tree]:
    """Return a function from a tree of parameters to what their roles say.

    Args:
        roles: the model's tree.
        read: (role, parameter) -> the leaf.

    Returns:
        The function; it raises a ValueError that names a parameter without a role.
    """
    known = flatten(roles)

    def leaf(path: tuple[Any, ...], parameter: Any) -> Any:
        return read(role_of(known, "/".join(str(key.key) for key in path)), parameter)

    return functools.partial(jax.tree_util.tree_map_with_path, leaf)


def _decayed(roles: Roles) -> Callable[[Tree], Tree]:
    return by_role(roles, lambda role, _: role.decayed)


def _kept_as(
    options: OptimizerOptions, make: Callable[..., optax.GradientTransformation]
) -> optax.GradientTransformation:
    """Make an optimizer whose first moment is kept in ``moment_dtype``; its updates are float32.

    The step rounds what is kept, up or down at random; optax would round it to the nearest, which a
    mean of many gradients gets stuck at: with Lion's 0.99, a fifth of it away.

    Args:
        options: the config's group.
        make: (mu_dtype) -> the optimizer.
    """
    kept = make(mu_dtype=jnp.dtype(options.moment_dtype))
    return optax.GradientTransformation(kept.init, make(mu_dtype=None).update)


def adamw(options: OptimizerOptions, rate: Schedule, roles: Roles) -> optax.GradientTransformation:
    """Make AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101)."""
    make = functools.partial(
        optax.adamw,
        rate,
        b1=options.b1,
        b2=options.b2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        mask=_decayed(roles),
    )
    return _kept_as(options, make)


def lion(options: OptimizerOptions, rate: Schedule, roles: Roles) -> optax.GradientTransformation:
    """Make Lion (Chen et al. 2023, arXiv 2302.06675)."""
    make = functools.partial(
        optax.lion,
        rate,
        b1=options.b1,
        b2=options.b2,
        weight_decay=options.weight_decay,
        mask=_decayed(roles),
    )
    return _kept_as(options, make)


def rmsprop(
    options: OptimizerOptions, rate: Schedule, roles: Roles
) -> optax.GradientTransformation:
    """Make RMSprop as PyTorch has it: decay 0.99, and epsilon outside the root."""
    return optax.chain(
        optax.scale_by_rms(decay=0.99, eps=options.eps, eps_in_sqrt=False),
        optax.add_decayed_weights(options.weight_decay, mask=_decayed(roles)),
        optax.scale_by_learning_rate(rate),
    )


def adafactor(
    options: OptimizerOptions, rate: Schedule, roles: Roles
) -> optax.GradientTransformation:
    """Make Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) without relative steps."""
    return optax.adafactor(
        rate,
        weight_decay_rate=options.weight_decay or None,
        weight_decay_mask=_decayed(roles),
        multiply_by_parameter_scale=False,
    )


def sgd(options: OptimizerOptions, rate: Schedule, roles: Roles) -> optax.GradientTransformation:
    """Make gradient descent with momentum ``b1``."""
    return optax.chain(
        optax.add_decayed_weights(options.weight_decay, mask=_decayed(roles)),
        optax.sgd(rate, momentum=options.b1),
    )


MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # of an update's entries: AdamW's, so that both share one rate and one decay


def muon(options: OptimizerOptions, rate: Schedule, roles: Roles) -> optax.GradientTransformation:
    """Make Muon for the matrices between hidden states, AdamW for all else.

    The momentum of a matrix is orthogonalized as the map that it is, all heads together, each layer
    and expert by itself.  Norms, biases, embeddings and the output heads go by AdamW, whose rate
    and decay serve both (Liu et al. 2025, Muon is Scalable for LLM Training, arXiv 2502.16982,
    section 2.2).
    """

    def axes(role: Role, parameter: Any) -> optax.contrib.MuonDimensionNumbers:
        outputs = parameter.ndim - role.leading - role.inputs
        first = -role.inputs - outputs  # from the end, and so in a layer too
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(first, -outputs)), tuple(range(-outputs, 0))
        )

    layer = jax.tree.map(lambda role: dataclasses.replace(role, leading=role.leading - 1), roles)
    make = functools.partial(
        optax.contrib.muon,
        rate,
        beta=MUON_MOMENTUM,
        weight_decay=options.weight_decay,
        muon_weight_dimension_numbers=by_role(layer, axes),
        consistent_rms=MUON_RMS,
    )
    matrices = _kept_as(options, make)
    labels = by_role(roles, lambda role, _: "muon" if role.hidden_matrix else "adamw")
    parts = {"muon": layer_by_layer(matrices), "adamw": adamw(options, rate, roles)}
    return optax.partition(parts, labels)


def layer_by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let a transformation see one layer after another of parameters that are stacked by layers.

    What it gathers of a matrix to multiply it, each device then holds of one layer at a time.
    """

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        names = flatten(updates)
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        stacked = [parameter_of(path, names) is not None for path, _ in leaves]

        def step(_: Any, layer: Tree) -> tuple[Tree, Tree]:
            updates, params, own = layer
            own = iter(own)
            here = [next(own) if one else leaf for one, (_, leaf) in zip(stacked, leaves)]
            updates, after = inner.update(updates, jax.tree.unflatten(structure, here), params)
            kept, shared = _divided(jax.tree.leaves(after), stacked)
            return shared, (updates, kept)

        # counts and the like move on once: each layer starts from what they were
        kept, shared = _divided([leaf for _, leaf in leaves], stacked)
        shared, (updates, kept) = jax.lax.scan(step, shared, (updates, params, kept))
        mine, others = iter(kept), iter(shared)
        found = [next(mine) if one else next(others) for one in stacked]
        return updates, jax.tree.unflatten(structure, found)

    return optax.GradientTransformation(inner.init, update)


def _divided(leaves: Sequence[Any], chosen: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    pairs = list(zip(leaves, chosen))
    return [leaf for leaf, one in pairs if one], [leaf for leaf, one in pairs if not one]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A row of the table.

    Attributes:
        make: (options, schedule, the model's roles) -> any optax transformation.
        takes: its options beside those that all have; another one away from its default is an
            error.
    """

    make: Callable[[OptimizerOptions, Schedule, Roles], optax.GradientTransformation]
    takes: tuple[str, ...]


OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(adamw, ("weight_decay", "b1", "b2", "eps", "moment_dtype")),
    "lion": Optimizer(lion, ("weight_decay", "b1", "b2", "moment_dtype")),
    "rmsprop": Optimizer(rmsprop, ("weight_decay", "eps")),
    "adafactor": Optimizer(adafactor, ("weight_decay",)),
    "sgd": Optimizer(sgd, ("weight_decay", "b1")),
    "muon": Optimizer(muon, ("weight_decay", "b1", "b2", "eps", "moment_dtype")),
}


def _of_function(make: Callable[..., optax.GradientTransformation]) -> Optimizer:
    """Make a row of a user's function of (options, schedule, roles); it may read every option."""
    return Optimizer(make, tuple(field.name for field in dataclasses.fields(OptimizerOptions)))


def make_optimizer(
    options: OptimizerOptions, schedule: Schedule, roles: Roles
) -> optax.GradientTransformation:
    """Make the optimizer; gradients are clipped by the norm over all parameters of all devices.

    Args:
        options: the config's group.
        schedule: from ``make_schedule``.
        roles: the policy's tree of roles.

    Raises:
        ValueError: an unknown name; an option that this optimizer does not have.
    """
    row = own.row(OPTIMIZERS, options.name, "config.optimizer.name", _of_function)
    others = {name for other in OPTIMIZERS.values() for name in other.takes} - set(row.takes)
    foreign = [
        field.name
        for field in dataclasses.fields(options)
        if field.name in others and getattr(options, field.name) != field.default
    ]
    if foreign:
        raise ValueError(
            f"optimizer {options.name!r} has no "
            + ", ".join(f"config.optimizer.{name}" for name in foreign)
            + f"; it takes {list(row.takes)}"
        )
    transform = row.make(options, schedule, roles)
    if not options.clip_norm:
        return transform
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), transform)


# ------------------------------------------------------------------------------ its state


def parameter_of(path: tuple[Any, ...], parameters: Container[str]) -> str | None:
    """Return the parameter that a leaf of an optimizer's state belongs to; None: to none.

    It is the one with whose path the leaf's own ends, wrapped, masked or partitioned as the state
    may be.

    Args:
        path: of the leaf, as JAX gives it.
        parameters: "layers/mlp/up/kernel"-like paths.
    """
    keys = [str(key.key) if isinstance(key, jax.tree_util.DictKey) else "" for key in path]
    ends = ("/".join(keys[start:]) for start in range(len(keys)))  # the longest first
    return next((end for end in ends if end in parameters), None)


def state_shardings(
    optimizer: optax.GradientTransformation, params: Tree, shardings: Tree, mesh: Mesh
) -> Tree:
    """Shard the optimizer's state as its parameters, whatever trees it keeps of them.

    Where a leaf has another shape than its parameter (factored moments), and where it belongs to
    none (counts, hyperparameters), it is replicated.

    Args:
        optimizer: the transformation.
        params: the tree of trained parameters' shapes.
        shardings: their shardings, the same tree.
        mesh: the mesh.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    own, shapes = flatten(shardings), flatten(params)

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = parameter_of(path, own)
        return own[name] if name and leaf.shape == shapes[name].shape else replicated

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(optimizer.init, params))

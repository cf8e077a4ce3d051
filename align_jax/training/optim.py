# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, on optax: schedule, clipping by the global norm, decay masked off norms and
biases."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from align_jax.core.choose import choose

Schedule = Callable[[Any], Any]
# Every parameter's own name is in exactly one of these: matrices decay, what scales or shifts a
# feature does not.
DECAYED = ("kernel", "tokens", "positions", "router", "gate", "up", "down", "lora_a", "lora_b")
NOT_DECAYED = ("scale", "bias", "lora_m")


def _decay_mask(params: Any) -> Any:
    """Tell for each parameter whether weight decay applies, by its name; an unknown name is an
    error."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = str(getattr(path[-1], "key", path[-1]))
        if (name in DECAYED) == (name in NOT_DECAYED):
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)}: its name {name!r} must be "
                "in exactly one of "
                "training.optim.DECAYED and NOT_DECAYED"
            )
        return name in DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def _adamw(
    rate: Schedule, *, weight_decay: float, b1: float, b2: float, eps: float, moment_dtype: str
) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=_decay_mask,
        mu_dtype=jnp.dtype(moment_dtype),
    )


def _lion(
    rate: Schedule, *, weight_decay: float, b1: float, b2: float, moment_dtype: str
) -> optax.GradientTransformation:
    return optax.lion(
        rate,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
        mask=_decay_mask,
        mu_dtype=jnp.dtype(moment_dtype),
    )


def _rmsprop(rate: Schedule, *, weight_decay: float, eps: float) -> optax.GradientTransformation:
    # PyTorch's: decay 0.99, and epsilon outside the root
    return optax.chain(
        optax.scale_by_rms(decay=0.99, eps=eps, eps_in_sqrt=False),
        optax.add_decayed_weights(weight_decay, mask=_decay_mask),
        optax.scale_by_learning_rate(rate),
    )


def _adafactor(rate: Schedule, *, weight_decay: float) -> optax.GradientTransformation:
    return optax.adafactor(
        rate,
        weight_decay_rate=weight_decay or None,
        weight_decay_mask=_decay_mask,
        multiply_by_parameter_scale=False,
    )


def _sgd(rate: Schedule, *, weight_decay: float, b1: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=_decay_mask), optax.sgd(rate, momentum=b1)
    )


OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "rmsprop": _rmsprop,
    "adafactor": _adafactor,
    "sgd": _sgd,
}

_DECAYS: Mapping[str, Callable[[float, float, int], Schedule]] = {
    "constant": lambda peak, final, steps: optax.constant_schedule(peak),
    "linear": lambda peak, final, steps: optax.linear_schedule(peak, final * peak, steps),
    "cosine": lambda peak, final, steps: optax.cosine_decay_schedule(peak, steps, alpha=final),
}


def make_schedule(
    *,
    learning_rate: float,
    schedule: str,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_fraction: float = 0.0,
    final_fraction: float = 0.0,
) -> Schedule:
    """Make the learning rate as a function of the step, counted from 0.

    A linear warm-up from ``peak / w`` at step 0 to the peak at step w - 1 (w = warm-up steps), so
    that no step is spent at zero; then the decay over the steps that are left.

    Raises:
        ValueError: an unknown schedule, or a warm-up longer than the run.
    """
    decay = choose(_DECAYS, schedule, "config.optimizer.schedule")
    warmup = warmup_steps or round(warmup_fraction * total_steps)
    if warmup > total_steps:
        raise ValueError(
            f"config.optimizer.warmup_steps = {warmup} is longer than the run's {total_steps} steps"
        )
    after = decay(learning_rate, final_fraction, max(total_steps - warmup, 1))
    if not warmup:
        return after
    ramp = optax.linear_schedule(learning_rate / warmup, learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    schedule: Schedule,
    *,
    name: str,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    moment_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Make the optimizer of this name; gradients are clipped by the norm over all parameters of all
    devices.

    Raises:
        ValueError: an unknown name, with the nearest known one; or a setting that this optimizer
            does not have.
    """
    make = choose(OPTIMIZERS, name, "config.optimizer.name")
    options = dict(weight_decay=weight_decay, b1=b1, b2=b2, eps=eps, moment_dtype=moment_dtype)
    known, mine = inspect.signature(make_optimizer).parameters, inspect.signature(make).parameters
    foreign = [
        key for key, value in options.items() if key not in mine and value != known[key].default
    ]
    if foreign:
        raise ValueError(
            f"optimizer {name!r} has no "
            + ", ".join(f"config.optimizer.{key}" for key in foreign)
            + f"; it takes {[key for key in options if key in mine]}"
        )
    transform = make(schedule, **{key: value for key, value in options.items() if key in mine})
    return optax.chain(optax.clip_by_global_norm(clip_norm), transform) if clip_norm else transform


def state_shardings(
    optimizer: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh
) -> Any:
    """Shard the optimizer's state as its parameters; what has another shape (counts, factored
    moments) is replicated.

    Args:
        optimizer: the transformation.
        params: the tree of trained parameters' shapes.
        shardings: their shardings, the same tree.
        mesh: the mesh.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    return optax.tree_map_params(
        optimizer,
        lambda leaf, sharding, param: sharding if leaf.shape == param.shape else replicated,
        jax.eval_shape(optimizer.init, params),
        shardings,
        params,
        transform_non_params=lambda _: replicated,
    )

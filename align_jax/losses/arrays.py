# SPDX-License-Identifier: Apache-2.0
"""Objectives on plain arrays of log-probabilities: for notebooks, tests and other people's training
loops.

The arrays become a Batch and Outputs of one row a response, and go through the same ``total`` as in
training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from align_jax.core.choose import nearest
from align_jax.core.metrics import divide
from align_jax.core.schema import Batch, Outputs
from align_jax.losses.objective import Inputs, Term, data_kind
from align_jax.losses.reduction import own_statistics, total

POSITIONAL = {  # what positional arguments mean, by kind of data
    "completions": ("policy",),
    "pairs": ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"),
    "ranked": ("policy",),
    "unpaired": ("policy", "label", "reference"),
    "scored": ("policy", "scores"),
    "stepwise": ("policy", "step_labels"),
    "rollout": ("policy", "old_token_logps", "advantages"),
}
TOKEN_COLUMNS = (
    "guide_token_logps",
    "old_token_logps",
    "sampler_token_logps",
    "sampler_ratio",
    "advantages",
    "returns",
    "old_values",
    "step_labels",
)
COLUMNS = ("weight", "label", "scores", "margin", *TOKEN_COLUMNS)
FIELDS = ("entropy", "log_sum_sq", "kl", "divergence", "values")


class Evaluated(NamedTuple):
    """What an objective says of a batch.

    Attributes:
        losses: [B]; for K terms [K, B].
        rewards: β (P - R) of each response, [B, R], no gradient (β = 1 where the objective has
            none).
        weights: shaped as losses.
        loss: the scalar to be minimized.
        metrics: name -> mean.
    """

    losses: Float[Array, "*K B"]
    rewards: Float[Array, "B R"]
    weights: Float[Array, "*K B"]
    loss: Float[Array, ""]
    metrics: dict[str, Any]


def make_batch(
    policy: Any, *, responses: int, mask: Any = None, lengths: Any = None, **columns: Any
) -> tuple[Batch, Outputs]:
    """Make a Batch and the policy's Outputs of log-probabilities.

    Args:
        policy: [B * R] sums or [B * R, T] token log-probabilities, nats.
        responses: R.
        mask: [B * R, T], true for response tokens; all by default.
        lengths: [B * R] tokens, where ``policy`` holds sums; 1 by default.
        columns: of ``COLUMNS``: fields of Batch; of ``FIELDS``: fields of Outputs, [B * R, T].

    Raises:
        ValueError: both a mask and lengths.
    """
    policy = jnp.asarray(policy, jnp.float32)
    sums = policy.ndim == 1
    if (mask is not None and sums) or (lengths is not None and not sums):
        raise ValueError(
            "give mask [.., T] with token log-probabilities, or lengths with their sums"
        )
    tokens = policy[:, None] if sums else policy  # [N, T]
    rows, length = tokens.shape
    groups = rows // responses
    loss_mask = jnp.ones((rows, length), bool) if mask is None else jnp.asarray(mask, bool)
    counts = (
        loss_mask.sum(axis=1, dtype=jnp.int32)
        if lengths is None
        else jnp.asarray(lengths, jnp.int32)
    )
    indices = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    weight = columns.pop("weight", None)
    fields = {
        name: jnp.asarray(columns.pop(name), jnp.float32)
        for name in FIELDS
        if columns.get(name) is not None
    }
    token_logps = jnp.where(loss_mask, tokens, 0.0)
    zeros = jnp.zeros((rows, length), jnp.int32)
    known: dict[str, Any] = {
        name: None if value is None else jnp.asarray(value) for name, value in columns.items()
    }
    batch = Batch(
        tokens=zeros,
        segment_ids=zeros + 1,
        positions=indices,
        source_index=jnp.maximum(indices - 1, 0),
        loss_mask=loss_mask,
        slot=zeros,
        loss_index=jnp.sort(jnp.where(loss_mask, indices, length), axis=1),
        lengths=counts.reshape(groups, responses),
        weight=jnp.ones(groups) if weight is None else jnp.asarray(weight, jnp.float32),
        **known,
    )
    return batch, Outputs(
        token_logps, token_logps.sum(axis=1).reshape(groups, responses), batch.lengths, **fields
    )


def _flat(x: Any, rows: int, tokens: bool) -> Any:
    """Reshape to one row a response: [B * R, T] or [B * R]."""
    return None if x is None else jnp.reshape(jnp.asarray(x), (rows, -1) if tokens else (rows,))


def _stack(arrays: dict[str, Any], name: str) -> Any:
    chosen, rejected = arrays.pop(f"{name}_chosen", None), arrays.pop(f"{name}_rejected", None)
    if (chosen is None) != (rejected is None):
        raise ValueError(f"{name}: give both chosen and rejected, or neither")
    if chosen is None:
        return arrays.pop(name, None)
    if name in arrays:
        raise ValueError(f"{name}: give it stacked or as chosen and rejected, not both")
    return jnp.stack([jnp.asarray(chosen), jnp.asarray(rejected)], axis=1)


def make_inputs(terms: tuple[Term, ...], kind: str, arrays: dict[str, Any]) -> Inputs:
    """Make what objectives see of arrays by name: see ``losses.jitted``.

    Raises:
        ValueError: no policy, or one side of a pair alone.
    """
    policy, reference = (_stack(arrays, name) for name in ("policy", "reference"))
    mask, lengths = _stack(arrays, "mask"), _stack(arrays, "lengths")
    text = arrays.pop("text", None)
    if policy is None:
        raise ValueError("the policy's log-probabilities (or a reward model's scores) are missing")
    size = jnp.shape(policy)
    grouped = kind in ("pairs", "ranked") or (kind == "rollout" and len(size) == 3)
    responses = size[1] if grouped else 1
    rows, tokens = size[0] * responses, kind == "rollout" or len(size) == (3 if grouped else 2)
    others = {name: arrays.pop(f"mismatched_{name}", None) for name in ("policy", "reference")}
    for name in (*FIELDS, *TOKEN_COLUMNS):
        # a ratio of each sequence stays one of each
        if name in arrays and (name != "sampler_ratio" or jnp.shape(arrays[name]) != size[:2]):
            arrays[name] = _flat(arrays[name], rows, True)
    shape = {
        "responses": responses,
        "mask": _flat(mask, rows, True),
        "lengths": _flat(lengths, rows, False),
    }
    batch, outputs = make_batch(_flat(policy, rows, tokens), **shape, **arrays)
    if terms[0].needs == ("scores",):
        outputs = outputs._replace(scores=outputs.logps)
    if terms[0].needs == ("step_scores",):
        outputs = outputs._replace(step_scores=outputs.token_logps)
    base = None if reference is None else make_batch(_flat(reference, rows, tokens), **shape)[1]
    if text is not None:
        text, said = make_batch(text, responses=1)
        return Inputs(batch._replace(text=text), outputs, base, text=said)
    if others["policy"] is None:
        return Inputs(batch, outputs, base)
    other, first = make_batch(others["policy"], responses=1)
    mismatched = first, make_batch(others["reference"], responses=1)[1]
    return Inputs(batch._replace(mismatched=other), outputs, base, mismatched)


def evaluate(terms: tuple[Term, ...], inputs: Inputs) -> Evaluated:
    """Evaluate a weighted sum of objectives on a whole batch, at the first step of training."""
    stats, _ = own_statistics(terms, inputs)
    found = total(terms, inputs, stats)
    ratios = inputs.policy.logps
    if inputs.reference is not None:
        ratios = ratios - inputs.reference.logps
    rewards = jax.lax.stop_gradient(getattr(terms[0].loss, "beta", 1.0) * ratios)
    losses, weights = found.losses, found.weights
    if len(terms) == 1:
        losses, weights = losses[0], weights[0]
    return Evaluated(losses, rewards, weights, found.loss, divide(found.metrics, empty=0.0))


def compile_terms(terms: tuple[Term, ...]) -> Callable[..., Evaluated]:
    """Compile a weighted sum of objectives into a function of plain arrays; see
    ``losses.jitted``."""
    kind = data_kind(terms)
    known = set(POSITIONAL[kind]) | {"policy", "reference", "mask", "lengths", *COLUMNS, *FIELDS}
    if kind == "rollout":
        known.add("text")
    if kind == "pairs":
        known |= {
            f"{name}_{side}" for name in ("mask", "lengths") for side in ("chosen", "rejected")
        }
    if any(term.objective.mismatched for term in terms):
        known |= {"mismatched_policy", "mismatched_reference"}

    @jax.jit
    def compiled(arrays: dict[str, Any]) -> Evaluated:
        return evaluate(terms, make_inputs(terms, kind, arrays))

    def run(*args: Any, **arrays: Any) -> Evaluated:
        names = ("policy",) if len(args) == 1 and kind == "pairs" else POSITIONAL[kind]
        if len(args) > len(names):
            raise TypeError(f"expected at most {len(names)} arrays {names}, got {len(args)}")
        given = dict(zip(names, args)) | arrays
        if unknown := sorted(given.keys() - known):
            raise TypeError(f"unknown array {unknown[0]!r}{nearest(unknown[0], known)}")
        as_arrays = {
            name: np.asarray(x) if isinstance(x, (list, tuple)) else x for name, x in given.items()
        }
        return compiled({name: x for name, x in as_arrays.items() if x is not None})

    return run


def dpo_from_indices(
    policy_logps: Float[Array, "C"],
    reference_logps: Float[Array, "C"],
    chosen: Int[Array, "B"],
    rejected: Int[Array, "B"],
    beta: float = 0.1,
) -> tuple[Float[Array, "B"], Float[Array, "C"]]:
    """Compute DPO on a vector of completions, pairs named by two index vectors: the paper's own
    form.

    Args:
        policy_logps: [C] log-probabilities of completions under the policy, nats.
        reference_logps: [C] under the reference.
        chosen: [B] indices of each pair's chosen completion.
        rejected: [B] indices of each pair's rejected completion; a completion may stand in several
            pairs.
        beta: per nat.

    Returns:
        Losses [B] and rewards [C] = β (policy - reference), without gradient.

    References:
        Rafailov et al. 2023, arXiv 2305.18290, appendix B.

    >>> losses, rewards = dpo_from_indices(
    ...     jnp.array([-10.0, -12.0, -9.0]), jnp.array([-11.0, -11.0, -9.0]),
    ...     jnp.array([0, 2]), jnp.array([1, 1]), beta=0.5)
    >>> [round(x, 4) for x in losses.tolist()], rewards.tolist()
    ([0.3133, 0.4741], [0.5, -0.5, 0.0])
    """
    ratios = policy_logps - reference_logps
    z = beta * (ratios[chosen] - ratios[rejected])
    return -jax.nn.log_sigmoid(z), jax.lax.stop_gradient(beta * ratios)

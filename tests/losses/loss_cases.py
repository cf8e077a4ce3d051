# SPDX-License-Identifier: Apache-2.0
"""Random problems for any row of the table, and one way to evaluate it: shared by the tests of the
losses."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align_jax import losses
from align_jax.core.schema import Batch, Outputs
from align_jax.losses import Inputs
from align_jax.losses.logprobs import sum_by_slot
from align_jax.losses.options import declared

RESPONSES = {
    "completions": 1,
    "pairs": 2,
    "ranked": 4,
    "unpaired": 1,
    "scored": 1,
    "stepwise": 1,
    "rollout": 3,
}
# A value other than the default for every option of the table, to be tried one at a time.  A new
# option fails the tests until it has a line here; {"needs": other options} where it is not valid
# alone.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "beta": [{"beta": 0.7}],
    "on_policy": [{"on_policy": 0.5}],
    "seq_kd": [{"seq_kd": True}],
    "teacher_share": [{"teacher_share": 0.3}],
    "single_step": [{"single_step": False}],
    "length_normalization": [{"length_normalization": False}],
    "label_smoothing": [{"label_smoothing": 0.2}],
    "ld_alpha": [{"ld_alpha": 0.3}],
    "wpo": [{"wpo": True}],
    "temperature": [{"temperature": 2.0, "target": "scores"}],
    "steps": [{"steps": "last"}],
    "positive_weight": [{"positive_weight": 3.0}],
    "unbiased_kl": [{"unbiased_kl": True, "beta": 0.1}],
    "off_policy_threshold": [{"off_policy_threshold": 0.01}],
    "k_positive": [{"k_positive": 1.0}],
    "lambda_positive": [{"lambda_positive": 2.0}],
    "k_negative": [{"k_negative": 1.0}],
    "lambda_negative": [{"lambda_negative": 3.0}],
    "epsilon": [{"epsilon": 0.1}],
    "shift": [{"shift": 0.5}],
    "eta": [{"eta": 2.0}],
    "target": [{"target": "scores"}],
    "f_divergence": [{"f_divergence": kind} for kind in ("forward_kl", "js", "alpha")],
    "f_alpha": [{"f_divergence": "alpha", "f_alpha": 1.0}],
    "reference_free": [{"reference_free": True}],
    "sft_coef": [{"sft_coef": 0.5}],
    "humanline": [{"humanline": True}],
    "log_eps_p": [{"humanline": True, "log_eps_p": -0.1}],
    "log_eps_r": [{"humanline": True, "log_eps_r": 0.2}],
    "lengths": [{"lengths": "sum"}],
    "tau": [{"tau": 2.0}],
    "lam": [{"lam": 0.9}],
    "per": [{"per": "sequence"}],
    "dft": [{"dft": True}],
    "center_coef": [{"center_coef": 0.01}],
    "form": [
        {"form": form}
        for form in ("pairs", "best_of", "hinge", "ipo", "sum", "forward_kl", "square")
    ],
    "alpha": [{"alpha": 0.4}],
    "momentum": [{"momentum": 0.5}],
    "stop_gradient_chosen": [{"stop_gradient_chosen": False}],
    "gamma_beta_ratio": [{"gamma_beta_ratio": 0.3}],
    "delta": [{"delta": 2.0}],
    "density_ratio": [{"density_ratio": True}],
    "desirable_weight": [{"desirable_weight": 1.5}],
    "undesirable_weight": [{"undesirable_weight": 2.0}],
    "kl_scope": [{"kl_scope": "microbatch"}],
    "clip": [{"clip": 0.3}],
    "gamma": [{"gamma": 0.9}],
    "critic_coef": [{"critic_coef": 0.5}],
    "kl_coef": [{"kl_coef": 0.2}],
    "clip_form": [{"clip_form": "reciprocal"}],
    "kl_sign": [{"kl_sign": -1}],
    "critic_target": [{"critic_target": "gae"}],
    "reward": [{"reward": "score"}],
    "whiten": [{"whiten": False}],
    "value_clip": [{"value_clip": 0.05}],
    "vf_coef": [{"vf_coef": 1.0}],
    "entropy_coef": [{"entropy_coef": 0.1}],
    "ptx_coef": [{"ptx_coef": 0.5}],
    "loss_type": [{"loss_type": kind} for kind in ("bnpo", "dapo", "dr_grpo")]
    + [{"loss_type": "luspo", "importance": "sequence"}],
    "max_length": [{"loss_type": "dr_grpo", "max_length": 16}],
    "importance": [{"importance": "sequence"}, {"importance": "sequence_token"}],
    "top_entropy_quantile": [{"top_entropy_quantile": 0.5}],
    "dual_clip": [{"dual_clip": 1.1}],
    "cov_share": [{"cov_share": 0.3}],
    "cov_low": [{"cov_low": 0.1}],
    "cov_high": [{"cov_high": 2.0}],
    "cov_coef": [{"cov_coef": 0.5}],
    "epsilon_low": [{"epsilon_low": 0.1}],
    "entropy_target": [{"entropy_target": 9.0}],
    "entropy_step": [{"entropy_target": 9.0, "entropy_step": 0.5}],
    "epsilon_high": [{"epsilon_high": 0.3}],
    "tau_positive": [{"tau_positive": 1.2}],
    "tau_negative": [{"tau_negative": 0.9}],
}


def variants(name: str) -> list[dict[str, Any]]:
    """Return the defaults, then every option of an objective changed, one at a time."""
    row = losses.OBJECTIVES[name]
    found: list[dict[str, Any]] = [{}]
    for option in row.options:
        if row.rollout and option in declared(row.rollout):
            continue
        assert option in VARIANTS, (
            f"give {option!r}, an option of {name!r}, a line in loss_cases.VARIANTS"
        )
        for change in VARIANTS[option]:  # what is another objective's is left out
            own = {key: value for key, value in change.items() if key in row.options}
            if all(row.declared[key].accepts(value) for key, value in own.items()):
                found.append(own)
    return found


def make_outputs(
    batch: Batch, token_logps: Any, needs: tuple[str, ...] = (), seed: int = 0
) -> Outputs:
    """Make outputs of token log-probabilities, and random ones of the fields needed."""
    token_logps = jnp.where(batch.loss_mask, jnp.asarray(token_logps, jnp.float32), 0.0)
    rng = np.random.default_rng(seed)
    fields = {}
    for field in needs:
        shape = batch.lengths.shape if field == "scores" else batch.tokens.shape
        x = rng.normal(size=shape).astype(np.float32)
        x = (
            -np.abs(x)
            if field == "log_sum_sq"
            else np.abs(x)
            if field in ("kl", "divergence", "entropy")
            else x
        )
        fields[field] = (
            jnp.asarray(x) if field == "scores" else jnp.where(batch.loss_mask, jnp.asarray(x), 0.0)
        )
    return Outputs(token_logps, sum_by_slot(token_logps, batch), batch.lengths, **fields)


def make_batch(
    kind: str,
    groups: int = 4,
    length: int = 7,
    seed: int = 0,
    *,
    lengths: Any = None,
    label: Any = None,
) -> Batch:
    """Make a plain batch (one response a row) with every column that an objective of this kind may
    want."""
    rng = np.random.default_rng(seed)
    responses = RESPONSES[kind]
    rows = groups * responses
    counts = (
        rng.integers(1, length, rows)
        if lengths is None
        else np.broadcast_to(np.asarray(lengths), (rows,))
    )
    indices = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    start = rng.integers(0, length - counts + 1)[:, None]
    mask = (indices >= start) & (indices < start + counts[:, None])
    tokens = np.zeros((rows, length), np.int32)

    def draw():
        return jnp.asarray(np.where(mask, rng.normal(size=(rows, length)), 0).astype(np.float32))

    labels = (
        rng.integers(0, 2, groups).astype(bool)
        if label is None
        else np.broadcast_to(label, (groups,))
    )
    rollout = {
        "old_token_logps": -jnp.abs(draw()),
        "advantages": draw(),
        "returns": draw(),
        "old_values": draw(),
        "sampler_token_logps": -jnp.abs(draw()),
    }
    return Batch(
        tokens=jnp.asarray(tokens),
        segment_ids=jnp.asarray(tokens + 1),
        positions=jnp.asarray(indices),
        source_index=jnp.asarray(np.maximum(indices - 1, 0)),
        loss_mask=jnp.asarray(mask),
        slot=jnp.asarray(tokens),
        loss_index=jnp.asarray(np.sort(np.where(mask, indices, length), axis=1).astype(np.int32)),
        lengths=jnp.asarray(counts.reshape(groups, responses).astype(np.int32)),
        weight=jnp.ones(groups),
        label=jnp.asarray(labels) if kind in ("unpaired", "rollout") else None,
        scores=jnp.asarray(
            np.sort(rng.normal(size=(groups, responses)).astype(np.float32))[:, ::-1].copy()
        ),
        step_labels=jnp.asarray(np.where(mask, indices % 2, 0).astype(np.float32))
        if kind == "stepwise"
        else None,
        guide_token_logps=-jnp.abs(draw()) if kind == "pairs" else None,
        **(rollout if kind == "rollout" else {}),
    )


def make_problem(
    name: str, groups: int = 4, seed: int = 0, *, spread: float = 0.5, **shape: Any
) -> Inputs:
    """Make a random problem for an objective; ``spread`` is the size of a token's log-ratio, in
    nats."""
    row = losses.OBJECTIVES[name]
    batch = make_batch(row.data, groups, seed=seed, **shape)
    rng = np.random.default_rng(seed + 1)
    size = batch.tokens.shape
    base = -np.abs(rng.normal(size=size)) - 0.1
    needs = tuple(dict.fromkeys([*row.needs, "log_sum_sq", "entropy"]))
    policy = make_outputs(
        batch, np.minimum(base + spread * rng.normal(size=size), -1e-3), needs, seed
    )
    reference = make_outputs(batch, base)
    mismatched = None
    if row.mismatched:
        other = make_batch(row.data, groups, seed=seed + 2)
        batch = batch._replace(mismatched=other)
        x = -np.abs(rng.normal(size=size))
        mismatched = (make_outputs(other, x + 0.3), make_outputs(other, x))
    text = None
    if row.data == "rollout":
        rows = make_batch("completions", groups, seed=seed + 3)
        batch = batch._replace(text=rows)
        text = make_outputs(rows, -np.abs(rng.normal(size=rows.tokens.shape)) - 0.1)
    return Inputs(batch, policy, reference, mismatched, text=text)


def whole(terms: Any, problem: Inputs) -> Any:
    """Compute the Total of a whole batch in one piece."""
    if not any(term.reference for term in terms):
        problem = problem._replace(reference=None)
    stats, _ = losses.own_statistics(terms, problem)
    return losses.total(terms, problem, stats)


def total(terms: Any, problem: Inputs) -> jax.Array:
    """Compute the loss of a whole batch in one piece."""
    return whole(terms, problem).loss


def value_and_grad(terms: Any, problem: Inputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the loss and its gradient with respect to everything that the policy says.

    Not compiled: operation by operation the same few kernels serve every objective, which is far
    faster.
    """

    def f(said: dict[str, jax.Array]) -> jax.Array:
        said = dict(said)
        text = problem.text and problem.text._replace(token_logps=said.pop("text"))
        logps = sum_by_slot(said["token_logps"], problem.batch)
        policy = problem.policy._replace(logps=logps, **said)
        return total(terms, problem._replace(policy=policy, text=text))

    fields = ("token_logps", "scores", "step_scores", "values", "kl", "divergence", "entropy")
    text = {} if problem.text is None else {"text": problem.text.token_logps}
    return jax.value_and_grad(f)(
        {
            field: getattr(problem.policy, field)
            for field in fields
            if getattr(problem.policy, field) is not None
        }
        | text
    )


def split(tree: Any, parts: int) -> list[Any]:
    """Split the groups of a plain batch (or its outputs) into interleaved microbatches."""

    def take(x: jax.Array, part: int, groups: int) -> jax.Array:
        per = x.shape[0] // groups
        return x.reshape(groups // parts, parts, per, *x.shape[1:])[:, part].reshape(
            -1, *x.shape[1:]
        )

    groups = tree.lengths.shape[0]
    if getattr(tree, "text", None) is not None:  # a batch's text has groups of its own
        pairs = zip(split(tree._replace(text=None), parts), split(tree.text, parts))
        return [piece._replace(text=text) for piece, text in pairs]
    return [
        jax.tree.map(functools.partial(take, part=part, groups=groups), tree)
        for part in range(parts)
    ]


def in_microbatches(terms: Any, problem: Inputs, parts: int) -> jax.Array:
    """Compute the same loss as a step does: microbatch by microbatch, denominators and statistics
    first."""
    batches, policies, references = (
        split(x, parts) for x in (problem.batch, problem.policy, problem.reference)
    )
    mismatched = [None] * parts
    if problem.mismatched is not None:
        mismatched = list(zip(*(split(x, parts) for x in problem.mismatched)))
    texts = [None] * parts if problem.text is None else split(problem.text, parts)
    pieces = [
        Inputs(*piece, text=text)
        for *piece, text in zip(batches, policies, references, mismatched, texts)
    ]
    denominators = losses.weights(terms, problem.batch).sum(axis=1)
    found = [losses.batch_statistics(terms, piece) for piece in pieces]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *found)
    stats, _ = losses.reduce_statistics(terms, stacked, losses.first_running(terms))
    each = [jax.tree.map(operator.itemgetter(m), stats) for m in range(parts)]
    return sum(
        losses.total(terms, piece, own, denominators).loss for piece, own in zip(pieces, each)
    )

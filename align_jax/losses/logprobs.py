# SPDX-License-Identifier: Apache-2.0
"""From hidden states to token log-probabilities, without ever holding all logits.

    hidden [N, T, D] ──gather at loss positions──► [N, P, D] ──scan──► logits [N, c, V]
                                                                  ──► [N, P] ──► [N, T]

The output head is applied only where the loss mask asks.  Each chunk is rematerialized in the
backward pass, so neither pass holds more than one chunk of logits.  Log-sum-exp and all that
follows is float32: bfloat16 logits would cost about 0.01 nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from align_jax.core.schema import Batch, Outputs

TOKEN_FIELDS = (
    "entropy",
    "most_probable",
    "log_sum_sq",
    "kl",
    "divergence",
)  # what token_outputs computes when asked
WHOLE = frozenset({"kl", "divergence"})  # of them, what needs the reference's whole distributions

LEAST = -1e30  # a logit that is as good as -inf


class Divergence(NamedTuple):
    """A generalized Jensen-Shannon divergence of the reference q and the policy p.

        β = 0: KL(q || p)      β = 1: KL(p || q)
        between: β KL(q || m) + (1 - β) KL(p || m),  m = β q + (1 - β) p

    References:
        Agarwal et al. 2023, arXiv 2306.13649, equation 1.
    """

    beta: float = 0.5
    temperature: float = 1.0  # both logits are divided by it

    def __call__(
        self, logits: Float[Array, "N c V"], reference: Float[Array, "N c V"]
    ) -> Float[Array, "N c"]:
        """Compute it for each position, in nats."""
        # a token that is masked out by -inf would give NaN in the gradient of the mixture
        p, q = (
            jax.nn.log_softmax(jnp.maximum(x, LEAST) / self.temperature, axis=-1)
            for x in (logits, reference)
        )
        if self.beta in (0.0, 1.0):
            return _kl(q, p) if self.beta == 0 else _kl(p, q)
        m = jnp.logaddexp(q + math.log(self.beta), p + math.log1p(-self.beta))
        return self.beta * _kl(q, m) + (1.0 - self.beta) * _kl(p, m)


JENSEN_SHANNON = Divergence()


def _kl(p: Float[Array, "N c V"], q: Float[Array, "N c V"]) -> Float[Array, "N c"]:
    """Compute KL(p || q) of logarithms of probabilities; what p excludes counts nothing."""
    probability = jnp.exp(p)
    return (probability * jnp.where(probability > 0, p - q, 0.0)).sum(axis=-1)


def sum_by_slot(x: Float[Array, "N T"], batch: Batch) -> Float[Array, "B R"]:
    """Sum a per-token quantity over each response, by the loss mask.

    Args:
        x: [N, T] float32.
        batch: its ``loss_mask``, ``slot`` and ``lengths`` [B, R] say which token belongs to which
            response.

    Returns:
        [B, R] sums; 0 for a response without tokens.
    """
    masked = jnp.where(batch.loss_mask, x, 0.0)
    slots = batch.lengths.size // x.shape[0]
    if slots == 1:
        return masked.sum(axis=1).reshape(batch.lengths.shape)
    belongs = batch.slot[:, :, None] == jnp.arange(slots)[None, None]  # [N, T, S]
    return jnp.where(belongs, masked[:, :, None], 0.0).sum(axis=1).reshape(batch.lengths.shape)


def spread_to_tokens(x: Float[Array, "B R"], batch: Batch) -> Float[Array, "N T"]:
    """Give every loss token its response's value: the inverse direction of ``sum_by_slot``; 0
    elsewhere."""
    rows = x.reshape(batch.tokens.shape[0], -1)  # [B, R] -> [N, S]
    return jnp.where(batch.loss_mask, jnp.take_along_axis(rows, batch.slot, axis=1), 0.0)


def blank_outputs(batch: Batch) -> Outputs:
    """Return log-probabilities of 0: of a model that is not asked for any."""
    token_logps = jnp.zeros(batch.tokens.shape, jnp.float32)
    logps = jnp.zeros(batch.lengths.shape, jnp.float32)
    return Outputs(token_logps, logps, jnp.asarray(batch.lengths))


def at_sources(x: Float[Array, "N T"], batch: Batch) -> Float[Array, "N T"]:
    """Move what a head says at the index that predicts token t to index t; 0 where the loss mask is
    false."""
    return jnp.where(batch.loss_mask, jnp.take_along_axis(x, batch.source_index, axis=1), 0.0)


def at_last(x: Float[Array, "N T"], batch: Batch) -> Float[Array, "B R"]:
    """Take what a head says at each response's last real token.

    Raises:
        ValueError: the batch has no ``last_index``.
    """
    if batch.last_index is None:
        raise ValueError(
            "scores need batch.last_index [B, R], the index of each response's last token; it is "
            "None"
        )
    index = batch.last_index.reshape(x.shape[0], -1)  # [B, R] -> [N, S]
    return jnp.take_along_axis(x, index, axis=1).reshape(batch.last_index.shape)


def _statistics(
    logits: Float[Array, "N c V"],
    targets: Int[Array, "N c"],
    needs: Sequence[str],
    reference: Float[Array, "N c V"] | None,
    divergence: Divergence,
) -> dict[str, Float[Array, "N c"]]:
    """Compute what is asked of one chunk's distributions."""
    log_sum = jax.nn.logsumexp(logits, axis=-1)  # [N, c]
    # A comparison and a masked sum instead of a gather: it stays local where the vocabulary is
    # split over devices, and its gradient is a select instead of a scatter.
    chosen = jnp.arange(logits.shape[-1])[None, None] == targets[:, :, None]
    logit = jnp.where(chosen, logits, 0.0).sum(axis=-1)
    found = {"token_logps": logit - log_sum}
    if "most_probable" in needs:
        found["most_probable"] = (logit >= logits.max(axis=-1)).astype(jnp.float32)
    if "entropy" in needs:
        p = jnp.exp(logits - log_sum[:, :, None])
        found["entropy"] = log_sum - (p * jnp.where(p > 0, logits, 0.0)).sum(axis=-1)
    if "log_sum_sq" in needs:
        found["log_sum_sq"] = jax.nn.logsumexp(2.0 * logits, axis=-1) - 2.0 * log_sum
    if reference is None:
        return found
    reference = jax.lax.stop_gradient(reference)
    if reference.shape[-1] != logits.shape[-1]:  # compared over the tokens that both have
        logits = logits[..., : reference.shape[-1]]
        log_sum = jax.nn.logsumexp(logits, axis=-1)
    if "divergence" in needs:
        found["divergence"] = divergence(logits, reference)
    if "kl" in needs:
        q_log_sum = jax.nn.logsumexp(reference, axis=-1)
        q = jnp.exp(reference - q_log_sum[:, :, None])
        difference = jnp.where(q > 0, reference - logits, 0.0)
        found["kl"] = (q * difference).sum(axis=-1) - q_log_sum + log_sum
    return found


def _check(needs: Sequence[str], has_reference: bool, chunk: int) -> bool:
    """Refuse what ``token_outputs`` cannot compute; tell whether it compares whole
    distributions."""
    unknown = [
        field for field in needs if field not in TOKEN_FIELDS + ("values", "scores", "step_scores")
    ]
    if unknown:
        raise ValueError(f"token_outputs cannot compute {unknown}; known: {list(TOKEN_FIELDS)}")
    whole = sorted(WHOLE.intersection(needs))
    if whole and not has_reference:
        raise ValueError(
            f"{' and '.join(map(repr, whole))} need the reference's hidden states and its head"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 position, got {chunk}")
    return bool(whole)


def _where_used(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of (used, *arguments) that is zero, and computes nothing, where not used.

    A batch's rows seldom fill the positions that are budgeted for the fullest of all.  Over several
    devices all is computed: what one of them has no use for, another may.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return lambda used, *arguments: function(*arguments)

    def where_used(used: jax.Array, *arguments: Any) -> Any:
        shapes = jax.eval_shape(function, *arguments)

        def nothing(*_: Any) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return jax.lax.cond(used, function, nothing, *arguments)

    return where_used


def token_outputs(
    hidden: Float[Array, "N T D"],
    unembed: Callable[[Array], Array],
    batch: Batch,
    *,
    needs: Sequence[str] = (),
    reference: tuple[Float[Array, "N T D"], Callable[[Array], Array]] | None = None,
    divergence: Divergence = JENSEN_SHANNON,
    chunk: int = 256,
) -> Outputs:
    """Compute token and sequence log-probabilities of a batch's responses.

        token_logps[n, t] = log softmax(unembed(hidden[n, source_index[n, t]]))[tokens[n, t]]

    Args:
        hidden: [N, T, D], after the final norm, any float dtype.
        unembed: [..., D] -> float32 logits [..., V]; closes over traced arrays only (made inside
            the step).
        batch: the batch.
        needs: of ``TOKEN_FIELDS``.  What heads say is added by the caller.
        reference: needed for "kl" and "divergence": the reference's hidden states and its head; one
            of fewer logits is compared with over the first of the policy's.
        divergence: which one "divergence" is.
        chunk: positions of a row whose logits are held at a time: memory is 4 · N · chunk · V
            bytes, twice that in the backward pass.

    Returns:
        Outputs in float32, nats; gradients flow to ``hidden`` and to what ``unembed`` closes over,
        through all but ``log_sum_sq``; never into the reference.

    Raises:
        ValueError: an unknown need, "kl" or "divergence" without a reference, or a chunk below 1.
    """
    whole = _check(needs, reference is not None, chunk)
    rows, length = batch.tokens.shape
    budget = batch.loss_index.shape[1]
    chunk = min(chunk, max(budget, 1))
    padding = -budget % chunk
    # [N, P]
    index = jnp.pad(jnp.asarray(batch.loss_index), ((0, 0), (0, padding)), constant_values=length)
    inside = jnp.minimum(index, length - 1)
    targets = jnp.take_along_axis(batch.tokens, inside, axis=1)
    sources = jnp.take_along_axis(batch.source_index, inside, axis=1)

    def chunks(x: Array) -> Array:  # [N, P, ...] -> [P / c, N, c, ...]
        return jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)

    def gather(x: Array) -> Array:
        return chunks(jnp.take_along_axis(x, sources[:, :, None], axis=1))

    other = None
    if whole and reference is not None:
        other = gather(jax.lax.stop_gradient(reference[0]))

    def of_chunk(targets: Array, hidden: Array, other: Array | None) -> dict[str, Array]:
        logits = None if other is None or reference is None else reference[1](other)
        return _statistics(unembed(hidden), targets, needs, logits, divergence)

    def body(_: None, xs: tuple) -> tuple[None, dict[str, Array]]:
        return None, jax.checkpoint(_where_used(of_chunk))(*xs)

    used = jnp.any(chunks(index) < length, axis=(1, 2))  # [P / c]
    with jax.named_scope("token_outputs"):
        _, found = jax.lax.scan(body, None, (used, chunks(targets), gather(hidden), other))

    def scatter(x: Array) -> Array:  # [P / c, N, c] -> [N, T]
        x = jnp.moveaxis(x, 0, 1).reshape(rows, -1)
        zeros = jnp.zeros(length, jnp.float32)
        return jax.vmap(lambda i, values: zeros.at[i].set(values, mode="drop"))(index, x)

    fields = {name: scatter(x) for name, x in found.items()}
    if "log_sum_sq" in fields:
        fields["log_sum_sq"] = jax.lax.stop_gradient(fields["log_sum_sq"])
    return Outputs(
        logps=sum_by_slot(fields["token_logps"], batch),
        lengths=jnp.asarray(batch.lengths),
        **fields,
    )

# SPDX-License-Identifier: Apache-2.0
"""From chosen samples to a batch's rows, and from per-response arrays to per-token fields.

plain          a response a row: [prompt response 0 . .], [prompt response 1 . .]
shared_prefix  a group a row: [prompt | response 0 | response 1 | . .], the prompt stored and
computed once
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from align_jax.core.schema import Batch
from align_jax.data import batching, planning
from align_jax.data.batching import Piece, Shape
from align_jax.inference.generate import Completion
from align_jax.online.config import RolloutConfig
from align_jax.online.selection import Groups

LAYOUTS = ("plain", "shared_prefix")


def plan_shape(*, groups: int, responses: int, prompt: int, response: int, layout: str) -> Shape:
    """Return the static sizes of a batch of so many groups.

    Args:
        groups: B.
        responses: R.
        prompt: tokens of the longest prompt.
        response: tokens of the longest completion.
        layout: one of ``LAYOUTS``.

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"rollouts are laid out as one of {LAYOUTS}; data.layout is {layout!r}")
    each = responses if layout == "shared_prefix" else 1
    length = -(-(prompt + each * response) // 8) * 8
    return Shape(
        rows=groups * responses // each,
        length=length,
        positions=each * response,
        slots=each,
        groups=groups,
        responses=responses,
    )


def batch_shapes(shape: Shape, config: RolloutConfig) -> Batch:
    """Return a step's batch, the whole mesh's, as arrays that take no memory.

    Args:
        shape: from ``plan_shape``.
        config: how rollouts are made.
    """
    batch = planning.batch_shapes(
        shape,
        kind=config.kind,
        layout=config.layout,
        mismatched=shape if config.mismatched else None,
    )
    by_token = np.broadcast_to(np.zeros((), np.float32), batch.tokens.shape)
    if config.targets is not None:
        batch = batch._replace(old_token_logps=by_token, advantages=by_token)
    return batch._replace(returns=by_token, old_values=by_token) if config.value_head else batch


def write(
    groups: Groups,
    prompts: Sequence[Int[np.ndarray, "_"]],
    completions: Sequence[Sequence[Completion]],
    scores: Float[np.ndarray, "Q n"],
    shape: Shape,
    *,
    layout: str,
    pad: int,
    keep_unfinished: bool = True,
) -> Batch:
    """Write groups into rows.

    Args:
        groups: which samples belong together.
        prompts: token ids of each of the rollout's prompts.
        completions: its samples.
        scores: theirs.
        shape: of the batch; only its rows may be fewer or more.
        layout: one of ``LAYOUTS``.
        pad: id that fills rows.
        keep_unfinished: whether the tokens of completions cut off by the limit bear the loss.
    """
    count, responses = groups.samples.shape
    each = shape.slots
    rows = batching.Rows(
        count * responses // each,
        shape.length,
        shape.positions,
        each,
        pad,
        shared=layout == "shared_prefix",
    )
    for g in range(count):
        prompt, chosen = groups.prompts[g], []
        for s in groups.samples[g]:
            one = completions[prompt][s]
            mask = np.full(len(one.tokens), keep_unfinished or one.finish == "stop")
            chosen.append((one.tokens, mask))
        if layout == "shared_prefix":
            rows.write(g, [Piece(prompts[prompt], tuple(chosen))], responses)
        else:
            for r, response in enumerate(chosen):
                rows.write(g * responses + r, [Piece(prompts[prompt], (response,))], 1)
    found = np.take_along_axis(scores[groups.prompts], groups.samples, axis=1).astype(np.float32)
    extra = (
        {"label": groups.label}
        if groups.label is not None
        else {"margin": np.zeros(count, np.float32)}
    )
    return batching.to_batch(
        rows, responses, weight=groups.weight.astype(np.float32), scores=found, **extra
    )


def token_field(
    batch: Batch, groups: Groups, completions: Sequence[Sequence[Completion]], field: str
) -> Float[np.ndarray, "N T"]:
    """Lay a per-token quantity of the completions (a field of Completion) over the batch's loss
    tokens."""
    out = np.zeros(batch.tokens.shape, np.float32)
    samples = [
        completions[p][s] for p, chosen in zip(groups.prompts, groups.samples) for s in chosen
    ]
    per_row = len(samples) // len(out)
    for row in range(len(out)):
        for slot, one in enumerate(samples[row * per_row : (row + 1) * per_row]):
            at = np.flatnonzero(batch.loss_mask[row] & (batch.slot[row] == slot))
            out[row, at] = getattr(one, field)[: len(at)]
    return out


def mismatch(
    groups: Groups,
    prompts: Sequence[Int[np.ndarray, "_"]],
    completions: Sequence[Sequence[Completion]],
    shape: Shape,
    *,
    pad: int,
) -> Batch:
    """Pair each prompt with the response of the next group that has another prompt: KTO's rows for
    its KL term.

    Raises:
        ValueError: all groups have the same prompt.
    """
    count = len(groups.prompts)
    rows = batching.Rows(count, shape.length, shape.positions, 1, pad, shared=False)
    texts = [prompts[p].tobytes() for p in groups.prompts]
    for g in range(count):
        others = (h % count for h in range(g + 1, g + count) if texts[h % count] != texts[g])
        other = next(others, None)
        if other is None:
            raise ValueError(
                "mismatched completions need two different prompts in a rollout; "
                "raise rollout.prompts"
            )
        tokens = completions[groups.prompts[other]][groups.samples[other][0]].tokens
        rows.write(
            g, [Piece(prompts[groups.prompts[g]], ((tokens, np.ones(len(tokens), bool)),))], 1
        )
    return batching.to_batch(rows, 1, weight=groups.weight.astype(np.float32))


def take(batch: Batch, chosen: Int[np.ndarray, "b"]) -> Batch:
    """Return the batch of some of a batch's groups."""
    groups = len(batch.weight)

    def pick(x: np.ndarray) -> np.ndarray:
        each = len(x) // groups  # rows of a group
        return x.reshape(groups, each, *x.shape[1:])[chosen].reshape(-1, *x.shape[1:])

    fields = {
        name: value
        if value is None
        else take(value, chosen)
        if isinstance(value, Batch)
        else pick(value)
        for name, value in batch._asdict().items()
    }
    return Batch(**fields)

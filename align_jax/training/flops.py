# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a step, counted from shapes: the compiler counts a scanned layer
only once.

A multiplication and an addition are two operations; norms, activations, softmax and the optimizer
are left out (below 1 % of a 7B model's).  A *unit* is one forward pass over a batch:

    policy, all trained   3 units: 1 forward + 2 backward (gradients of inputs and of weights)
    policy, adapter only  2 units: 1 forward + 1 backward (of inputs); and the adapter's 3
    reference             1 unit: 1 forward

so a pair under DPO costs 2 * (3 + 1) units of one response.  Rematerialization repeats forward
work: it takes time but is no progress, so it counts for the hardware and not for the model (and its
MFU).
"""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

from align_jax.core.schema import Batch
from align_jax.core.tree import flatten
from align_jax.models.attention import named
from align_jax.models.config import ModelConfig
from align_jax.models.delta_rule import CHUNK
from align_jax.models.model import Model
from align_jax.training.steps import StepSpec


class Forward(NamedTuple):
    """Operations of one forward pass, by where they are."""

    layers: float  # products with the layers' weights
    attention: float  # queries with keys, weights with values; tokens with states
    head: float  # the output head, on loss positions
    adapter: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of one run of a program, the whole mesh together.

    Attributes:
        policy: forward and, where it is trained, backward.
        reference: the frozen reference's forward.
        statistics: forwards without gradients, for statistics of the whole batch.
        recomputed: forward work that the backward pass repeats; the hardware's, not the model's.
        tokens: places in the rows, padding included.
    """

    policy: float
    reference: float
    statistics: float
    recomputed: float
    tokens: int

    @property
    def model(self) -> float:
        """What the mathematics asks for: the numerator of MFU."""
        return self.policy + self.reference + self.statistics

    @property
    def hardware(self) -> float:
        """What the devices do."""
        return self.model + self.recomputed


def layer_weights(config: ModelConfig) -> int:
    """Count the weights of all layers that multiply each token (of a mixture: the chosen experts'),
    with what makes several residual streams and joins them."""
    kinds = collections.Counter(config.kinds)
    ends = 2 * (config.num_streams - 1) * config.hidden_size**2
    return ends + sum(count * _weights(config.of_kind(kind)) for kind, count in kinds.items())


def _weights(config: ModelConfig) -> int:
    """Count those of one layer of a kind."""
    D, H, h = config.hidden_size, config.num_heads, config.head_dim
    alike = config.wide is not None and config.wide.key_is_value
    keys = config.num_kv_heads * h * (0 if config.reused else 1 if alike else 2)
    mixer = D * H * config.query_dim + D * keys + H * h * D
    if latent := config.latent:
        q, c, v = latent.query_rank, latent.rank, latent.value_dim
        queries = q * (D + H * h) if q else D * H * h
        keys = D * (c + latent.rope_dim) + c * H * (config.still_dim + v)
        mixer = queries + keys + H * v * D
    if delta := config.delta:
        keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
        maps = D * (2 * keys + 2 * values + 2 * delta.value_heads) + values * D
        mixer = maps + (2 * keys + values) * delta.taps
    mlp = (3 if config.gated else 2) * D * config.intermediate_size
    if config.num_experts:
        mlp = mlp * config.experts_per_token + D * config.num_experts
        mlp += 3 * D * config.shared_size
    mlp += 3 * D * config.token_inputs + 2 * D * config.laurel_rank
    if config.streams:  # two routers, a mixture of all, a correction of each
        mlp += D * config.num_streams * (config.num_streams + 3)
    return mixer + mlp


def _state(config: ModelConfig, chunk: int) -> float:
    """Count the operations of a token of the layers that keep a state, in chunks of so many
    tokens: three products with the state, four within the chunk."""
    if not (delta := config.delta):
        return 0.0
    n, o = delta.key_dim, delta.value_dim
    inside = 4 * chunk * (n * delta.key_heads + o * delta.value_heads)
    return len(config.delta_layers) * (6.0 * n * o * delta.value_heads + inside)


def _pair(config: ModelConfig) -> int:
    """Count the operations of one query and one key, in one layer."""
    return 2 * config.num_heads * (config.head_dim + config.value_dim)


def _decoded_widths(config: ModelConfig) -> int:
    """Return the widths of what a drawn token attends to and of what it takes from there."""
    _, keys, values = config.cached
    return 2 * keys + values if config.latent else keys + values


# Seconds of a FLOP of attention, all T^2 pairs of a row counted, over those of a FLOP of a matrix
# product: on two cores 26 of 185 GFLOP/s were measured; on an H100 cuDNN with a mask gave 230
# TFLOP/s, where 600 are taken for products; on a TPU it is an estimate: splash skips the upper
# half.  What follows the segments costs a group the same in a row of any length.
ATTENTION_SLOWER = {"xla": 7.0, "blocks": 7.0, "segments": 0.0, "cudnn": 2.6, "splash": 1.0}


def attention_cost(config: ModelConfig, attention: str) -> float:
    """Return what attention of one query to one key costs, in a token's matrix products, of those
    that a longer row adds; see ``data.row_length``.

    The head is counted at every second token, about as many as answers have.

    Args:
        config: the model.
        attention: a name from ``models.attention.ATTENTION``, or "auto".
    """
    pair = sum(count * _pair(of) for of, _, count in config.attending)
    token = 2 * layer_weights(config) + config.vocab_size * config.hidden_size
    return ATTENTION_SLOWER[named(attention)] * pair / token


def forward_flops(
    model: Model, *, rows: int, length: int, positions: int, segment_length: int | None = None
) -> Forward:
    """Count one forward pass.

    Args:
        model: the model; its adapter counts.
        rows: N.
        length: T.
        positions: P, loss positions of a row: the head is applied to these alone.
        segment_length: tokens that attend to each other, where rows are packed; default T.

    Returns:
        Operations.  Attention is causal, and of a sliding window only what is inside counts.
    """
    config = model.config
    tokens = rows * length
    segment = min(segment_length or length, length)
    attention = 0.0
    for of, window, count in config.attending:
        reach = min(window or segment, segment)
        pairs = reach * (reach + 1) / 2 + (segment - reach) * reach  # of a segment
        attention += count * _pair(of) * pairs * tokens / segment
    attention += _state(config, min(CHUNK, segment)) * tokens
    head = (
        2 * config.hidden_size * config.vocab_rows * rows * positions
        if model.options.unembed
        else 0.0
    )
    adapter = 0
    if model.options.lora:
        roles, shapes = flatten(model.roles()), flatten(model.shapes())
        factors = [
            path
            for path, role in roles.items()
            if role.part == "adapter" and role.inputs  # a table's rows are looked up
        ]
        adapter = sum(shapes[path].size for path in factors)
    return Forward(
        2.0 * layer_weights(config) * tokens, attention, float(head), 2.0 * adapter * tokens
    )


def decode_flops(model: Model, *, rows: int, context: int) -> Forward:
    """Count the drawing of one token in each row.

    Args:
        model: the model; adapters are not counted.
        rows: N.
        context: tokens that a row has before it.
    """
    config = model.config
    widths = sum(
        count * _decoded_widths(of) * min(window or context, context)
        for of, window, count in config.attending
    )
    return Forward(
        2.0 * layer_weights(config) * rows,
        (2.0 * config.num_heads * widths + _state(config, 0)) * rows,
        2.0 * config.hidden_size * config.vocab_rows * rows,
    )


def step_flops(
    spec: StepSpec, batch: Batch, *, segment_length: int | None = None, train: bool = True
) -> StepFlops:
    """Count one train step, or one eval step.

    Args:
        spec: what the step is compiled from.
        batch: the global batch, or its shapes.
        segment_length: of packed rows, the mean tokens of a segment; default: the whole row
            attends.
        train: false: the eval step, forwards alone.

    Returns:
        Operations of the whole mesh.
    """

    def forward(model: Model, part: Batch) -> Forward:
        rows, length = part.tokens.shape
        positions = part.loss_index.shape[1] if spec.wants_logps else 0
        return forward_flops(
            model, rows=rows, length=length, positions=positions, segment_length=segment_length
        )

    once = forward(spec.policy, batch)
    adapted = spec.policy.options.lora is not None
    frozen = once.layers + once.attention + once.head
    # attention has no weights: both of its operands get gradients whether or not anything is
    # adapted
    policy = 2 * frozen + once.attention + 3 * once.adapter if adapted else 3 * frozen
    if batch.text is not None:
        text = forward(spec.policy, batch.text)
        policy += 3 * (text.layers + text.attention + text.head)
    in_graph = spec.wants_reference and batch.reference_token_logps is None
    reference = forward(spec.reference, batch).total if in_graph else 0.0
    statistics = 0.0
    if spec.wants_statistics and (spec.microbatches > 1 or not train):
        statistics += once.total
    elif spec.balances and spec.microbatches > 1 and train:
        statistics += once.total - once.head
    if spec.wants_statistics and batch.mismatched is not None:
        statistics += forward(spec.policy, batch.mismatched).total
        statistics += (
            forward(spec.reference, batch.mismatched).total if spec.wants_reference else 0.0
        )
    if not train:
        return StepFlops(once.total, reference, statistics, 0.0, batch.tokens.size)
    # kernels recompute the weights from queries and keys whatever the policy
    attention = once.attention
    again = {
        "full": once.layers + once.adapter + attention,
        "attention": once.layers + once.adapter,
        "dots": attention,
        "none": 0.0,
    }
    # the head's chunks are always rematerialized
    recomputed = again[spec.policy.options.remat] + once.head
    return StepFlops(policy, reference, statistics, recomputed, batch.tokens.size)

# SPDX-License-Identifier: Apache-2.0
"""Attention by JAX's splash kernels (Pallas, TPU), which never hold the [T, T] weights.

    q [N, T, H, h]   rows over data, fsdp, expert;  T over sequence;  H over tensor
    k [N, T, K, h]   rows likewise, K over tensor;  gathered over sequence, so that a query sees all
                     keys before it

Pallas kernels are opaque to XLA's partitioner, so they run inside ``shard_map`` over the ambient
mesh.
"""

from __future__ import annotations

import functools
import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from align_jax.models.segment_attention import SAVED, divisible
from align_jax.parallel.mesh import ROWS

LANES = 128  # of a TPU's vector registers: rows are padded to a multiple
# queries and keys that a kernel works on at once, at most: fits the vector memory with head dim
# 256
BLOCK = 512


def splash(
    q: Float[Array, "N T H h"],
    k: Float[Array, "N T K h"],
    v: Float[Array, "N T K v"],
    *,
    segment_ids: Int[Array, "N T"],
    prefix_ids: Int[Array, "N T"] | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
    sinks: Float[Array, "H"] | None = None,
    interpret: bool = False,
) -> Float[Array, "N T H v"]:
    """Attend by JAX's splash attention kernels (Pallas, TPU), forwards and backwards.

    Args:
        q, k, v: queries, keys (both already rotated) and values.
        segment_ids: as in core.schema.Batch; a query attends to its own segment's keys at or before
            it.
        prefix_ids: the shared prompt segment that a token attends to as well: a second kernel over
            the prompts' keys, merged by the softmax denominators.
        window: tokens a query sees, itself included, counted by index within its segment; None =
            all.
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        scale: factor on q k.
        sinks: a further logit for each head, which takes its share of the softmax and adds nothing.
        interpret: run the kernels step by step on any device (tests).

    Raises:
        ValueError: a window with prefix_ids (a prefix's distance is not one of indices), heads that
            the tensor axis does not divide, or a row that the sequence axis does not divide.
    """
    if prefix_ids is not None and window is not None:
        raise ValueError(
            "splash attention has no sliding window over shared prefixes; use another row of "
            "ATTENTION"
        )
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {"sequence": 1, "tensor": 1} if mesh.empty else dict(mesh.shape)
    sequence, tensor = sizes["sequence"], sizes["tensor"]
    rows, length, heads, _ = q.shape
    k, v = divisible(k, v, heads, tensor)
    if length % sequence:
        raise ValueError(f"rows of {length} tokens cannot be split over mesh.sequence={sequence}")
    extra = -length % (LANES * sequence)
    if extra:  # padding attends to padding
        q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, extra)))
        if prefix_ids is not None:
            prefix_ids = jnp.pad(prefix_ids, ((0, 0), (0, extra)))
    kernel = _kernel(
        length + extra,
        heads // tensor,
        window,
        softcap,
        sequence,
        interpret,
        prefix_ids is not None or sinks is not None,
    )
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    run = functools.partial(_rows, split=sequence > 1)
    if not mesh.empty:
        over = ROWS if rows % math.prod(sizes[axis] for axis in ROWS) == 0 else None
        by_head, by_token = (
            PartitionSpec(over, "sequence", "tensor", None),
            PartitionSpec(over, "sequence"),
        )
        tables = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, "sequence")))
        run = jax.shard_map(
            run,
            mesh=mesh,
            out_specs=by_head,
            check_vma=False,
            in_specs=(
                tables,
                by_head,
                by_head,
                by_head,
                by_token,
                None if prefix_ids is None else by_token,
                None if sinks is None else PartitionSpec("tensor"),
            ),
        )
    out = run(kernel, scaled, k, v, segment_ids, prefix_ids, sinks)
    return out[:, :length] if extra else out


def _kernel(
    length: int,
    heads: int,
    window: int | None,
    softcap: float,
    sequence: int,
    interpret: bool,
    merging: bool,
) -> kernels.SplashAttentionKernel:
    """Make the kernel of one device's heads; its block tables are split over the sequence axis."""
    shape = (length, length)
    mask = (
        masks.CausalMask(shape, shard_count=sequence)
        if window is None
        else masks.LocalMask(shape, (window - 1, 0), 0, shard_count=sequence)
    )
    blocks = (BLOCK, 384, 256, LANES)
    queries = next(size for size in blocks if length // sequence % size == 0)
    keys = next(size for size in blocks if length % size == 0)
    sizes = kernels.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=sequence,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=None if merging else SAVED,
        save_residuals=merging,
        interpret=interpret,
    )


def _rows(
    kernel: kernels.SplashAttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    prefix_ids: jax.Array | None,
    sinks: jax.Array | None,
    *,
    split: bool,
) -> jax.Array:
    """Run the kernel on one device's rows: [N, T, H, h] -> [N, T, H, h]."""
    key_ids = segment_ids
    if split:
        # gathered here, not by the arguments' sharding: XLA would gather what they are made of,
        # which is wider, and the gradients of keys and values are then scattered as they are summed
        k, v, key_ids = (
            jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in (k, v, key_ids)
        )

    def row(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        query_ids: jax.Array,
        key_ids: jax.Array,
        prefix_ids: jax.Array | None,
    ) -> jax.Array:
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))  # [T, H, h] -> [H, T, h]
        ids = [kernels.SegmentIds(query_ids, key_ids)]
        if prefix_ids is None and sinks is None:
            return typing.cast(jax.Array, kernel(q, k, v, *ids)).swapaxes(0, 1)
        if prefix_ids is not None:
            prompts = jnp.where(prefix_ids > 0, prefix_ids, -1)
            ids.append(kernels.SegmentIds(prompts, key_ids))
        return _merged(kernel, q, k, v, tuple(ids), sinks).swapaxes(0, 1)

    return jax.vmap(row)(q, k, v, segment_ids, key_ids, prefix_ids)


def _merged(
    kernel: kernels.SplashAttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: tuple[kernels.SegmentIds, ...],
    sinks: jax.Array | None,
) -> jax.Array:
    """Attend to disjoint sets of keys, and to a sink, as if they were one.

    With l_i = log sum exp of the logits of set i and l = log(sum_i e^l_i + e^sink), the output is
    sum_i e^(l_i - l) o_i; and the gradient of each set's q, k, v is its kernel's own backward pass
    given l and the merged output, because all that it takes from the forward pass is
    p = exp(logits - l) and sum(o do).  A sink is a key whose value is zero: its gradient is
    -exp(sink - l) sum(o do).
    """
    options = kernel.kwargs
    static = tuple(options[name] for name in ("mask_value", "is_mqa", "block_sizes"))

    @jax.custom_vjp
    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any, ids: Any, tables: Any
    ) -> jax.Array:
        return forward(q, k, v, sinks, ids, tables)[0]

    def forward(
        q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any, ids: Any, tables: Any
    ) -> tuple[jax.Array, tuple]:
        run: Any = kernels.SplashAttentionKernel(*tables, **options)
        parts = [run(q, k, v, segments) for segments in ids]
        total = functools.reduce(jnp.logaddexp, (log_sum for _, (log_sum,) in parts))  # [H, T]
        if sinks is not None:
            total = jnp.logaddexp(total, sinks.astype(jnp.float32)[:, None])
        scaled = (
            part.astype(jnp.float32) * jnp.exp(log_sum - total)[..., None]
            for part, (log_sum,) in parts
        )
        out = functools.reduce(jnp.add, scaled).astype(q.dtype)
        out, total = (checkpoint_name(x, SAVED) for x in (out, total))
        return out, (q, k, v, sinks, ids, tables, out, total)

    def backward(saved: tuple, d_out: jax.Array) -> tuple:
        q, k, v, sinks, ids, (_, dq_table, dkv_table), out, total = saved
        # the public function cannot be given the merged denominators
        run: Any = kernels._splash_attention_bwd
        gradients = [
            run(
                False,
                *static,
                None,
                options["mask_function"],
                options["attn_logits_soft_cap"],
                options["interpret"],
                (q, k, v, segments, None, out, total, dq_table, dkv_table),
                d_out,
            )[3:6]
            for segments in ids
        ]
        d_sinks = None
        if sinks is not None:
            means = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
            share = jnp.exp(sinks.astype(jnp.float32)[:, None] - total)
            d_sinks = -jnp.sum(share * means, axis=-1).astype(sinks.dtype)
        return *(sum(parts) for parts in zip(*gradients)), d_sinks, None, None

    attend.defvjp(forward, backward)
    tables = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    return attend(q, k, v, sinks, ids, tables)

# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: angles in float32, with the scalings that stretch a model's context.

References:
    Su et al. 2021, RoFormer (arXiv 2104.09864); Peng et al. 2023, YaRN (arXiv 2309.00071),
    equations 17 to 22; Ding et al. 2024, LongRoPE (arXiv 2402.13753); the "dynamic" and "llama3"
    rules as in transformers' ``modeling_rope_utils``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from align_jax.models.config import Rope


def frequencies(rope: Rope, run_length: int = 0) -> tuple[np.ndarray, float]:
    """Return the angle per position of each feature pair, and the factor on sine and cosine.

    "dynamic" and "longrope" change beyond the original context.  What transformers decides by each
    call's longest row is decided once, by the longest text that a run can have: so a text gets the
    same angles sampled and rescored, alone and packed.

    Args:
        rope: the rotary embedding.
        run_length: tokens of the run's longest text; 0 = within the original context.

    Returns:
        float32 [rotary_dim / 2] in radians a token; the attention factor.
    """
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    plain = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.option("factor")), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope)
    if rope.kind == "proportional":
        turned = int(rope.option("partial_rotary_factor") * rope.rotary_dim // 2)
        still = np.arange(len(plain)) >= turned
        return np.where(still, 0, plain / np.float32(rope.option("factor", 1.0))), 1.0
    if rope.kind == "longrope":
        name = "long_factor" if run_length > rope.limit else "short_factor"
        return plain / np.asarray(rope.option(name), np.float32), _longrope_factor(rope)
    if rope.kind == "dynamic" and run_length > rope.limit:
        scale = rope.option("factor")
        power = rope.rotary_dim / (rope.rotary_dim - 2)
        base = rope.theta * (scale * run_length / rope.limit - (scale - 1)) ** power
        return (1.0 / np.float32(base) ** exponents).astype(np.float32), 1.0
    return plain, 1.0


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    factor, low, high = (
        rope.option(name) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    original = rope.option("original_max_position_embeddings")
    wavelengths = 2 * math.pi / plain
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    scaled = np.where(wavelengths < original / high, plain, blended)
    scaled = np.where(wavelengths > original / low, plain / factor, scaled)
    return scaled.astype(np.float32)


def _yarn(rope: Rope) -> tuple[np.ndarray, float]:
    factor = float(rope.option("factor"))
    original = rope.option(
        "original_max_position_embeddings", rope.option("max_position_embeddings")
    )

    def magnitude(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    attention = rope.option("attention_factor")
    if attention is None:
        mscale, mscale_all = rope.option("mscale"), rope.option("mscale_all_dim")
        attention = (
            magnitude(factor, mscale) / magnitude(factor, mscale_all)
            if mscale and mscale_all
            else magnitude(factor)
        )

    def dimension(rotations: float) -> float:
        return (
            rope.rotary_dim
            * math.log(original / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = (
        dimension(float(rope.option(name, default)))
        for name, default in (("beta_fast", 32), ("beta_slow", 1))
    )
    if rope.option("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    span = high - low or 0.001  # below 0 where the original context is tiny
    ramp = np.clip((np.arange(rope.rotary_dim // 2, dtype=np.float32) - low) / span, 0, 1)
    powers = np.float32(rope.theta) ** (
        np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    )
    return ((1 / (factor * powers)) * ramp + (1 / powers) * (1 - ramp)).astype(np.float32), float(
        attention
    )


def _longrope_factor(rope: Rope) -> float:
    original = rope.limit
    factor = rope.option("factor", rope.option("max_position_embeddings") / original)
    if rope.option("attention_factor") is not None:
        return float(rope.option("attention_factor"))
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def tables(
    rope: Rope, positions: Int[Array, "N T"], run_length: int = 0
) -> tuple[Float[Array, "N T w"], Float[Array, "N T w"]]:
    """Return the cosines and sines, float32 [N, T, rotary_dim / 2].

    Args:
        rope: the rotary embedding.
        positions: of the tokens.
        run_length: as ``frequencies`` takes it.

    Raises:
        ValueError: rows longer than the original context, of a kind that changes beyond it, and no
            run's length.
    """
    limit, length = rope.limit, positions.shape[1]
    if limit and not run_length and length > limit:
        raise ValueError(
            f"rows of {length} tokens, but the factors of this {rope.kind} rotary embedding change "
            f"beyond {limit}: expected one length for the whole run, run_length= of hf.load_config "
            "(or max_length= of load_model), so that every row and packing gets the same"
        )
    inverse, factor = frequencies(rope, run_length)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse)[None, None]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "N T heads h"],
    cos: Float[Array, "N T w"],
    sin: Float[Array, "N T w"],
    interleaved: bool = False,
) -> jax.Array:
    """Turn the first 2 w features of each head by the angles, in float32.

    Pairs are (i, i + w), interleaved (2 i, 2 i + 1).
    """
    half = cos.shape[-1]
    parts = x[..., : 2 * half].astype(jnp.float32)
    first, second = parts[..., :half], parts[..., half:]
    if interleaved:
        first, second = parts[..., ::2], parts[..., 1::2]
    cos, sin = cos[:, :, None], sin[:, :, None]
    both = first * cos - second * sin, second * cos + first * sin
    join = jnp.stack if interleaved else jnp.concatenate
    turned = join(both, axis=-1).reshape(parts.shape).astype(x.dtype)
    return (
        turned
        if 2 * half == x.shape[-1]
        else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
    )

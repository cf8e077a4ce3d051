# SPDX-License-Identifier: Apache-2.0
"""Code World Model: Llama with windows on some layers (Meta 2025)."""

from __future__ import annotations

from align_jax.models.families import llama

from_hf, tensor_maps = llama.from_hf, llama.tensor_maps

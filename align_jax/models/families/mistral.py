# SPDX-License-Identifier: Apache-2.0
"""Mistral: Llama with a sliding window on every layer (Jiang et al. 2023, arXiv 2310.06825)."""

from __future__ import annotations

from align_jax.models.families import llama

from_hf = llama.from_hf  # ``sliding_window`` is read for every family that has it
tensor_maps = llama.tensor_maps

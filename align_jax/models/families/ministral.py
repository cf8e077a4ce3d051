# SPDX-License-Identifier: Apache-2.0
"""Ministral: Mistral with windows on some layers (Mistral AI 2024)."""

from __future__ import annotations

from align_jax.models.families import llama

from_hf, tensor_maps = llama.from_hf, llama.tensor_maps

# SPDX-License-Identifier: Apache-2.0
"""Online learning: rewards for generated text, and rollouts as a source of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from align_jax.online import rewards

REWARDS: Mapping[str, Callable[..., rewards.RewardFunction]] = {
    "exact": rewards.exact,
    "numeric": rewards.numeric,
    "regex": rewards.regex,
    "format": rewards.layout,
    "length": rewards.length,
    "lexicon": rewards.lexicon,
    "function": rewards.function,
    "model": rewards.model,
    "judge": rewards.judge,
}

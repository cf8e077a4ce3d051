# SPDX-License-Identifier: Apache-2.0
"""Whose answers are better?  By rewards, or by a judge that sees both answers in both orders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from align_jax.core.options import RolloutOptions
from align_jax.data.datasets import Examples
from align_jax.evals.generation import ONE_SAMPLE, Keep, record, sample
from align_jax.evals.policy import EvaluatedPolicy, standard_error
from align_jax.online.judges import PairJudge
from align_jax.online.rewards import WeightedRewards, columns, prompt_text

Compare = Callable[
    [Sequence[str], Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float]
]


def by_rewards(rewards: WeightedRewards) -> Compare:
    """Compare by a weighted sum of rewards: 1 the first is better, 0 the second, ½ equal."""

    def compare(
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        extras: Sequence[Mapping[str, Any]],
    ) -> Sequence[float]:
        others = [{**row, "finished": row.get("other_finished", True)} for row in extras]
        mine, other = rewards(prompts, first, extras)[0], rewards(prompts, second, others)[0]
        return (0.5 * (1.0 + np.sign(mine - other))).tolist()

    return compare


def by_judge(judge: PairJudge) -> Compare:
    """Compare by a language model that sees both answers in both orders."""

    def compare(
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        extras: Sequence[Mapping[str, Any]],
    ) -> Sequence[float]:
        return judge(prompts, first, second).wins.tolist()

    return compare


def interval(wins: Float[np.ndarray, "n"], draws: int = 2000) -> tuple[float, float]:
    """Return the bootstrap's 95 % interval of a mean: prompts drawn with replacement, always by the
    same seed."""
    rng = np.random.default_rng(0)
    means = [wins[rng.integers(len(wins), size=len(wins))].mean() for _ in range(draws)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def length_controlled(wins: Float[np.ndarray, "n"], longer: Float[np.ndarray, "n"]) -> float:
    """Return the win rate that is left where both answers are equally long.

        P(win) = σ(θ + φ tanh(Δ / std Δ)), the rate is σ(θ)

    fitted by Newton's method; ½φ² is added to the summed losses, so that answers that won by length
    alone have a fit.  The paper's form for one model against one, without its difficulty of each
    instruction, which needs other models' answers.

    Args:
        wins: 1, ½ or 0 of each prompt.
        longer: Δ: characters that the policy's answer is longer by.

    References:
        Dubois et al. 2024, arXiv 2404.04475, section 3.
    """
    scale = float(longer.std()) or 1.0
    inputs = np.stack([np.ones(len(wins)), np.tanh(longer / scale)], axis=1)
    penalty = np.asarray([1e-6, 1.0])
    weights = np.zeros(2)
    for _ in range(100):
        said = 1.0 / (1.0 + np.exp(-inputs @ weights))
        slope = inputs.T @ (said - wins) + penalty * weights
        curve = (inputs * (said * (1.0 - said))[:, None]).T @ inputs + np.diag(penalty)
        # a step of at most 1: beside a wall of wins the curve is nearly flat
        step = np.clip(np.linalg.solve(curve, slope), -1.0, 1.0)
        weights = weights - step
        if np.abs(step).max() < 1e-9 or abs(weights[0]) > 20.0:
            break
    return float(1.0 / (1.0 + np.exp(-weights[0])))


def tally(wins: Float[np.ndarray, "n"], longer: Float[np.ndarray, "n"]) -> dict[str, float]:
    """Return the win rate (ties count half) with its standard error and 95 % interval, the rate at
    equal lengths, and the shares of wins, ties and losses.

    Args:
        wins: 1, ½ or 0 of each prompt.
        longer: characters that the policy's answer is longer by.
    """
    low, high = interval(wins)
    return {
        "win_rate": float(wins.mean()),
        "win_rate/stderr": standard_error(wins),
        "win_rate/low": low,
        "win_rate/high": high,
        "win_rate/length_controlled": length_controlled(wins, longer),
        "wins": float((wins > 0.5).mean()),
        "ties": float((wins == 0.5).mean()),
        "losses": float((wins < 0.5).mean()),
        "comparisons": float(len(wins)),
    }


def win_rate(
    policy: EvaluatedPolicy,
    examples: Examples,
    compare: Compare,
    options: RolloutOptions = ONE_SAMPLE,
    *,
    keep: Keep | None = None,
    **more: Any,
) -> dict[str, float]:
    """Compare the policy's samples with the reference's samples, or with the data's own (chosen)
    answers.

    Args:
        policy: the policy; its reference answers the same prompts with the same seeds.
        examples: of kind "prompts"; without a reference each must bring its ``answer``.
        compare: `by_rewards` or `by_judge`.
        options: how samples are drawn; of each prompt one.
        keep: is given each prompt with both answers and which won: 1 the policy's, 0 the other, ½
            neither; None where the comparison failed.
        more: further options of ``generation.sample``.

    Raises:
        ValueError: neither a reference nor answers.
    """
    options = dataclasses.replace(options, responses_per_prompt=1)
    unscored = WeightedRewards(())
    samples = sample(policy, examples, unscored, options, **more)
    extras = [columns(one.example, one.completions[0].finish) for one in samples]
    if policy.reference is not None:
        model, params = policy.reference
        rival = policy._replace(model=model, params=params)
        others = sample(rival, examples, unscored, options, **more)
        second = [one.completions[0].text for one in others]
        ended = [one.completions[0].finish == "stop" for one in others]
        extras = [{**row, "other_finished": end} for row, end in zip(extras, ended)]
    elif all("answer" in one for one in extras):
        second = [str(one["answer"]) for one in extras]
    else:
        raise ValueError(
            "win_rate needs a reference to compare with, or prompts that bring an answer"
        )
    first = [one.completions[0].text for one in samples]
    wins: Sequence[float] = ()
    try:
        wins = compare([prompt_text(one.example) for one in samples], first, second, extras)
    finally:
        if keep is not None:
            for number, (one, other) in enumerate(zip(samples, second)):
                win = float(wins[number]) if wins else None
                keep({**record(one, 0), "other": other, "win": win})
    longer = [float(len(own) - len(other)) for own, other in zip(first, second)]
    return tally(np.asarray(wins, np.float32), np.asarray(longer, np.float32))

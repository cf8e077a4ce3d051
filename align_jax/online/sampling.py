# SPDX-License-Identifier: Apache-2.0
"""Prompts in, scored samples out: the part of a rollout that deals in text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from align_jax.core.schema import Example
from align_jax.inference.engines import Engine
from align_jax.inference.generate import Completion, Request, everywhere
from align_jax.losses import advantages as estimators
from align_jax.online.config import RolloutConfig
from align_jax.online.prompts import Prompts
from align_jax.online.rewards import WeightedRewards

# running moments of all scores; see losses.advantages.normalize_scores
Moments = Mapping[str, float]


class Asked(NamedTuple):
    """One prompt with its samples and what they are worth."""

    place: int  # in the stream of prompts
    example: Example
    ids: Int[np.ndarray, "p"]
    completions: list[Completion]
    scores: Float[np.ndarray, "n"]  # after shaping: what is trained on
    raw: Float[np.ndarray, "n"]  # the weighted sum of the rewards
    parts: dict[str, Float[np.ndarray, "n"]]  # each reward by itself


class Drawn(NamedTuple):
    """This process's share of a rollout."""

    asked: list[Asked]
    tries: int  # times that a whole rollout's prompts were taken from the stream
    moments: Moments
    seconds: float  # spent generating, all tries together
    tokens: int  # generated in them


def prompt_text(example: Example) -> str:
    """Return what a reward function is given as the prompt: the text, or the last turn's words."""
    return example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]


def columns(example: Example) -> dict[str, Any]:
    """Return the row's columns for reward functions; ``messages`` holds the prompt's turns."""
    return dict(example.extras) | (
        {} if isinstance(example.prompt, str) else {"messages": list(example.prompt)}
    )


def gather(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "m"]:
    """Join the arrays of all processes, each of the same size."""
    if jax.process_count() == 1:
        return x
    return np.asarray(multihost_utils.process_allgather(x)).reshape(-1)


def shape_scores(
    scores: Float[np.ndarray, "q n"],
    completions: Sequence[Sequence[Completion]],
    config: RolloutConfig,
    moments: Moments,
) -> tuple[Float[np.ndarray, "q n"], Moments]:
    """Normalize, clip, and take off the penalties for completions that are cut off or overlong; as
    the config says."""
    shaped = jnp.asarray(scores)
    if config.normalize_scores:
        shaped, found = estimators.normalize_scores(shaped, dict(moments), clip=config.score_clip)
        moments = {name: float(value) for name, value in found.items()}
    elif config.score_clip is not None:
        shaped = jnp.clip(shaped, -config.score_clip, config.score_clip)
    if config.missing_eos_penalty:
        finished = np.array([[one.finish == "stop" for one in several] for several in completions])
        shaped = estimators.missing_eos_penalty(
            shaped, jnp.asarray(finished), config.missing_eos_penalty
        )
    if config.overlong_buffer:
        lengths = np.array(
            [[len(one.tokens) for one in several] for several in completions], np.int32
        )
        shaped = shaped + estimators.overlong_penalty(
            jnp.asarray(lengths), max_length=config.max_new_tokens, buffer=config.overlong_buffer
        )
    return np.asarray(shaped, np.float32), moments


def sample(
    places: Sequence[int],
    config: RolloutConfig,
    prompts: Prompts,
    engine: Engine,
    rewards: WeightedRewards,
    moments: Moments,
) -> tuple[list[Asked], Moments, float]:
    """Sample the prompts at these places of the stream, and score the samples.

    Returns:
        The samples, the running moments of all scores, and the seconds spent generating.
    """
    asked, n = [prompts[place] for place in places], config.responses
    began = time.monotonic()
    completions = engine(
        [
            Request(
                tuple(ids.tolist()),
                n,
                config.max_new_tokens,
                config.sampling,
                prompts.seed(place),
                config.stop,
            )
            for place, (_, ids) in zip(places, asked)
        ]
    )
    seconds = time.monotonic() - began
    raw, parts = rewards(
        [prompt_text(example) for example, _ in asked for _ in range(n)],
        [one.text for several in completions for one in several],
        [columns(example) for example, _ in asked for _ in range(n)],
    )
    scores, moments = shape_scores(raw.reshape(-1, n), completions, config, moments)

    def own(x: Float[np.ndarray, "m"], i: int) -> Float[np.ndarray, "n"]:
        return x[i * n : (i + 1) * n]

    return (
        [
            Asked(
                place,
                example,
                ids,
                several,
                scores[i],
                own(raw, i),
                {k: own(v, i) for k, v in parts.items()},
            )
            for i, (place, (example, ids), several) in enumerate(zip(places, asked, completions))
        ],
        moments,
        seconds,
    )


def draw(
    place: int,
    config: RolloutConfig,
    prompts: Prompts,
    engine: Engine,
    rewards: WeightedRewards,
    moments: Moments,
) -> Drawn:
    """Sample a rollout; with dynamic sampling again and again until every group's scores differ.

    References:
        Dynamic sampling: Yu et al. 2025 (DAPO), arXiv 2503.14476, section 3.2.
    """
    share = config.prompts // jax.process_count()
    kept: list[Asked] = []
    spare: list[Asked] = []  # groups without a difference: used only where the tries do not suffice
    tries, seconds, tokens = 0, 0.0, 0
    while tries < config.tries and (tries == 0 or not everywhere(len(kept) >= share)):
        first = place + tries * config.prompts + jax.process_index() * share
        found, moments, taken = sample(
            range(first, first + share), config, prompts, engine, rewards, moments
        )
        seconds += taken
        tokens += sum(len(one.tokens) for each in found for one in each.completions)
        for one in found:
            (kept if config.tries == 1 or np.ptp(one.scores) > 0 else spare).append(one)
        tries += 1
    return Drawn((kept + spare)[:share], tries, moments, seconds, tokens)


def describe(drawn: Drawn, config: RolloutConfig) -> dict[str, float]:
    """Return a rollout's metrics over all processes, by the names that dashboards know."""
    raw = gather(np.concatenate([one.raw for one in drawn.asked])).reshape(-1, config.responses)
    completions = [one for asked in drawn.asked for one in asked.completions]
    lengths = gather(np.array([len(one.tokens) for one in completions], np.float32))
    cut_off = gather(np.array([one.finish == "length" for one in completions], np.float32))
    tokens = float(gather(np.array([drawn.tokens], np.float32)).sum())
    metrics = {
        "reward": float(raw.mean()),
        "reward_std": float(raw.std(axis=1, ddof=1).mean()) if config.responses > 1 else 0.0,
        "frac_reward_zero_std": float((np.ptp(raw, axis=1) == 0).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(cut_off.mean()),
        "rollout/tries": float(drawn.tries),
        "rollout/generation_seconds": drawn.seconds,
        "rollout/tokens_per_second": tokens / drawn.seconds,
    }
    for name in drawn.asked[0].parts:
        metrics[f"rewards/{name}"] = float(
            gather(np.concatenate([one.parts[name] for one in drawn.asked])).mean()
        )
    return metrics


def records(drawn: Drawn, prompts: int = 4) -> list[dict[str, Any]]:
    """Return some samples as JSON-able records, for people to read."""
    return [
        {
            "prompt": asked.example.prompt
            if isinstance(asked.example.prompt, str)
            else list(asked.example.prompt),
            "output": one.text,
            "reward": float(asked.raw[i]),
            "score": float(asked.scores[i]),
            "rewards": {name: float(values[i]) for name, values in asked.parts.items()},
            "tokens": len(one.tokens),
            "finish": one.finish,
        }
        for asked in drawn.asked[:prompts]
        for i, one in enumerate(asked.completions)
    ]

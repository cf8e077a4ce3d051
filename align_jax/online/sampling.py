# SPDX-License-Identifier: Apache-2.0
"""Prompts in, scored samples out: the part of a rollout that deals in text.

Prompts are tokenized once and come in an endless seeded stream; a *position* is a place in it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from align_jax.core.options import RolloutOptions
from align_jax.core.schema import Example
from align_jax.data import chat
from align_jax.data.truncation import Limits, truncate
from align_jax.inference.engines import Engine
from align_jax.inference.generate import Completion, Request, true_on_all_processes
from align_jax.inference.samplers import Sampling
from align_jax.losses import advantages as estimators
from align_jax.online import comparisons
from align_jax.online.comparisons import Compared
from align_jax.online.environment import Episode, Player, turn_tokens
from align_jax.online.partners import Answers, Opponent, others, sampled_positions
from align_jax.online.rewards import WeightedRewards, by_name, columns, counted, prompt_text
from align_jax.online.steps import StepRewards, token_places

# running moments of all scores; see losses.advantages.normalize_scores
Moments = Mapping[str, float]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> Int[np.ndarray, "n"]:
    return np.random.default_rng((seed, epoch)).permutation(size)


def _encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, at_once: int = 1024
) -> Iterator[chat.Tokens]:
    """Tokenize in parts: what is between a text and its ids is many times their size."""
    for begin in range(0, len(examples), at_once):
        yield from chat.encode_many(examples[begin : begin + at_once], tokenizer)


class Prompts:
    """Prompts by their position in an endless stream; each epoch has an order of its own.

    Args:
        examples: of kind "prompts".
        tokenizer: the policy's.
        max_length: tokens of a prompt with its completion.
        max_new_tokens: tokens kept free for the completion.
        truncation: of prompts that are too long: "keep_start", "keep_end", or "drop" the prompt.
        seed: of the order and of the draws.
        shuffle: a new order each epoch; else the data's own.
        answers: keep the examples' first responses too, at most ``max_new_tokens`` of them.

    Attributes:
        report: counts of truncated and dropped prompts.
        longest: tokens of the longest prompt.

    Raises:
        ValueError: no room for a prompt, or none left.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        max_new_tokens: int,
        truncation: str = "keep_end",
        seed: int = 0,
        shuffle: bool = True,
        answers: bool = False,
    ) -> None:
        if max_new_tokens >= max_length:
            raise ValueError(
                f"rollout.max_new_tokens = {max_new_tokens} leaves no room for a prompt in "
                f"max_length = {max_length} tokens"
            )
        # prompts give way to completions of the greatest length
        limits = Limits(max_length, truncation, max_length - max_new_tokens, tokenizer.bos_token_id)
        self._seed, self._shuffle = seed, shuffle
        self._examples, self._tokenizer = examples, tokenizer
        self._answers = Answers(max_new_tokens) if answers else None
        kept_ids: list[Int[np.ndarray, "p"]] = []
        kept_examples: list[int] = []
        truncated = 0
        for number, tokens in enumerate(_encoded(examples, tokenizer)):
            ids = np.asarray(tokens.prompt, np.int32)
            left = truncate(
                ids, [max_new_tokens], limits, last_turn=tokens.last_turn, header=tokens.header
            )
            if left.reason or not len(ids):
                continue
            kept = left.prompt(ids)
            truncated += len(kept) < len(ids)
            kept_ids.append(kept)
            kept_examples.append(number)
            if self._answers is not None:
                self._answers.add(tokens)
        if not kept_ids:
            raise ValueError(
                f"no prompts left of {len(examples)}: all are empty or longer than max_length - "
                f"max_new_tokens = {max_length - max_new_tokens} tokens"
            )
        self.report = {
            "prompts": len(kept_ids),
            "truncated prompts": int(truncated),
            "dropped prompts": len(examples) - len(kept_ids),
        }
        if self._answers is not None:
            self.report["truncated answers"] = self._answers.truncated
        self.longest = max(len(ids) for ids in kept_ids)
        # one after another: an array for each would take more than its tokens do
        self._tokens = np.concatenate(kept_ids)
        self._ends = np.cumsum([0, *(len(ids) for ids in kept_ids)])
        self._numbers = np.asarray(kept_examples, np.int32)

    def __len__(self) -> int:
        return len(self._numbers)

    def lengths(self) -> dict[str, Int[np.ndarray, "_"]]:
        """Return the tokens of each prompt, as ``data.pipeline.Pipeline.lengths`` does."""
        return {"a prompt": np.diff(self._ends)}

    def index(self, position: int) -> int:
        """Return which of the examples stands at a position of the stream."""
        return int(self._numbers[self._place(position)])

    def _place(self, position: int) -> int:
        epoch, index = divmod(position, len(self))
        if not self._shuffle:
            return index
        return int(_order(self._seed, epoch, len(self))[index])

    def __getitem__(self, position: int) -> tuple[Example, Int[np.ndarray, "p"]]:
        """Return the prompt at a position of the stream, as an example and as token ids."""
        place = self._place(position)
        ids = self._tokens[self._ends[place] : self._ends[place + 1]]
        return self._examples[int(self._numbers[place])], ids

    def answer(self, position: int) -> Completion:
        """Return the data's answer to the prompt at a position of the stream, as a completion that
        nobody drew.

        Raises:
            ValueError: no answers were kept.
        """
        if self._answers is None:
            raise ValueError("these prompts were read without their answers")
        _, prompt = self[position]
        return self._answers.completion(self._place(position), prompt, self._tokenizer)

    def steps(
        self, position: int, completion: Completion, steps: StepRewards
    ) -> list[tuple[int, float]]:
        """Return each of a completion's steps by its last token, with its reward."""
        _, prompt = self[position]
        places = token_places(self._tokenizer, prompt.tolist(), completion, steps)
        return [(place, reward) for place, (_, reward) in zip(places, steps, strict=True)]

    def seed(self, position: int, player: int = 0) -> int:
        """Return the seed of a player's draws at a position of the stream; player 0 is the
        policy."""
        entropy = (self._seed, position, player) if player else (self._seed, position)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])


class PromptSamples(NamedTuple):
    """One prompt with its samples and what they are worth."""

    position: int  # in the stream of prompts
    example: Example
    prompt: Int[np.ndarray, "p"]  # token ids
    completions: list[Completion]
    scores: Float[np.ndarray, "n"]  # after shaping: what is trained on
    rewards: Float[np.ndarray, "n"]  # the weighted sum
    each_reward: dict[str, Float[np.ndarray, "n"]]  # by name, unweighted; NaN: it said nothing
    episodes: list[Episode] = []  # of the samples, where an environment answers
    # of the samples, where rewards stand at the ends of steps: each step's last token, its reward
    steps: list[list[tuple[int, float]]] = []
    compared: Compared | None = None  # where a judge of pairs compared them
    sampled: bool = True  # else the completions are the data's answer
    greedy_score: float = math.nan  # of the most probable completion, where one was asked for
    others: list[Completion] = []  # what the completions meet
    other_scores: Float[np.ndarray, "m"] = np.zeros(0, np.float32)
    other_rewards: Float[np.ndarray, "m"] = np.zeros(0, np.float32)

    @property
    def differ(self) -> bool:
        """Whether the samples are worth different amounts."""
        of_steps = {reward for several in self.steps for _, reward in several}
        return bool(np.ptp(self.scores) > 0) or len(of_steps) > 1


class SampledRollout(NamedTuple):
    """This process's share of a rollout, in text."""

    prompts: list[PromptSamples]
    tries: int  # times that a whole rollout's prompts were taken from the stream
    moments: Moments
    seconds: float  # spent generating, all tries together
    tokens: int  # generated in them


def gather(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "m"]:
    """Join the arrays of all processes, each of the same size."""
    if jax.process_count() == 1:
        return x
    return np.asarray(multihost_utils.process_allgather(x)).reshape(-1)


def unscored_as_mean(
    rewards: Float[np.ndarray, "q n"], each: Mapping[str, Float[np.ndarray, "m"]]
) -> Float[np.ndarray, "q n"]:
    """Let completions that no reward scored be worth the mean of their prompt's others, so that
    they are neither better nor worse; of all processes' where their prompt has no others, 0 without
    any.

    Args:
        rewards: the weighted sums, 0 where no reward said anything.
        each: every reward by itself, NaN where it said nothing.

    >>> each = np.float32([3.0, np.nan, 1.0])
    >>> unscored_as_mean(np.nan_to_num(each)[None], {"mine": each}).tolist()
    [[3.0, 2.0, 1.0]]
    """
    if not each:
        return rewards
    unscored = np.isnan(np.stack([*each.values()])).all(axis=0).reshape(rewards.shape)
    known = np.where(unscored, 0.0, rewards)
    sums, counts = known.sum(axis=1), (~unscored).sum(axis=1)
    total, count = gather(np.array([sums.sum(), counts.sum()])).reshape(-1, 2).sum(axis=0)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), total / max(count, 1))
    return np.where(unscored, means[:, None], rewards).astype(np.float32)


def shape_scores(
    rewards: Float[np.ndarray, "q n"],
    completions: Sequence[Sequence[Completion]],
    options: RolloutOptions,
    moments: Moments,
) -> tuple[Float[np.ndarray, "q n"], Moments]:
    """Turn rewards into scores: normalize, clip, take off the penalties for completions that are
    cut off or overlong, as the options say.

    The moments are those of all processes' rewards.
    """
    shaped, clip = jnp.asarray(rewards), options.score_clip or None
    if options.normalize_scores:
        everyone = jnp.asarray(gather(rewards.reshape(-1)))[:, None]
        whole, found = estimators.normalize_scores(everyone, dict(moments), clip=clip)
        first = jax.process_index() * rewards.size
        shaped = whole[first : first + rewards.size].reshape(rewards.shape)
        moments = {name: float(value) for name, value in found.items()}
    elif clip is not None:
        shaped = jnp.clip(shaped, -clip, clip)
    if options.missing_eos_penalty:
        finished = np.array([[one.finish == "stop" for one in several] for several in completions])
        shaped = estimators.missing_eos_penalty(
            shaped, jnp.asarray(finished), options.missing_eos_penalty
        )
    if options.overlong_buffer:
        lengths = np.array(
            [[len(one.tokens) for one in several] for several in completions], np.int32
        )
        shaped = shaped + estimators.overlong_penalty(
            jnp.asarray(lengths), max_length=options.max_new_tokens, buffer=options.overlong_buffer
        )
    return np.asarray(shaped, np.float32), moments


@dataclasses.dataclass(frozen=True)
class PromptSampler:
    """Samples prompts and scores the samples.

    Attributes:
        options: how.
        engine: what generates.
        rewards: what a completion is worth.
        player: plays episodes of several turns; None: a completion has one.
        own_share: of the prompts whose responses are the policy's samples; the others have the
            data's answer.
        taught: the others have the opponent's samples instead.
        greedy: score the most probable completion to each of a rollout's prompts too.
        opponent: the other player, where it samples.
        facing: a judge of pairs compares each sample with what was drawn against it alone.
        mixed: the opponent, a mixture of the policy with the reference, draws the samples.
    """

    options: RolloutOptions
    engine: Engine
    rewards: WeightedRewards
    player: Player | None = None
    own_share: float = 1.0
    taught: bool = False
    greedy: bool = False
    opponent: Opponent | None = None
    facing: bool = False
    mixed: bool = False

    def sample(
        self,
        prompts: Prompts,
        positions: Sequence[int],
        moments: Moments,
        greedy: bool = False,
        *,
        alone: bool = False,
    ) -> tuple[list[PromptSamples], Moments, float]:
        """Sample the prompts at these positions of the stream, and score the samples.

        Args:
            prompts: the stream.
            positions: in it.
            moments: the running moments of all scores.
            greedy: score the most probable completion to each prompt too; it counts among the
                moments, and nowhere else.
            alone: sample the policy itself, and what the samples meet for a judge of pairs only.

        Returns:
            The samples, the running moments of all scores, and the seconds spent generating.
        """
        options, count = self.options, self.options.responses_per_prompt
        n = count + greedy  # the greedy one is the last of its prompt's
        drawn = [(count, Sampling.of(options)), (1, Sampling(temperature=0.0))][: 1 + greedy]
        chosen = [prompts[position] for position in positions]
        requests = [
            Request(
                tuple(ids.tolist()),
                each,
                turn_tokens(options),
                sampling,
                prompts.seed(position),
                options.stop,
            )
            for each, sampling in drawn
            for position, (_, ids) in zip(positions, chosen)
        ]
        began = time.monotonic()
        examples = [example for example, _ in chosen]
        completions, episodes = self._complete(requests, examples, alone)
        met = self._others(prompts, positions, requests, alone and self.rewards.pairs is None)
        seconds = time.monotonic() - began
        everyone = [[*own, *other] for own, other in zip(completions, met)]
        extras = [
            columns(example, one.finish)
            for example, several in zip(examples, everyone)
            for one in several
        ]
        for row, episode in zip(extras, (one for several in episodes for one in several)):
            row |= episode.columns()
        total, each = self.rewards(
            [prompt_text(example) for example, several in zip(examples, everyone) for _ in several],
            [one.text for several in everyone for one in several],
            extras,
        )
        rewards = unscored_as_mean(total.reshape(len(chosen), -1), each)
        compared = self._compared(examples, everyone)
        if compared is not None:
            rewards = np.stack([one.wins for one in compared])
        scores, moments = shape_scores(rewards, everyone, options, moments)
        found = []
        for i, (position, (example, ids)) in enumerate(zip(positions, chosen)):
            own = {name: x.reshape(rewards.shape)[i, :count] for name, x in each.items()}
            one = PromptSamples(
                *(position, example, ids, completions[i][:count]),
                *(scores[i, :count], rewards[i, :count], own, episodes[i][:count]),
                greedy_score=float(scores[i, -1]) if greedy else math.nan,
            )
            one = one._replace(others=met[i], other_scores=scores[i, n:])
            one = one._replace(other_rewards=rewards[i, n:])
            found.append(one if compared is None else self._judged(one, compared[i]))
        return self._with_steps(prompts, found, extras), moments, seconds

    def _compared(
        self, examples: Sequence[Example], everyone: Sequence[Sequence[Completion]]
    ) -> list[Compared] | None:
        """Let a judge of pairs compare each prompt's completions, where there is one."""
        return self.rewards.compared(
            [prompt_text(example) for example in examples],
            [[one.text for one in several] for several in everyone],
            self.options.responses_per_prompt,
            self.facing,
        )

    def _judged(self, one: PromptSamples, compared: Compared) -> PromptSamples:
        """Say by whom these samples were judged; of what each met, how often it was the better
        one."""
        name, _ = self.rewards.pairs or ("", None)
        others = 1.0 - one.rewards if self.facing else one.other_rewards[:0]
        return one._replace(
            compared=compared, each_reward={name: one.rewards}, other_rewards=others
        )

    def _with_steps(
        self, prompts: Prompts, samples: list[PromptSamples], extras: Sequence[Mapping[str, Any]]
    ) -> list[PromptSamples]:
        """Add what the samples' steps are worth, where rewards stand at their ends."""
        if not self.rewards.step_terms:
            return samples
        n = self.options.responses_per_prompt
        scored, each = self.rewards.of_steps(
            [prompt_text(one.example) for one in samples for _ in range(n)],
            [said.text for one in samples for said in one.completions],
            extras,
        )
        found = []
        for i, one in enumerate(samples):
            own = slice(n * i, n * (i + 1))
            steps = [
                prompts.steps(one.position, said, several)
                for said, several in zip(one.completions, scored[own])
            ]
            sums = np.array([sum(reward for _, reward in several) for several in steps], np.float32)
            means = {name: x[own] for name, x in each.items()}
            found.append(
                one._replace(
                    steps=steps, rewards=one.rewards + sums, each_reward=one.each_reward | means
                )
            )
        return found

    def _complete(
        self, requests: Sequence[Request], examples: Sequence[Example], alone: bool
    ) -> tuple[list[list[Completion]], list[list[Episode]]]:
        """Return each example's completions and episodes; several requests may ask for them."""
        size, engine = len(examples), self.engine
        if self.mixed and not alone and self.opponent is not None:
            engine = self.opponent.engine
        if self.player is None:
            found = engine(requests)
            episodes: list[list[Episode]] = [[] for _ in requests]
        else:
            repeated = [*examples] * (len(requests) // size)
            played = self.player(engine, requests, repeated)
            found = [one.completions for one in played]
            episodes = [one.episodes for one in played]
        return (
            [[one for several in found[i::size] for one in several] for i in range(size)],
            [[one for several in episodes[i::size] for one in several] for i in range(size)],
        )

    def _others(
        self, prompts: Prompts, positions: Sequence[int], requests: Sequence[Request], unmet: bool
    ) -> list[list[Completion]]:
        """Draw what the samples of each prompt meet."""
        if unmet or not others(self.options):
            return [[] for _ in positions]
        if self.opponent is None:
            return [[prompts.answer(position)] for position in positions]
        draws = (prompts.seed(position, player=1) for position in positions)
        return self.opponent.engine(
            [dataclasses.replace(one, seed=seed) for one, seed in zip(requests, draws)]
        )

    def sample_rollout(self, prompts: Prompts, position: int, moments: Moments) -> SampledRollout:
        """Sample a rollout's prompts from a position of the stream on; with dynamic sampling again
        and again until every group's scores differ.

        References:
            Dynamic sampling: Yu et al. 2025 (DAPO), arXiv 2503.14476, section 3.2.
        """
        options = self.options
        share = options.prompts // jax.process_count()
        kept: list[PromptSamples] = []
        # groups without a difference: used only where the tries do not suffice
        spare: list[PromptSamples] = []
        tries, seconds, tokens = 0, 0.0, 0
        while tries < options.tries and (
            tries == 0 or not true_on_all_processes(len(kept) >= share)
        ):
            first = position + tries * options.prompts + jax.process_index() * share
            positions = range(first, first + share)
            sampled = sampled_positions(positions, self.own_share)
            rest = [one for one in positions if one not in sampled]
            found = []
            for some, by in ((sampled, self), (rest if self.taught else [], self.teacher)):
                if not some:
                    continue
                more, moments, taken = by.sample(prompts, some, moments, self.greedy)
                found += more
                seconds += taken
            tokens += sum(int(one.mask.sum()) for each in found for one in each.completions)
            found += [self._answered(prompts, one) for one in rest if not self.taught]
            found.sort(key=lambda one: one.position)
            for one in found:
                (kept if options.tries == 1 or one.differ else spare).append(one)
            tries += 1
        return SampledRollout((kept + spare)[:share], tries, moments, seconds, tokens)

    @property
    def teacher(self) -> PromptSampler:
        """What samples the opponent alone in the policy's place."""
        return dataclasses.replace(self, mixed=True)

    def _answered(self, prompts: Prompts, position: int) -> PromptSamples:
        """Take the data's answer in the place of samples."""
        example, ids = prompts[position]
        n = self.options.responses_per_prompt
        zeros = np.zeros(n, np.float32)
        answers = [prompts.answer(position)] * n
        return PromptSamples(position, example, ids, answers, zeros, zeros, {}, sampled=False)


def describe(rollout: SampledRollout) -> dict[str, float]:
    """Return the metrics of a rollout's samples over all processes, by the names that dashboards
    know."""
    rollout = rollout._replace(prompts=[one for one in rollout.prompts if one.sampled])
    responses = len(rollout.prompts[0].rewards)
    rewards = gather(np.concatenate([one.rewards for one in rollout.prompts]))
    rewards = rewards.reshape(-1, responses)
    completions = [one for several in rollout.prompts for one in several.completions]
    lengths = gather(np.array([one.mask.sum() for one in completions], np.float32))
    cut_off = gather(np.array([one.finish == "length" for one in completions], np.float32))
    tokens = float(gather(np.array([rollout.tokens], np.float32)).sum())
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(cut_off.mean()),
        "rollout/tries": float(rollout.tries),
        "rollout/generation_seconds": rollout.seconds,
        "rollout/tokens_per_second": tokens / rollout.seconds,
    }
    silent, each_reward = np.ones(rewards.size, bool), rollout.prompts[0].each_reward
    if each_reward:
        metrics |= {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(axis=1, ddof=1).mean()) if responses > 1 else 0.0,
            "frac_reward_zero_std": float((np.ptp(rewards, axis=1) == 0).mean()),
        }
    met = [one for several in rollout.prompts for one in several.other_rewards]
    if each_reward and met:
        theirs = gather(np.array(met, np.float32)).reshape(len(rewards), -1)
        wins = np.sign(rewards - theirs)  # one other response, or one for each sample
        metrics |= {
            "against/reward": float(theirs.mean()),
            "against/win_rate": float((0.5 + 0.5 * wins).mean()),
        }
    for name in each_reward:
        own = gather(np.concatenate([one.each_reward[name] for one in rollout.prompts]))
        silent &= np.isnan(own)
        said = counted(own)
        if len(said):
            metrics[f"rewards/{name}"] = float(said.mean())
        if len(said) < len(own):
            metrics[f"rewards/{name}/abstained"] = float(len(own) - len(said))
    if each_reward and silent.any():
        metrics["rewards/all_abstained"] = float(silent.sum())
    judged = [one.compared for one in rollout.prompts if one.compared is not None]
    if judged:
        counts = gather(comparisons.describe(judged)).reshape(-1, 4).sum(axis=0)
        names = ("judge/ties", "judge/disagreements", "judge/silent")
        metrics |= {name: float(x / counts[0]) for name, x in zip(names, counts[1:])}
        metrics["judge/pairs"] = float(counts[0])
    steps = [len(one) for several in rollout.prompts for one in several.steps]
    if steps:
        metrics["completions/steps"] = float(gather(np.array(steps, np.float32)).mean())
    return metrics | _describe_episodes(rollout)


def _describe_episodes(rollout: SampledRollout) -> dict[str, float]:
    """Return the metrics of episodes of several turns, over all processes."""
    episodes = [one for several in rollout.prompts for one in several.episodes]
    if not episodes:
        return {}
    completions = [
        one for several in rollout.prompts if several.episodes for one in several.completions
    ]
    facts = [
        (one.answers, not one.done, one.no_room, (~whole.mask).sum(), len(whole.tokens))
        for one, whole in zip(episodes, completions)
    ]
    turns, unfinished, no_room, said, tokens = (
        float(gather(np.array(x, np.float32)).mean()) for x in zip(*facts)
    )
    return {
        "environment/turns": turns,
        "environment/unfinished": unfinished,
        "environment/no_room": no_room,
        "environment/tokens_share": said / tokens,
    }


def records(rollout: SampledRollout, prompts: int = 4) -> list[dict[str, Any]]:
    """Return some samples as JSON-able records, for people to read."""
    found: list[dict[str, Any]] = []
    for several in [one for one in rollout.prompts if one.sampled][:prompts]:
        prompt = several.example.prompt
        for i, one in enumerate(several.completions):
            found.append(
                {
                    "prompt": prompt if isinstance(prompt, str) else list(prompt),
                    "output": one.text,
                    "reward": float(several.rewards[i]),
                    "score": float(several.scores[i]),
                    "rewards": by_name(several.each_reward, i),
                    "tokens": len(one.tokens),
                    "finish": one.finish,
                }
            )
            if several.steps:
                found[-1]["step_rewards"] = [reward for _, reward in several.steps[i]]
            if several.episodes:
                episode = several.episodes[i]
                turns = {"turns": list(episode.turns), "turn_rewards": list(episode.rewards)}
                found[-1] |= turns | {"done": episode.done}
    return found

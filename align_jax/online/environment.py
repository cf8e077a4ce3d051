# SPDX-License-Identifier: Apache-2.0
"""Rollouts of several turns: a user's Python answers the model, and the model goes on.

    prompt [answer <end>] [reply, header] [answer <end>] [reply, header] [answer <end>]
            learned        masked          learned        masked          learned

``config.rollout.environment`` names a function, or a class of which each episode gets an object:

    def check(said, **columns)                       asked once a turn
    class Game:
        def __init__(self, **columns)                once an episode
        def step(self, said)                         once a turn

``said`` is the text of the model's answer.  The others are given by name, those that are named (all
to ``**columns``): columns of the data's row, ``messages`` (the prompt's turns), and
``seed`` (of the prompt's place in the stream: the same for all its samples, and again on resuming).
What they return is a ``Reply``, or a tuple that begins like one, a text (the episode goes on), or
None (it is over).

An answer's tokens are the very ones that were sampled, so that each context begins with all of the
one before.  Where a rollout's samples are decoded together and replies are short, the cache is kept
and the reply runs behind it (``Generator``'s ``keep``); else the context is prefilled anew, padded
to one length.  No program is compiled after the second turn, but for replies of another bucket.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from align_jax.core.choose import choose
from align_jax.core.options import RolloutOptions
from align_jax.core.schema import Example, Message
from align_jax.data import chat
from align_jax.inference.engines import Engine
from align_jax.inference.generate import (
    Completion,
    Request,
    bucket,
    stop_tokens,
    true_on_all_processes,
)
from align_jax.online import deadline, functions

ROLES = ("user", "tool", "system")  # whose turn a reply may be
_SAID = "said"  # the parameter that takes what the model said
_EXCERPT = 60  # characters of an answer in a message
_RETURNS = (
    "expected a text, None (the episode is over), or (text, done), (text, done, reward), "
    "(text, done, reward, role)"
)


class Reply(NamedTuple):
    """What an environment says to an answer.

    Attributes:
        text: the next turn; where the episode is over it is only logged.
        done: the episode is over.
        reward: of this turn; an episode's rewards are summed, and count as the reward
            "environment".
        role: whose turn it is, one of ``ROLES``; plain text has no roles.
    """

    text: str = ""
    done: bool = False
    reward: float | None = None
    role: str = "user"


def read_reply(found: Any) -> Reply:
    """Read what a user's environment returned.

    Raises:
        ValueError: no reply.
    """
    if found is None:
        return Reply(done=True)
    given = found if isinstance(found, tuple) else (found,)
    if not 1 <= len(given) <= len(Reply._fields):
        raise ValueError(f"returned {len(given)} values; {_RETURNS}")
    reply = Reply(*given)
    if not isinstance(reply.text, str):
        kind = type(reply.text).__name__
        raise ValueError(f"returned {str(found)[:_EXCERPT]} (a {kind}); {_RETURNS}")
    if not isinstance(reply.done, (bool, np.bool_)):
        raise ValueError(f"returned done = {reply.done!r}; expected True or False")
    if reply.role not in ROLES:
        raise ValueError(f"returned the role {reply.role!r}; expected one of {', '.join(ROLES)}")
    reward = reply.reward
    if reward is not None:
        if not isinstance(reward, (numbers.Real, np.bool_)) or not math.isfinite(reward):
            raise ValueError(f"returned the reward {reward!r}; expected a finite number, or None")
        reward = float(reward)
    if not reply.text and not reply.done:
        raise ValueError("returned an empty text, and not that the episode is over (done)")
    return reply._replace(done=bool(reply.done), reward=reward)


Step = Callable[[str], Any]  # from an answer to what `read_reply` reads


@dataclasses.dataclass(frozen=True)
class Environment:
    """A user's environment, found and asked by its signature what it takes.

    Attributes:
        path: its name, ``module:function``.
        made: the function or class.
        named: the parameters that it takes by name, ``said`` not among them.
        needed: those of them without a default.
        anything: it takes any column.
    """

    path: str
    made: Callable[..., Any]
    named: frozenset[str]
    needed: frozenset[str]
    anything: bool

    def check(self, columns: Mapping[str, Any]) -> None:
        """Check that a row has what it takes.

        Raises:
            ValueError: a column is missing.
        """
        for name in sorted(self.needed - {"seed"}):
            choose(columns, name, "the environment's column")

    def start(self, columns: Mapping[str, Any], seed: int) -> Step:
        """Begin an episode.

        Args:
            columns: of its row.
            seed: of its prompt.
        """
        given = {"seed": seed, **columns}
        taken = {name: x for name, x in given.items() if self.anything or name in self.named}
        if inspect.isclass(self.made):
            game: Any = self.made(**taken)
            step: Step = game.step
            return step
        return lambda said: self.made(**taken | {_SAID: said})


def find(path: str) -> Environment:
    """Find the function or class that ``module:function`` names.

    Raises:
        ValueError: there is none, or one that cannot be an environment.
    """
    made = functions.find(path, "an environment", classes=True)
    try:
        parameters = dict(inspect.signature(made).parameters)
    except (TypeError, ValueError):
        raise ValueError(f"{path!r} does not say what it takes; wrap it in a function") from None
    if inspect.isclass(made):
        step = getattr(made, "step", None)
        try:
            inspect.signature(step).bind(None, "")  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ValueError(f"{path!r} has no method step(self, said)") from None
    elif _SAID in parameters:
        del parameters[_SAID]
    else:
        raise ValueError(
            f"{path!r} takes ({', '.join(parameters)}); expected (said, **columns), or a class "
            "with step(self, said)"
        )
    kinds = {one.kind for one in parameters.values()}
    if inspect.Parameter.POSITIONAL_ONLY in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        raise ValueError(f"{path!r} takes a parameter by position only; expected columns by name")
    named = {
        name: one
        for name, one in parameters.items()
        if one.kind is not inspect.Parameter.VAR_KEYWORD
    }
    needed = {name for name, one in named.items() if one.default is inspect.Parameter.empty}
    anything = inspect.Parameter.VAR_KEYWORD in kinds
    return Environment(path, made, frozenset(named), frozenset(needed), anything)


def columns_of(example: Example) -> dict[str, Any]:
    """Return the columns of an example's row for environments, and the prompt's turns."""
    if isinstance(example.prompt, str):
        return dict(example.extras)
    return {**example.extras, "messages": list(example.prompt)}


class Episode(NamedTuple):
    """What was said in a sample of several turns."""

    turns: tuple[Message, ...]  # after the prompt
    rewards: tuple[float | None, ...]  # that the environment gave, of each answer
    done: bool  # the environment ended it
    no_room: bool  # a reply was left out: no answer would have fitted behind it

    @property
    def answers(self) -> int:
        """How often the model spoke."""
        return len(self.rewards)

    def columns(self) -> dict[str, Any]:
        """Return what reward functions are told beside the row's columns."""
        given = [one for one in self.rewards if one is not None]
        return {
            "turns": [dict(turn) for turn in self.turns],
            "environment_reward": sum(given) if given else None,
        }


class Played(NamedTuple):
    """A request's samples: as one completion each, and by their turns."""

    completions: list[Completion]
    episodes: list[Episode]


@dataclasses.dataclass
class _Playing:
    """An episode under way."""

    example: Example
    request: Request  # the first turn's
    sample: int
    step: Step | None = None  # before its first turn
    # tokens, their log-probabilities (nats: the model's, the sampler's), said by the model?
    parts: list[tuple[Any, Any, Any, bool]] = dataclasses.field(default_factory=list)
    turns: list[Message] = dataclasses.field(default_factory=list)
    rewards: list[float | None] = dataclasses.field(default_factory=list)
    done: bool = False
    no_room: bool = False
    over: bool = False
    finish: str = "length"

    @property
    def tokens(self) -> Int[np.ndarray, "n"]:
        """Of all turns, the environment's among them."""
        return np.concatenate([part[0] for part in self.parts]).astype(np.int32)

    def take(self, answer: Completion) -> None:
        """Append an answer."""
        self.parts.append((answer.tokens, answer.token_logps, answer.drawn_logps, True))
        self.turns.append({"role": "assistant", "content": answer.text})
        self.finish = answer.finish

    def append(self, ids: Sequence[int]) -> None:
        """Append what the environment said, of no log-probability."""
        none = np.zeros(len(ids), np.float32)
        self.parts.append((np.array(ids, np.int32), none, none, False))

    def completion(self, room: int) -> Completion:
        """Return all of it as one completion.

        Args:
            room: tokens that an episode may have at most.
        """
        tokens = self.tokens
        said = np.concatenate([np.full(len(part[0]), part[3]) for part in self.parts])
        logps, drawn = (
            np.concatenate([part[i] for part in self.parts]).astype(np.float32) for i in (1, 2)
        )
        ended = self.done and (self.finish == "stop" or len(tokens) < room)
        words = [turn["content"] for turn in self.turns[: len(self.parts)]]
        text = ("" if isinstance(self.example.prompt, str) else "\n").join(words)
        return Completion(tokens, logps, drawn, text, "stop" if ended else "length", said)

    def episode(self) -> Episode:
        """Return what was said."""
        return Episode(tuple(self.turns), tuple(self.rewards), self.done, self.no_room)


@dataclasses.dataclass(frozen=True)
class Player:
    """Plays episodes: engine and environment by turns.

    Attributes:
        environment: the user's.
        tokenizer: the policy's.
        options: limits, and how answers are sampled.
        room: tokens that a later turn's context and answer are padded to.
        rewarded: what the environment gives counts among the rewards.
        ends: tokens that end an answer.
    """

    environment: Environment
    tokenizer: PreTrainedTokenizerBase
    options: RolloutOptions
    room: tuple[int, int]
    rewarded: bool
    ends: tuple[int, ...]

    def __call__(
        self, engine: Engine, requests: Sequence[Request], examples: Sequence[Example]
    ) -> list[Played]:
        """Play each request's samples.

        Args:
            engine: what generates.
            requests: of the first turn.
            examples: of each request.

        Raises:
            ValueError, TimeoutError: the environment fails, or does not return; with its name, the
                row, the sample and the turn.
        """
        first = engine(requests)
        playing = [
            [_Playing(example, request, sample) for sample in range(request.samples)]
            for request, example in zip(requests, examples, strict=True)
        ]
        everyone = [one for several in playing for one in several]
        self._turns(everyone, [one for several in first for one in several])
        for turn in range(1, self.options.max_turns):
            # processes must make the same calls: there the episodes that are over ask for nothing
            several = jax.process_count() > 1
            going = everyone if several else [one for one in everyone if not one.over]
            if true_on_all_processes(all(one.over for one in everyone)):
                break
            answers = engine([self._request(one, turn) for one in going])
            self._turns(going, [several[0] for several in answers])
        room = self.options.max_new_tokens
        return [
            Played([one.completion(room) for one in several], [one.episode() for one in several])
            for several in playing
        ]

    def _request(self, one: _Playing, turn: int) -> Request:
        """Ask for an episode's next answer; of one that is over, for none."""
        first, left = one.request, self.options.max_new_tokens
        prompt = first.prompt
        if not one.over:
            tokens = one.tokens
            prompt, left = (*prompt, *tokens.tolist()), left - len(tokens)
        seed = np.random.SeedSequence((first.seed, one.sample, turn)).generate_state(1)[0]
        return Request(
            prompt,
            1,
            0 if one.over else min(left, turn_tokens(self.options)),
            first.sampling,
            int(seed),
            first.stop,
            self.room,
        )

    def _turns(self, going: Sequence[_Playing], answers: Sequence[Completion]) -> None:
        """Give each episode its answer, and let the environment reply.

        Raises:
            TimeoutError: that takes longer than ``environment_seconds``.
        """
        seconds, now = self.options.environment_seconds, [""]

        def play() -> None:
            for one, answer in zip(going, answers, strict=True):
                if not one.over:
                    now[0] = f"{self._place(one)}, turn {len(one.rewards) + 1}"
                    self._turn(one, answer)

        def describe(frame: FrameType | None) -> str:
            line = functions.line_in(traceback.extract_stack(frame)) if frame else ""
            at = f"; it is at {line}" if line else ""
            return f"{now[0]}: no reply within rollout.environment_seconds = {seconds:g}{at}"

        deadline.call(play, seconds, describe)

    def _place(self, one: _Playing) -> str:
        return f"environment {self.environment.path!r} at {one.example.source}, sample {one.sample}"

    def _turn(self, one: _Playing, answer: Completion) -> None:
        """Take an answer, and what the environment says to it."""
        if one.step is None:
            begin = functools.partial(
                self.environment.start, columns_of(one.example), one.request.seed
            )
            one.step = self._asked(begin, one, "before its first turn")
        one.take(answer)
        words = one.turns[-1]["content"]
        where = f"turn {len(one.rewards) + 1} (answer {words[:_EXCERPT]!r})"
        ask = functools.partial(self._reply, one.step, words)
        reply: Reply = self._asked(ask, one, where)
        one.rewards.append(reply.reward)
        last = len(one.rewards) == self.options.max_turns
        if reply.done or last:
            one.done, one.over = reply.done, True
            if reply.text:  # for people to read
                one.turns.append({"role": reply.role, "content": reply.text})
            return
        end = ""
        if len(answer.tokens) and answer.tokens[-1] in self.ends:
            end = str(self.tokenizer.decode([int(answer.tokens[-1])]))
        turn = {"role": reply.role, "content": reply.text}
        encode = functools.partial(chat.encode_reply, one.example, self.tokenizer, turn, end)
        ids = self._asked(encode, one, where)
        if len(one.tokens) + len(ids) >= self.options.max_new_tokens:
            one.no_room = one.over = True
            return
        one.turns.append(turn)
        one.append(ids)

    def _reply(self, step: Step, answer: str) -> Reply:
        reply = read_reply(functions.awaited(step(answer)))
        if reply.reward is not None and not self.rewarded:
            raise ValueError(
                "gave a reward, which counts for nothing: name the reward 'environment' in "
                "config.rewards"
            )
        return reply

    def _asked(self, ask: Callable[[], Any], one: _Playing, where: str) -> Any:
        """Call the user's code.

        Raises:
            ValueError, ConnectionError: whatever it raised, with its name and the place.
        """
        place = self._place(one)
        try:
            return ask()
        except ConnectionError as error:
            raise ConnectionError(f"{place}, {where}: {error}") from error
        except (Exception, SystemExit) as error:
            line = functions.line_of(error)
            words = f"{type(error).__name__}: {error} ({line})" if line else str(error)
            raise ValueError(f"{place}, {where}: {words}") from error


def turn_tokens(options: RolloutOptions) -> int:
    """Return how many tokens an answer has at most."""
    return options.max_turn_tokens or options.max_new_tokens


def later_room(options: RolloutOptions, longest: int, max_length: int) -> tuple[int, int]:
    """Return what a later turn's context and answer are padded to, tokens.

    Args:
        options: the rollout's.
        longest: tokens of the longest prompt.
        max_length: tokens of a prompt with its response.
    """
    return bucket(longest + options.max_new_tokens - 1, max_length - 1), turn_tokens(options)


def make_player(
    options: RolloutOptions,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    longest: int,
    max_length: int,
    rewarded: bool,
    end_tokens: Sequence[int] = (),
) -> Player | None:
    """Make what plays a rollout's episodes; None where it has one turn.

    Args:
        options: the rollout's.
        tokenizer: the policy's.
        examples: prompts.
        longest: tokens of the longest prompt.
        max_length: tokens of a prompt with its response.
        rewarded: what the environment gives counts among the rewards.
        end_tokens: those of the policy's checkpoint.

    Raises:
        ValueError: no such environment, a row without what it takes, or a chat template that
            renders no reply.
    """
    if not options.environment:
        if rewarded:
            raise ValueError(
                "the reward 'environment' is what an environment gives: set "
                "config.rollout.environment"
            )
        return None
    try:
        environment = find(options.environment)
    except ValueError as error:
        raise ValueError(f"config.rollout.environment: {error}") from error
    for example in examples:
        try:
            environment.check(columns_of(example))
        except ValueError as error:
            raise ValueError(f"{example.source}: {options.environment!r}: {error}") from error
    try:
        chat.encode_reply(examples[0], tokenizer, {"role": "user", "content": "a"})
    except chat.RowError as error:
        raise ValueError(f"config.rollout.environment: {error}") from error
    room = later_room(options, longest, max_length)
    ends = stop_tokens(tokenizer, end_tokens)
    return Player(environment, tokenizer, options, room, rewarded, ends)

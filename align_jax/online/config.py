# SPDX-License-Identifier: Apache-2.0
"""How rollouts are made: every number that an online run has beside its objective's own."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from align_jax.inference.samplers import Sampling
from align_jax.losses.objective import Term, data_kind
from align_jax.online.selection import SELECTIONS, group_count


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How rollouts are made; sizes are those of all processes together.

    Attributes:
        kind: what the objective trains on, a key of ``SELECTIONS``.
        prompts: prompts in a rollout.
        responses: samples of each.
        max_new_tokens: tokens at most.
        batch_size: groups in an optimizer step.
        rows: completions decoded together, at most.
        tensor: neighboring devices that hold one copy of the weights together while they generate
            (``inference.resharding``); 0: generation takes the weights as training has them.
        microbatches: parts of a step; the forwards here are cut as finely.
        epochs: passes over a rollout.
        sampling, stop: of the samples.
        targets: options of ``losses.targets.make_targets``; None where the objective needs no
            advantages.
        kl_target, kl_horizon: of the adaptive KL coefficient; None: it stays.
        value_head: the policy's head that gives values; "" = none.
        rescore: take the old log-probabilities from a forward like the training one, so that the
            first ratio is exactly 1; else from generation.
        layout: "plain" or "shared_prefix".
        mismatched: add mismatched completions.
        keep_unfinished: completions cut off by the limit bear the loss.
        missing_eos_penalty: taken from their score, units of reward.
        overlong_buffer: tokens before the limit in which the score falls by up to 1 (DAPO); 0 =
            off.
        normalize_scores, score_clip: by the running moments; at most this size.  None: off.
        tries: dynamic sampling: draw up to so many times until every group has unequal scores; 1 =
            off.
        stop_kl: skip a rollout's later epochs once the policy's divergence from the old one exceeds
            this, nats a token; 0 = never.
        overlap: make the next rollout while this one trains, with weights one rollout old.
        server: an OpenAI-compatible server generates: the options of ``inference.engines.Server``
            (url, model, and the folder ``weights`` through which it gets the newest ones).  None:
            this mesh generates.
        selection: options of the selection.
        seed: of prompts' order, draws and slices.
    """

    kind: str
    prompts: int
    responses: int
    max_new_tokens: int
    batch_size: int
    rows: int = 256
    tensor: int = 0
    microbatches: int = 1
    epochs: int = 1
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    targets: Mapping[str, Any] | None = None
    kl_target: float | None = None
    kl_horizon: float = 10000.0
    value_head: str = ""
    rescore: bool = True
    layout: str = "plain"
    mismatched: bool = False
    keep_unfinished: bool = True
    missing_eos_penalty: float = 0.0
    overlong_buffer: int = 0
    normalize_scores: bool = False
    score_clip: float | None = None
    tries: int = 1
    stop_kl: float = 0.0
    overlap: bool = False
    server: Mapping[str, Any] | None = None
    selection: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in SELECTIONS:
            raise ValueError(
                f"no rollout for data of kind {self.kind!r}; known: {sorted(SELECTIONS)}"
            )
        groups, processes = self.groups[0], jax.process_count()
        if groups % self.batch_size or self.batch_size % self.microbatches:
            raise ValueError(
                f"a rollout of {self.prompts} prompts gives {groups} groups; they "
                "must divide into steps "
                f"of batch_size = {self.batch_size}, and those into microbatches = "
                f"{self.microbatches}"
            )
        if self.prompts % processes or self.batch_size % (processes * self.microbatches):
            raise ValueError(
                f"rollout.prompts = {self.prompts} and batch_size = "
                f"{self.batch_size} must divide over "
                f"{processes} processes (and {self.microbatches} microbatches)"
            )
        if not self.rescore and self.temperature != 1:
            raise ValueError(
                "rollout.options.rescore = False keeps log-probabilities at "
                "temperature 1: set "
                f"rollout.temperature = 1, got {self.sampling.temperature}"
            )
        if self.tries > 1 and self.responses < 2:
            raise ValueError(
                "dynamic sampling (rollout.options.tries > 1) needs "
                "rollout.responses_per_prompt > 1"
            )
        if self.server is not None and processes > 1:
            raise ValueError("the server of rollout.options works with one process only")
        if self.server is not None and self.tensor:
            raise ValueError(
                f"rollout.tensor = {self.tensor} deals weights out for generation "
                "here; with a "
                "server in rollout.options it must be 0"
            )
        if self.overlap and processes > 1:
            raise ValueError(
                "rollout.options.overlap works in one process only: threads of "
                "several processes would "
                "meet in different orders"
            )
        SELECTIONS[self.kind](
            np.zeros((1, self.responses), np.float32), np.zeros(1, np.float32), **self.selection
        )

    @property
    def groups(self) -> tuple[int, int]:
        """Groups in a rollout, and R."""
        return group_count(self.kind, self.prompts, self.responses)

    @property
    def slices(self) -> int:
        """Optimizer steps in one pass over a rollout."""
        return self.groups[0] // self.batch_size

    @property
    def temperature(self) -> float:
        """What the logits are divided by wherever these samples' log-probabilities are computed; 1
        for preferences."""
        return float(self.sampling.temperature or 1.0) if self.targets is not None else 1.0

    @property
    def needs_reference(self) -> bool:
        """Whether the rollout itself compares with the reference: its KL is in the reward."""
        return bool(self.targets and self.targets.get("kl_coef"))


# fields of RolloutConfig that any online objective takes as options
_OPTIONS = (
    "epochs",
    "rescore",
    "keep_unfinished",
    "missing_eos_penalty",
    "overlong_buffer",
    "normalize_scores",
    "score_clip",
    "tries",
    "stop_kl",
    "overlap",
    "server",
)


def make_rollout_config(
    terms: Sequence[Term],
    *,
    batch_size: int,
    responses: int,
    max_new_tokens: int,
    prompts: int = 0,
    rows: int = 256,
    tensor: int = 0,
    microbatches: int = 1,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    layout: str = "plain",
    value_head: str = "value",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> RolloutConfig:
    """Put together how rollouts are made for these objectives.

    Args:
        terms: the objectives; a policy gradient brings its own options (advantages, KL in the
            reward, epochs).
        batch_size: groups in an optimizer step.
        responses: samples of each prompt.
        max_new_tokens: tokens at most.
        prompts: prompts in a rollout; 0: what gives the steps of one pass (the objective's
            ``minibatches``, else one).
        rows, tensor, microbatches, sampling, stop, layout, value_head, seed: see `RolloutConfig`.
        options: more fields of `RolloutConfig`, and options of the selection.

    Raises:
        KeyError: an option that neither has, with the nearest.
        ValueError: sizes that do not divide.
    """
    kind, options = data_kind(terms), dict(options or {})
    targets = next((dict(term.rollout) for term in terms if term.rollout), None)
    own = {
        name: targets.pop(name)
        for name in ("missing_eos_penalty", "kl_target", "kl_horizon", "epochs")
        if targets and name in targets
    }
    minibatches = targets.pop("minibatches") if targets else 1
    choices = [
        name
        for name, parameter in inspect.signature(SELECTIONS[kind]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for name in options:
        if name not in (*_OPTIONS, *choices):
            near = difflib.get_close_matches(name, (*_OPTIONS, *choices), 1)
            raise KeyError(
                f"rollout.options has no {name!r} for data of kind {kind!r}; "
                + (
                    f"did you mean {near[0]!r}?"
                    if near
                    else f"known: {sorted((*_OPTIONS, *choices))}"
                )
            )
    if not prompts:
        groups = batch_size * minibatches
        prompts = groups // responses if kind == "unpaired" else groups
        if kind == "unpaired" and groups % responses:
            raise ValueError(
                f"batch_size = {groups} unpaired samples are not a multiple of "
                f"rollout.responses_per_prompt = {responses}"
            )
    selection = {name: options.pop(name) for name in choices if name in options}
    needs = {need for term in terms for need in term.needs}
    return RolloutConfig(
        kind=kind,
        prompts=prompts,
        responses=responses,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        rows=rows,
        tensor=tensor,
        microbatches=microbatches,
        sampling=sampling,
        stop=tuple(stop),
        targets=targets,
        value_head=value_head if "values" in needs else "",
        layout=layout,
        mismatched=any(term.objective.mismatched for term in terms),
        selection=selection,
        seed=seed,
        **(own | options),
    )

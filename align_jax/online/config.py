# SPDX-License-Identifier: Apache-2.0
"""How rollouts are made: the config's ``rollout`` group, and what its other groups decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from align_jax.core.choose import choose
from align_jax.core.options import Config, RolloutOptions
from align_jax.inference.samplers import Sampling
from align_jax.losses import process
from align_jax.losses.objective import Term, data_kind
from align_jax.losses.options import declared
from align_jax.losses.sampler import Correction, SamplerOptions
from align_jax.losses.targets import COMPARE
from align_jax.online import rewards
from align_jax.online.partners import check_against, needs_no_reward, others
from align_jax.online.selection import SELECTIONS, check_unread, group_count

# what an objective may decide in place of config.rollout
_EITHER = ("epochs", "missing_eos_penalty")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How rollouts are made; sizes are those of all processes together.

    Attributes:
        options: the config's, with ``prompts``, ``epochs`` and ``missing_eos_penalty`` as they hold
            for this objective.
        kind: what the objective trains on, a key of ``SELECTIONS``.
        batch_size: groups in an optimizer step.
        microbatches: parts of a step; the forwards here are cut as finely.
        layout: "plain" or "shared_prefix"; "auto" until the prompts are read.
        targets: options of ``losses.targets.make_targets``; None where the objective needs no
            advantages.
        kl_target, kl_horizon: of the adaptive KL coefficient, nats and responses; None: it stays.
        correction: for samples of another distribution than the trainer's; None: none.
        value_head: the policy's head that gives values; "" = none.
        mismatched: add mismatched completions.
        own_share: of the prompts whose responses are the policy's samples; the others have the
            data's answer.
        taught: the others have the reference's samples instead.
        reference_share: of the reference in the mixture that samples are drawn from.
        learns_opponent: what the samples meet is in the groups of policy gradients, too.
        steps_rewarded: some rewards stand at the ends of a completion's steps.
        judged: a judge of pairs compares a prompt's completions.
        seed: of the prompts' order, the draws and the slices.

    Raises:
        ValueError: sizes that do not divide, or options that do not go together.
    """

    options: RolloutOptions
    kind: str
    batch_size: int
    microbatches: int = 1
    layout: str = "plain"
    targets: Mapping[str, Any] | None = None
    kl_target: float | None = None
    kl_horizon: float = 10000.0
    correction: Correction | None = None
    value_head: str = ""
    mismatched: bool = False
    own_share: float = 1.0
    taught: bool = False
    reference_share: float = 0.0
    learns_opponent: bool = False
    steps_rewarded: bool = False
    judged: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        options, processes = self.options, jax.process_count()
        choose(SELECTIONS, self.kind, "the kind of data of a rollout")
        check_unread(self.kind, options)
        groups, _ = self.groups
        if groups % self.batch_size or self.batch_size % self.microbatches:
            raise ValueError(
                f"a rollout of {options.prompts} prompts gives {groups} groups; they must divide "
                f"into steps of batch_size = {self.batch_size}, and those into microbatches = "
                f"{self.microbatches}"
            )
        if options.prompts % processes or self.batch_size % (processes * self.microbatches):
            raise ValueError(
                f"rollout.prompts = {options.prompts} and batch_size = {self.batch_size} must "
                f"divide over {processes} processes (and {self.microbatches} microbatches)"
            )
        if not options.rescore and self.temperature != 1:
            raise ValueError(
                "config.rollout.rescore = False keeps log-probabilities at temperature 1: set "
                f"config.rollout.temperature = 1, got {options.temperature}"
            )
        if options.tries > 1 and options.responses_per_prompt < 2:
            raise ValueError(
                "dynamic sampling (config.rollout.tries > 1) needs "
                "config.rollout.responses_per_prompt > 1"
            )
        self._check_method()
        if self.steps_rewarded:
            self._check_steps()
        if self.judged:
            self._check_judged()
        if (self.targets or {}).get("bootstrap") and not options.keep_unfinished:
            raise ValueError(
                "config.objective.bootstrap gives a value to what follows a response that was cut "
                "off, which config.rollout.keep_unfinished = False leaves out of the loss"
            )
        if options.stop_kl and options.epochs < 2:
            raise ValueError(
                f"config.rollout.stop_kl = {options.stop_kl:g} skips later passes over a rollout; "
                "with one pass there are none: give more epochs"
            )
        if self.correction is not None:
            _check_correction(self.correction, options)
        if self.own_share < 1:
            self._check_answers(options.prompts // processes)
        if self.reference_share:
            self._check_mixed()
        check_against(self.kind, options, self.learns_opponent)
        if options.server.url and processes > 1:
            raise ValueError("config.rollout.server works with one process only")
        if options.server.url and options.tensor:
            raise ValueError(
                f"config.rollout.tensor = {options.tensor} deals weights out for generation here; "
                "with config.rollout.server.url it must be 0"
            )
        if options.overlap and processes > 1:
            raise ValueError(
                "config.rollout.overlap works in one process only: threads of several processes "
                "would meet in different orders"
            )

    def _check_answers(self, share: int) -> None:
        """Refuse what does not go with data's answers in the place of samples.

        Args:
            share: prompts of a rollout in this process.
        """
        if abs(round(self.own_share * share) - self.own_share * share) > 1e-6:
            nearest = max(1, round(self.own_share * share)) / share
            raise ValueError(
                f"config.objective.on_policy = {self.own_share:g} of {share} prompts of a rollout "
                f"is no whole number of them; {nearest:g} is, or give another "
                "config.rollout.prompts"
            )
        if self.options.tries > 1 or self.options.environment:
            raise ValueError(
                "config.rollout.tries and config.rollout.environment are for samples alone: set "
                f"config.objective.on_policy = 1, got {self.own_share:g}"
            )

    def _check_mixed(self) -> None:
        """Refuse what does not go with samples of a mixture with the reference."""
        options, share = self.options, f"config.objective.teacher_share = {self.reference_share:g}"
        if self.correction is not None:
            raise ValueError(
                f"{share} weighs samples by their own ratios to the mixture: leave "
                "config.objective.sampler_correction at 'auto'"
            )
        wrong = {
            "server.url": (bool(options.server.url), "''", "a server has no teacher"),
            "rescore": (not options.rescore, "True", "the student's are not those of the samples"),
            "against": (options.against != "none", "'none'", "samples meet no other player"),
            "temperature": (not options.temperature, "1.0", "ratios are of draws"),
        }
        for key, (given, fix, why) in wrong.items():
            if given:
                raise ValueError(f"{share} does not go with config.rollout.{key}: {why}; set {fix}")
        if self.greedy:
            raise ValueError(
                f"{share} does not go with config.objective.advantages = 'greedy', whose sample "
                "is the student's own"
            )

    @property
    def keeps_drawn(self) -> bool:
        """Whether the batch holds the log-probabilities that the samples were drawn with."""
        return self.correction is not None or self.reference_share > 0

    @property
    def answers(self) -> bool:
        """Whether the data's answers are needed beside the prompts."""
        return self.answered or self.options.against == "data"

    @property
    def answered(self) -> bool:
        """Whether some prompts are learned on the data's answers."""
        return self.own_share < 1 and not self.taught

    @property
    def wins(self) -> bool:
        """Whether a sample is worth its probability to win, and what it meets is not learned."""
        return self.kind == "rollout" and not self.learns_opponent

    def _check_method(self) -> None:
        """Refuse what the way of making advantages cannot work with, or would not look at."""
        options, method, responses = self.options, self.method, self.groups[1]
        if method in COMPARE and responses < 2:
            raise ValueError(
                f"config.objective.advantages = {method!r} compare a prompt's responses: "
                f"config.rollout.responses_per_prompt must be at least 2, got {responses}"
            )
        if method == "pass_at_k" and self.targets and self.targets["pass_k"] > responses:
            raise ValueError(
                f"config.objective.pass_k = {self.targets['pass_k']} is more than the {responses} "
                "responses of a prompt (config.rollout.responses_per_prompt)"
            )
        for key in ("keep_hard", "keep_count") if method == "filtered" and self.targets else ():
            if (kept := (self.targets or {})[key] or 0) > responses:
                raise ValueError(
                    f"config.objective.{key} = {kept} is more than the {responses} responses of a "
                    "prompt (config.rollout.responses_per_prompt)"
                )
        if method == "greedy" and options.temperature == 0:
            raise ValueError(
                "config.objective.advantages = 'greedy' compare samples with the most probable "
                "response, which with config.rollout.temperature = 0 they are"
            )
        if method in ("greedy", "decoupled") and options.against != "none":
            raise ValueError(
                f"config.objective.advantages = {method!r} are made of the rewards; with "
                f"config.rollout.against = {options.against!r} a sample is worth its probability "
                "to win: give another of the two"
            )
        default = RolloutOptions()
        shaping = ("missing_eos_penalty", "overlong_buffer", "normalize_scores", "score_clip")
        for key in shaping if method == "decoupled" else ():
            if (value := getattr(options, key)) != getattr(default, key):
                raise ValueError(
                    f"config.rollout.{key} = {value!r} shapes the sum of the rewards; "
                    "config.objective.advantages = 'decoupled' look at each by itself: leave it at "
                    f"{getattr(default, key)!r}, and make a reward of what it is to say"
                )

    def _check_steps(self) -> None:
        """Refuse what rewards at the ends of steps do not go with, or what would not look at
        them."""
        options, default = self.options, RolloutOptions()
        if self.method not in process.METHODS:
            raise ValueError(
                f"config.objective.advantages = {self.method!r} do not look at rewards of steps "
                f"(of kind 'process'): give one of {', '.join(process.METHODS)}, or set the "
                "reward's aggregate to 'min' for one number a completion"
            )
        for key in ("environment", "normalize_scores", "score_clip"):
            if (value := getattr(options, key)) != getattr(default, key):
                raise ValueError(
                    f"config.rollout.{key} = {value!r} is of whole completions; rewards of kind "
                    f"'process' stand at their steps: leave it at {getattr(default, key)!r}, or "
                    "set the reward's aggregate to 'min'"
                )
        if options.against != "none":
            raise ValueError(
                f"config.rollout.against = {options.against!r} compares scores of completions; "
                "rewards of kind 'process' stand at their steps: set the reward's aggregate to "
                "'min'"
            )

    def _check_judged(self) -> None:
        """Refuse what a judge of pairs does not go with, and where it would have nothing to say."""
        options, default = self.options, RolloutOptions()
        for key in ("normalize_scores", "score_clip"):
            if (value := getattr(options, key)) != getattr(default, key):
                raise ValueError(
                    f"config.rollout.{key} = {value!r} shapes rewards; a judge of pairs says how "
                    f"often a completion wins: leave it at {getattr(default, key)!r}"
                )
        if self.method == "greedy":
            raise ValueError(
                "config.objective.advantages = 'greedy' compare with a score of one more sample; a "
                "judge of pairs gives none: give another, or a reward of kind 'judge'"
            )
        one = options.responses_per_prompt == 1
        if one and options.against == "none":
            raise ValueError(
                "config.rollout.responses_per_prompt = 1 leaves a judge of pairs nothing to "
                "compare: give 2 or more"
            )
        if options.against == "data" and (self.kind == "unpaired" or (one and not self.wins)):
            raise ValueError(
                "config.rollout.against = 'data' counts the data's answer as better, whatever a "
                "judge of pairs says: leave config.rewards empty"
            )

    @property
    def facing(self) -> bool:
        """Whether each sample counts against what it meets alone."""
        return self.kind == "rollout" and self.options.against != "none"

    @property
    def method(self) -> str:
        """How advantages are made; "" where the objective needs none."""
        return (self.targets or {}).get("advantages", "")

    @property
    def token_fields(self) -> tuple[str, ...]:
        """What the advantages need to know of the distributions that were sampled."""
        return ("log_sum_sq",) if self.method == "optimal_token" else ()

    @property
    def groups(self) -> tuple[int, int]:
        """Groups in a rollout, and R."""
        responses = self.options.responses_per_prompt
        responses += 0 if self.wins else others(self.options)
        return group_count(self.kind, self.options, responses)

    @property
    def slices(self) -> int:
        """Optimizer steps in one pass over a rollout."""
        return self.groups[0] // self.batch_size

    @property
    def steps(self) -> int:
        """Optimizer steps on one rollout, all passes."""
        return self.slices * self.options.epochs

    @property
    def own_prompts(self) -> int:
        """Prompts of a rollout whose responses are the policy's samples."""
        return round(self.own_share * self.options.prompts)

    @property
    def sampled_prompts(self) -> int:
        """Prompts of a rollout whose responses are sampled, by the policy or its teacher."""
        return self.options.prompts if self.taught else self.own_prompts

    @property
    def greedy(self) -> bool:
        """Whether the most probable response to each prompt is asked for too."""
        return self.method == "greedy"

    @property
    def samples(self) -> int:
        """Completions that a rollout samples and learns from."""
        return self.sampled_prompts * self.options.responses_per_prompt

    @property
    def temperature(self) -> float:
        """What the logits are divided by wherever these samples' log-probabilities are computed; 1
        for preferences."""
        return float(self.options.temperature or 1.0) if self.targets is not None else 1.0

    @property
    def needs_reference(self) -> bool:
        """Whether the rollout itself compares with the reference: its KL is in the reward."""
        return bool(self.targets and self.targets.get("kl_coef"))


def is_online(terms: Sequence[Term], config: Config) -> bool:
    """Tell whether these objectives learn from samples of the policy's own.

    Raises:
        ValueError: nothing says what samples are worth, or rewards that nothing would be given.
    """
    if needs_no_reward(data_kind(terms), config.rollout, bool(config.rewards)):
        return True
    shares = [(term.name, term.loss.own_share) for term in terms]
    own = next((share for _, share in shares if share is not None), None)
    taught = any(term.loss.teacher_answers for term in terms)
    if config.rewards and own == 0 and not taught:
        name = next(name for name, share in shares if share is not None)
        raise ValueError(
            f"config.rewards say what samples are worth, of which the objective {name!r} learns "
            "none: set config.objective.on_policy (1: on samples alone), or config.rewards = {}"
        )
    if data_kind(terms) == "rollout" and not config.rewards and not own:
        raise ValueError(
            f"the objective {config.objective.name!r} learns from the policy's own samples: "
            "config.rewards must name at least one reward, such as {'length': 1.0}"
        )
    if not config.rewards and (own or taught) and data_kind(terms) == "completions":
        if own and any(share is None for _, share in shares):
            raise ValueError(
                f"objective {config.objective.name!r}: 'sft' would imitate the student's own "
                "samples, good or bad: set on_policy = 0, or leave it out"
            )
        if config.rollout.responses_per_prompt != 1:
            raise ValueError(
                f"config.rollout.responses_per_prompt = {config.rollout.responses_per_prompt}: "
                "without config.rewards no sample of a prompt is its best, which alone is "
                "learned: set it to 1"
            )
    return bool(config.rewards) or bool(own) or taught


def make_rollout_config(terms: Sequence[Term], config: Config) -> RolloutConfig:
    """Say how rollouts are made for these objectives.

    Args:
        terms: the objectives; a policy gradient brings its own options (advantages, KL in the
            reward, passes, steps of a pass).
        config: the run's.

    Raises:
        ValueError: sizes that do not divide, options that do not go together, or a key of
            ``config.rollout`` for which the objective has an option of its own.
    """
    kind, options = data_kind(terms), config.rollout
    taught = [term.name for term in terms if term.loss.own_share or term.loss.teacher_answers]
    if taught and options.eval_responses_per_prompt:
        raise ValueError(
            f"config.rollout.eval_responses_per_prompt = {options.eval_responses_per_prompt}: "
            f"{taught[0]!r} is compared with its teacher on held-out samples as training has them: "
            "leave it at 0"
        )
    if options.against == "auto":
        against = next((x for term in terms if (x := term.loss.opponent) != "none"), "none")
        options = dataclasses.replace(options, against=against)
    for term in terms:
        if term.loss.opponent != "none" and options.against == "none":
            raise ValueError(
                f"config.rollout.against = 'none': the objective {term.name!r} learns from samples "
                f"that meet another player's: leave it at 'auto', which is {term.loss.opponent!r}"
            )
    targets = next((dict(term.rollout) for term in terms if term.rollout), None)
    own = {} if targets is None else targets
    decided = {name: own.pop(name) for name in _EITHER if name in own}
    for name in decided:
        if (value := getattr(options, name)) != getattr(RolloutOptions(), name):
            raise ValueError(
                f"config.rollout.{name} = {value}: the objective has an option of the same "
                f"meaning, config.objective.{name}; set that one"
            )
    kl = {name: own.pop(name) for name in ("kl_target", "kl_horizon") if name in own}
    groups = config.batch_size * own.pop("minibatches", 1)
    mixed = max(term.loss.reference_share for term in terms)
    correction = _correction(own, options, corrects=not mixed)
    responses = options.responses_per_prompt + others(options)
    resolved = {
        "epochs": options.epochs or 1,
        "prompts": options.prompts or _prompts(kind, groups, responses),
    }
    needs = {need for term in terms for need in term.needs}
    named = rewards.read(config.rewards) if config.rewards else []
    judged = _is_judged(named)
    if targets is None:
        rewards.refuse_steps(named, f"the objective {config.objective.name!r} learns one a sample")
    return RolloutConfig(
        dataclasses.replace(options, **(resolved | decided)),
        kind,
        config.batch_size,
        config.microbatches,
        config.data.layout,
        targets,
        **kl,
        correction=correction,
        value_head=config.model.value_head if "values" in needs else "",
        mismatched=any(term.objective.mismatched for term in terms),
        learns_opponent=any(term.loss.learns_opponent for term in terms),
        steps_rewarded=any(rewards.gives_steps(one) for one in named),
        judged=judged,
        own_share=next((s for term in terms if (s := term.loss.own_share) is not None), 1.0),
        taught=any(term.loss.teacher_answers for term in terms),
        reference_share=mixed,
        seed=config.seed,
    )


def _is_judged(named: Sequence[rewards.RewardTerm]) -> bool:
    """Tell whether a judge of pairs decides.

    Raises:
        ValueError: it has a weight, or stands beside another reward.
    """
    judge = next((term for term in named if term.kind == "pair_judge"), None)
    if judge is None:
        return False
    if len(named) > 1 or judge.weight != 1:
        raise ValueError(
            f"reward {judge.name!r} says which of two completions is better, which cannot be added "
            "to other rewards or weighed: let it be the only one, of weight 1"
        )
    return True


def _reshapes(options: RolloutOptions) -> bool:
    """Tell whether samples are drawn from another distribution than the trainer's at their
    temperature."""
    return bool(options.temperature and Sampling.of(options).filters - {"temperature"})


def _correction(own: dict[str, Any], options: RolloutOptions, corrects: bool) -> Correction | None:
    """Take the sampler's options out of a policy gradient's, and say what is corrected with them;
    "auto" is nothing unless ``corrects``."""
    given = [own.pop(name) for name in declared(SamplerOptions) if name in own]
    if not given:
        return None
    mode, high, low = given
    if mode == "auto" and not corrects:
        return None
    if mode == "auto":
        server = options.server.url and options.rescore and options.temperature
        mode = "sequence_mask" if server else "none"
        mode = "token_truncate" if _reshapes(options) else mode
    return None if mode == "none" else Correction(mode, high, low)


def _check_correction(correction: Correction, options: RolloutOptions) -> None:
    """Refuse a correction for which the probabilities are not known, or that does nothing."""
    reshapes, server = _reshapes(options), options.server
    name = f"the correction for the sampler, {correction.mode!r},"
    if not options.temperature:
        raise ValueError(
            f"{name} compares probabilities of draws: set config.rollout.temperature > 0"
        )
    if server.url and server.logprobs == "raw" and (reshapes or options.temperature != 1):
        raise ValueError(
            f"{name} needs the probabilities with which the server drew, which are not the model's "
            "own with config.rollout.temperature, top_p, top_k, min_p or repetition_penalty: serve "
            "with --logprobs-mode processed_logprobs and set config.rollout.server.logprobs = "
            "'processed', or set config.objective.sampler_correction = 'none'"
        )
    if options.rescore:
        return
    if not reshapes:
        raise ValueError(
            f"{name} has no effect with config.rollout.rescore = False: the old log-probabilities "
            "are then the sampler's own"
        )
    if server.url:
        raise ValueError(
            "config.rollout.rescore = False takes the old log-probabilities from the server, which "
            "tells those after top_p, top_k, min_p and repetition_penalty: set it to True"
        )


def _prompts(kind: str, groups: int, responses: int) -> int:
    """Return how many prompts give so many groups: those of one pass over the rollout."""
    if kind != "unpaired":
        return groups
    if groups % responses:
        raise ValueError(
            f"batch_size = {groups} unpaired samples are not a multiple of the {responses} "
            "responses to a prompt (rollout.responses_per_prompt, and what they meet)"
        )
    return groups // responses

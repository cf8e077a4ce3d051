# SPDX-License-Identifier: Apache-2.0
"""Which method aligns best for the divergence that it costs?  The controlled-sentiment experiment.

    python experiments/frontier.py --model=HF_DIR --stories=STORIES.txt --lexicon=vader_lexicon.txt
        --output=DIR [--studies=frontier,pairs,noise,imbalance,overoptimization]
        [--methods=DPO,KTO --seeds=0,1,2 --middle --small]

    stories ─ sentence and next sentence ─ start (SFT) ─ its samples, true reward of each ─┐
      ┌─ pairs, drawn by Bradley-Terry from the true reward ───────────────────────────────┘
      └─ methods x strengths x seeds ─ reward and KL on held-out prompts ─ results.jsonl

The model continues a sentence of a story by the next one.  The true reward is the answer's
sentiment by a lexicon, s / sqrt(s^2 + 15), in (-1, 1).  A preference is drawn with probability
σ((r_a - r_b) / τ), τ = ``TEMPERATURE``; equal rewards make no pair.  Each run is measured at a
third, two thirds and the whole of its steps: mean true reward of samples at temperature 1, and
Σ_t log π - log π_start of each, nats.  What DIR/results.jsonl already has is not computed again, so
the same command goes on where it was stopped.

A run is seconds of arithmetic, so compiling it must not cost more than running it: all runs are of
one process, a method's strengths and seeds share one compiled step, in which the strength is an
argument, and a policy is measured where it lies, without a checkpoint.
``experiments/frontier_page.py`` makes the pages.

References:
    Rafailov et al. 2023, arXiv 2305.18290, section 6.1.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from align_jax import evaluate, export, losses
from align_jax.core import config as configs
from align_jax.core.config import ConfigDict, defaults
from align_jax.core.options import DataOptions, RolloutOptions
from align_jax.data import datasets
from align_jax.evals.generation import sample, sequence_logps
from align_jax.evals.policy import EvaluatedPolicy, standard_error
from align_jax.models.model import LoadedModel
from align_jax.online import rewards
from align_jax.online.sampling import Prompts
from align_jax.parallel.mesh import make_mesh
from align_jax.parallel.sharding import put_batch
from align_jax.runs import loop, weights
from align_jax.runs.setup import Run, prepare
from align_jax.runs.source import make_source
from align_jax.runs.weights import load_model
from align_jax.training import initialize, steps
from align_jax.training.flops import forward_flops, step_flops

TEMPERATURE = 0.2  # of Bradley-Terry, units of reward
NEW_TOKENS, LENGTH = 40, 96
STUDIES = ("frontier", "pairs", "noise", "imbalance", "overoptimization")
TOLD = (" (happy)", " (sad)")  # behind a prompt of conditional SFT: a chosen, a rejected answer
_SENTENCE = re.compile(r"[A-Z\"][^.!?\n]{15,110}[.!?]\"?")


class Data(NamedTuple):
    """The feedback that a run learns from: a part of the pairs drawn.

    Attributes:
        form: completions (the chosen answers), told (both answers, each to a prompt that tells
            which), pairs, unpaired (each pair's two answers), prompts.
        pairs: how many, at most.
        flipped: share of the pairs whose label is turned.
        desirable: unpaired: share of the desirable answers that is kept.
    """

    form: str
    pairs: int = 4096
    flipped: float = 0.0
    desirable: float = 1.0


class Method(NamedTuple):
    """How a policy is trained from the start.

    Attributes:
        objective: its name.
        options: of the objective.
        strength: the key that sets how far the policy goes, below ``config.objective`` or
            ``config.optimizer``.
        values: that it takes.
        data: what it learns from.
        rate: learning rate, where that is not the strength.
        groups: in a step (pairs, answers, or prompts of a rollout).
        samples: of each prompt.
        reward_models: whose mean scores rollouts, learned from the pairs; 0 = the true reward.
    """

    objective: str
    options: Mapping[str, Any]
    strength: str
    values: tuple[float, ...]
    data: Data = Data("pairs")
    rate: float = 1e-3
    groups: int = 32
    samples: int = 1
    reward_models: int = 0


_PAIRS, _UNPAIRED, _PROMPTS = Data("pairs"), Data("unpaired"), Data("prompts")
_RATES, _BETAS, _COEFS = (3e-4, 1e-3, 3e-3), (0.03, 0.1, 0.5), (0.003, 0.01, 0.05)
_PPO = {"epochs": 2, "minibatches": 2}
METHODS: Mapping[str, Method] = {
    "SFT on chosen": Method("sft", {}, "learning_rate", _RATES, Data("completions"), groups=64),
    "conditional SFT": Method("sft", {}, "learning_rate", _RATES, Data("told"), groups=64),
    "DPO": Method("dpo", {}, "beta", _BETAS),
    "IPO": Method("ipo", {"lengths": "sum"}, "beta", (0.01, 0.05, 0.2)),
    "robust DPO, 20 % flipped": Method(
        "robust", {"label_smoothing": 0.2}, "beta", _BETAS, Data("pairs", flipped=0.2)
    ),
    "SimPO": Method("simpo", {"beta": 2.0}, "learning_rate", (2e-4, 6e-4, 2e-3)),
    "ORPO": Method("orpo", {}, "lam", (0.1, 0.5, 2.0)),
    "KTO": Method("kto", {}, "beta", _BETAS, _UNPAIRED, groups=64),
    "KTO, half of the desirable": Method(
        "kto", {"desirable_weight": 2.0}, "beta", _BETAS, Data("unpaired", desirable=0.5), groups=64
    ),
    "KTO, a tenth of the desirable": Method(
        "kto",
        {"desirable_weight": 10.0},
        "beta",
        _BETAS,
        Data("unpaired", desirable=0.1),
        groups=64,
    ),
    "BCO": Method("bco", {}, "beta", _BETAS, _UNPAIRED, groups=64),
    "offline PPO": Method("ppo_offline", {}, "kl_coef", (0.02, 0.1, 0.5), _UNPAIRED, groups=64),
    "PPO, learned reward": Method(
        "ppo", _PPO, "kl_coef", _COEFS, _PROMPTS, 5e-4, groups=64, reward_models=1
    ),
    "PPO, true reward": Method("ppo", _PPO, "kl_coef", _COEFS, _PROMPTS, 5e-4, groups=64),
    "GRPO": Method("grpo", {}, "beta", _COEFS, _PROMPTS, groups=8, samples=8),
    "RLOO": Method("rloo", {}, "kl_coef", _COEFS, _PROMPTS, groups=8, samples=8),
    "online DPO": Method("dpo", {}, "beta", _BETAS, _PROMPTS, groups=16, samples=4),
    "online KTO": Method("kto", {}, "beta", _BETAS, _PROMPTS, groups=16, samples=4),
}


class Scale(NamedTuple):
    """How large the study is."""

    start_steps: int
    samples: int  # of each training prompt
    prompts: int  # for training; 0 = all
    held_out: int
    offline_steps: int
    rollouts: int
    reward_steps: int
    counts: tuple[int, ...]  # of pairs, in the study of their number
    scorers: tuple[int, ...]  # of pairs that reward models learn, in the study of their number
    rows: int = 256  # decoded together
    best: tuple[int, ...] = (2, 4, 8, 16)  # n of the best of n samples


SCALES = {
    False: Scale(300, 8, 0, 256, 48, 18, 96, (30, 100, 300, 1000), (100, 1000, 4096)),
    True: Scale(20, 2, 64, 8, 6, 3, 6, (16, 32), (32,), rows=32, best=(2, 4)),
}


class Job(NamedTuple):
    """A run: a method with one strength and one seed, in a study."""

    study: str
    label: str
    method: Method
    strength: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = (self.study, self.label, f"{self.strength:g}", str(self.seed))
        return re.sub(r"[^A-Za-z0-9.]+", "_", "-".join(parts))


def jobs(
    studies: Sequence[str], methods: Sequence[str], seeds: Sequence[int], scale: Scale, middle: bool
) -> list[Job]:
    """List the runs of the studies, all methods of one seed before the next seed.

    Args:
        studies, methods, seeds, scale: which.
        middle: of each method its middle strength alone.
    """
    found = []
    for seed in seeds:
        for study in studies:
            for label, method in _rows(study, scale):
                if not methods or label.split(":")[0] in methods:
                    values = method.values[1:2] if middle and study == "frontier" else method.values
                    found += [Job(study, label, method, value, seed) for value in values]
    return found


def _rows(study: str, scale: Scale) -> Iterator[tuple[str, Method]]:
    """Yield a study's labels and methods; a condition that the frontier has (all pairs, no label
    flipped, all answers) is not repeated."""
    if study == "frontier":
        for label, method in METHODS.items():
            yield label, method
    elif study == "pairs":
        for count in scale.counts:
            for name in ("DPO", "KTO", "PPO, learned reward"):
                method = METHODS[name]
                data = method.data._replace(pairs=count)
                yield f"{name}: {count}", _middle(method._replace(data=data))
    elif study == "noise":
        for flipped in (0.4, 0.2, 0.1):
            for name, method in (
                ("DPO", METHODS["DPO"]),
                ("cDPO", METHODS["DPO"]._replace(options={"label_smoothing": flipped})),
                ("robust DPO", Method("robust", {"label_smoothing": flipped}, "beta", _BETAS)),
                ("IPO", METHODS["IPO"]),
                ("KTO", METHODS["KTO"]),
            ):
                data = method.data._replace(flipped=flipped)
                yield (f"{name}: {flipped:.0%}", _middle(method._replace(data=data)))
    elif study == "imbalance":
        for desirable in (0.5, 0.1):
            data = Data("unpaired", desirable=desirable)
            method = _middle(METHODS["KTO"]._replace(data=data))
            yield f"KTO, weight 1: {desirable:.0%}", method
    elif study == "overoptimization":
        learned = METHODS["PPO, learned reward"]
        learned = learned._replace(values=(_COEFS[0], _COEFS[-1]))
        for count in scale.scorers:
            for models in (1, 3):
                method = learned._replace(
                    data=learned.data._replace(pairs=count), reward_models=models
                )
                yield f"{models} of {count} pairs", method
    else:
        raise SystemExit(f"--studies={study}: expected one of {', '.join(STUDIES)}")


def _middle(method: Method) -> Method:
    return method._replace(values=method.values[1:2])


def write_rows(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write JSON lines, whole or not at all; return the path."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)
    return str(path)


def sentences(source: str, folder: pathlib.Path, scale: Scale) -> None:
    """Write each sentence with the next one; the last eighth of the stories is held out."""
    stories = pathlib.Path(source).read_text(encoding="utf-8").split("<|endoftext|>")
    border = len(stories) * 7 // 8
    for name, part in (("train", stories[:border]), ("held_out", stories[border:])):
        rows: dict[str, dict[str, str]] = {}
        for story in part:
            found = _SENTENCE.findall(story)
            for before, after in zip(found, found[1:]):
                rows.setdefault(before, {"prompt": before, "completion": " " + after})
        few = list(rows.values())[: scale.held_out if name == "held_out" else scale.prompts or None]
        write_rows(folder / f"{name}.jsonl", few)
    held_out = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    told = [{"prompt": row["prompt"] + TOLD[0]} for row in held_out]
    write_rows(folder / "held_out_control.jsonl", told)


def base_config(model: str, seed: int) -> ConfigDict:
    """Return what all runs have in common."""
    config = defaults()
    config.seed, config.max_length = seed, LENGTH
    config.model.path, config.model.compute_dtype, config.model.remat = model, "float32", "none"
    config.reference.dtype = "float32"
    config.data.eval_fraction = 0.0  # the held-out prompts are apart already
    config.optimizer.schedule, config.optimizer.b2 = "constant", 0.99
    config.optimizer.warmup_steps, config.log.every_steps = 5, 10
    return config


def make_start(model: str, folder: pathlib.Path, scale: Scale) -> str:
    """Fine-tune the model to continue by one sentence; return the checkpoint."""
    output = folder / "start"
    if not (output / "config.json").exists():
        config = base_config(model, 0)
        config.data.train = str(folder / "train.jsonl")
        config.objective = ConfigDict(losses.options("sft"))
        config.batch_size, config.total_steps = 64, scale.start_steps
        config.optimizer.learning_rate = 5e-4
        loop.train(config, str(folder / "runs" / "start"))
        export.export_run(str(folder / "runs" / "start"), str(output))
    return str(output)


def reward_table(lexicon: str, learned: Sequence[str] = ()) -> dict[str, Any]:
    """Return ``config.rewards``: the true reward; or the mean of learned ones, the true one only
    shown."""
    table: dict[str, Any] = {"lexicon": {"path": lexicon}}
    if learned:
        table["lexicon"]["weight"] = 0.0
    for path in learned:
        share = {"weight": 1 / len(learned), "path": path, "rows": 64}
        table[pathlib.Path(path).name] = {"kind": "model", **share}
    return table


def make_pairs(start: str, lexicon: str, folder: pathlib.Path, scale: Scale) -> None:
    """Sample the training prompts, and draw preferences between disjoint pairs of samples."""
    if (folder / "pairs.jsonl").exists():
        return
    policy = evaluate.model_policy(start, dtype="float32")
    examples = datasets.load(str(folder / "train.jsonl"), "prompts", DataOptions(), chat=False)
    options = RolloutOptions(
        responses_per_prompt=scale.samples, max_new_tokens=NEW_TOKENS, rows=scale.rows
    )
    scored = rewards.resolve(reward_table(lexicon), load_model=load_model)
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for one in sample(policy, examples, scored, options, max_length=LENGTH, seed=1):
        # a cut-off answer has no end to learn
        order = [i for i, said in enumerate(one.completions) if said.finish == "stop"]
        for a, b in zip(order[::2], order[1::2]):
            gap = float(one.rewards[a] - one.rewards[b])
            if gap == 0.0:
                continue
            if rng.random() >= 1 / (1 + math.exp(-gap / TEMPERATURE)):
                a, b, gap = b, a, -gap
            said = [one.completions[i].text for i in (a, b)]
            if said[0] != said[1] and all(text.strip() for text in said):
                rows.append(
                    {
                        "prompt": one.example.prompt,
                        "chosen": said[0],
                        "rejected": said[1],
                        "gap": gap,
                    }
                )
    agree = np.mean([row["gap"] > 0.0 for row in rows])
    rows = [{**rows[i], "draw": float(rng.random())} for i in rng.permutation(len(rows))]
    print(f"{len(rows)} pairs; {agree:.1%} of the chosen have more true reward", flush=True)
    write_rows(folder / "pairs.jsonl", rows)


def drawn(folder: pathlib.Path) -> dict[str, Any]:
    """Count the pairs, and those that prefer what has more true reward."""
    gaps = [json.loads(line)["gap"] for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return {"pairs": len(gaps), "agree": float(np.mean(np.asarray(gaps) > 0.0))}


def feedback(data: Data, folder: pathlib.Path) -> str:
    """Write a run's training rows; return their file."""
    if data.form == "prompts":
        return str(folder / "train.jsonl")
    path = folder / "data" / ("-".join(f"{one}" for one in data) + ".jsonl")
    if path.exists():
        return str(path)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    rows = []
    for i, row in enumerate(pairs[: data.pairs]):
        good, bad = row["chosen"], row["rejected"]
        if row["draw"] < data.flipped:
            good, bad = bad, good
        prompt = {"prompt": row["prompt"]}
        if data.form == "pairs":
            rows.append({**prompt, "chosen": good, "rejected": bad})
        elif data.form == "completions":
            rows.append({**prompt, "completion": good})
        elif data.form == "told":
            for how, answer in zip(TOLD, (good, bad)):
                rows.append({"prompt": row["prompt"] + how, "completion": answer})
        else:
            if i % 10 < round(10 * data.desirable):
                rows.append({**prompt, "completion": good, "label": True})
            rows.append({**prompt, "completion": bad, "label": False})
    path.parent.mkdir(exist_ok=True)
    return write_rows(path, rows)


def make_reward(data: Data, start: str, folder: pathlib.Path, scale: Scale, seed: int) -> str:
    """Train a reward model on the pairs; return the checkpoint."""
    pairs = data._replace(form="pairs")
    name = f"reward-{pairs.pairs}-{pairs.flipped:g}-{seed}"
    output = folder / name
    if not (output / "config.json").exists():
        config = base_config(start, seed)
        config.data.train = feedback(pairs, folder)
        config.objective = ConfigDict(losses.options("reward"))
        config.batch_size, config.total_steps = 32, scale.reward_steps
        config.optimizer.learning_rate = 3e-4
        loop.train(config, str(folder / "runs" / name))
        export.export_run(str(folder / "runs" / name), str(output))
    return str(output)


def make_config(
    job: Job, start: str, lexicon: str, folder: pathlib.Path, scale: Scale
) -> ConfigDict:
    """Return a run's config."""
    method = job.method
    config = base_config(start, job.seed)
    config.data.train = feedback(method.data, folder)
    config.objective = ConfigDict(losses.options(method.objective) | dict(method.options))
    config.optimizer.learning_rate = method.rate
    group = config.optimizer if method.strength == "learning_rate" else config.objective
    group[method.strength] = job.strength
    config.batch_size, config.total_steps = method.groups, scale.offline_steps
    if method.data.form == "prompts":
        slices = method.options.get("epochs", 1) * method.options.get("minibatches", 1)
        config.total_steps = scale.rollouts * slices
        config.rollout.responses_per_prompt = method.samples
        config.rollout.max_new_tokens = NEW_TOKENS
        learned = [
            make_reward(method.data, start, folder, scale, seed)
            for seed in range(method.reward_models)
        ]
        config.rewards = ConfigDict(reward_table(lexicon, learned))
    return config


class Stage(NamedTuple):
    """A policy on its way.

    Attributes:
        step: of the optimizer.
        policy: with the start as its reference.
        flops: of training so far, sampling and the reference's scores included.
        seconds: of training so far, of the processors; without the compilation of the first steps.
    """

    step: int
    policy: EvaluatedPolicy
    flops: float
    seconds: float


def with_strength(run: Run, method: Method, given: float, strength: jax.Array) -> steps.StepSpec:
    """Return what a step is compiled from, with the strength an array in place of a constant.

    Args:
        run: whose config has the strength ``given``.
        method: its method.
        given: strength in the run's config, by which a learning rate is scaled.
        strength: float32 [].
    """
    spec = run.step_spec
    if method.strength == "learning_rate":
        inner = spec.optimizer

        def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            updates, state = inner.update(grads, state, params)
            return jax.tree.map(lambda x: x * (strength / given).astype(x.dtype), updates), state

        return spec._replace(optimizer=inner._replace(update=update))

    held = [hasattr(term.loss, method.strength) for term in spec.terms]
    if not any(held) and not any(method.strength in term.rollout for term in spec.terms):
        names = "+".join(term.name for term in spec.terms)
        raise ValueError(f"{names} has no option {method.strength!r}")
    terms = []
    for term, has in zip(spec.terms, held):
        if has:  # else it is in the rewards, which the rollouts make
            loss = copy.copy(term.loss)
            object.__setattr__(loss, method.strength, strength)
            term = dataclasses.replace(term, loss=loss)
        terms.append(term)
    return spec._replace(terms=tuple(terms))


def jit_step(run: Run, job: Job) -> Callable[..., Any]:
    """Compile the train step of (state, frozen, batch, strength)."""

    def step(state: Any, frozen: Any, batch: Any, strength: jax.Array) -> Any:
        spec = run.step_spec
        if not is_constant(job.method):
            spec = with_strength(run, job.method, job.strength, strength)
        return steps.train_step(spec, state, frozen, batch)

    return jax.jit(step, donate_argnums=0)


def is_constant(method: Method) -> bool:
    """Tell whether a step is compiled for one strength: GRPO's asks whether its beta is 0."""
    return method.objective == "grpo"


def flops_of(run: Run, batch: Any) -> float:
    """Count a step's model FLOPs with its share of a rollout: of each sample a forward by the
    policy, which drew it, and one by the reference."""
    segment = LENGTH // 2  # tokens of a prompt with an answer, about
    trained = step_flops(run.step_spec, batch, segment_length=segment).model
    if run.resolved.rollouts is None:
        return trained
    once = forward_flops(
        run.step_spec.policy,
        rows=run.config.batch_size * run.config.rollout.responses_per_prompt,
        length=segment,
        positions=segment // 2,
    )
    return trained + 2 * once.total / run.resolved.rollouts.steps


def train(
    config: ConfigDict, job: Job, start: LoadedModel, compiled: dict[Any, Any]
) -> Iterator[Stage]:
    """Train, and stop at each third of the steps.

    Args:
        config: of the run.
        job: what it is.
        start: the reference of what is measured.
        compiled: the steps of earlier runs, by what they are compiled from.
    """
    with tempfile.TemporaryDirectory() as workdir:
        run = prepare(configs.read(config), workdir)
        with jax.set_mesh(run.mesh):
            yield from _stages(run, job, start, compiled)


def _stages(run: Run, job: Job, start: LoadedModel, compiled: dict[Any, Any]) -> Iterator[Stage]:
    frozen, trained = weights.load_start(run.step_spec, run.state_specs, run.config)
    state = initialize.first_state(run.step_spec, run.state_specs, trained, None)
    key = repr(job.method._replace(data=Data(""), values=()))
    if is_constant(job.method):
        key += f" {job.strength}"
    step = compiled.setdefault(key, jit_step(run, job))
    source, flops, seconds = make_source(run, 0, {}), 0.0, 0.0
    try:
        for number in range(1, run.total_steps + 1):
            began = time.process_time()
            newest = functools.partial(loop.weights_of, state, frozen)
            batch = source.next(newest)
            state, values = step(
                state, frozen, put_batch(run.mesh, batch), jnp.float32(job.strength)
            )
            if not math.isfinite(float(values["loss"])):
                raise FloatingPointError(f"{job.name}: the loss of step {number} is not finite")
            seconds += time.process_time() - began if number > 8 else 0.0
            flops += flops_of(run, batch)
            if number % (run.total_steps // 3) == 0:
                params = loop.weights_of(state, frozen).policy
                policy = EvaluatedPolicy(
                    run.step_spec.policy, params, run.resolved.tokenizer, run.mesh, start
                )
                yield Stage(number, policy, flops, seconds)
    finally:
        source.close()


@functools.cache
def scorer(lexicon: str, learned: tuple[str, ...]) -> rewards.WeightedRewards:
    """Load the true reward, and learned ones beside it."""
    return rewards.resolve(reward_table(lexicon, learned), load_model=load_model)


def measure(
    policy: EvaluatedPolicy,
    config: ConfigDict | None,
    lexicon: str,
    folder: pathlib.Path,
    samples: int,
    rows: int,
    told: bool = False,
) -> dict[str, Any]:
    """Sample the held-out prompts: the true reward, the learned ones if any, KL from the start.

    A policy that is told to be happy is compared with the start that is told nothing.
    """
    read = functools.partial(datasets.load, kind="prompts", options=DataOptions(), chat=False)
    plain = read(str(folder / "held_out.jsonl"))
    examples = read(str(folder / "held_out_control.jsonl")) if told else plain
    table = {} if config is None else dict(config.rewards)
    learned = {name: term["path"] for name, term in table.items() if name != "lexicon"}
    scored = scorer(lexicon, tuple(learned.values()))
    options = RolloutOptions(responses_per_prompt=samples, max_new_tokens=NEW_TOKENS, rows=rows)
    found = sample(policy, examples, scored, options, max_length=LENGTH, seed=1000)
    said = [one.completions for one in found]
    each = [one for several in said for one in several]
    prompts = Prompts(
        plain.items,
        policy.tokenizer,
        max_length=LENGTH,
        max_new_tokens=NEW_TOKENS,
        seed=0,
        shuffle=False,
    )
    tokens = [prompts[i][1] for i in range(len(prompts))]
    kl = np.asarray([one.token_logps.sum() for one in each])
    kl -= sequence_logps(policy, policy.reference, tokens, said, options.rows)
    reward = np.stack([one.each_reward["lexicon"] for one in found])
    values = {
        "prompts": len(found),
        "reward": float(reward.mean()),
        "reward/stderr": standard_error(reward.mean(axis=1)),
        "objective/kl": float(kl.mean()),
        "objective/kl/stderr": standard_error(kl),
        "length": float(np.mean([len(one.tokens) for one in each])),
        "clipped": float(np.mean([one.finish == "length" for one in each])),
        "distinct": len({one.text for one in each}) / len(each),
        "rewards": [round(float(x), 3) for x in reward.mean(axis=1)],
    }
    if learned:
        of_models = [one.each_reward[name] for one in found for name in learned]
        values["rewards/model"] = float(np.mean(of_models))
    return values


def best_of(
    start: str, lexicon: str, folder: pathlib.Path, counts: Sequence[int], at_once: int
) -> list[dict[str, Any]]:
    """Measure the best of n of the start's samples: reward by their order, KL log n - (n-1)/n.

    With N samples of a prompt, sorted upwards, the k-th is the best of n with probability
    C(k-1, n-1) / C(N, n).  The KL is an upper bound that is near where samples seldom repeat
    (Beirami et al. 2024, arXiv 2401.01879).
    """
    policy = evaluate.model_policy(start, dtype="float32")
    examples = datasets.load(str(folder / "held_out.jsonl"), "prompts", DataOptions(), chat=False)
    scored = rewards.resolve(reward_table(lexicon), load_model=load_model)
    most = max(counts) * 2
    options = RolloutOptions(responses_per_prompt=most, max_new_tokens=NEW_TOKENS, rows=at_once)
    found = sample(policy, examples, scored, options, max_length=LENGTH, seed=1000)
    ordered = np.sort(np.stack([one.rewards for one in found]), axis=1)
    rows = []
    for n in counts:
        odds = [math.comb(k, n - 1) / math.comb(most, n) for k in range(most)]
        values = ordered @ np.asarray(odds)
        rows.append(
            {
                "reward": float(values.mean()),
                "reward/stderr": float(values.std(ddof=1) / math.sqrt(len(values))),
                "objective/kl": math.log(n) - (n - 1) / n,
                "strength": n,
            }
        )
    return rows


def append(file: pathlib.Path, *rows: Mapping[str, Any]) -> None:
    """Add results: those of a run together."""
    with file.open("a") as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows))


def run_job(
    job: Job,
    reference: LoadedModel,
    values: flags.FlagValues,
    scale: Scale,
    compiled: dict[Any, Any],
) -> list[dict[str, Any]]:
    """Train and measure; return a row for each third of the steps."""
    began, rows, folder = time.process_time(), [], pathlib.Path(values.output)
    config = make_config(job, str(folder / "start"), values.lexicon, folder, scale)
    told = job.method.data.form == "told"
    for stage in train(config, job, reference, compiled):
        found = measure(stage.policy, config, values.lexicon, folder, 1, scale.rows, told)
        row = {"study": job.study, "label": job.label, "strength": job.strength, "seed": job.seed}
        row |= {"step": stage.step, "last": stage.step == config.total_steps}
        row |= {"jax": jax.__version__}
        rows.append({**row, "flops": stage.flops, "seconds": stage.seconds, **found})
    cpu = time.process_time() - began
    return [{**row, "cpu_seconds": cpu} for row in rows]


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    folder, scale = pathlib.Path(values.output), SCALES[values.small]
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    if not (folder / "held_out_control.jsonl").exists():
        sentences(values.stories, folder, scale)
    start = make_start(values.model, folder, scale)
    make_pairs(start, values.lexicon, folder, scale)
    file = folder / "results.jsonl"
    text = file.read_text() if file.exists() else ""
    done = {
        (row["study"], row["label"], row["strength"], row["seed"])
        for row in map(json.loads, text.splitlines())
        if row["last"]
    }
    if ("start", "start", 0, 0) not in done:
        policy = evaluate.model_policy(start, start, dtype="float32")
        common = {"study": "start", "label": "start", "strength": 0, "seed": 0, "last": True}
        for row in best_of(start, values.lexicon, folder, scale.best, scale.rows):
            append(
                file, {"study": "frontier", "label": "best of n", "seed": 0, "last": True, **row}
            )
        common |= drawn(folder)
        append(file, {**common, **measure(policy, None, values.lexicon, folder, 4, scale.rows)})
    seeds = [int(seed) for seed in values.seeds]
    wanted = jobs(values.studies, values.methods, seeds, scale, values.middle)
    reference = load_model(start, mesh=make_mesh({"fsdp": -1}), compute_dtype="float32")
    compiled: dict[Any, Any] = {}
    for number, job in enumerate(wanted, 1):
        key = (job.study, job.label, job.strength, job.seed)
        if key in done:
            continue
        rows = run_job(job, reference, values, scale, compiled)
        append(file, *rows)
        print(
            f"{number}/{len(wanted)} {job.name}: reward {rows[-1]['reward']:.3f}, KL "
            f"{rows[-1]['objective/kl']:.2f} nats, {rows[-1]['cpu_seconds']:.0f} CPU-seconds",
            flush=True,
        )


if __name__ == "__main__":
    for name in ("model", "stories", "lexicon", "output"):
        flags.DEFINE_string(name, None, f"See the file's head: {name}.", required=True)
    flags.DEFINE_list("studies", ["frontier"], f"Of {', '.join(STUDIES)}.")
    flags.DEFINE_list("methods", [], "Some of the methods alone; default: all.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
    flags.DEFINE_bool("middle", False, "Of each method's strengths the middle one alone.")
    flags.DEFINE_bool("small", False, "Few samples and steps: does the command work?")
    app.run(main)

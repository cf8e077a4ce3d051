# SPDX-License-Identifier: Apache-2.0
"""Evaluate a policy on held-out data.

    python -m align_jax.evaluate (--model=HF_DIR | --workdir=DIR) --eval=NAME=SOURCE
    [--eval=NAME=SOURCE ...]
        [--reference=HF_DIR --rewards=JSON_OR_FILE --judge=URL --judge_model=NAME --json=FILE
        --answers=FILE.jsonl]

    preference=pairs.jsonl     accuracy and margins of log-probabilities on pairs
    feedback=thumbs.jsonl      margins and AUC of rewards on answers with a label, without pairs
    reward=pairs.jsonl         accuracy and margins of a reward model's scores on pairs
    process=steps.jsonl        accuracy of a process reward model's scores on labeled steps
    perplexity=answers.jsonl   nats a token on completions
    generation=prompts.jsonl   reward, length, KL
    pass_at_k=prompts.jsonl    whether any of k samples passes, by rewards
    win_rate=prompts.jsonl     against the reference

Where pairs or prompts have a column ``subset``, accuracies are told for each subset too.  A run's
reference is what it was trained against; a model's is what ``--reference`` names, or none.
"""

from __future__ import annotations

from absl import flags

from align_jax.core.choose import choose
from align_jax.evals import EVALS
from align_jax.runs import command


def named_source(item: str) -> tuple[str, str]:
    """Divide NAME=SOURCE.

    Raises:
        ValueError: an unknown evaluation, or no source.
    """
    name, _, source = item.partition("=")
    choose(EVALS, name, "--eval")
    if not source:
        raise ValueError(f"--eval={item}: expected NAME=SOURCE, such as {name}=data.jsonl")
    return name, source


def check_flags() -> None:
    """Refuse flags that do not go together, or not with what is evaluated.

    Raises:
        Usage: with what to give instead.
        ValueError: as ``named_source``.
    """
    values = flags.FLAGS
    command.one_of("model", "workdir")
    if not values.eval:
        raise command.Usage(f"give at least one --eval=NAME=SOURCE; known: {', '.join(EVALS)}")
    command.belong(("dtype",), "--model", bool(values.model))
    command.belong(("step",), "--workdir", bool(values.workdir))
    command.belong(("judge_model",), "--judge", bool(values.judge))
    command.belong(("allow_http",), "--judge", bool(values.judge))
    names = {named_source(item)[0] for item in values.eval}
    command.belong(("judge",), "--eval=win_rate", "win_rate" in names)
    several = {"generation", "pass_at_k"}
    command.belong(
        ("samples_per_prompt",), "--eval=generation and --eval=pass_at_k", bool(names & several)
    )
    command.belong(("pass_score",), "--eval=pass_at_k", "pass_at_k" in names)
    of_beta = {"preference", "feedback"}
    command.belong(("beta",), "--eval=preference and --eval=feedback", bool(names & of_beta))
    if "feedback" in names and not (values.reference or values.workdir):
        raise command.Usage("--eval=feedback needs --reference, with which it compares")
    drawn = ("answers", "rewards", "max_new_tokens", "temperature", "top_p", "seed")
    for own, sampled in ((drawn, True), (("batch_size",), False)):
        takers = [name for name, row in EVALS.items() if row.sampled is sampled]
        where = ", ".join(f"--eval={name}" for name in takers)
        command.belong(own, where, not names.isdisjoint(takers))
    asked = {EVALS[name].head for name in names}
    command.belong(("reference",), "evaluations of words", "" in asked)
    of_steps = bool(values.model) and "steps" in asked
    command.belong(("step_separator",), "--model and --eval=process", of_steps)
    for name in sorted(names):
        if EVALS[name].takes == "rewards" and not values.rewards:
            raise command.Usage(f"--eval={name} needs --rewards")
    if len(asked) > 1:
        raise command.Usage(
            "--eval=reward is of a reward model and --eval=process of one that scores steps; "
            "neither says words: give it alone"
        )
    if "win_rate" in names and not (values.rewards or values.judge):
        raise command.Usage("--eval=win_rate needs --rewards or --judge")
    rows = [named_source(item)[1] for item in values.eval]
    command.check_there(values.model, values.workdir, *rows)


if __name__ == "__main__":  # here, because what is imported next takes seconds
    flags.DEFINE_string("model", "", "Hugging Face checkpoint: directory or hub id.")
    flags.DEFINE_string("workdir", "", "Folder of a training run.")
    flags.DEFINE_string("step", "latest", "Checkpoint of the run: latest, best or a step.")
    flags.DEFINE_string("reference", "", "Checkpoint to compare with.")
    flags.DEFINE_multi_string("eval", [], "NAME=SOURCE, NAME one of " + ", ".join(EVALS))
    flags.DEFINE_string("rewards", "", "As config.rewards: JSON, or a file of it.")
    flags.DEFINE_string(
        "judge", "", "OpenAI-compatible server that compares answers (its key in OPENAI_API_KEY)."
    )
    flags.DEFINE_string("judge_model", "", "The judge's name on that server.")
    flags.DEFINE_bool("allow_http", False, "--judge may be plain http to another host.")
    flags.DEFINE_string("json", "", "File for the results.")
    flags.DEFINE_string(
        "answers",
        "",
        "File for the answers that are sampled, a JSON object a line (win_rate: prompt, "
        "output, other, and win, 1 where output is better).",
    )
    flags.DEFINE_integer("limit", 0, "Rows of each source; 0 = all.", 0)
    flags.DEFINE_integer("batch_size", 16, "Groups at once.", 1)
    flags.DEFINE_integer(
        "max_length", 1024, "Tokens of prompt and response; the model's positions, if fewer.", 1
    )
    flags.DEFINE_integer("samples_per_prompt", 1, "generation: completions of each prompt.", 1)
    flags.DEFINE_float("pass_score", 1.0, "pass_at_k: an answer passes from this reward on.")
    flags.DEFINE_integer("max_new_tokens", 128, "Where answers are sampled: their tokens.", 1)
    flags.DEFINE_float("temperature", 1.0, "Where answers are sampled; 0 is greedy.", 0)
    flags.DEFINE_float("top_p", 1.0, "Where answers are sampled.", 0, 1)
    flags.DEFINE_integer("seed", 0, "Of the samples.", 0, 2**31)
    flags.DEFINE_float("beta", 0.1, "preference, feedback: of implicit rewards.", 0)
    flags.DEFINE_string(
        "step_separator", None, "process: behind each step; a run and its export know theirs."
    )
    command.define_dtype("Of weights and activations (--model)")
    arguments = command.read(check=check_flags)

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from align_jax.core.files import json_text, write_text
from align_jax.core.options import Config, DataOptions, RolloutOptions
from align_jax.core.progress import samples_table
from align_jax.data import datasets
from align_jax.data.tokenizer import load_tokenizer
from align_jax.evals.policy import EvaluatedPolicy
from align_jax.evals.win_rate import Compare, by_judge, by_rewards
from align_jax.inference.client import Client
from align_jax.inference.samplers import Sampling
from align_jax.models.model import LoadedModel
from align_jax.online.judges import TOTAL_SECONDS, PairJudge
from align_jax.online.rewards import WeightedRewards, from_json, resolve
from align_jax.parallel import compile_cache, distributed
from align_jax.parallel.mesh import make_mesh
from align_jax.runs import trained as trained_runs
from align_jax.runs.trained import Trained
from align_jax.runs.weights import draw_start, load_model


def model_policy(
    path: str,
    reference: str = "",
    dtype: str = "",
    max_length: int = 0,
    heads: Sequence[str] = (),
    separator: str | None = None,
) -> EvaluatedPolicy:
    """Return a checkpoint as the policy, another as its reference.

    Args:
        path, reference: directories or hub ids; "" = no reference.
        dtype: of weights and activations; "" as ``runs.weights.load_model`` has it.
        max_length: as that takes it.
        heads: what is asked of it: () its words, ("score",) rewards, ("steps",) those of steps.
        separator: behind each step; None = the one that the checkpoint says it was trained with.

    Raises:
        ValueError: nothing says what stands behind each step.
    """
    mesh, steps = make_mesh({"fsdp": -1}), "steps" in heads
    how: dict[str, Any] = {"mesh": mesh, "compute_dtype": dtype, "max_length": max_length}
    loaded = load_model(path, heads=("score",) if heads else (), steps=steps, **how)
    other = load_model(reference, **how) if reference else None
    if steps and separator is None:
        separator = json.loads(loaded.model.config.hf).get("step_separator")
        if separator is None:
            raise ValueError(
                f"the process reward model {path} does not say what stands behind each step: give "
                "--step_separator"
            )
    return EvaluatedPolicy(*loaded, load_tokenizer(path), mesh, other, path, separator)


def run_policy(
    workdir: str, which: str = "latest", reference: str = "", heads: Sequence[str] = ()
) -> EvaluatedPolicy:
    """Return a run's policy; its reference is the one it was trained against, unless another is
    named.

    Args:
        workdir: the run's folder.
        which: "latest", "best" or a step.
        reference: directory or hub id; "" = as above.
        heads: what is asked of it, as ``model_policy`` takes them; () = its words.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: a reward model, of which words are asked.
    """
    trained = trained_runs.restore(workdir, which, speaks=not heads)
    return policy_of(trained, f"{workdir}@{trained.step}", reference)


def policy_of(trained: Trained, name: str, reference: str = "") -> EvaluatedPolicy:
    """Return a policy that was read back; its reference is as ``run_policy`` says."""
    config, resolved, mesh = trained.config, trained.resolved, trained.mesh
    speaks, other = resolved.models.policy.options.unembed, None
    if speaks and trained.reference is not None and not reference:
        other = LoadedModel(resolved.models.policy, trained.reference)
    elif speaks and (path := reference or config.reference.path or config.model.path):
        dtype, length = config.model.compute_dtype, config.max_length
        other = load_model(path, mesh=mesh, compute_dtype=dtype, max_length=length)
    elif speaks:
        other = draw_start(resolved.models.base, mesh, config)
    separator = config.data.step_separator if resolved.kind == "stepwise" else None
    return EvaluatedPolicy(
        resolved.models.policy, trained.params, resolved.tokenizer, mesh, other, name, separator
    )


def as_trained(config: Config, kind: str) -> dict[str, dict[str, Any]]:
    """Return evaluation -> the keyword arguments with which a run measures what it holds out.

    Args:
        config: of the run.
        kind: of the data that its objective learns from.
    """
    length, rollout = {"max_length": config.max_length}, config.rollout
    found: dict[str, dict[str, Any]] = dict.fromkeys(EVALS, length)
    if "beta" in config.objective.options:
        beta = {"beta": config.objective.options["beta"]}
        found |= dict.fromkeys(("preference", "feedback"), length | beta)
    if kind == "rollout":
        several = rollout.eval_responses_per_prompt or rollout.responses_per_prompt
        drawn = dataclasses.replace(rollout, responses_per_prompt=several)
        sampled = (name for name, row in EVALS.items() if row.sampled)
        found |= dict.fromkeys(sampled, length | {"options": drawn})
    return found


def evaluate(
    policy: EvaluatedPolicy,
    wanted: Sequence[str],
    *,
    rewards: WeightedRewards | None = None,
    compare: Compare | None = None,
    limit: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    data: DataOptions | None = None,
    answers: dict[str, list[Mapping[str, Any]]] | None = None,
) -> dict[str, dict[str, float]]:
    """Run evaluations.

    Args:
        policy: the policy.
        wanted: of each ``name=source``.
        rewards: for evaluations that take them; also the comparison where ``compare`` is None.
        compare: for win rates.
        limit: at most so many rows of each source.
        options: evaluation -> its keyword arguments.
        data: how rows are read; None: as by default.
        answers: is filled with ``name=source`` -> the answers that were sampled.

    Returns:
        ``name=source`` -> metric -> number.

    Raises:
        ValueError: an unknown evaluation, a missing source, no rewards where they are needed, or a
            policy without what it asks.
    """
    found, data = {}, data or DataOptions()
    for item, (name, source) in ((item, named_source(item)) for item in wanted):
        row = EVALS[name]
        check_head(policy, row.head)
        takes: list[Any] = []
        if row.takes == "compare" and compare is not None:
            takes = [compare]
        elif row.takes:
            if rewards is None:
                also = " or --judge" if row.takes == "compare" else ""
                raise ValueError(f"{name} needs --rewards{also}")
            takes = [by_rewards(rewards) if row.takes == "compare" else rewards]
        examples = datasets.load(
            source, row.kind, data, chat=bool(policy.tokenizer.chat_template), limit=limit
        )
        own = dict((options or {}).get(name, {}))
        if answers is not None and row.takes:
            own["keep"] = answers.setdefault(item, []).append
        found[item] = row.fn(policy, examples, *takes, **own)
    return found


# what a policy says -> what it is, and the evaluation that asks for it
KINDS = {
    "": ("a language model, without a score head", "preference=PAIRS, of its log-probabilities"),
    "score": ("a reward model, which says no words and nothing of a step", "reward=PAIRS"),
    "steps": ("a process reward model, which scores steps alone", "process=STEPS"),
}


def check_head(policy: EvaluatedPolicy, head: str) -> None:
    """Refuse words of a reward model, and scores of another model."""
    if head != policy.head:
        kind, fix = KINDS[policy.head]
        raise ValueError(f"{policy.name} is {kind}: --eval={fix}")


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Write results as an aligned table; a metric's standard error stands beside it."""
    lines = []
    for item, values in results.items():
        lines.append(item)
        shown = [name for name in values if not name.endswith("/stderr")]
        width = max(map(len, shown))
        for name in shown:
            error = values.get(f"{name}/stderr")
            lines.append(
                f"  {name:<{width}}  {values[name]:>10.4f}"
                + (f" ± {error:.4f}" if error is not None else "")
            )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    Sampling(values.temperature, top_p=values.top_p)  # settings in range
    written, kept = command.output_path("json"), command.output_path("answers")
    distributed.start()
    compile_cache.keep()
    rewards = None
    if values.rewards:
        rewards = resolve(from_json(values.rewards), load_model=load_model)
    compare = None
    if values.judge:
        client = Client(values.judge, allow_http=values.allow_http, total_seconds=TOTAL_SECONDS)
        compare = by_judge(PairJudge(client, values.judge_model))
    heads = tuple(filter(None, {EVALS[named_source(item)[0]].head for item in values.eval}))
    if values.workdir:
        policy = run_policy(values.workdir, values.step, values.reference, heads)
    else:
        how = {"dtype": values.dtype or "", "max_length": values.max_length}
        how |= {"heads": heads, "separator": values.step_separator}
        policy = model_policy(values.model, values.reference, **how)
    scored = {"batch_size": values.batch_size, "max_length": values.max_length}
    drawn = RolloutOptions(
        responses_per_prompt=values.samples_per_prompt,
        max_new_tokens=values.max_new_tokens,
        rows=64,
        temperature=values.temperature,
        top_p=values.top_p,
    )
    sampled = {"options": drawn, "max_length": values.max_length, "seed": values.seed}
    answers: dict[str, list[Mapping[str, Any]]] = {}
    try:
        results = evaluate(
            policy,
            values.eval,
            rewards=rewards,
            compare=compare,
            limit=values.limit or None,
            options={name: sampled if row.sampled else scored for name, row in EVALS.items()}
            | {
                **dict.fromkeys(("preference", "feedback"), scored | {"beta": values.beta}),
                "pass_at_k": sampled | {"pass_score": values.pass_score},
            },
            answers=answers,
        )
    finally:  # a judge that fails in the end leaves what was sampled
        if kept is not None:
            lines = ({"eval": item, **row} for item, rows in answers.items() for row in rows)
            write_text(kept, "".join(json_text(line) + "\n" for line in lines))
    print(table(results))
    for item, rows in answers.items():
        print(f"\n{item}: {min(4, len(rows))} of {len(rows)} answers\n{samples_table(rows)}")
    if written is not None:
        found = {"policy": policy.name, "results": results}
        write_text(written, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main, arguments)

# SPDX-License-Identifier: Apache-2.0
"""Label samples: binary, pairwise or scalar feedback for the next round of training.

    python -m align_jax.label --samples=SAMPLES.jsonl --output=FEEDBACK.jsonl --feedback=pairwise
        --rewards='{"lexicon": {"path": "vader_lexicon.txt"}}' [--pairing=max --threshold=0
        --round=1 --seed=0]

``--rewards`` takes what ``config.rewards`` takes, as JSON or as a file of it: names of
``align_jax.online.rewards.REWARDS`` with weights and options, reward models among them; without it
the samples' own ``reward`` counts.  The records have HALOs' field names, so they train there, and
they are training data of ``align_jax.train`` as they are.  They are a function of the samples and
the seed: the order of the samples in the file changes nothing.

References:
    HALOs, github.com/ContextualAI/HALOs, ``train/label.py``.
"""

from __future__ import annotations

from absl import flags

from align_jax.runs import command

KINDS = ("binary", "pairwise", "scalar")
PAIRINGS = ("max", "random", "min")


def check_flags() -> None:
    """Refuse flags that would have no effect, and an output that cannot be written."""
    kind = flags.FLAGS.feedback
    command.belong(["pairing", "seed"], "--feedback=pairwise", kind == "pairwise")
    command.belong(["one_class"], "--feedback=binary", kind == "binary")
    command.belong(["threshold"], "--feedback=binary and pairwise", kind != "scalar")
    command.rows_path("output", "samples")
    command.check_there("", "", flags.FLAGS.samples)


if __name__ == "__main__":  # here, because what is imported next takes seconds
    flags.DEFINE_string(
        "samples", None, "Samples: JSON or JSON lines, of align_jax.sample or HALOs.", required=True
    )
    flags.DEFINE_string(
        "output", None, "File to write: .jsonl, or .json for an array.", required=True
    )
    flags.DEFINE_enum("feedback", "pairwise", KINDS, "Kind of feedback.")
    flags.DEFINE_string(
        "rewards", "", "JSON, or a file of it: reward -> weight, or options with a weight."
    )
    flags.DEFINE_string(
        "threshold",
        "0",
        "binary: desirable from this reward on, a number, mean or median; pairwise: pairs differ "
        "by more than this number.",
    )
    flags.DEFINE_enum("pairing", "random", PAIRINGS, "pairwise: which samples of a prompt meet.")
    flags.DEFINE_integer(
        "round", 0, "Round of sampling: prompt ids of different rounds never meet.", 0
    )
    flags.DEFINE_bool("one_class", False, "binary: write labels that are all the same, too.")
    flags.DEFINE_integer("seed", 0, "Of random pairing and of which sample is A.")
    arguments = command.read(check=check_flags)

import collections
import itertools
import operator
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import logging

from align_jax.core.choose import nearest
from align_jax.core.files import json_text, writing
from align_jax.core.schema import Example, Message
from align_jax.data.messages import kind_of
from align_jax.data.rows import LARGEST, prompt_of, response_of
from align_jax.data.sources import open_source
from align_jax.online.rewards import (
    WeightedRewards,
    by_name,
    columns,
    from_json,
    prompt_text,
    resolve,
)
from align_jax.online.selection import resolve_threshold
from align_jax.parallel import compile_cache, distributed
from align_jax.runs.weights import load_model

_CHUNK = 256  # samples scored between two steps of the bar
Sample = Mapping[str, Any]  # {prompt, output, prompt_id, sample_id, reward, ...}

ROUND_STRIDE = 10**9  # prompt_id of round r starts at r times this, so rounds can be concatenated


def round_id(prompt_id: int, round_number: int) -> int:
    """Return an id that is unique over the rounds of sampling and labeling.

    Raises:
        ValueError: an id that is not an integer from 0 below 10^9, or a negative round.
    """
    if not isinstance(prompt_id, int) or not 0 <= prompt_id < ROUND_STRIDE or round_number < 0:
        raise ValueError(
            f"expected an integer prompt_id from 0 below {ROUND_STRIDE} and a round from 0; got "
            f"prompt_id {prompt_id!r}, round {round_number}"
        )
    return round_number * ROUND_STRIDE + prompt_id


def _answer(sample: Sample) -> Any:
    """Give the output the form of the prompt: messages where that has turns, else text."""
    output = sample["output"]
    if isinstance(output, str) and not isinstance(sample["prompt"], str):
        return [{"role": "assistant", "content": output}]
    return output


_prompt_id = operator.itemgetter("prompt_id")
_ids = operator.itemgetter("prompt_id", "sample_id")


def _ordered(samples: Iterable[Sample]) -> list[Sample]:
    ordered = sorted(samples, key=_ids)
    for before, after in itertools.pairwise(ordered):
        alike = ""
        if _ids(before) == _ids(after):
            alike = f"two samples have prompt_id {after['prompt_id']} and sample_id "
            alike += str(after["sample_id"])
        elif _prompt_id(before) == _prompt_id(after) and before["prompt"] != after["prompt"]:
            alike = f"two prompts have prompt_id {after['prompt_id']}"
        if alike:
            raise ValueError(f"{alike}; label one round's samples at a time")
    return ordered


def scalar(samples: Iterable[Sample], round_number: int = 0) -> list[dict[str, Any]]:
    """Return each sample with its reward as ``scalar_feedback``.

    Raises:
        ValueError: two samples with the same ids.
    """
    return [
        {
            **one,
            "prompt_id": round_id(one["prompt_id"], round_number),
            "output": _answer(one),
            "type": "scalar_feedback",
        }
        for one in _ordered(samples)
    ]


def binary(
    samples: Iterable[Sample], threshold: float | str = 0.0, round_number: int = 0
) -> list[dict[str, Any]]:
    """Return each sample labeled desirable (1) where its reward is at least the threshold, as
    ``binary_feedback``.

    Args:
        samples: with rewards.
        threshold: a number, or "mean" or "median" of all the samples' rewards.
        round_number: which round of sampling this is.

    Raises:
        ValueError: two samples with the same ids, or an unknown threshold.
    """
    ordered = _ordered(samples)
    border = resolve_threshold(threshold, [one["reward"] for one in ordered]) if ordered else 0.0
    return [
        {
            "prompt_id": round_id(one["prompt_id"], round_number),
            "sample_id": one["sample_id"],
            "prompt": one["prompt"],
            "output": _answer(one),
            "label": int(one["reward"] >= border),
            "reward": one["reward"],
            "type": "binary_feedback",
        }
        for one in ordered
    ]


def _pairs(
    rewards: Sequence[float], pairing: str, threshold: float, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Choose index pairs whose rewards differ by more than the threshold."""
    order = np.argsort(-np.asarray(rewards), kind="stable").tolist()
    if pairing == "random":
        chosen = rng.permutation(len(rewards)).tolist()
        candidates = list(zip(chosen[::2], chosen[1::2]))
    elif pairing == "max":
        candidates = [(order[0], order[-1])]
    else:
        candidates = list(itertools.combinations(order, 2))
    gaps = {pair: abs(rewards[pair[0]] - rewards[pair[1]]) for pair in candidates}
    kept = [pair for pair in candidates if gaps[pair] > threshold]
    if pairing == "min" and kept:
        least = min(gaps[pair] for pair in kept)
        kept = [pair for pair in kept if gaps[pair] <= least + 1e-12]
    return kept


def pairwise(
    samples: Iterable[Sample],
    pairing: str = "random",
    threshold: float = 0.0,
    seed: int = 0,
    round_number: int = 0,
) -> list[dict[str, Any]]:
    """Pair each prompt's samples, as ``pairwise_feedback``; label 1 says that A is better.

    Args:
        samples: with rewards.
        pairing: "max": the best with the worst; "random": a random matching; "min": all pairs of
            the least difference above the threshold.
        threshold: pairs must differ by more than this; equal rewards never make a pair.
        seed: of the matching and of which sample is A; a prompt's pairs depend on it and the
            prompt's id alone.
        round_number: which round of sampling this is.

    Raises:
        ValueError: an unknown pairing, a negative threshold, or two samples with the same ids.
    """
    if pairing not in PAIRINGS or threshold < 0:
        raise ValueError(
            f"expected a pairing of {PAIRINGS} and a threshold from 0; got {pairing!r}, {threshold}"
        )
    feedback = []
    for prompt_id, found in itertools.groupby(_ordered(samples), key=_prompt_id):
        own, new_id = list(found), round_id(prompt_id, round_number)
        if len(own) < 2:
            continue
        rng = np.random.default_rng((seed, new_id))
        for pair in _pairs([one["reward"] for one in own], pairing, threshold, rng):
            a, b = (own[i] for i in (pair if rng.random() < 0.5 else pair[::-1]))
            feedback.append(
                {
                    "prompt_id": new_id,
                    "prompt": a["prompt"],
                    "output_A": _answer(a),
                    "output_B": _answer(b),
                    "label": int(a["reward"] > b["reward"]),
                    "reward_A": a["reward"],
                    "reward_B": b["reward"],
                    "reward_difference": abs(a["reward"] - b["reward"]),
                    "type": "pairwise_feedback",
                }
            )
    return feedback


_WORDS: Mapping[tuple[type, ...], str] = {(str, list): "a text or messages", (int,): "an integer"}
FIELDS: Mapping[str, tuple[type, ...]] = {
    "prompt": (str, list),
    "output": (str, list),
    "prompt_id": (int,),
    "sample_id": (int,),
}


def read_samples(path: str) -> list[dict[str, Any]]:
    """Read samples.

    Raises:
        ValueError: a record without ``prompt``, ``output``, ``prompt_id`` or ``sample_id``, or one
            of them or the reward of another type or form, with file and line.
    """
    source = open_source(path)
    found = []
    for i in range(len(source)):
        row = dict(source[i])
        if missing := [name for name in FIELDS if row.get(name) is None]:
            raise ValueError(
                f"{source.where(i)}: a sample needs {', '.join(FIELDS)}; this has no "
                f"{', '.join(missing)}"
            )
        for name, kinds in {**FIELDS, "reward": (int, float, type(None))}.items():
            value = row.get(name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                wanted = _WORDS.get(kinds, "a number")
                raise ValueError(
                    f"{source.where(i)}: {name}: expected {wanted}, got {kind_of(value)}"
                )
        try:
            prompt = prompt_of(row)
            if prompt == ():
                raise ValueError("prompt: no messages")
            response_of(row["output"], prompt, "output")
            round_id(row["prompt_id"], 0)
        except ValueError as error:
            raise ValueError(f"{source.where(i)}: {error}") from error
        found.append(row)
    return found


def with_rewards(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples whose reward is known: null, NaN and infinity say nothing of an answer.

    Infinity is what no float32 holds, as everywhere: above 3e38.

    Raises:
        ValueError: none has one.
    """
    known = [
        one for one in samples if one.get("reward") is not None and abs(one["reward"]) <= LARGEST
    ]
    if not known:
        raise ValueError(f"none of the {len(samples)} samples has a reward; give --rewards")
    return known


def _example(sample: Sample) -> Example:
    prompt = prompt_of(sample)
    return Example(prompt, (response_of(sample["output"], prompt, "output"),), extras=sample)


def _text(response: str | Sequence[Message]) -> str:
    """Return what a reward function is given as the completion: the text, or the last turn's."""
    return response if isinstance(response, str) else response[-1]["content"]


def _finishes(samples: Sequence[Sample]) -> list[str]:
    """Return how each sample ended; those of other programs do not say, and are taken as whole."""
    return [str(one.get("finish", "stop")) for one in samples]


def score(
    samples: Sequence[Mapping[str, Any]], rewards: WeightedRewards, show: bool = True
) -> list[dict[str, Any]]:
    """Return the samples with their ``reward``, and with each of several rewards by itself under
    ``rewards``; those of which no reward said anything are left out, and counted in a warning."""
    scored = []
    with tqdm.tqdm(total=len(samples), unit="sample", disable=not show) as bar:
        for begin in range(0, len(samples), _CHUNK):
            part = samples[begin : begin + _CHUNK]
            examples = [_example(one) for one in part]
            total, each = rewards(
                [prompt_text(example) for example in examples],
                [_text(example.responses[0]) for example in examples],
                [columns(*pair) for pair in zip(examples, _finishes(part))],
            )
            for i, one in enumerate(part):
                own = by_name(each, i)
                if own and all(value is None for value in own.values()):
                    continue  # no reward said anything
                scored.append({**one, "reward": float(total[i])})
                if len(each) > 1:
                    scored[-1]["rewards"] = own
            bar.update(len(part))
    if silent := len(samples) - len(scored):
        logging.warning("%d samples of which no reward said anything are left out", silent)
    return scored


def make_feedback(
    samples: Sequence[Mapping[str, Any]],
    kind: str,
    *,
    threshold: str = "0",
    pairing: str = "random",
    seed: int = 0,
    round_number: int = 0,
) -> list[dict[str, Any]]:
    """Turn scored samples into feedback of a kind.

    Raises:
        ValueError: an unknown kind, or a threshold that the kind does not take.
    """
    if kind not in KINDS:
        raise ValueError(f"--feedback = {kind!r} is unknown{nearest(kind, KINDS)}")
    if kind == "scalar":
        return scalar(samples, round_number)
    if kind == "binary":
        return binary(samples, threshold, round_number)
    return pairwise(samples, pairing, resolve_threshold(threshold, [0.0]), seed, round_number)


def summary(
    kind: str, samples: Sequence[Sample], known: Sequence[Sample], records: Sequence[Sample]
) -> str:
    """Say what was made of samples, of which some have a known reward.

    Returns:
        Counts on one line: of labels, of equal rewards of a prompt, of what was left out.
    """
    rewards = collections.defaultdict(list)
    for one in known:
        rewards[one["prompt_id"]].append(one["reward"])
    parts = [f"{len(records)} records of {kind} feedback from {len(samples)} samples"]
    if kind == "binary":
        labels = collections.Counter(one["label"] for one in records)
        parts.append(f"{labels[1]} desirable, {labels[0]} undesirable")
    if kind == "pairwise":
        ties = sum(a == b for own in rewards.values() for a, b in itertools.combinations(own, 2))
        parts.append(f"{ties} ties among a prompt's samples")
        used = len({one["prompt_id"] for one in records})
        prompts = len({one["prompt_id"] for one in samples})
        parts.append(f"{prompts - used} of {prompts} prompts unused")
    parts.append(f"{len(samples) - len(known)} samples without a reward left out")
    return "; ".join(parts)


def check_useful(kind: str, records: Sequence[Sample], one_class: bool) -> None:
    """Refuse feedback of which nothing is to be learned.

    Raises:
        ValueError: no record at all, or labels that are all the same, unless ``one_class``.
    """
    if not records:
        raise ValueError(
            f"no {kind} feedback: no two samples of a prompt differ by more than --threshold; "
            "lower it, or sample more of each prompt"
        )
    labels = {one["label"] for one in records} if kind == "binary" else set()
    if len(labels) == 1 and not one_class:
        rewards = [one["reward"] for one in records]
        raise ValueError(
            f"all {len(records)} samples get the label {labels.pop()}: rewards go from "
            f"{min(rewards):g} to {max(rewards):g}; set --threshold (a number, mean or median), or "
            "--one_class to write them all the same"
        )


def write(path: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, or as one JSON array where the file's name ends in .json (as
    HALOs reads it); a file that is there is replaced when the new one is whole."""
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with writing(file), part.open("w", encoding="utf-8") as out:
            if file.suffix == ".json":
                out.write(json_text(list(records), indent=1) + "\n")
            else:
                out.writelines(json_text(one) + "\n" for one in records)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    distributed.start()
    compile_cache.keep()
    samples = read_samples(values.samples)
    if values.rewards:
        rewards = resolve(from_json(values.rewards), load_model=load_model)
        samples = score(samples, rewards)
    known = with_rewards(samples)
    records = make_feedback(
        known,
        values.feedback,
        threshold=values.threshold,
        pairing=values.pairing,
        seed=values.seed,
        round_number=values.round,
    )
    check_useful(values.feedback, records, values.one_class)
    write(values.output, records)
    print(f"{values.output}: {summary(values.feedback, samples, known, records)}")


if __name__ == "__main__":
    command.run(main, arguments)

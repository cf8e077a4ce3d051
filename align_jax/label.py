# SPDX-License-Identifier: Apache-2.0
"""Label samples: binary, pairwise or scalar feedback for the next round of training.

    python -m align_jax.label --samples=SAMPLES.jsonl --output=FEEDBACK.jsonl --feedback=pairwise
        --rewards='{"lexicon": {"path": "vader_lexicon.txt"}}' [--pairing=max --threshold=0
        --round=1 --seed=0]

``--rewards`` takes what ``config.rewards`` takes, as JSON or as a file of it: names of
``align_jax.online.rewards.REWARDS`` with weights and options, reward models among them; without it the
samples' own ``reward`` counts.  The records have HALOs' fields and are training data of
``align_jax.train`` as they are.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tqdm
from absl import app, flags, logging

from align_jax.data.sources import open_source
from align_jax.online import feedback
from align_jax.online.rewards import WeightedRewards, resolve
from align_jax.parallel import distributed

KINDS = ("binary", "pairwise", "scalar")
_CHUNK = 256  # samples scored between two steps of the bar


def read_samples(path: str) -> list[dict[str, Any]]:
    """Read samples.

    Raises:
        ValueError: a record without ``prompt``, ``output``, ``prompt_id`` or ``sample_id``, with
            file and line.
    """
    source = open_source(path)
    found = []
    for i in range(len(source)):
        row = dict(source[i])
        missing = [
            name for name in ("prompt", "output", "prompt_id", "sample_id") if name not in row
        ]
        if missing:
            raise ValueError(
                f"{source.where(i)}: a sample needs prompt, output, prompt_id and "
                "sample_id; "
                f"this has no {', '.join(missing)}"
            )
        found.append(row)
    return found


def score(
    samples: Sequence[Mapping[str, Any]], rewards: WeightedRewards, show: bool = True
) -> list[dict[str, Any]]:
    """Return the samples with their ``reward``, and with each of several rewards by itself under
    ``rewards``."""
    scored = []
    with tqdm.tqdm(total=len(samples), unit="sample", disable=not show) as bar:
        for begin in range(0, len(samples), _CHUNK):
            part = samples[begin : begin + _CHUNK]
            prompts = [
                one["prompt"] if isinstance(one["prompt"], str) else one["prompt"][-1]["content"]
                for one in part
            ]
            extras = [
                dict(one) | ({} if isinstance(one["prompt"], str) else {"messages": one["prompt"]})
                for one in part
            ]
            total, parts = rewards(prompts, [one["output"] for one in part], extras)
            for i, one in enumerate(part):
                more = (
                    {"rewards": {name: float(values[i]) for name, values in parts.items()}}
                    if len(parts) > 1
                    else {}
                )
                scored.append({**one, "reward": float(total[i]), **more})
            bar.update(len(part))
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
        ValueError: an unknown kind; a sample without a reward; a threshold that the kind does not
            take.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown feedback {kind!r}; known: {KINDS}")
    unscored = next((one for one in samples if "reward" not in one), None)
    if unscored is not None:
        raise ValueError(
            f"the sample with prompt_id {unscored['prompt_id']}, sample_id "
            f"{unscored['sample_id']} has no "
            "reward; give --rewards"
        )
    if kind == "scalar":
        return feedback.scalar(samples, round_number)
    if kind == "binary":
        return feedback.binary(samples, threshold, round_number)
    return feedback.pairwise(
        samples, pairing, feedback.resolve_threshold(threshold, [0.0]), seed, round_number
    )


def write(path: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, or as one JSON array where the file's name ends in .json (as
    HALOs reads it)."""
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".json":
        file.write_text(
            json.dumps(list(records), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
    else:
        file.write_text(
            "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8"
        )


def define_flags() -> None:
    """Define the command line."""
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
        "binary: desirable from this reward on, a number, mean "
        "or median; "
        "pairwise: pairs differ by more than this number.",
    )
    flags.DEFINE_enum(
        "pairing", "random", feedback.PAIRINGS, "pairwise: which samples of a prompt meet."
    )
    flags.DEFINE_integer(
        "round", 0, "Round of sampling: prompt ids of different rounds never meet.", 0
    )
    flags.DEFINE_integer("seed", 0, "Of random pairing and of which sample is A.")


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells much of little
    distributed.start()
    samples = read_samples(values.samples)
    if values.rewards:
        text = (
            pathlib.Path(values.rewards).read_text()
            if os.path.isfile(values.rewards)
            else values.rewards
        )
        samples = score(samples, resolve(json.loads(text)))
    records = make_feedback(
        samples,
        values.feedback,
        threshold=values.threshold,
        pairing=values.pairing,
        seed=values.seed,
        round_number=values.round,
    )
    write(values.output, records)
    print(
        f"{len(records)} records of {values.feedback} feedback from {len(samples)} samples in "
        f"{values.output}"
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Public data sets by name, with the filters that their users agree on.

``set:NAME:SPLIT`` reads the data set from the hub; ``set:NAME:SOURCE`` reads the same rows from
anywhere else (a path, a glob, ``tfds:...``, ``hf:...``).  Filters are those of HALOs (commit
4831988, train/data.py) and of the papers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from align_jax.core.choose import choose
from align_jax.core.schema import Example
from align_jax.data.conversions import prompt_key
from align_jax.data.messages import Row
from align_jax.data.published import grow_trees


@dataclasses.dataclass(frozen=True)
class PublicDataset:
    """A public data set.

    Attributes:
        splits: split -> source spec.
        format: a key of ``FORMATS``.
        gather: all rows -> the rows to read, where a row alone says too little.
        keep: (examples, split is for training, seed) -> the examples to keep.
    """

    splits: Mapping[str, str]
    format: str
    gather: Callable[[Sequence[Row]], Sequence[Row]] | None = None
    keep: Callable[[Sequence[Example], bool, int], Sequence[Example]] | None = None


def resolve(spec: str) -> tuple[PublicDataset, str, bool]:
    """Resolve ``set:NAME:SPLIT_OR_SOURCE``.

    Returns:
        The data set, the source to open, and whether it is for training: a split, or file name,
        that does not speak of test, eval or validation.

    Raises:
        ValueError: not of that form, or an unknown name.
    """
    name, _, rest = spec.removeprefix("set:").partition(":")
    dataset = choose(DATASETS, name, "data set")
    if not rest:
        raise ValueError(f"{spec!r}: expected set:{name}:SPLIT or set:{name}:SOURCE")
    held_out = re.search("test|eval|valid", rest.rpartition("/")[2])
    return dataset, dataset.splits.get(rest, rest), held_out is None


def keep_shp(examples: Sequence[Example], training: bool, seed: int) -> Sequence[Example]:
    """Keep pairs whose votes differ by a factor of two, and at most five pairs a post; all of them
    in a test split.

    Source: Ethayarajh et al., 2022 (arXiv 2110.08420), and HALOs' get_shp.
    """
    if not training:
        return examples
    posts: dict[str, list[Example]] = {}
    for example in examples:
        votes = example.scores or ()
        if max(votes) >= 2 * min(votes):
            posts.setdefault(prompt_key(example), []).append(example)
    rng = np.random.default_rng(seed)
    return [
        pairs[i]
        for pairs in posts.values()
        for i in sorted(rng.permutation(len(pairs))[:5].tolist())
    ]


def grow_english_trees(rows: Sequence[Row]) -> Sequence[Row]:
    """Gather Open-Assistant's flat messages into trees, the English ones only."""
    return grow_trees([row for row in rows if row.get("lang", "en") == "en"])


def _hub(repository: str, *splits: str) -> dict[str, str]:
    return {split: f"hf:{repository}:{split}" for split in splits}


DATASETS: Mapping[str, PublicDataset] = {
    "hh": PublicDataset(_hub("Anthropic/hh-rlhf", "train", "test"), "implicit_pairs"),
    "hh_helpful": PublicDataset(
        _hub("Anthropic/hh-rlhf/helpful-base", "train", "test"), "implicit_pairs"
    ),
    "hh_harmless": PublicDataset(
        _hub("Anthropic/hh-rlhf/harmless-base", "train", "test"), "implicit_pairs"
    ),
    "shp": PublicDataset(
        _hub("stanfordnlp/SHP", "train", "validation", "test"), "shp", keep=keep_shp
    ),
    "oasst": PublicDataset(
        _hub("OpenAssistant/oasst1", "train", "validation"), "oasst_tree", gather=grow_english_trees
    ),
    "oasst_trees": PublicDataset({}, "oasst_tree"),
    "ultrafeedback": PublicDataset(
        {
            "train": "hf:HuggingFaceH4/ultrafeedback_binarized:train_prefs",
            "test": "hf:HuggingFaceH4/ultrafeedback_binarized:test_prefs",
        },
        "pairs",
    ),
    "ultrafeedback_armorm": PublicDataset(
        _hub("princeton-nlp/llama3-ultrafeedback-armorm", "train", "test"), "pairs"
    ),
    "ultrachat": PublicDataset(
        {
            "train": "hf:HuggingFaceH4/ultrachat_200k:train_sft",
            "test": "hf:HuggingFaceH4/ultrachat_200k:test_sft",
        },
        "messages",
    ),
    "alpaca": PublicDataset(_hub("tatsu-lab/alpaca", "train"), "alpaca"),
    "tldr": PublicDataset(
        {
            **_hub("CarperAI/openai_summarize_comparisons", "train", "test"),
            "validation": "hf:CarperAI/openai_summarize_comparisons:valid1",
        },
        "pairs",
    ),
    "tldr_comparisons": PublicDataset({}, "comparisons"),
    "safe_rlhf": PublicDataset(
        _hub("PKU-Alignment/PKU-SafeRLHF-single-dimension", "train", "test"), "safe_rlhf"
    ),
    "gsm8k": PublicDataset(_hub("openai/gsm8k/main", "train", "test"), "question"),
}

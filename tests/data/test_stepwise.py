# SPDX-License-Identifier: Apache-2.0
"""Labeled steps on their way into a batch: where they end, in every layout, cut or whole."""

import json

import numpy as np
import pytest

from align_jax.core.options import DataOptions
from align_jax.data import datasets
from align_jax.data.layout import BatchSizes
from align_jax.data.pipeline import make_pipeline
from align_jax.data.tokenizer import load_tokenizer

ROWS = [
    {"prompt": "p:", "completions": ["a", "bb", "c"], "labels": [True, None, 0.25]},
    {"prompt": "q:", "completions": ["dddd"], "labels": [True]},
    {"prompt": "r:", "completions": ["e", "f"], "labels": [True, False]},
]


@pytest.mark.parametrize("layout", ["plain", "packed", "shared_prefix"])
@pytest.mark.parametrize("separator", ["\n", "", " #\n"])
def test_labels_lie_at_the_last_token_of_each_labeled_step(tmp_path, layout, separator):
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = load_tokenizer("byte")
    options = DataOptions(layout=layout, step_separator=separator)
    examples = datasets.load(str(path), "stepwise", options, chat=False)
    pipeline = make_pipeline(examples, tokenizer, options, BatchSizes(4, 32, 64), once=True)
    found = {}
    for step in range(pipeline.steps_per_epoch):
        batch = pipeline.batch(step)
        assert batch.step_labels.shape == pipeline.abstract().step_labels.shape
        for row, t in zip(*np.nonzero(batch.loss_mask)):
            group = batch.example_index.reshape(len(batch.tokens), -1)[row, batch.slot[row, t]]
            found.setdefault(int(group), []).append(
                (tokenizer.decode(batch.tokens[row, t]), float(batch.step_labels[row, t]))
            )
        assert not batch.step_labels[~batch.loss_mask].any()
    for number, row in enumerate(ROWS):
        steps = zip(row["completions"], row["labels"])
        assert found[number] == [
            ((text + separator)[-1], float(label)) for text, label in steps if label is not None
        ]


def test_of_a_response_that_is_cut_the_first_steps_are_left():
    rows = [{"prompt": "p", "completions": ["aaaa", "b", "c"], "labels": [False, True, True]}]
    rows.append({"prompt": "q", "completions": ["a"], "labels": [True]})
    examples = [datasets.formats.read(row, "stepwise", chat=False)[0] for row in rows]
    made = datasets.Examples("stepwise", examples, (2,), None, "", {})
    sizes = BatchSizes(2, 8)
    options = DataOptions(layout="plain")
    batch = make_pipeline(made, load_tokenizer("byte"), options, sizes, once=True).batch(0)
    assert batch.step_labels[batch.loss_mask].tolist() == [0.0, 1.0, 1.0]  # without the last


def test_a_whole_response_is_right_where_no_step_is_wrong(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def load(kind):
        return datasets.load(str(path), kind, DataOptions(), chat=False)

    assert [one.label for one in load("unpaired").items] == [False, True, False]
    assert [one.responses for one in load("completions").items] == [("dddd",)]
    assert [one.responses for one in load("prompts").items] == [(), (), ()]

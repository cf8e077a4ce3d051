# SPDX-License-Identifier: Apache-2.0
"""Data made by code follows the preference it claims, and holds back whole questions."""

import pytest

from align_jax.core.options import DataOptions
from align_jax.data import datasets, synthetic


def rows(name, split="train", **options):
    made = synthetic.make(name, split, **options)
    return [made.row(index) for index in range(made.size)]


def test_people_prefer_the_kinder_answer():
    for row in rows("preferences", size=300):
        assert synthetic.kindness(row["chosen"]) > synthetic.kindness(row["rejected"])
    for row in rows("unpaired", size=300):
        assert (synthetic.kindness(row["response"]) > 0) == row["label"]
    for row in rows("ranked", size=300):
        assert [synthetic.kindness(response) for response in row["responses"]] == row["scores"]


def test_lengths_say_nothing_of_the_preference():
    found = rows("preferences", size=2000)
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in found)
    equal = sum(len(row["chosen"]) == len(row["rejected"]) for row in found)
    assert 0.4 < (longer + equal / 2) / len(found) < 0.6


@pytest.mark.parametrize("name", synthetic.BUILTINS)
def test_held_out_questions_never_occur_in_training(name):
    train, held = (
        {row["question"] for row in rows(name, split, size=1500)} for split in synthetic.SPLITS
    )
    assert held and not train & held
    if name not in ("arithmetic", "verified_steps"):

        def words(questions):
            return {word for question in questions for word in question.split()}

        assert words(held) == words(train)


def test_rows_are_a_function_of_their_number_and_the_seed():
    assert rows("preferences", size=50) == rows("preferences", size=80)[:50]
    assert rows("preferences", size=50) != rows("preferences", size=50, seed=1)


@pytest.mark.parametrize(
    "name, kind, responses",
    [
        ("completions", "completions", 1),
        ("preferences", "pairs", 2),
        ("unpaired", "unpaired", 1),
        ("ranked", "ranked", 4),
        ("arithmetic", "prompts", 0),
        ("verified_steps", "stepwise", 1),
        ("verified_steps", "unpaired", 1),
        ("preferences", "completions", 1),
        ("ranked", "pairs", 2),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_builtin_sources_load_with_and_without_a_template(name, kind, responses, chat):
    examples = datasets.load(f"builtin:{name}:eval?size=20&seed=2", kind, DataOptions(), chat=chat)
    assert len(examples) <= 20 and {len(example.responses) for example in examples.items} == {
        responses
    }
    assert isinstance(examples[0].prompt, tuple) == chat


def test_sums_are_right():
    for row in rows("arithmetic", size=100):
        left, right = row["question"].removeprefix("What is ").rstrip("?").split("+")
        assert int(left) + int(right) == int(row["answer"])

# SPDX-License-Identifier: Apache-2.0
"""Each published form of feedback gives the example it means; mistakes name the row and the way
out."""

import json
import math

import pytest

from align_jax.core.options import DataOptions
from align_jax.data import conversions, datasets, formats, named, published, transcripts


def U(text):
    return {"role": "user", "content": text}


def A(text):
    return {"role": "assistant", "content": text}


def S(text):
    return {"role": "system", "content": text}


def G(who, text):
    return {"from": who, "value": text}


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"


# name of the format, row, prompt, responses, and other attributes of the example; with a chat
# template
def prm_step(completions, chosen=None, human=None):
    """A step as PRM800K writes it down."""
    rated = [{"text": text, "rating": rating, "flagged": None} for text, rating in completions]
    return {"completions": rated, "human_completion": human, "chosen_completion": chosen}


CASES = [
    ("pairs", {"prompt": "p", "chosen": "c", "rejected": "r"}, "p", ("c", "r"), {}),
    (
        "pairs",
        {"prompt": [U("p")], "chosen": [A("c")], "rejected": [A("r")], "margin": 2, "weight": 0.5},
        (U("p"),),
        ("c", "r"),
        {"margin": 2.0, "weight": 0.5},
    ),
    (
        "pairs",
        {
            "prompt": "p",
            "chosen": [U("p"), A("c")],
            "rejected": [U("p"), A("r")],
            "score_chosen": 9,
            "score_rejected": 2.5,
        },
        (U("p"),),
        ("c", "r"),
        {"scores": (9.0, 2.5)},
    ),
    (
        "pairs",
        {"system": "s", "prompt": "p", "chosen": "c", "rejected": "r"},
        (S("s"), U("p")),
        ("c", "r"),
        {},
    ),
    (
        "pairs",
        {
            "prompt": "p",
            "chosen": [U("p"), A("c")],
            "rejected": [U("p"), A("r")],
            "all_rm_scores": [0.1, 0.7],
        },
        (U("p"),),
        ("c", "r"),
        {"scores": (0.7, 0.1)},
    ),
    (
        "implicit_pairs",
        {"chosen": HH + " Yes, so.", "rejected": HH + " Yes, no."},
        (U("Hi"), A("Hello"), U("Why?")),
        ("Yes, so.", "Yes, no."),
        {},
    ),
    (
        "implicit_pairs",
        {"chosen": [U("p"), A("c"), U("q"), A("d")], "rejected": [U("p"), A("c"), U("q"), A("e")]},
        (U("p"), A("c"), U("q")),
        ("d", "e"),
        {},
    ),
    (
        "implicit_pairs",
        {"chosen": "Q: one two three\nA: the sea", "rejected": "Q: one two three\nA: the sky"},
        "Q: one two three\nA: the ",
        ("sea", "sky"),
        {},
    ),
    (
        "alpaca_pairs",
        {"instruction": "i", "input": "x", "output": "c", "chosen": "c", "rejected": "r"},
        (U("i\n\nx"),),
        ("c", "r"),
        {},
    ),
    (
        "question_pairs",
        {"system": "", "question": "q", "chosen": "c", "rejected": "r"},
        (U("q"),),
        ("c", "r"),
        {},
    ),
    (
        "sharegpt_pairs",
        {"conversations": [G("human", "p")], "chosen": G("gpt", "c"), "rejected": G("gpt", "r")},
        (U("p"),),
        ("c", "r"),
        {},
    ),
    (
        "ranked",
        {"prompt": "p", "responses": ["b", "a", "c"], "ranks": [1, 0, 2]},
        "p",
        ("a", "b", "c"),
        {},
    ),
    (
        "ranked",
        {"prompt": [U("p")], "responses": ["b", [A("a")]], "scores": [0.5, 3]},
        (U("p"),),
        ("a", "b"),
        {"scores": (3.0, 0.5)},
    ),
    ("unpaired", {"prompt": "p", "completion": "c", "label": False}, "p", ("c",), {"label": False}),
    (
        "unpaired",
        {"prompt": [U("p")], "completion": [A("c")], "label": 1},
        (U("p"),),
        ("c",),
        {"label": True},
    ),
    (
        "messages_label",
        {"messages": [U("p"), A("x"), U("q"), A("c")], "label": True},
        (U("p"), A("x"), U("q")),
        ("c",),
        {"label": True},
    ),
    (
        "sharegpt_label",
        {"conversations": [G("human", "p"), G("gpt", "c")], "kto_tag": "false"},
        (U("p"),),
        ("c",),
        {"label": False},
    ),
    ("messages", {"messages": [S("s"), U("p"), A("c")]}, (S("s"), U("p")), ("c",), {}),
    (
        "messages",
        {"messages": [U("p"), A("c"), U("q"), A("d")]},
        (U("p"),),
        ((A("c"), U("q"), A("d")),),
        {},
    ),
    (
        "sharegpt",
        {"system": "s", "conversations": [G("human", "p"), G("gpt", "c")]},
        (S("s"), U("p")),
        ("c",),
        {},
    ),
    ("completion", {"prompt": "p", "completion": " c"}, "p", (" c",), {}),
    ("alpaca", {"instruction": "i", "input": "", "output": "c"}, (U("i"),), ("c",), {}),
    ("question", {"question": "1+1?", "answer": "#### 2"}, (U("1+1?"),), ("#### 2",), {}),
    ("text", {"text": "t"}, "", ("t",), {}),
    ("prompt", {"prompt": [U("p")]}, (U("p"),), (), {}),
    (
        "binary_feedback",
        {
            "type": "binary_feedback",
            "prompt": [U("p")],
            "output": [A("c")],
            "label": 1,
            "reward": 0.9,
            "prompt_id": 3,
        },
        (U("p"),),
        ("c",),
        {"label": True, "scores": (0.9,)},
    ),
    (
        "pairwise_feedback",
        {
            "type": "pairwise_feedback",
            "prompt": [U("p")],
            "output_A": [A("r")],
            "output_B": [A("c")],
            "label": 0,
            "reward_A": 0.1,
            "reward_B": 0.7,
        },
        (U("p"),),
        ("c", "r"),
        {"scores": (0.7, 0.1)},
    ),
    (
        "scalar_feedback",
        {"type": "scalar_feedback", "prompt": [U("p")], "output": [A("c")], "reward": 7},
        (U("p"),),
        ("c",),
        {"scores": (7.0,)},
    ),
    (
        "sample",
        {"type": "sample", "instruction": "p", "output": "c", "generator": "m"},
        (U("p"),),
        ("c",),
        {},
    ),
    (
        "shp",
        {
            "history": "p",
            "human_ref_A": "r",
            "human_ref_B": "c",
            "labels": 0,
            "score_A": 2,
            "score_B": 8,
        },
        (U("p"),),
        ("c", "r"),
        {"scores": (8.0, 2.0)},
    ),
    (
        "safe_rlhf",
        {"prompt": "p", "response_0": "r", "response_1": "c", "better_response_id": 1},
        (U("p"),),
        ("c", "r"),
        {},
    ),
    (
        "comparisons",
        {
            "info": {"subreddit": "x", "title": "t", "post": "p"},
            "summaries": [{"text": " r"}, {"text": " c"}],
            "choice": 1,
        },
        (U("SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"),),
        ("c", "r"),
        {},
    ),
    (
        "scored_completions",
        {
            "instruction": "p",
            "completions": [
                {"response": "b", "overall_score": 3},
                {"response": "a", "overall_score": 8.5},
            ],
        },
        (U("p"),),
        ("a", "b"),
        {"scores": (8.5, 3.0)},
    ),
    (
        "openai_pairs",
        {
            "input": {"messages": [S("s"), U("p")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [A("c")],
            "non_preferred_output": [A("r")],
        },
        (S("s"), U("p")),
        ("c", "r"),
        {},
    ),
    (
        "preference_strength",
        {"prompt": "p", "response_1": "r", "response_2": "c", "preference_strength": 2},
        (U("p"),),
        ("c", "r"),
        {"scores": (2.0, 0.0)},
    ),
    (
        "preference_strength",
        {
            "context": [U("p"), A("x"), U("q")],
            "response1": "c",
            "response2": "r",
            "overall_preference": -1,
        },
        (U("p"), A("x"), U("q")),
        ("c", "r"),
        {"scores": (0.0, -1.0)},
    ),
    (
        "ranked_answers",
        {
            "prompt": "\n\nHuman: p\n\nAssistant: ",
            "answers": [{"answer": "b", "rank": 2.0}, {"answer": "a", "rank": 1.0}],
        },
        (U("p"),),
        ("a", "b"),
        {},
    ),
    (
        "webgpt",
        {
            "question": {"full_text": "p", "id": "i"},
            "answer_0": "r",
            "answer_1": "c",
            "score_0": -0.5,
            "score_1": 0.5,
        },
        (U("p"),),
        ("c", "r"),
        {"scores": (0.5, -0.5)},
    ),
    (
        "arena",
        {
            "conversation_a": [U("p"), A("r"), U("q"), A("s")],
            "conversation_b": [U("p"), A("c"), U("q"), A("d")],
            "winner": "model_b",
        },
        (U("p"),),
        ((A("c"), U("q"), A("d")), (A("r"), U("q"), A("s"))),
        {"scores": (1.0, 0.0)},
    ),
    (
        "stepwise",
        {"prompt": "p", "completions": ["a", "b", "c"], "labels": [True, 0.25, None]},
        "p",
        ("a\nb\nc",),
        {"steps": (("a", 1.0), ("b", 0.25), ("c", None))},
    ),
    (
        "stepwise",
        {"question": "p", "completions": ["a"], "labels": [False]},
        (U("p"),),
        ("a",),
        {"steps": (("a", 0.0),)},
    ),
    (
        "math_shepherd",
        {
            "input": "p? Step 1: 1 + 1 = 2 ки\nStep 2: The answer is: 3 ки",
            "label": "p? Step 1: 1 + 1 = 2 +\nStep 2: The answer is: 3 -",
            "task": "GSM8K",
        },
        (U("p?"),),
        ("Step 1: 1 + 1 = 2\nStep 2: The answer is: 3",),
        {"steps": (("Step 1: 1 + 1 = 2", 1.0), ("Step 2: The answer is: 3", 0.0))},
    ),
    (
        "prm800k",
        {
            "labeler": "l",
            "question": {"problem": "p", "ground_truth_answer": "2"},
            "label": {
                "steps": [prm_step([("a", 1)], 0), prm_step([("b", -1)], 0)],
                "total_time": 1,
            },
        },
        (U("p"),),
        ("a\nb",),
        {"steps": (("a", 1.0), ("b", 0.0))},
    ),
]


@pytest.mark.parametrize(
    "name, row, prompt, responses, known", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_a_row_is_recognized_and_read(name, row, prompt, responses, known):
    assert formats.detect([row]) == name
    (example,) = formats.read(row, name, chat=True)
    assert example.prompt == prompt
    assert example.responses == responses
    for attribute in ("label", "scores", "steps", "margin", "weight"):
        assert getattr(example, attribute) == known.get(
            attribute, {"margin": 0.0, "weight": 1.0}.get(attribute)
        )


def test_prm800k_gives_each_alternative_and_the_chosen_steps_as_trl_does():
    steps = [
        prm_step([("a", 1), ("x", -1), ("z", None)], 0),
        prm_step([("y", 0)], None, {"text": "h", "rating": None}),
        prm_step([("c", 1), ("w", -1)]),
    ]
    row = {"labeler": "l", "question": {"problem": "p"}, "label": {"steps": steps}}
    found = formats.read(row, "prm800k", chat=False)
    a, h = ("a", 1.0), ("h", 1.0)
    assert [example.steps for example in found] == [
        (("x", 0.0),),
        (a, ("y", 0.0)),
        (a, h, ("c", 1.0)),
        (a, h, ("w", 0.0)),
        (a, h),
    ]


STEP = {"prompt": "p", "completions": ["a"], "labels": [True]}
SHEPHERD = {"input": "p Step 1: a ки", "label": "p Step 1: a +", "task": "t"}
PRM = {"labeler": "l", "question": {"problem": "p"}, "label": {"steps": [prm_step([("a", 1)], 0)]}}


@pytest.mark.parametrize(
    "name, row, change, words",
    [
        ("stepwise", STEP, {"labels": [True, False]}, "another number of completions"),
        ("stepwise", STEP, {"labels": [2]}, "true, false, or from 0 to 1: got 2"),
        ("stepwise", STEP, {"labels": ["maybe"]}, "expected true or false: got 'maybe'"),
        ("stepwise", STEP, {"labels": [None]}, "no step has a label"),
        ("stepwise", STEP, {"completions": [" "]}, "empty step"),
        ("stepwise", STEP, {"completions": [3]}, "completions: expected a text, got a number"),
        ("stepwise", STEP, {"prompt": ""}, "empty prompt"),
        ("math_shepherd", SHEPHERD, {"label": "p Step 1: a ки"}, "at character 12 is 'к'"),
        ("math_shepherd", SHEPHERD, {"label": "p Step 1: b +"}, "expected the text of input"),
        ("math_shepherd", SHEPHERD, {"input": "p a ки", "label": "p a +"}, "then 'Step 1:'"),
        ("math_shepherd", SHEPHERD, {"label": 3}, "label: expected a text, got a number"),
        ("prm800k", PRM, {"question": "p"}, "question: expected a dict, got a text"),
        ("prm800k", PRM, {"label": {"steps": 3}}, "label.steps: expected a list, got a number"),
        ("prm800k", PRM, {"label": {"steps": []}}, "no step has a label"),
        ("prm800k", PRM, {"label": {"steps": [prm_step([("a", 5)])]}}, "rating: expected -1, 0, 1"),
        ("prm800k", PRM, {"label": {"steps": [prm_step([("a", 1)], 7)]}}, "place of a completion"),
    ],
)
def test_mistakes_in_labeled_steps_are_named(name, row, change, words):
    with pytest.raises(transcripts.RowError) as caught:
        formats.read({**row, **change}, name, chat=False)
    assert words in str(caught.value)


def test_every_format_is_tested():
    assert set(formats.FORMATS) - {case[0] for case in CASES} == {
        "alpaca_outputs",
        "oasst_tree",
        "question_ranked",
        "question_label",
    }


PLAIN = [
    (
        "implicit_pairs",
        {"chosen": HH + " Yes, so.", "rejected": HH + " Yes, no."},
        HH,
        (" Yes, so.", " Yes, no."),
    ),
    ("question", {"question": "q", "answer": "a"}, "Question: q\nAnswer:", (" a",)),
    (
        "shp",
        {
            "history": "p",
            "human_ref_A": "c",
            "human_ref_B": "r",
            "labels": 1,
            "score_A": 2,
            "score_B": 1,
        },
        "\n\nHuman: p\n\nAssistant:",
        (" c", " r"),
    ),
    (
        "alpaca",
        {"instruction": "i", "output": "c"},
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\ni\n\n### Response:\n",
        ("c",),
    ),
]


@pytest.mark.parametrize("name, row, prompt, responses", PLAIN, ids=[case[0] for case in PLAIN])
def test_without_a_chat_template_rows_become_plain_text(name, row, prompt, responses):
    (example,) = formats.read(row, name, chat=False)
    assert (example.prompt, example.responses) == (prompt, responses)


TREE = {
    "message_tree_id": "t",
    "prompt": {
        "role": "prompter",
        "text": "p",
        "message_id": "t",
        "replies": [
            {
                "role": "assistant",
                "text": "b",
                "rank": 1,
                "replies": [
                    {
                        "role": "prompter",
                        "text": "q",
                        "replies": [
                            {"role": "assistant", "text": "y", "rank": 1},
                            {"role": "assistant", "text": "x", "rank": 0},
                        ],
                    }
                ],
            },
            {"role": "assistant", "text": "a", "rank": 0, "replies": []},
            {"role": "assistant", "text": "deleted", "rank": 2, "deleted": True},
        ],
    },
}


def test_a_message_tree_gives_one_ranking_for_each_ranked_set_of_answers():
    first, second = formats.read(TREE, formats.detect([TREE]), chat=True)
    assert (first.prompt, first.responses) == ((U("p"),), ("a", "b"))
    assert (second.prompt, second.responses) == ((U("p"), A("b"), U("q")), ("x", "y"))


def test_flat_messages_grow_into_the_same_tree():
    rows = [
        {"message_id": "t", "parent_id": None, "role": "prompter", "text": "p", "rank": None},
        {"message_id": "b", "parent_id": "t", "role": "assistant", "text": "b", "rank": 1},
        {"message_id": "a", "parent_id": "t", "role": "assistant", "text": "a", "rank": 0},
    ]
    (tree,) = published.grow_trees(rows)
    (example,) = formats.read(tree, "oasst_tree", chat=True)
    assert (example.prompt, example.responses) == ((U("p"),), ("a", "b"))


def write(path, *lines):
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return str(path)


GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
MISTAKES = [
    ("bad JSON", [GOOD, "{'prompt': 1}\n"], {}, r"data\.jsonl:2: malformed JSON"),
    ("not an object", [GOOD, "[1]\n"], {}, r"data\.jsonl:2: expected a JSON object"),
    (
        "missing field",
        [GOOD, "\n", {"prompt": "p", "chosen": "c"}],
        {},
        r"data\.jsonl:3: format 'pairs' needs .*rejected",
    ),
    (
        "two formats",
        [GOOD, {"messages": [U("q"), {"role": "assistant", "content": "a"}]}],
        {},
        r"data\.jsonl:2: format 'pairs' needs .*, format 'messages': rows of another",
    ),
    (
        "empty response",
        [GOOD, {**GOOD, "rejected": " "}],
        {},
        r"data\.jsonl:2: empty response; --config\.data\.invalid=drop",
    ),
    (
        "unknown fields",
        [{"a": 1, "b": 2}],
        {},
        r"data\.jsonl:1: no known format.*\['a', 'b'\].*--config\.data\.columns",
    ),
    ("unknown format", [GOOD], {"format": "pair"}, "did you mean 'pairs'"),
    (
        "unknown column",
        [GOOD],
        {"columns": {"prompt": "question"}},
        r"data\.jsonl:1: .*\['question'\]; the row has",
    ),
    ("no rows", [], {}, "no rows"),
    (
        "nothing shared",
        [{"chosen": "abc", "rejected": "abd"}],
        {},
        r"data\.jsonl:1: chosen and rejected share no",
    ),
    (
        "one is all they share",
        [{"chosen": "p q ", "rejected": "p q r"}],
        {},
        r"data\.jsonl:1: empty response",
    ),
    (
        "all invalid",
        [{**GOOD, "chosen": ""}],
        {"invalid": "drop"},
        "no pairs are left of 0 pairs.*empty response': 1",
    ),
    (
        "bad label",
        [{"prompt": "p", "completion": "c", "label": "maybe"}],
        {},
        "label: expected true or false",
    ),
    (
        "bad role",
        [{"messages": [{"role": "narrator", "content": "x"}]}],
        {"kind": "completions"},
        "a role is unknown: 'narrator'",
    ),
    ("no way", [{"text": "t"}], {}, "no conversion from completions to pairs"),
    ("prompts alone", [{"prompt": "q", "quality": 3}], {}, "of which they are made$"),
    (
        "half a pair",
        [{"prompt": "p", "chosen": "c"}],
        {},
        "it lacks rejected to be of format .pairs.",
    ),
    ("unknown kind", [GOOD], {"kind": "pair"}, "kind = 'pair' is unknown; did you mean 'pairs'"),
    (
        "unknown choice",
        [GOOD],
        {"invalid": "drp"},
        "config.data.invalid = 'drp' is unknown; did you mean 'drop'",
    ),
    ("weights", [GOOD], {"weights": [1.0, 2.0]}, "no effect: the shares are of several"),
]


def load(path, kind="pairs", weights=None, **options):
    return datasets.load(path, kind, DataOptions(**options), chat=True, weights=weights)


@pytest.mark.parametrize(
    "lines, options, message", [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES]
)
def test_mistakes_are_told_with_their_place(tmp_path, lines, options, message):
    path = write(tmp_path / "data.jsonl", *lines)
    with pytest.raises(ValueError, match=message):
        load(path, **options)


def test_invalid_rows_are_dropped_and_counted_on_request(tmp_path):
    path = write(tmp_path / "data.jsonl", GOOD, {**GOOD, "chosen": ""})
    examples = load(path, invalid="drop")
    assert len(examples) == 1 and examples.report == {"examples": 1, "dropped: empty response": 1}
    assert examples[0].source == f"{path}:1"


def test_columns_are_renamed(tmp_path):
    path = write(tmp_path / "data.jsonl", {"q": "p", "good": "c", "bad": "r", "prompt": "other"})
    (example,) = load(path, columns={"prompt": "q", "chosen": "good", "rejected": "bad"}).items
    assert (example.prompt, example.responses) == ("p", ("c", "r"))


def test_a_text_prompt_becomes_a_users_turn_on_request(tmp_path):
    path = write(tmp_path / "data.jsonl", GOOD)
    assert load(path, strings="messages")[0].prompt == (U("p"),)


def test_only_the_last_turn_is_learned_on_request(tmp_path):
    path = write(tmp_path / "data.jsonl", {"messages": [U("p"), A("c"), U("q"), A("d")]})
    (example,) = load(path, "completions", turns="last").items
    assert (example.prompt, example.responses) == ((U("p"), A("c"), U("q")), ("d",))


def pair(prompt="p", chosen="c", rejected="r", **known):
    return conversions.Example(prompt, (chosen, rejected), **known)


def one(response, prompt="p", **known):
    return conversions.Example(prompt, (response,), **known)


RANKED = conversions.Example("p", ("a", "b", "c"), scores=(3.0, 2.0, 0.5))
CONVERSIONS = [
    (
        "pairs",
        "unpaired",
        [pair(scores=(2.0, 1.0))],
        {},
        [(("c",), True, (2.0,)), (("r",), False, (1.0,))],
    ),
    ("pairs", "completions", [pair()], {}, [(("c",), None, None)]),
    ("ranked", "pairs", [RANKED], {}, [(("a", "c"), None, (3.0, 0.5))]),
    (
        "ranked",
        "pairs",
        [RANKED],
        {"pairing": "adjacent"},
        [(("a", "b"), None, (3.0, 2.0)), (("b", "c"), None, (2.0, 0.5))],
    ),
    (
        "ranked",
        "pairs",
        [RANKED],
        {"pairing": "all", "min_difference": 1.0},
        [(("a", "c"), None, (3.0, 0.5)), (("b", "c"), None, (2.0, 0.5))],
    ),
    (
        "ranked",
        "unpaired",
        [RANKED],
        {},
        [(("a",), True, (3.0,)), (("b",), False, (2.0,)), (("c",), False, (0.5,))],
    ),
    (
        "scored",
        "pairs",
        [one("x", scores=(1.0,)), one("y", scores=(4.0,)), one("z", "q", scores=(9.0,))],
        {},
        [(("y", "x"), None, (4.0, 1.0))],
    ),
    (
        "scored",
        "ranked",
        [one("x", scores=(1.0,)), one("y", scores=(4.0,))],
        {},
        [(("y", "x"), None, (4.0, 1.0))],
    ),
    (
        "scored",
        "unpaired",
        [one("x", scores=(1.0,)), one("y", scores=(4.0,))],
        {"threshold": "mean"},
        [(("x",), False, (1.0,)), (("y",), True, (4.0,))],
    ),
    (
        "scored",
        "unpaired",
        [one("x", scores=(1.0,)), one("y", scores=(4.0,))],
        {"threshold": "0.5"},
        [(("x",), True, (1.0,)), (("y",), True, (4.0,))],
    ),
    (
        "unpaired",
        "completions",
        [one("x", label=True), one("y", label=False)],
        {},
        [(("x",), None, None)],
    ),
    (
        "unpaired",
        "pairs",
        [one("x", label=False), one("y", label=True), one("z", label=True)],
        {"pairing": "all"},
        [(("y", "x"), None, None), (("z", "x"), None, None)],
    ),
    ("ranked", "scored", [RANKED], {}, [((x,), None, (s,)) for x, s in zip("abc", (3, 2, 0.5))]),
    (
        "unpaired",
        "scored",
        [one("x", label=True), one("y", label=False)],
        {},
        [(("x",), None, (1.0,)), (("y",), None, (0.0,))],
    ),
    ("completions", "scored", [one("x", scores=(2.0,))], {}, [(("x",), None, (2.0,))]),
    ("completions", "prompts", [one("x"), one("y")], {}, [((), None, None)]),
]


@pytest.mark.parametrize(
    "source, target, examples, options, expected",
    CONVERSIONS,
    ids=[f"{case[0]}-to-{case[1]}-{i}" for i, case in enumerate(CONVERSIONS)],
)
def test_kinds_are_converted(source, target, examples, options, expected):
    made = conversions.convert(examples, source, target, DataOptions(**options))
    assert [(example.responses, example.label, example.scores) for example in made] == expected


def test_a_score_beside_a_completion_is_kept_and_a_missing_one_is_named():
    row = {"prompt": "p", "completion": "c"}
    for score, read in ((2, (2.0,)), ("2", (2.0,)), (True, None), (None, None)):
        (example,) = formats.read({**row, "score": score}, "completion", chat=False)
        assert example.scores == read
    with pytest.raises(ValueError, match="no score: a column score or reward"):
        conversions.convert([example], "completions", "scored", DataOptions())


def test_a_random_pairing_is_fixed_by_its_seed():
    made = [
        conversions.convert(
            [RANKED] * 20, "ranked", "pairs", DataOptions(pairing="random"), seed=seed
        )
        for seed in (0, 0, 1)
    ]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.7, 1.0), (0.25, 0.01), (1.0, 0.7)])
def test_a_share_of_each_label_is_kept_of_pairs_that_are_split(shares, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = "frac_unique_desirable", "frac_unique_undesirable"
    options = DataOptions(**dict(zip(names, shares)))
    one, same, other = (
        datasets.load(str(path), "unpaired", options, chat=False, seed=seed) for seed in (0, 0, 1)
    )
    kept = [[example.responses[0] for example in found.items] for found in (one, same, other)]
    assert kept[0] == kept[1] and (kept[0] != kept[2] or shares == (1.0, 1.0))
    for letter, share in zip("cr", shares):  # rounded up, no example twice
        assert len({word for word in kept[0] if word[0] == letter}) == math.ceil(10 * share - 1e-6)
    assert len(kept[0]) == len(set(kept[0])) == 20 - one.report.get("dropped: frac_unique", 0)
    assert kept[0] == sorted(kept[0], key=lambda word: (word[1:], word[0]))  # in their order
    assert all(example.label == (example.responses[0][0] == "c") for example in one.items)


def test_balanced_labels_are_equally_many():
    examples = [one(str(i), label=i < 3) for i in range(10)]
    kept = conversions.balance(examples)
    assert sorted(example.label for example in kept) == [False] * 3 + [True] * 3


def test_rankings_are_thinned_to_as_many_responses_as_asked():
    made, few = conversions.take_responses([RANKED, pair()], 3)
    assert [example.responses for example in made] == [("a", "b", "c")] and few == 1
    assert conversions.take_responses([RANKED], 2)[0][0].responses == ("a", "c")


def test_shp_keeps_clear_pairs_and_five_a_post():
    examples = [pair(scores=(4.0, 2.0), extras={"n": i}) for i in range(9)] + [
        pair("q", scores=(3.0, 2.0))
    ]
    kept = named.keep_shp(examples, True, 0)
    assert len(kept) == 5 and {example.prompt for example in kept} == {"p"}
    assert named.keep_shp(examples, False, 0) == examples


def test_a_named_set_reads_local_files_with_its_filter(tmp_path):
    row = {
        "history": "p",
        "human_ref_A": "a",
        "human_ref_B": "b",
        "labels": 1,
        "score_A": 3,
        "score_B": 2,
    }
    path = write(tmp_path / "data.jsonl", row, {**row, "score_A": 9})
    examples = load(f"set:shp:{path}")
    assert len(examples) == 1 and examples.report["dropped: the data set's own filter"] == 1
    assert len(load(path, format="shp")) == 1
    # found from the fields: no filter
    assert len(load(path)) == 2
    with pytest.raises(ValueError, match="did you mean 'shp'"):
        load("set:ship:train")


def test_every_named_set_has_a_known_format():
    assert {entry.format for entry in named.DATASETS.values()} <= set(formats.FORMATS)


def test_a_name_that_is_a_format_and_a_data_set_means_the_same_fields():
    shared = set(named.DATASETS) & set(formats.FORMATS)
    assert shared and all(named.DATASETS[name].format == name for name in shared)


SPLITS = [  # transcripts whose ends are not a plain pair of answers
    (
        "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c",
        "\n\nHuman: a\n\nAssistant: b",
        ("b\n\nc", "b"),
    ),
    (
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: e\n\nAssistant: f",
        ((A("b"), U("c"), A("d")), (A("b"), U("e"), A("f"))),
    ),
]


@pytest.mark.parametrize("chosen, rejected, responses", SPLITS)
def test_transcripts_split_where_both_go_on_with_the_assistant(chosen, rejected, responses):
    assert transcripts.split_pair(chosen, rejected, chat=True) == ((U("a"),), responses)


def test_transcripts_without_a_shared_prompt_are_refused():
    with pytest.raises(transcripts.TranscriptError, match="share no prompt"):
        transcripts.split_pair(
            "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d", chat=True
        )

# SPDX-License-Identifier: Apache-2.0
"""What a user hands in is what is trained, or is refused by name: nothing is dropped in silence."""

import json
import re

import pytest

from align_jax.core.options import DataOptions
from align_jax.core.schema import Example
from align_jax.data import chat, datasets, encoding, tokenizer, truncation


def U(text, **more):
    return {"role": "user", "content": text, **more}


def A(text, **more):
    return {"role": "assistant", "content": text, **more}


def S(text):
    return {"role": "system", "content": text}


def G(who, text):
    return {"from": who, "value": text}


CALL = {"type": "function", "function": {"name": "search", "arguments": {"q": "x"}}}
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {}}}]


def load(tmp_path, rows, kind="pairs", *, raw=None, name="data.jsonl", strict=False, **options):
    path = tmp_path / name
    data = raw if raw is not None else "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(data)
    return datasets.load([str(path)], kind, DataOptions(**options), chat=True, strict=strict)


# row, kind, prompt, responses
READ = {
    "history": (
        {"instruction": "b", "chosen": "c", "rejected": "r", "history": [["a", "x"]]},
        "pairs",
        (U("a"), A("x"), U("b")),
        ("c", "r"),
    ),
    "context": (
        {"instruction": "b", "context": "k", "output": "c"},
        "completions",
        (U("b\n\nk"),),
        ("c",),
    ),
    "two outputs": ({"instruction": "q", "output": ["c", "r"]}, "pairs", (U("q"),), ("c", "r")),
    "text parts": (
        {
            "prompt": [U([{"type": "text", "text": "q"}, {"type": "text", "text": "!"}])],
            "chosen": "c",
            "rejected": "r",
        },
        "pairs",
        (U("q!"),),
        ("c", "r"),
    ),
    "roles in any case": (
        {"conversations": [{"from": "User", "value": "q"}, {"from": "GPT", "value": "a"}]},
        "completions",
        (U("q"),),
        ("a",),
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "s"}, U("q"), A("a")]},
        "completions",
        (S("s"), U("q")),
        ("a",),
    ),
    "the system once": (
        {"system": "s", "messages": [S("s"), U("q"), A("a")]},
        "completions",
        (S("s"), U("q")),
        ("a",),
    ),
    "a text prompt beside messages": (
        {"prompt": "q", "completion": [A("a", reasoning_content="t")]},
        "completions",
        (U("q"),),
        ((A("a", reasoning_content="t"),),),
    ),
    "a call without content": (
        {"prompt": [U("q"), A(None, tool_calls=[CALL])], "chosen": "c", "rejected": "r"},
        "pairs",
        (U("q"), A("", tool_calls=[CALL])),
        ("c", "r"),
    ),
    "an answer that is a call": (
        {"messages": [U("q"), A(None, tool_calls=[CALL])]},
        "completions",
        (U("q"),),
        ((A("", tool_calls=[CALL]),),),
    ),
    "sharegpt's call": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
            ]
        },
        "completions",
        (U("q"),),
        ((A("", tool_calls=[CALL]),),),
    ),
    "a marked turn": (
        {"messages": [U("a"), A("bad", weight=0), U("b"), A("good", train=True)]},
        "completions",
        (U("a"),),
        ((A("bad", loss=False), U("b"), A("good")),),
    ),
    "a tool's answer first": (
        {
            "prompt": [U("q"), A("call f")],
            "chosen": [{"role": "tool", "content": "3"}, A("three")],
            "rejected": "r",
        },
        "pairs",
        (U("q"), A("call f")),
        (({"role": "tool", "content": "3"}, A("three")), "r"),
    ),
    "a transcript without the leading lines": (
        {"chosen": "Human: q\n\nAssistant: Rome is it", "rejected": "Human: q\n\nAssistant: Rome"},
        "pairs",
        (U("q"),),
        ("Rome is it", "Rome"),
    ),
}

HUMAN = "\n\nHuman: q\n\nAssistant:"
TEXT_CALL = {**CALL, "function": {"name": "search", "arguments": '{"q": "x"}'}}
READ |= {
    "calls in a text": (
        {"messages": [U("q"), A("", tool_calls=json.dumps([CALL]))]},
        "completions",
        (U("q"),),
        ((A("", tool_calls=[CALL]),),),
    ),
    "openai's old call": (
        {"messages": [U("q"), A(None, function_call=TEXT_CALL["function"])]},
        "completions",
        (U("q"),),
        ((A("", tool_calls=[TEXT_CALL]),),),
    ),
    "several calls of sharegpt": (
        {"messages": [U("q"), {"role": "tool_call", "content": [CALL["function"]] * 2}]},
        "completions",
        (U("q"),),
        ((A("", tool_calls=[CALL] * 2),),),
    ),
    "marks of other names": (
        {"messages": [U("a"), A("x", training=False), U("b"), A("y", loss_mask=0), U("c"), A("z")]},
        "completions",
        (U("a"),),
        ((A("x", loss=False), U("b"), A("y", loss=False), U("c"), A("z")),),
    ),
    "history in a text": (
        {"instruction": "b", "output": "c", "history": '[["a", "x"]]'},
        "completions",
        (U("a"), A("x"), U("b")),
        ("c",),
    ),
    "history of a prompt": (
        {"prompt": "b", "completion": "c", "history": [["a", "x"]]},
        "completions",
        (U("a"), A("x"), U("b")),
        ("c",),
    ),
    "history of messages": (
        {"prompt": "b", "completion": "c", "history": [U("a"), A("x")]},
        "completions",
        (U("a"), A("x"), U("b")),
        ("c",),
    ),
    "a question's context": (
        {"question": "q", "context": "k", "answer": "a"},
        "completions",
        (U("q\n\nk"),),
        ("a",),
    ),
    "dolly": (
        {"instruction": "q", "input": "", "context": "k", "response": "a"},
        "completions",
        (U("q\n\nk"),),
        ("a",),
    ),
    "messages in texts": (
        {"prompt": json.dumps([S("s"), U("q")]), "chosen": json.dumps([A("c")]), "rejected": "r"},
        "pairs",
        (S("s"), U("q")),
        ("c", "r"),
    ),
    "JSON that is an answer": (
        {"prompt": "q", "completion": '[{"value": 1}]'},
        "completions",
        "q",
        ('[{"value": 1}]',),
    ),
    "the system beside transcripts": (
        {"system": "s", "chosen": f"{HUMAN} c", "rejected": f"{HUMAN} r"},
        "pairs",
        (S("s"), U("q")),
        ("c", "r"),
    ),
    "the system beside a public set's fields": (
        {
            "system": "s",
            "prompt": "q",
            "response_0": "r",
            "response_1": "c",
            "better_response_id": 1,
        },
        "pairs",
        (S("s"), U("q")),
        ("c", "r"),
    ),
    "the system said twice": (
        {"messages": [S("s"), S("s"), U("q"), A("a")]},
        "completions",
        (S("s"), U("q")),
        ("a",),
    ),
    "transcripts that repeat the prompt": (
        {"prompt": HUMAN, "chosen": f"{HUMAN} c", "rejected": " r"},
        "pairs",
        HUMAN,
        (" c", " r"),
    ),
    "a transcript beside messages": (
        {"prompt": [U("q")], "chosen": f"{HUMAN} c", "rejected": "r"},
        "pairs",
        (U("q"),),
        ("c", "r"),
    ),
    "roles with spaces": (
        {"messages": [{"role": "User ", "content": "q"}, {"role": "AI", "content": "a"}]},
        "completions",
        (U("q"),),
        ("a",),
    ),
}

READ |= {
    "the system beside conversations that begin with it": (
        {"system": "s", "chosen": [S("s"), U("q"), A("c")], "rejected": [S("s"), U("q"), A("r")]},
        "pairs",
        (S("s"), U("q")),
        ("c", "r"),
    ),
    "the system beside a prompt that begins with it": (
        {"system": "s", "prompt": [S("s"), U("q")], "chosen": "c", "rejected": "r"},
        "pairs",
        (S("s"), U("q")),
        ("c", "r"),
    ),
    "history beside the system": (
        {"instruction": "b", "output": "c", "system": "s", "history": [["a", "x"]]},
        "completions",
        (S("s"), U("a"), A("x"), U("b")),
        ("c",),
    ),
    "an answer of text parts": (
        {"messages": [U("q"), A([{"type": "text", "text": "a"}, {"type": "text", "text": "!"}])]},
        "completions",
        (U("q"),),
        ("a!",),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_row_is_read_whole(tmp_path, name):
    row, kind, prompt, responses = READ[name]
    found = load(tmp_path, [row], kind).items[0]
    assert (found.prompt, found.responses) == (prompt, responses)


P = {"prompt": "q", "chosen": "c", "rejected": "r"}
SIDES = ("score_chosen", "score_rejected")
REFUSED = {
    "two names of a role": (
        {"messages": [{"role": "user", "from": "gpt", "content": "q"}, A("a")]},
        "completions",
        "role and from differ",
    ),
    "two names of a content": (
        {"messages": [{"role": "user", "content": "q", "value": "p"}, A("a")]},
        "completions",
        "content and value differ",
    ),
    "two names of the system": (
        {**P, "system": "s", "system_prompt": "t"},
        "pairs",
        "system and system_prompt differ",
    ),
    "tools of a number": ({**P, "tools": 3}, "pairs", "tools: expected a list, got a number"),
    "documents in a text": ({**P, "documents": '{"text": "d"}'}, "pairs", "expected a list"),
    "one answer without its score": (
        {
            "instruction": "q",
            "completions": [{"response": "a", "overall_score": 1}, {"response": "b"}],
        },
        "ranked",
        "expected an overall_score in each",
    ),
    "a dict": ({"question": "q", "chosen": {"answer": "c"}, "rejected": "r"}, "pairs", "a dict"),
    "a list": ({"question": "q", "chosen": ["c"], "rejected": "r"}, "pairs", "got a list"),
    "a truth": ({"instruction": "q", "chosen": True, "rejected": False}, "pairs", "true or false"),
    "a question of messages": (
        {"question": [U("q")], "chosen": "c", "rejected": "r"},
        "pairs",
        "question: expected a text",
    ),
    "texts": ({"text": ["a", "b"]}, "completions", "text: expected a text"),
    "a system list": (
        {"system": ["a"], "question": "q", "chosen": "c", "rejected": "r"},
        "pairs",
        "system: expected a text",
    ),
    "bad JSON": ({"messages": "[{'role': 'user'}]"}, "completions", "begins like JSON"),
    "two systems": (
        {"system": "s", "messages": [S("t"), U("q"), A("a")]},
        "completions",
        "two different system messages",
    ),
    "another prompt": (
        {"prompt": [U("u2")], "chosen": [U("u1"), A("c")], "rejected": "r"},
        "pairs",
        "first turns are not the prompt's: expected user: 'u2'",
    ),
    "a user's answer": (
        {"prompt": [U("q")], "chosen": [U("q"), U("x")], "rejected": "r"},
        "pairs",
        "no turn of the assistant",
    ),
    "a picture": ({"messages": [U([{"type": "image"}]), A("a")]}, "completions", "'image'"),
    "pictures": ({"instruction": "q", "output": "a", "images": ["x.png"]}, "completions", "images"),
    "a surrogate": ({**P, "chosen": "c \ud83d"}, "pairs", "lone surrogate"),
    "a negative weight": ({**P, "weight": -1}, "pairs", "weight: expected a finite number from 0"),
    "a weight beside which others are nothing": ({**P, "weight": 1e30}, "pairs", "to 1e+06"),
    "a margin beyond all others": (
        {**P, "margin": -1e30},
        "pairs",
        "margin: expected a finite number from -1e+06 to",
    ),
    "no number": (
        {**P, "margin": "much"},
        "pairs",
        "margin: expected a finite number from -1e+06 to 1e+06: got a text",
    ),
    "half a turn": ({"messages": [U("q"), A("a", weight=0.5)]}, "completions", "neither 0 nor 1"),
    "an endless score": (
        {**P, "score_chosen": float("inf"), "score_rejected": 1},
        "pairs",
        "score_chosen: expected a finite number: got inf",
    ),
    "a score beyond float32": (
        {**P, "score_chosen": 1e39, "score_rejected": 1},
        "pairs",
        "score_chosen: expected a finite number: got 1e+39",
    ),
    "a margin of 400 digits": ({**P, "margin": 10**400}, "pairs", "margin: expected a finite"),
    "a reward that is no number": (
        {"type": "scalar_feedback", "prompt": "q", "output": "a", "reward": float("nan")},
        "pairs",
        "reward: expected a finite number",
    ),
    "a strength that is no number": (
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": float("nan")},
        "pairs",
        "preference_strength: expected a finite number",
    ),
    "a better one of three": (
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2},
        "pairs",
        "better_response_id: expected 0 or 1",
    ),
}

ALPACA = {"instruction": "q", "output": "a"}
REFUSED |= {
    f"{field} of {value!r}": ({**ALPACA, field: value}, "completions", f"{field}: expected")
    for field in ("input", "context", "system", "system_prompt")
    for value in (0, False, [], {"a": 1})
}
REFUSED |= {
    f"history of {value!r}": (
        {**ALPACA, "history": value},
        "completions",
        "history: expected pairs",
    )
    for value in (5, True, {"a": "b"}, [["a"]])
}
REFUSED["a mark on a part of a turn"] = (
    {"messages": [U("q"), A([{"type": "text", "text": "a", "weight": 0}])]},
    "completions",
    "a part's weight is no known mark; known: weight",
)
REFUSED |= {
    f"a turn's {key}": ({"messages": [U("q", **{key: "x"}), A("a")]}, "completions", said)
    for key, said in (
        ("mask", "mask is no known mark"),
        ("is_trainable", "is_trainable is no known mark"),
        ("Weight", "Weight is no known mark"),
        ("images", "messages's images: text alone cannot keep it"),
        ("Video_Path", "Video_Path: text alone"),
    )
}
SHAREGPT = [G("human", "q"), G("function_call", "{}"), G("gpt", "a")]
REFUSED |= {
    "an instruction of messages": ({**ALPACA, "instruction": [U("q")]}, "completions", "ion: exp"),
    "a call without a name": ({"conversations": SHAREGPT}, "completions", "no JSON with name and"),
    "half a character in a turn": (
        {"messages": [U("q"), A("a \ud83d")]},
        "completions",
        "response: a text with half a character",
    ),
    "half a character in a prompt": (
        {"prompt": "\ud83d", "answer": "4"},
        "prompts",
        "prompt: a te",
    ),
    "an answer to another prompt": (
        {"prompt": [U("q")], "chosen": [U("q"), A("c")], "rejected": [U("p")]},
        "pairs",
        "rejected: its first turns are not the prompt's",
    ),
    "a prompt that is the last of several turns": (
        {"prompt": [U("b")], "chosen": [U("a"), A("x"), U("b"), A("c")], "rejected": "r"},
        "pairs",
        "got user: 'a' / assistant: 'x' / user: 'b' / assistant: 'c'",
    ),
}
for _key, _value, _remedy in (
    ("weights", [0, 1], '{"note": "weights"}'),
    ("loss_mask", [0, 1], '{"note": "loss_mask"}'),
    ("loss_weight", 0.5, '{"weight": "loss_weight"}'),
    ("is_trainable", False, '{"train": "is_trainable"}'),
    ("Mask", "x", '{"note": "Mask"}'),
):
    REFUSED[f"the row's {_key}"] = ({**P, _key: _value}, "pairs", _remedy)
REFUSED |= {
    "a picture in a text part": (
        {"messages": [U([{"type": "text", "text": "q", "image_url": "x"}]), A("a")]},
        "completions",
        "content: image_url: text alone",
    ),
    "audio": ({**P, "audio": {"path": "x"}}, "pairs", "audio: text alone"),
    "thinking of a list": ({"messages": [U("q"), A("a", thinking=["t"])]}, "completions", "a text"),
    "a role of null": ({"messages": [{"role": None, "content": "q"}]}, "completions", "got null"),
    "an answer without words": ({"messages": [U("q"), A("", id=3)]}, "completions", "empty resp"),
    "functions": ({**P, "functions": [{"name": "f"}]}, "pairs", '"tools": "functions"'),
    "a thinking that is neither": ({**P, "enable_thinking": "maybe"}, "pairs", "expected true"),
    "two words on thinking": (
        {**P, "enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
        "pairs",
        "enable_thinking and chat_template_kwargs differ",
    ),
    "no instruction": ({"instruction": " ", "output": "a"}, "completions", "empty prompt"),
    "no question": ({"question": "", "chosen": "c", "rejected": "r"}, "pairs", "empty prompt"),
    "Python's lists": ({**P, "prompt": str([U("q")])}, "pairs", "begins like JSON, but is none"),
    "a transcript of another prompt": (
        {**P, "chosen": HUMAN + " c", "prompt": "p"},
        "pairs",
        "first",
    ),
    "ranks and scores": (
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2], "scores": [1, 2]},
        "ranked",
        "ranks and scores: give one",
    ),
    "scores of a number": ({**P, "all_rm_scores": 5}, "pairs", "all_rm_scores: expected a list"),
    "half a character in tools": (
        {**P, "tools": [{"type": "function", "function": {"name": "\ud83d"}}]},
        "pairs",
        "tools: a text with half a character",
    ),
    "a message of a tree": (
        {"message_id": "a", "parent_id": None, "role": "prompter", "text": "q"},
        "completions",
        "--config.data.format=oasst",
    ),
    "the system of a plain text": (
        {"system": "s", "text": "a"},
        "completions",
        "system: the prompt",
    ),
}


# rows of which the message names the columns, kind, prompt, responses; read so, they are whole
SAID_ALIKE = {"chosen": "The capital here is Paris.", "rejected": "The capital here is Rome."}
ANSWERS = tuple(SAID_ALIKE.values())
HINTED = {
    "a prompt beside answers that begin alike": (
        {"system": "", "input": "Where?", **SAID_ALIKE},
        "pairs",
        "Where?",
        ANSWERS,
    ),
    "turns beside answers": (
        {"trajectory": [G("user", "q")], "chosen": [A("c")], "rejected": [A("r")]},
        "pairs",
        (U("q"),),
        ("c", "r"),
    ),
    "turns beside a better answer and a worse": (
        {"messages": [U("q")], "chosen_response": A("c"), "rejected_response": A("r")},
        "pairs",
        (U("q"),),
        ("c", "r"),
    ),
    "an answer beside turns": (
        {"messages": [U("a"), A("x"), U("b")], "answer": "c"},
        "completions",
        (U("a"), A("x"), U("b")),
        ("c",),
    ),
    "a response beside turns": (
        {"conversations": [G("human", "q")], "response": "c", "label": True},
        "unpaired",
        (U("q"),),
        ("c",),
    ),
    "turns that only ask": ({"messages": [U("q")], "truth": "4"}, "prompts", (U("q"),), ()),
    "one score of two": ({**P, "chosen_score": 9}, "pairs", "q", ("c", "r")),
    "aya": ({"inputs": "q", "targets": "a", "user_id": "u"}, "completions", "q", ("a",)),
    "metamath": ({"query": "q", "type": "t", "response": "a"}, "completions", "q", ("a",)),
    "lmsys": ({"conversation": [U("q"), A("a")], "model": "m"}, "completions", (U("q"),), ("a",)),
    "numina": ({"problem": "q", "solution": "s", "answer": "4"}, "prompts", "q", ()),
    "output": ({"prompt": "q", "output": "a"}, "completions", "q", ("a",)),
    "a text": ({"text": "q"}, "prompts", "q", ()),
}


@pytest.mark.parametrize("name", HINTED)
def test_the_columns_that_a_message_names_make_the_row_whole(tmp_path, name):
    row, kind, prompt, responses = HINTED[name]
    with pytest.raises(ValueError, match=r"data\.jsonl:1: .*--config\.data\.columns='") as error:
        load(tmp_path, [row], kind)
    columns = json.loads(re.search(r"columns='(.*?)'", str(error.value))[1])
    found = load(tmp_path, [row], kind, columns=columns).items[0]
    assert (found.prompt, found.responses) == (prompt, responses)


TURNS = {"messages": [U("a"), A("b"), U("c"), A("d")]}
RANKED = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [3, 2, 0]}
LABELED = {"prompt": "q", "completion": "a", "label": True}
# a row, kind, options that make something of it, a row of which they make nothing, why
EFFECTS = [
    ({**P}, "pairs", {"strings": "messages"}, {**P, "prompt": [U("q")]}, "no prompt is a mere"),
    (TURNS, "completions", {"turns": "each"}, {"messages": [U("a"), A("b")]}, "several answers"),
    (TURNS, "completions", {"turns": "last"}, {"messages": [U("a"), A("b")]}, "several answers"),
    (
        {"messages": [{"role": "Bo", "content": "q"}, A("a")]},
        "completions",
        {"roles": {"bo": "user"}},
        {"messages": [U("q"), A("a")]},
        "no turn has the role bo",
    ),
    (RANKED, "pairs", {"pairing": "all"}, P, "made of several answers; the data are pairs"),
    (RANKED, "pairs", {"min_difference": 1.5}, P, "no pair has the scores"),
    ({**P, "score_chosen": 2, "score_rejected": 0}, "pairs", {"min_difference": 1.0}, P, "scores"),
    (RANKED, "unpaired", {"threshold": "1"}, LABELED, "made of scores; the data are unpaired"),
]


@pytest.mark.parametrize("row, kind, options, other, why", EFFECTS)
def test_an_option_that_makes_nothing_of_the_data_is_refused(
    tmp_path, row, kind, options, other, why
):
    ((name, value),) = options.items()
    assert load(tmp_path, [row], kind, strict=True, **options).items
    with pytest.raises(ValueError, match=rf"config\.data\.{name} = .* has no effect: .*{why}"):
        load(tmp_path, [other], kind, strict=True, **options)
    assert load(tmp_path, [other], kind, **options).items  # given for other examples


def test_pairs_whose_scores_are_near_are_left_out(tmp_path):
    rows = [{**P, "score_chosen": 2, "score_rejected": worse} for worse in (0, 1.5)]
    found = load(tmp_path, rows, min_difference=0.5)
    assert len(found) == 1 and found.report["dropped: min_difference"] == 1


_FEEDBACK = {"type": "pairwise_feedback", "output_A": "c", "output_B": "r", "label": 1}
_PAIRS = {  # a row of pairs, the columns of its two scores
    "prompt": (P, "score_chosen", "score_rejected"),
    "another name": (P, "chosen_score", "rejected_score"),
    "rating": (P, "chosen_rating", "rejected_rating"),
    "rating before": (P, "rating_chosen", "rating_rejected"),
    "reward": (P, "chosen_reward", "rejected_reward"),
    "hyphens": (P, "chosen-rating", "rejected-rating"),
    "implicit": ({"chosen": [U("q"), A("c")], "rejected": [U("q"), A("r")]}, *SIDES),
    "sharegpt": ({"conversations": [U("q")], "chosen": "c", "rejected": "r"}, *SIDES),
    "instruction": ({"instruction": "q", "chosen": "c", "rejected": "r"}, *SIDES),
    "two outputs": ({"instruction": "q", "output": ["c", "r"]}, *SIDES),
    "question": ({"question": "q", "chosen": "c", "rejected": "r"}, *SIDES),
    "feedback": ({**_FEEDBACK, "prompt": "q"}, "reward_A", "reward_B"),
}
REFUSED |= {
    f"one score of two: {name}, {one}": (
        {**row, one: 0.5, other: None},
        "pairs",
        f"{one}: no {other}",
    )
    for name, (row, *both) in _PAIRS.items()
    for one, other in (both, both[::-1])
}
_RANKED = {"prompt": "q", "responses": ["a", "b"]}
_SHP = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 3}
REFUSED |= {
    "one rank of two": ({**_RANKED, "ranks": [1, None]}, "ranked", "ranks: expected a finite"),
    "one score of a ranking": ({**_RANKED, "scores": [None, 1]}, "ranked", "scores: expected a"),
    "fewer scores": ({**_RANKED, "scores": [1]}, "ranked", "another number of responses"),
    "one vote of two": (_SHP, "pairs", "score_B: expected a finite number"),
    "history in a text": ({**P, "history": "what was said"}, "pairs", '"note": "history"'),
    "a mark's plural": ({**P, "token_masks": [0, 1]}, "pairs", '"note": "token_masks"'),
    "a skipped row": (
        {**P, "skip": True},
        "pairs",
        """loss_scale; --config.data.columns='{"note": "skip"}'""",
    ),
    "a prompt beside messages": (
        {"messages": [U("q"), A("a")], "prompt": "p"},
        "completions",
        "prompt: seems",
    ),
    "a response beside messages": (
        {"messages": [U("q"), A("a")], "response": "b"},
        "completions",
        "response: se",
    ),
    "a context": ({**P, "context": "k"}, "pairs", "context: seems to be a part of the prompt, and"),
    "contexts": ({**P, "contexts": ["q", "k"]}, "pairs", '"note": "contexts"'),
    "an input": ({"prompt": "q", "completion": "a", "input": "k"}, "completions", "input: seems"),
    "a context of a prompt": ({"prompt": "q", "context": "k"}, "prompts", "context: seems"),
    "another system turn": ({**P, "system_message": "s"}, "pairs", '"system": "system_message"'),
    "a reasoning": ({**ALPACA, "deepseek_reasoning": "t"}, "completions", "a part of the answer"),
    "an answer that shows nothing": ({**P, "chosen": "\u200b \ufeff"}, "pairs", "empty response"),
}


@pytest.mark.parametrize("name", _PAIRS)
def test_a_pairs_two_scores_are_read(tmp_path, name):
    row, chosen, rejected = _PAIRS[name]
    assert load(tmp_path, [{**row, chosen: "7", rejected: 2}]).items[0].scores == (7, 2)
    assert load(tmp_path, [{**row, chosen: None, rejected: None}]).items[0].scores is None


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_row_is_named_and_can_be_dropped(tmp_path, name):
    row, kind, said = REFUSED[name]
    good = P if kind == "pairs" else {"messages": [U("q"), A("a")]}
    rows = [{**{key: None for key in good if key in row}, **row}]
    good = {key: good[key] for key in good} if set(good) <= set(row) else None
    with pytest.raises(ValueError, match=r"data\.jsonl:1: ") as error:
        load(tmp_path, rows, kind)
    assert said in str(error.value) and "--config.data.invalid=drop" in str(error.value)
    if good:
        found = load(tmp_path, [*rows, good], kind, invalid="drop")
        assert len(found) == 1 and any(key.startswith("dropped: ") for key in found.report)


def test_drops_are_counted_by_reason_without_the_rows_words(tmp_path):
    bad = [{**P, "prompt": [{"role": "alien", "content": f"secret {i}"}]} for i in range(3)]
    report = load(tmp_path, [P, *bad], invalid="drop").report
    assert report == {"examples": 1, "dropped: prompt: a role is unknown": 3}
    for field, said in (("weight", "from 0 to 1e+06"), ("margin", "from -1e+06 to 1e+06")):
        bad = [{**P, field: value} for value in ("x", float("nan"), float("-inf"))]
        report = load(tmp_path, [P, *bad], invalid="drop").report
        reason = f"dropped: {field}: expected a finite number {said}"
        assert report == {"examples": 1, reason: 3}


def test_a_role_is_what_the_option_says(tmp_path):
    row = {"messages": [{"role": "human_expert", "content": "q"}, A("a")]}
    with pytest.raises(ValueError, match='--config.data.roles=\'{"human_expert": '):
        load(tmp_path, [row], "completions")
    found = load(tmp_path, [row], "completions", roles={"human_expert": "user"})
    assert found.items[0].prompt == (U("q"),)
    with pytest.raises(ValueError, match=r"config.data.roles\['x'\] = 'usr' is unknown"):
        load(tmp_path, [row], "completions", roles={"x": "usr"})


@pytest.mark.parametrize(
    "pairing, pairs", [("all", ["ac", "bc"]), ("best_worst", ["ac"]), ("adjacent", ["bc"])]
)
def test_equal_ranks_are_no_pair(tmp_path, pairing, pairs):
    row = {"prompt": "q", "responses": ["c", "a", "b"], "ranks": [2, 1, 1]}
    found = load(tmp_path, [row], pairing=pairing)
    assert ["".join(one.responses) for one in found.items] == pairs
    assert found.report["rankings with ties"] == 1
    assert load(tmp_path, [row], "ranked").items[0].scores == (-1, -1, -2)
    with pytest.raises(ValueError, match="no pairs are left of 1 ranked"):
        load(tmp_path, [{**row, "ranks": [1, 1, 1]}])


@pytest.mark.parametrize("policy", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [16, 24, 32, 80])
def test_a_short_row_keeps_the_header_and_says_what_was_cut(policy, max_length):
    made = tokenizer.load_tokenizer("byte", chat_template=PLAIN)
    example = Example((U("x" * 60), A("y" * 60), U("abc" * 20)), ("yes", "no"), source="f:1")
    encoded = encoding.encode_all([example], made, DataOptions())
    left = truncation.truncate_all(encoded, truncation.Limits(max_length, policy))
    prompt = made.decode(left.group(0).group(encoded.group(0)).prompt)
    assert prompt.endswith("<|assistant|>") and left.report["truncated prompts"] == 1
    assert ("truncated last turns" in left.report) == (policy == "keep_start" or max_length < 80)


def test_answers_that_truncation_makes_equal_are_counted():
    made = tokenizer.load_tokenizer("byte")
    alike = Example("q", ("a" * 90 + "good", "a" * 90 + "bad"), source="f:1")
    whole = Example("q", ("good", "bad"), source="f:2")
    encoded = encoding.encode_all([alike, whole], made, DataOptions())
    report = truncation.truncate_all(encoded, truncation.Limits(64)).report
    assert report["answers made equal by truncation"] == 1


@pytest.mark.parametrize("off", [{"train": False}, {"loss": 0}, {"trainable": "false"}])
@pytest.mark.parametrize("kind", ["pairs", "completions", "unpaired"])
def test_a_mark_of_a_whole_row_leaves_it_out_as_a_weight_of_0_does(tmp_path, kind, off):
    row = {"pairs": P, "completions": {"messages": [U("q"), A("a")]}, "unpaired": LABELED}[kind]
    rows = [{**row, **off}, {**row, **off, "weight": 2}, {**row, "train": True, "weight": 2}, row]
    found = load(tmp_path, rows, kind)
    assert [one.weight for one in found.items] == [0, 0, 2, 1]
    assert found.report == {"examples": 4, "examples of weight 0": 2}


def test_weights_and_scores_that_are_hardly_meant_are_counted(tmp_path):
    scores = {"score_chosen": 1, "score_rejected": 2}
    report = load(tmp_path, [{**P, **scores}, P, {**P, "weight": 2000}]).report
    assert report == {
        "examples": 3,
        "pairs whose rejected answer has the higher score": 1,
        "examples of over 1,000 times the median weight": 1,
    }


def test_equal_answers_are_counted_and_weights_of_0_alone_refused(tmp_path):
    assert load(tmp_path, [{**P, "rejected": "c"}]).report["identical answers"] == 1
    report = load(tmp_path, [{**P, "rejected": "None"}, {**P, "prompt": [U(" nan")]}, P]).report
    assert report["texts that are nan, None or the like alone"] == 2
    with pytest.raises(ValueError, match="all 1 examples have the weight 0"):
        load(tmp_path, [{**P, "weight": 0}])


@pytest.mark.parametrize(
    "row, field, kind",
    [
        (P, "chosen", "pairs"),
        ({"text": "a"}, "text", "completions"),
        ({"prompt": "q", "completion": "a", "label": True}, "label", "unpaired"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_null_is_a_bad_row_wherever_it_stands(tmp_path, row, field, kind, place):
    rows = [row, row]
    rows[place] = {**row, field: None}
    with pytest.raises(ValueError, match=rf"jsonl:{place + 1}: {field}: null; --config"):
        load(tmp_path, rows, kind)
    report = load(tmp_path, rows, kind, invalid="drop").report
    assert report == {"examples": 1, f"dropped: {field}: null": 1}


def test_tools_in_a_text_are_the_templates_tools(tmp_path):
    (found,) = load(tmp_path, [{**P, "prompt": [U("q")], "tools": json.dumps(TOOLS)}])
    assert found.template == {"tools": TOOLS}


def test_a_row_that_lacks_a_field_or_is_none_is_a_bad_row(tmp_path):
    bad = ({"prompt": "q", "rejected": "r"}, {}, None, ["q"])
    with pytest.raises(ValueError, match=r"jsonl:1: expected a JSON object.*got null; --config"):
        load(tmp_path, [None, P])
    found = load(tmp_path, [*bad, P], invalid="drop")
    assert len(found) == 1 and sum(value for key, value in found.report.items() if ":" in key) == 4


def test_a_field_that_is_null_in_many_first_rows_is_a_field(tmp_path):
    row = {"prompt": "q", "completion": "a", "label": True}
    rows = [*[{**row, "label": None}] * 70, row]
    assert len(load(tmp_path, rows, "unpaired", invalid="drop")) == 1


def test_thumbs_of_which_no_pairs_can_be_made_are_told_what_learns_of_them(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "a", "label": i % 2 == 0} for i in range(4)]
    with pytest.raises(ValueError, match="left of 4 unpaired; they are made of .*'name': 'kto'"):
        load(tmp_path, rows)


def test_what_stands_beside_the_text_is_said(tmp_path):
    row = {**P, "rationale": "t", "id": 3, "score_chosen": 1, "score_rejected": 0}
    report = load(tmp_path, [{**row, "context": " q  ", "scores": [1], "label": 1}]).report
    assert report["columns beside the text"] == "context id label rationale scores"


def test_turns_after_the_last_answer_are_counted(tmp_path):
    turns = [U("q"), A("a"), U("and now?")]
    found = load(tmp_path, [{"messages": turns}, {"messages": turns[:2]}], "completions")
    assert found.report["conversations with turns after the last answer, left out"] == 1


def test_a_number_written_as_a_text_is_a_score_and_nan_a_missing_one(tmp_path):
    row = {"prompt": "q", "completion": "a"}
    found = load(tmp_path, [{**row, "score": "0.5"}], "scored")
    assert found.items[0].scores == (0.5,)
    rows = [{**row, "score": 1}, {**row, "score": float("nan")}]
    with pytest.raises(ValueError, match=r"data\.jsonl:2: no score.*got score: nan; --config"):
        load(tmp_path, rows, "scored")
    report = load(tmp_path, rows, "scored", invalid="drop").report
    assert report == {"examples": 1, "dropped: no score": 1}


def test_a_field_that_no_row_fills_is_named(tmp_path):
    rows = [{"prompt": "q", "completion": "a", "label": None}] * 2
    with pytest.raises(ValueError, match="null in each of the rows: label; it lacks label"):
        load(tmp_path, rows, "unpaired")


def test_another_kind_is_told_with_the_columns_that_may_hold_it(tmp_path):
    row = {"prompt": "q", "chosen_response": "c", "rejected_response": "r"}
    with pytest.raises(
        ValueError, match=r"data.jsonl:1: .*'prompt'.*config.data.columns="
    ) as error:
        load(tmp_path, [row])
    columns = str(error.value).rpartition("=")[2].strip("'")
    assert len(load(tmp_path, [row], columns=json.loads(columns))) == 1
    row = {"prompt": "q", "response": "a", "helpfulness": 4}
    with pytest.raises(ValueError, match=r"jsonl:1: .*'helpfulness'.*format 'completion'.*'sft'"):
        load(tmp_path, [row])


LIST = json.dumps([P, P]).encode()


@pytest.mark.parametrize(
    "name, raw",
    [
        ("a.jsonl", LIST),
        ("a.jsonl", json.dumps([P, P], indent=1).encode()),
        ("a.json", b"\xef\xbb\xbf" + LIST),
        ("a.json", b"\xef\xbb\xbf" + json.dumps([P, P], indent=1).encode()),
        ("a.json", json.dumps({"data": [P, P], "version": 1}).encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + f"{json.dumps(P)}\n{json.dumps(P)}\n".encode()),
        ("a.jsonl", json.dumps({"data": [P, P]}).encode()),
        ("a.jsonl", json.dumps({"rows": [P, P]}, indent=1).encode()),
        ("a.csv", b",prompt, chosen,rejected\n0,q,c,r\n1,q,c,r\n"),
        ("a.csv", b"prompt, chosen, rejected\nq, c, r\nq, c, r\n"),
        ("a.json", json.dumps([P, P]).encode("utf-16")),
        ("a.json", f"{json.dumps(P)}\n{json.dumps(P)}\n".encode()),
    ],
)
def test_json_is_read_in_the_forms_it_has(tmp_path, name, raw):
    assert [one.responses for one in load(tmp_path, [], raw=raw, name=name).items] == [
        ("c", "r")
    ] * 2


@pytest.mark.parametrize(
    "raw, said",
    [
        (json.dumps({"prompt": ["a", "b"], "chosen": ["c", "d"]}).encode(), "looks like columns"),
        (json.dumps({**P, "prompt": "é"}, ensure_ascii=False).encode("latin-1"), "Latin-1"),
        (json.dumps(P).encode("utf-16-le"), "seems to be utf-16le: iconv"),
        (json.dumps(P).encode("utf-32"), "seems to be utf-32le"),
        (json.dumps({"a": P, "b": P}).encode(), r"rows under names: jq -c '\.\[\]'"),
        (json.dumps({key: {"0": key, "1": key} for key in P}).encode(), "one object of columns"),
        (f"{json.dumps(P, indent=1)}\n{json.dumps(P)}".encode(), "json:1: .*; jq -c . "),
        (json.dumps({"train": [P], "test": [P]}).encode(), "several lists of rows: test, train"),
        (b'{"data": []}', "no rows"),
    ],
)
def test_what_is_no_rows_is_said_to_look_like_what_it_is(tmp_path, raw, said):
    with pytest.raises(ValueError, match=said):
        load(tmp_path, [], raw=raw, name="a.json")


def test_each_answer_of_a_conversation_can_be_an_example(tmp_path):
    row = {"messages": [U("a"), A("b"), U("c"), A("no", loss=False), U("d"), A("e")]}
    found = load(tmp_path, [row], "completions", turns="each").items
    assert [one.responses for one in found] == [("b",), ("e",)]
    assert found[1].prompt == (U("a"), A("b"), U("c"), A("no", loss=False), U("d"))


def test_plain_texts_can_be_held_out(tmp_path):
    found = load(tmp_path, [{"text": str(i)} for i in range(40)], "completions")
    train, held_out = datasets.hold_out(found, 0.1, most=0, seed=0)
    assert len(held_out) == 4 and len(train) == 36


# ------------------------------------------------------------------------------------ templates

WHOLE = (
    "{% if tools %}<|system|>TOOLS {{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}"
    "<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for t in m.tool_calls or [] %}CALL {{ t.function.name }}"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OPENS_THINK = PLAIN.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
DROPS_THINK = PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
ALWAYS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN


def render(template, prompt, *responses, **given):
    made = tokenizer.load_tokenizer("byte", chat_template=template)
    example = Example(tuple(prompt), responses, source="f:1", template=given)
    return chat.render(example, made)


def test_tools_calls_and_reasoning_reach_the_template():
    found = render(WHOLE, [U("q")], (A("", tool_calls=[CALL]),), tools=TOOLS)
    assert "TOOLS" in found.prompt and "search" in found.prompt
    assert found.responses[0][0].text == "CALL search<|end|>"
    found = render(WHOLE, [U("q")], (A("4", reasoning_content="two"),))
    assert found.responses[0][0].text == "<think>two</think>4<|end|>"


@pytest.mark.parametrize(
    "response, given, name",
    [
        ("a", {"tools": TOOLS}, "tools"),
        ((A("a", tool_calls=[CALL]),), {}, "tool_calls"),
        ((A("a", reasoning_content="two"),), {}, "reasoning_content"),
    ],
)
def test_what_a_template_does_not_render_is_an_error(response, given, name):
    with pytest.raises(ValueError, match=f"does not render {name}"):
        render(PLAIN, [U("q")], response, **given)


PARALLEL = (A("", tool_calls=[CALL, {**CALL, "id": "2"}]),)
FIRST_CALL = WHOLE.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
ANSWERS_A_CALL = FIRST_CALL.replace(  # as harmony's template does
    "<|{{ m.role }}|>",
    "{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('nothing was called') }}{% endif %}<|{{ m.role }}|>",
)


def test_each_of_several_calls_is_rendered_or_the_template_refused():
    assert "CALL search" in render(WHOLE, [U("q")], PARALLEL).responses[0][0].text
    with pytest.raises(ValueError, match="does not render one of several tool_calls"):
        render(FIRST_CALL, [U("q")], PARALLEL)


def test_a_template_that_refuses_a_tools_answer_without_its_call_reads_the_call():
    turns = [U("q"), A("", tool_calls=[CALL]), {"role": "tool", "content": "3"}]
    (spans,) = render(ANSWERS_A_CALL, turns, "three").responses
    assert [span.text for span in spans] == ["three<|end|>"]


def test_the_white_space_around_reasoning_is_the_templates_to_set():
    sets = PLAIN.replace("{{ m.content }}", "{{ m.content | replace('<think>', '<think>\\n') }}")
    assert sets != PLAIN
    found = render(sets, [U("q")], "<think>add</think>4")
    assert found.responses[0][0].text == "<think>\nadd</think>4<|end|>"
    assert found.notes == ("answers whose white space around reasoning the chat template sets",)


def test_an_answer_that_goes_on_with_the_prompts_own_is_refused():
    with pytest.raises(ValueError, match="the prompt ends with the assistant"):
        render(PLAIN, [U("q"), A("It is")], " Rome")
    assert render(PLAIN, [U("q"), A("call f")], ({"role": "tool", "content": "3"}, A("three")))


def test_a_marked_turn_bears_no_loss():
    found = render(PLAIN, [U("a")], (A("bad", loss=False), U("b"), A("good")))
    assert [span.loss for span in found.responses[0] if "bad" in span.text] == [False]
    assert [span.text for span in found.responses[0] if span.loss] == ["good<|end|>"]


def test_a_mark_that_asks_for_a_users_turn_is_told_to_be_in_vain(tmp_path):
    rows = [{"messages": [U("q", **{"train": on}), A("a")]} for on in (True, False)]
    found = [render(PLAIN, x.prompt, "a") for x in load(tmp_path, rows, "completions").items]
    assert [one.notes for one in found] == [
        ("turns marked to be learned that are no assistant's, and are not",),
        (),
    ]


@pytest.mark.parametrize(
    "answer", ["<answer>4</answer>", "<thinking>x</thinking>4", "<table>", "4"]
)
def test_the_prompt_ends_at_the_assistants_header_and_never_in_the_answer(answer):
    found = render(OPENS_THINK, [U("q")], answer)
    assert found.prompt == "<|user|>q<|end|><|assistant|>"
    assert "".join(span.text for span in found.responses[0] if span.loss) == f"{answer}<|end|>"


def test_the_words_of_the_header_with_which_an_answer_begins_are_the_answers():
    answers = "<think>\nadd</think>4", "<think>\nguess</think>5"
    found = render(OPENS_THINK, [U("q")], *answers)
    assert found.prompt == "<|user|>q<|end|><|assistant|>"
    assert [spans[0].text for spans in found.responses] == [f"{one}<|end|>" for one in answers]
    found = render(OPENS_THINK, [U("q")], (A(answers[0]), U("p"), A(answers[1])))
    learned = [span.text for span in found.responses[0] if span.loss]
    assert learned == [f"{one}<|end|>" for one in answers]


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_template_that_leaves_out_the_words_of_a_turn_is_refused(role):
    drops = PLAIN.replace(
        "{{ m.content }}", "{% if m.role != '" + role + "' %}{{ m.content }}{% endif %}"
    )
    turns = [S("sys"), U("ask"), A("call"), {"role": "tool", "content": "(3)"}]
    for responses in (("so three",), ()):
        with pytest.raises(ValueError, match=f"leaves out a turn's words: role {role}"):
            render(drops, turns, *responses)
    found = render(PLAIN.replace("m.content", "m.content | tojson"), [U('an "e"')], "a")
    assert found.notes == ("turns that the chat template rewrites: user's",)


def test_what_a_template_makes_otherwise_of_the_turns_before_is_counted():
    made = tokenizer.load_tokenizer("byte", chat_template=DROPS_THINK)
    turns = (U("q"), A("<think>t</think>4", reasoning="w"), U("p", id=3))
    examples = [Example(turns, ("5",), source="f:1"), Example((U("q"),), ("4",), source="f:2")]
    encoded = encoding.encode_all(examples, made, DataOptions())
    report = truncation.truncate_all(encoded, truncation.Limits(64)).report
    assert report == {
        "answers in the history that the chat template rewrites": 1,
        "reasoning in the history that the chat template leaves out": 1,
        "keys that the chat template does not read: id": 1,
    }


@pytest.mark.parametrize("written", [CALL, TEXT_CALL])
@pytest.mark.parametrize(
    "arguments", ["| tojson", "", ".items() | list", "if t.function.arguments is string else 1 / 0"]
)
def test_a_calls_arguments_have_the_form_that_the_template_reads(written, arguments):
    template = WHOLE.replace("t.function.name }}", f"t.function.arguments {arguments} }}}}")
    found = render(template, [U("q")], (A("", tool_calls=[written]),)).responses[0][0].text
    expected = '{"q": "x"}' if "items" not in arguments else "[('q', 'x')]"
    assert found == f"CALL {expected}<|end|>"


def test_a_keyword_that_no_template_reads_is_refused():
    with pytest.raises(ValueError, match="does not read enable_thinkin"):
        render("{% set t = enable_thinking %}" + PLAIN, [U("q")], "a", enable_thinkin=False)
    made = tokenizer.load_tokenizer("byte")
    with pytest.raises(ValueError, match="enable_thinking: the prompt is plain text"):
        chat.render(Example("q", ("a",), template={"enable_thinking": False}), made)


def test_a_header_that_closes_its_thinking_gives_way_to_an_answer_that_thinks():
    template = WHOLE.replace("<|assistant|>{% endif %}", "<|assistant|><think></think>{% endif %}")
    found = render(template, [U("q")], (A("4", reasoning_content="two"),))
    assert found.prompt == "<|user|>q<|end|><|assistant|><think>"
    assert found.responses[0][0].text == "two</think>4<|end|>"


def test_a_template_that_rewrites_the_answer_is_refused_with_the_lost_words():
    with pytest.raises(ValueError, match="rewrites the answer.*lost: '<think>add</think>4'"):
        render(DROPS_THINK, [U("q")], "<think>add</think>4")


def test_a_template_that_makes_the_last_answer_otherwise_takes_an_example_each(tmp_path):
    alone = PLAIN.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}",
    )
    row = {"messages": [U("a"), A(" b \n"), U("c"), A("d ")]}
    (whole,) = load(tmp_path, [row], "completions")
    with pytest.raises(ValueError, match="--config.data.turns=each"):
        render(alone, whole.prompt, *whole.responses)
    each = load(tmp_path, [row], "completions", turns="each").items
    learned = [render(alone, one.prompt, *one.responses).responses[0] for one in each]
    assert [[span.text for span in spans if span.loss] for spans in learned] == [
        ["<think></think> b \n<|end|>"],
        ["<think></think>d <|end|>"],
    ]


def test_a_template_that_always_writes_the_next_header_is_refused():
    with pytest.raises(ValueError, match="writes the next answer's header"):
        render(ALWAYS, [U("a")], "b")


def test_rows_that_the_template_refuses_can_be_dropped():
    made = tokenizer.load_tokenizer("byte", chat_template=NO_SYSTEM)
    examples = [
        Example((S("s"), U("a")), ("b",), source="f:1"),
        Example((U("a"),), ("b",), source="f:2"),
    ]
    with pytest.raises(ValueError, match="f:1: the chat template refuses"):
        chat.encode_many(examples, made)
    first, second = chat.encode_many(examples, made, drop=True)
    assert first.refused and not any(first.responses) and second.responses[0]


def test_what_stands_beside_a_message_tree_is_kept(tmp_path):
    replies = [{"role": "assistant", "text": text, "rank": rank} for rank, text in enumerate("ab")]
    tree = {"role": "prompter", "text": "q", "replies": replies}
    row = {"message_tree_id": "t", "prompt": tree, "system": "s", "weight": 2, "tools": TOOLS}
    (found,) = load(tmp_path, [row], "ranked")
    assert found.weight == 2 and found.template == {"tools": TOOLS}
    assert found.prompt[0] == {"role": "system", "content": "s"}


def test_a_key_with_two_values_is_refused(tmp_path):
    raw = b'{"prompt": "q", "chosen": "c", "rejected": "r", "chosen": "d"}'
    with pytest.raises(ValueError, match=r"data\.jsonl:1: .*'chosen' is given twice: 'c' and 'd'"):
        load(tmp_path, [], raw=raw)

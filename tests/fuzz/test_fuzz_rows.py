# SPDX-License-Identifier: Apache-2.0
"""Rows of every format and kind of data, right and damaged: what a row says is what is trained."""

import copy
import json
import math
import re

import hypothesis
import junk
import pytest
from hypothesis import strategies as st
from oracle import Wrong, fuzzed, judge, same

from align_jax.core.options import DataOptions
from align_jax.data import conversions, datasets, encoding, formats, tokenizer

TEMPLATE = (  # writes every key of a message, and what stands beside the messages
    "{% for d in documents or [] %}<|system|>{{ d | tojson }}<|end|>{% endfor %}"
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}"
    "<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif "
    "%}{{ m.content }}{% for t in m.tool_calls or [] %}{{ t | tojson }}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = tokenizer.load_tokenizer("byte", chat_template=TEMPLATE)
PLAIN = tokenizer.load_tokenizer("byte")
PLAIN.chat_template = None
END = "<|end|>"


class Words:
    """Texts of a row, each told from all others by a mark: who says it, and a number."""

    def __init__(self, draw):
        self.draw, self.count = draw, 0

    def __call__(self, who="u"):
        self.count += 1
        around = self.draw(
            st.sampled_from(("{}", "{}", " {}\n", "é{}\U0001f600", "a\n\n{} {{", "<b>{}"))
        )
        return around.format(f"{who}{self.count}{who}")

    def turn(self, who="u"):
        role, source = {"u": ("user", "human"), "a": ("assistant", "gpt"), "s": ("system",) * 2}[
            who
        ]
        if self.draw(st.booleans()):
            return {"role": role, "content": self(who)}
        return {"from": source, "value": self(who)}

    def prompt(self):
        """A text, or turns that end with the user."""
        shape = self.draw(st.sampled_from(("text", "u", "su", "uau", "suau")))
        return self("u") if shape == "text" else [self.turn(who) for who in shape]

    def answer(self, prompt="", who="a"):
        """A text, a turn, or turns that may repeat the prompt's."""
        shape = self.draw(st.sampled_from(("text", "text", "turn", "turns", "whole")))
        if shape == "whole" and not isinstance(prompt, str):
            return [*prompt, self.turn(who)]
        return self(who) if shape == "text" else [self.turn(who)]

    def conversation(self):
        """Turns that end with the assistant."""
        return [
            self.turn(who) for who in self.draw(st.sampled_from(("ua", "sua", "uaua", "suaua")))
        ]

    def label(self):
        return self.draw(st.sampled_from((True, False, 1, 0, -1, "true", "desirable", "rejected")))

    def number(self):
        return self.draw(st.sampled_from((0, 1, -2, 0.5, 3.25, 10)))

    def ranked(self, key, prompt):
        count = self.draw(st.integers(2, 4))
        return {
            "responses": [self.answer(prompt) for _ in range(count)],
            key: [self.number() for _ in range(count)],
        }


def pairs(w, name="prompt", text=False):
    prompt = w("u") if text else w.prompt()
    return {name: prompt, "chosen": w.answer(prompt), "rejected": w.answer(prompt)}


def implicit(w):
    shape = w.draw(st.sampled_from(("hh", "turns")))
    if shape == "hh":
        before = f"\n\nHuman: {w('u')}\n\nAssistant:"
        return {side: f"{before} {w('a')}" for side in ("chosen", "rejected")}
    before = [w.turn("u")]
    return {side: [*before, w.turn("a")] for side in ("chosen", "rejected")}


def tree(w):
    replies = [{"role": "assistant", "text": w("a"), "rank": i, "replies": []} for i in range(2)]
    node = {"role": "prompter", "text": w("u"), "replies": replies}
    return {"message_tree_id": "t", "prompt": node}


# a row of each format
ROWS = {
    "binary_feedback": lambda w: {
        "type": "binary_feedback", "prompt": w.prompt(), "output": w("a"), "label": w.label(),
    },
    "pairwise_feedback": lambda w: {
        "type": "pairwise_feedback", "prompt": w.prompt(), "output_A": w("a"), "output_B": w("a"),
        "label": w.label(), "reward_A": w.number(), "reward_B": w.number(),
    },
    "scalar_feedback": lambda w: {
        "type": "scalar_feedback", "prompt": w.prompt(), "output": w("a"), "reward": w.number(),
    },
    "sample": lambda w: {"type": "sample", "prompt": w.prompt(), "output": w("a")},
    "oasst_tree": tree,
    "shp": lambda w: {
        "history": w("u"), "human_ref_A": w("a"), "human_ref_B": w("a"), "labels": w.label(),
        "score_A": w.number(), "score_B": w.number(),
    },
    "safe_rlhf": lambda w: {
        "prompt": w("u"), "response_0": w("a"), "response_1": w("a"), "better_response_id": 1,
    },
    "stepwise": lambda w: {
        "prompt": w.prompt(), "completions": [w("a"), w("a")], "labels": [w.label(), w.label()],
    },
    "math_shepherd": lambda w: {
        "input": "q Step 1: a ки", "label": "q Step 1: a +", "task": w("u"),
    },
    "prm800k": lambda w: {
        "labeler": w("u"), "question": {"problem": w("u")},
        "label": {"steps": [{"completions": [{"text": w("a"), "rating": 1}],
                             "human_completion": None, "chosen_completion": 0}]},
    },
    "comparisons": lambda w: {
        "info": {"post": w("u"), "title": w("u"), "subreddit": "x"},
        "summaries": [{"text": w("a")}, {"text": w("a")}],
        "choice": w.draw(st.sampled_from((0, 1))),
    },
    "scored_completions": lambda w: {
        "instruction": w("u"),
        "completions": [{"response": w("a"), "overall_score": w.number()} for _ in range(3)],
    },
    "openai_pairs": lambda w: {
        "input": {"messages": [w.turn("s"), w.turn("u")], "tools": []},
        "preferred_output": [w.turn("a")], "non_preferred_output": [w.turn("a")],
    },
    "preference_strength": lambda w: {
        "context": (prompt := w.prompt()), "response1": w.answer(prompt),
        "response2": w.answer(prompt), "overall_preference": w.number(),
    },
    "ranked_answers": lambda w: {
        "prompt": f"\n\nHuman: {w('u')}\n\nAssistant: ", "num_responses": 2,
        "answers": [{"answer": w("a"), "rank": w.number()} for _ in range(2)],
    },
    "webgpt": lambda w: {
        "question": {"full_text": w("u")}, "answer_0": w("a"), "answer_1": w("a"),
        "score_0": w.number(), "score_1": w.number(),
    },
    "arena": lambda w: {
        "conversation_a": [(asked := w.turn("u")), w.turn("a")],
        "conversation_b": [asked, w.turn("a")],
        "winner": w.draw(st.sampled_from(("model_a", "model_b", "tie (bothbad)"))),
    },
    "ranked": lambda w: {"prompt": (prompt := w.prompt()), **w.ranked("ranks", prompt)},
    "question_ranked": lambda w: {"question": w("u"), **w.ranked("scores", "")},
    "pairs": pairs,
    "sharegpt_pairs": lambda w: {
        "conversations": [w.turn("u")], "chosen": w.turn("a"), "rejected": w.turn("a"),
    },
    "alpaca_pairs": lambda w: {**pairs(w, "instruction", text=True), "input": w("u")},
    "question_pairs": lambda w: {**pairs(w, "question", text=True), "system": w("s")},
    "implicit_pairs": implicit,
    "messages_label": lambda w: {"messages": w.conversation(), "label": w.label()},
    "sharegpt_label": lambda w: {"conversations": w.conversation(), "kto_tag": w.label()},
    "unpaired": lambda w: {
        "prompt": (prompt := w.prompt()), "completion": w.answer(prompt), "label": w.label(),
    },
    "question_label": lambda w: {"question": w("u"), "answer": w.answer(), "label": w.label()},
    "messages": lambda w: {"messages": w.conversation()},
    "sharegpt": lambda w: {"conversations": w.conversation()},
    "completion": lambda w: {"prompt": (prompt := w.prompt()), "completion": w.answer(prompt)},
    "alpaca_outputs": lambda w: {"instruction": w("u"), "output": [w("a"), w("a")]},
    "alpaca": lambda w: {"instruction": w("u"), "input": w("u"), "output": w("a")},
    "question": lambda w: {"question": w("u"), "response": w.answer()},
    "text": lambda w: {"text": w("a")},
    "prompt": lambda w: {"prompt": w.prompt()},
}  # fmt: skip
CALL = {"type": "function", "function": {"name": "f", "arguments": {"q": "x"}}}
# columns that any row may have
MORE = {
    "weight": junk.numbers,
    "margin": junk.numbers,
    "train": st.sampled_from((True, False, "false", "x", [0], None)),
    "system": st.just("s0s"),
    "system_prompt": st.just("s00s"),
    "score_chosen": junk.numbers,
    "score_rejected": junk.numbers,
    "history": st.sampled_from(([["u0u", "a0a"]], [["u0u"]], "u0u", [])),
    "context": st.just("u00u"),
    "tools": st.sampled_from(([CALL], json.dumps([CALL]), "[", 3, [], {"a": 1})),
    "documents": st.sampled_from(([{"text": "s000s"}], "s000s")),
    "chat_template_kwargs": st.sampled_from(({"a": 1}, {"messages": []}, [1], "{}", {"tools": 3})),
    "enable_thinking": st.sampled_from((True, False, "yes", None)),
    "images": st.sampled_from((["x.png"], [], None)),
    "id": junk.values,
}
TURN = {
    "tool_calls": st.sampled_from(([CALL], [], "x", [3])),
    "weight": st.sampled_from((0, 1, 0.5, True, "0", None)),
    "train": st.booleans(),
    "reasoning_content": st.just("a0a"),
    "name": junk.values,
    "tool_call_id": junk.texts,
    "loss": st.sampled_from((False, True, 0, [])),
}


@st.composite
def cases(draw, damaged):
    """(format, row, kind of data, options, has a chat template)."""
    name = draw(st.sampled_from(list(ROWS)))
    row = ROWS[name](Words(draw))
    kind = formats.FORMATS[name].kind
    kind = "pairs" if kind == "scored" else kind
    chat, options = True, {}
    if draw(st.booleans()):
        for key in draw(st.lists(st.sampled_from(list(MORE)), max_size=2, unique=True)):
            row.setdefault(key, copy.deepcopy(draw(MORE[key])))
    if damaged:
        turns = [path for path in junk.places(row) if path and path[-1] in ("content", "value")]
        if turns and draw(st.booleans()):
            turn = row
            for key in draw(st.sampled_from(turns))[:-1]:
                turn = turn[key]
            key = draw(st.sampled_from(list(TURN)))
            turn[key] = copy.deepcopy(draw(TURN[key]))
        row = draw(junk.mutated(row, least=0))
        kind = draw(st.sampled_from((kind, *conversions.KINDS)))
        chat = draw(st.sampled_from((True, True, False)))
        for option in ("strings", "turns", "pairing", "labels"):
            choices = DataOptions.__dataclass_fields__[option].metadata["choices"]
            options[option] = draw(st.sampled_from(choices))
        options["invalid"] = draw(st.sampled_from(("error", "error", "drop")))
    named = draw(st.sampled_from((name, "auto")))
    return name, row, kind, {"format": named, **options}, chat


def pass_border(path, row, kind, options, chat):
    """Read, convert and tokenize a file of that row."""
    path.write_text(json.dumps(row) + "\n")
    made = datasets.load([str(path)], kind, DataOptions(**options), chat=chat)
    model = CHAT if chat else PLAIN
    encoded = encoding.encode_all(made.items, model, DataOptions(**options))
    return made, encoded


def marks(value):
    """The marks in a value's texts."""
    text = value if isinstance(value, str) else json.dumps(value, default=dict)
    return {found.group() for found in re.finditer(r"([usa])\d+\1", text)}


def check(row, kind, options, chat, found):
    """Raise Wrong where what is trained is not what the row says."""
    name = options["format"] if options["format"] != "auto" else formats.detect([row])
    # a conversion, the last turn alone and dropped rows leave words out, as they should
    whole = formats.FORMATS[name].kind == kind and options.get("turns", "all") == "all"
    whole = whole and options.get("labels") != "balanced" and options.get("invalid") != "drop"
    made, encoded = found
    model = CHAT if chat else PLAIN
    for name in ("scores", "margin", "weight"):
        values = getattr(encoded, name)
        given = name != "scores" or any(one.scores is not None for one in made.items)
        if given and not all(math.isfinite(one) for one in values.flat):
            raise Wrong(f"{name} is not finite")
    for index, example in enumerate(made.items):
        if encoded.refused[index]:
            continue
        prompt = model.decode(encoded.prompt(index))
        check_numbers(row, example)
        lost = marks([shown(example.prompt), example.template]) - marks(prompt)
        if lost:
            raise Wrong(f"the prompt lost {sorted(lost)}")
        for number, response in enumerate(example.responses):
            ids, mask = encoded.response(index, number)
            learned = model.decode(ids[mask])
            if example.steps:  # scored at the ends of steps, whose words bear no loss
                labels = [label for _, label in example.steps if label is not None]
                if learned != "\n" * len(labels):
                    raise Wrong(f"{len(labels)} labels, scored at {learned!r}")
                learned = f"{response}{END}"
            check_response(response, learned, model.decode(ids), prompt)
    if whole:
        kept = [[e.prompt, e.responses, dict(e.extras), dict(e.template)] for e in made.items]
        if lost := marks(row) - marks(kept):
            raise Wrong(f"lost {sorted(lost)}")
    for reason in made.report:
        if marks(reason):
            raise Wrong(f"a count's name holds the row's words: {reason}")


def shown(prompt):
    """What of a prompt's turns TEMPLATE reads."""
    keys = ("content", "reasoning_content", "reasoning", "thinking", "tool_calls")
    return prompt if isinstance(prompt, str) else [[t.get(key) for key in keys] for t in prompt]


def check_response(response, learned, whole, prompt):
    """Raise Wrong where the loss covers anything but the assistant's words and the end."""
    turns = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
    spoken = [t for t in turns if t["role"] == "assistant" and t.get("loss", True)]
    expected = "".join(words(turn) + END for turn in spoken)
    if not prompt and learned:
        # nothing precedes the first token, which is a byte
        expected = expected.encode()[1:].decode(errors="replace")
    if learned.rstrip() not in (expected, expected.removesuffix(END)) and "".join(
        learned.split()
    ) != "".join(expected.split()):
        raise Wrong(f"learned {learned!r}, said {expected!r}")
    last = max((i for i, t in enumerate(turns) if t["role"] == "assistant"), default=-1)
    if lost := marks(list(turns[: last + 1])) - marks(whole):
        raise Wrong(f"a response lost {sorted(lost)}")


def words(turn):
    thought = "".join(
        f"<think>{turn[key]}</think>"
        for key in ("reasoning_content", "reasoning", "thinking")
        if turn.get(key)
    )
    calls = "".join(json.dumps(call, ensure_ascii=False) for call in turn.get("tool_calls") or ())
    return f"{thought}{turn['content']}{calls}"


def check_numbers(row, example):
    if str(row.get("train")).strip().lower() in ("false", "0", "0.0"):
        same(example.weight, 0.0, "weight of a row that is not to be learned")
        row = {**row, "weight": 0.0}
    for name, default in (("weight", 1.0), ("margin", 0.0)):
        value = row.get(name)
        if value is None:
            same(getattr(example, name), default, name)
        elif getattr(example, name) not in (float(value), 0.0):
            raise Wrong(f"{name} = {value!r} became {getattr(example, name)!r}")
    if example.weight < 0:
        raise Wrong(f"weight = {example.weight}")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("rows") / "data.jsonl"


@fuzzed()
@hypothesis.given(case=cases(damaged=False))
def test_rows_as_they_should_be_are_read_whole(path, case):
    name, row, kind, options, chat = case
    judge(
        "rows",
        case,
        lambda: pass_border(path, row, kind, options, chat),
        names=["data.jsonl"],
        check=lambda found: check(row, kind, options, chat, found),
    )


@fuzzed(short=60, share=4)
@hypothesis.given(case=cases(damaged=True))
def test_damaged_rows_are_read_whole_or_refused(path, case):
    name, row, kind, options, chat = case
    judge(
        "damaged rows",
        case,
        lambda: pass_border(path, row, kind, options, chat),
        names=["data.jsonl"],
        check=lambda found: check(row, kind, options, chat, found),
    )

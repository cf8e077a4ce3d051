# SPDX-License-Identifier: Apache-2.0
"""Readers of public data sets and of programs' files whose fields are their own.

Field names: HALOs (ContextualAI/HALOs, commit 4831988: train/sample.py, label.py, data.py),
Open-Assistant's message trees, SHP, PKU-SafeRLHF, OpenAI's summary comparisons, WebGPT and files
of preferences for its service, UltraFeedback, HelpSteer, Nectar, Chatbot Arena.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from align_jax.core.schema import Example, Message
from align_jax.data.messages import Row, given, kind_of, messages, text_of, user
from align_jax.data.rows import (
    about,
    as_messages,
    choice_of,
    label_of,
    number_of,
    order,
    pair_scores,
    prompt_of,
    response_of,
    system_of,
    with_system,
)
from align_jax.data.transcripts import RowError, asking, is_transcript, split_messages, turns


def _text(row: Row, name: str) -> str:
    return text_of(row.get(name), name)


def _number(row: Row, name: str) -> float:
    return number_of(row.get(name), name)


def _dicts(value: Any, name: str) -> list[Row]:
    """Read a list of dicts."""
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{name}: expected a list of dicts, got {kind_of(value)}")
    for one in value:
        if not isinstance(one, Mapping):
            raise RowError(f"{name}: expected a list of dicts, got {kind_of(one)} in it")
    return list(value)


def _prompt(row: Row) -> tuple[Message, ...] | str:
    return prompt_of(row) if row.get("prompt") is not None else user(_text(row, "instruction"))


def _output(value: Any) -> Any:
    return value if isinstance(value, str) else response_of(value, (), "output")


def read_binary_feedback(row: Row, chat: bool) -> Example:
    """Read prompt, output, label and, where given, reward."""
    return Example(
        _prompt(row),
        (_output(row["output"]),),
        label=label_of(row["label"]),
        scores=None if row.get("reward") is None else (_number(row, "reward"),),
        **about(row, "prompt", "output", "label"),
    )


def read_pairwise_feedback(row: Row, chat: bool) -> Example:
    """Read prompt, output_A, output_B and label: 1 where A is preferred."""
    sides = ("A", "B") if label_of(row["label"]) else ("B", "A")
    rewards = (f"reward_{sides[0]}", f"reward_{sides[1]}")
    return Example(
        _prompt(row),
        tuple(_output(row[f"output_{side}"]) for side in sides),
        scores=pair_scores(row, [rewards]),
        **about(row, "prompt", "output_A", "output_B", "label"),
    )


def read_scalar_feedback(row: Row, chat: bool) -> Example:
    """Read prompt, output and reward."""
    known = about(row, "prompt", "output")
    return Example(
        _prompt(row), (_output(row["output"]),), scores=(_number(row, "reward"),), **known
    )


def read_sample(row: Row, chat: bool) -> Example:
    """Read prompt and output: a model's answer of which nothing is known yet."""
    return Example(_prompt(row), (_output(row["output"]),), **about(row, "prompt", "output"))


def read_oasst_tree(row: Row, chat: bool) -> list[Example]:
    """Read an Open-Assistant message tree: one ranking for each message that has several ranked
    answers."""
    found: list[Example] = []
    if not isinstance(row["prompt"], Mapping):
        raise RowError(f"prompt: expected a message tree's dict, got {kind_of(row['prompt'])}")
    _walk(row["prompt"], system_of(row), found, chat)
    known = about(row, "prompt", "system", "system_prompt")
    beside = known.pop("extras")
    return [dataclasses.replace(one, extras={**beside, **one.extras}, **known) for one in found]


def _walk(node: Row, before: tuple[Message, ...], found: list[Example], chat: bool) -> None:
    path = (*before, {"role": _tree_role(node), "content": _text(node, "text")})
    replies = _dicts(node.get("replies") or [], "replies")
    replies = [reply for reply in replies if not reply.get("deleted")]
    ranked = [
        reply
        for reply in replies
        if _tree_role(reply) == "assistant" and reply.get("rank") is not None
    ]
    if len(ranked) > 1:
        answers = [_text(answer, "text") for answer in ranked]
        extras = {"message_id": node.get("message_id"), "lang": node.get("lang")}
        example = Example(*asking(path, answers, chat=chat), extras=extras)
        found.append(order(example, {"ranks": [answer["rank"] for answer in ranked]}))
    for reply in replies:
        _walk(reply, path, found, chat)


def _tree_role(node: Row) -> str:
    """Read who speaks in a message tree."""
    role = node.get("role")
    if role not in ("prompter", "assistant"):
        raise RowError("role: expected prompter or assistant in a message tree")
    return "user" if role == "prompter" else "assistant"


def grow_trees(rows: Sequence[Row]) -> list[Row]:
    """Build Open-Assistant message trees from flat messages (message_id, parent_id, role, text,
    rank)."""
    for index, row in enumerate(rows):
        if not isinstance(row.get("message_id"), str):
            raise RowError(f"message {index} has no message_id")
    nodes = {row["message_id"]: {**row, "replies": []} for row in rows}
    trees: list[Row] = []
    for node in nodes.values():
        if node.get("parent_id") is None:
            trees.append({"message_tree_id": node["message_id"], "prompt": node})
        elif node["parent_id"] in nodes:
            nodes[node["parent_id"]]["replies"].append(node)
    return trees


def read_shp(row: Row, chat: bool) -> Example:
    """Read Stanford Human Preferences: labels is 1 where answer A is preferred; scores are Reddit's
    votes."""
    sides = ("A", "B") if label_of(row["labels"]) else ("B", "A")
    responses = [_text(row, f"human_ref_{side}").strip() for side in sides]
    return Example(
        *asking(user(_text(row, "history").strip()), responses, chat=chat),
        scores=tuple(_number(row, f"score_{side}") for side in sides),
        **about(row, "history", "human_ref_A", "human_ref_B", "labels"),
    )


def read_safe_rlhf(row: Row, chat: bool) -> Example:
    """Read PKU-SafeRLHF: two responses, and which of them is better."""
    better = choice_of(row, "better_response_id")
    responses = (_text(row, f"response_{better}"), _text(row, f"response_{1 - better}"))
    return Example(
        *asking(user(_text(row, "prompt").strip()), responses, chat=chat),
        **about(row, "prompt", "response_0", "response_1", "better_response_id"),
    )


def read_comparisons(row: Row, chat: bool) -> Example:
    """Read OpenAI's comparisons of summaries: info.post, two summaries, and which was chosen."""
    (info,), choice = _dicts([row["info"]], "info"), choice_of(row, "choice")
    summaries = _dicts(row["summaries"], "summaries")
    if len(summaries) != 2:
        raise RowError(f"summaries: expected two, got {len(summaries)}")
    lead = f"SUBREDDIT: r/{_text(info, 'subreddit')}\n\n" if info.get("subreddit") else ""
    lead += f"TITLE: {_text(info, 'title')}\n\n" if info.get("title") else ""
    post = f"{lead}POST: {_text(info, given(info, 'post', 'article'))}\n\nTL;DR:"
    texts = [_text(summaries[index], "text").strip() for index in (choice, 1 - choice)]
    known = about(row, "info", "summaries", "choice")
    if chat:
        return Example(user(post), tuple(texts), **known)
    return Example(post, tuple(f" {text}" for text in texts), **known)


def read_scored_completions(row: Row, chat: bool) -> Example:
    """Read UltraFeedback as first published: an instruction and several completions with an overall
    score each."""
    completions = _dicts(row["completions"], "completions")
    if not completions or any(one.get("overall_score") is None for one in completions):
        raise RowError("completions: expected an overall_score in each")
    example = Example(
        *asking(
            user(_text(row, "instruction").strip()),
            [_text(one, "response") for one in completions],
            chat=chat,
        ),
        **about(row, "instruction", "completions"),
    )
    return order(example, {"scores": [one["overall_score"] for one in completions]})


def read_openai_pairs(row: Row, chat: bool) -> Example:
    """Read a file of preferences as OpenAI's service takes them: input (messages and tools),
    preferred_output, non_preferred_output."""
    (inner,) = _dicts([row["input"]], "input")
    row, sides = {**row, **inner}, ("preferred_output", "non_preferred_output")
    prompt = with_system(row, messages(row.get("messages"), "input.messages"))
    responses = tuple(response_of(row[side], prompt, side) for side in sides)
    return Example(prompt, responses, **about(row, "input", "messages", *sides))


def read_strength(row: Row, chat: bool) -> Example:
    """Read HelpSteer2's and HelpSteer3's preferences: two responses, and from -3 to 3 by how much
    the second is the better one; 0 is no preference."""
    prompt_name = given(row, "prompt", "context")
    names = given(row, "response_1", "response1"), given(row, "response_2", "response2")
    strength = given(row, "preference_strength", "overall_preference")
    known, prompt = about(row, prompt_name, *names, strength), prompt_of(row, prompt_name)
    if isinstance(prompt, str):
        texts = [_text(row, name) for name in names]
        example = Example(*asking(user(prompt), texts, chat=chat), **known)
    else:
        answers = tuple(response_of(row[name], prompt, name) for name in names)
        example = Example(as_messages(prompt, answers), answers, **known)
    return order(example, {"scores": [0.0, _number(row, strength)]})


def read_ranked_answers(row: Row, chat: bool) -> Example:
    """Read Nectar: a prompt, perhaps a transcript, and answers with a rank each (1 is best)."""
    text, answers = _text(row, "prompt"), _dicts(row["answers"], "answers")
    asked = turns(text) if is_transcript(text) else user(text.strip())
    if asked and asked[-1] == {"role": "assistant", "content": ""}:
        asked = asked[:-1]
    responses = [_text(one, "answer").strip() for one in answers]
    example = Example(*asking(asked, responses, chat=chat), **about(row, "prompt", "answers"))
    return order(example, {"ranks": [one.get("rank") for one in answers]})


def read_webgpt(row: Row, chat: bool) -> Example:
    """Read WebGPT's comparisons: question.full_text, two answers, and a score of each from -1 to
    1; equal ones are no preference."""
    (question,) = _dicts([row["question"]], "question")
    sides = ("answer_0", "answer_1"), ("score_0", "score_1")
    responses = [_text(row, name).strip() for name in sides[0]]
    asked = user(text_of(question.get("full_text"), "question.full_text").strip())
    known = about(row, "question", *sides[0], *sides[1])
    example = Example(*asking(asked, responses, chat=chat), **known)
    return order(example, {"scores": [_number(row, name) for name in sides[1]]})


_WINS = {"model_a": [1, 0], "model_b": [0, 1], "tie": [0, 0]}


def read_arena(row: Row, chat: bool) -> Example:
    """Read Chatbot Arena's votes: two conversations that begin alike, and which won; a tie is no
    preference."""
    sides = ("conversation_a", "conversation_b")
    winner = _text(row, "winner")
    won = "tie" if winner.startswith("tie") or winner == "both_bad" else winner
    if won not in _WINS:
        raise RowError(f"winner: expected {', '.join(_WINS)} or both_bad", f"got {winner!r:.40}")
    prompt, *rests = split_messages(*(messages(row[side], side) for side in sides))
    responses = tuple(response_of(rest, (), side) for rest, side in zip(rests, sides))
    example = Example(with_system(row, prompt), responses, **about(row, *sides, "winner"))
    return order(example, {"scores": _WINS[won]})

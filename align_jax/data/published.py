# SPDX-License-Identifier: Apache-2.0
"""Readers of public data sets and of programs' files whose fields are their own.

Field names: HALOs (ContextualAI/HALOs, commit 4831988: train/sample.py, label.py, data.py),
Open-Assistant's message trees, SHP, PKU-SafeRLHF, OpenAI's summary comparisons, UltraFeedback.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from align_jax.core.schema import Example, Message
from align_jax.data.messages import Row, given, kind_of, text_of, user
from align_jax.data.rows import (
    about,
    choice_of,
    label_of,
    number_of,
    order,
    pair_scores,
    prompt_of,
    response_of,
    system_of,
)
from align_jax.data.transcripts import RowError, asking


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

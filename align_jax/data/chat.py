# SPDX-License-Identifier: Apache-2.0
"""From an example to spans of text, and from spans to tokens.

    prompt                                 response               not rendered into tokens
    <|user|>How?<|end|><|assistant|>       Like this.<|end|>      (what a template writes after
    ^last_turn              ^header        loss: true              the last turn)

Prompt and responses are tokenized apart, exactly as when the model generates: a group's responses
share one prompt, token by token, and the mask needs no search.  A template is applied to the whole
conversation and cut where the prompt with its generation header ends, so that the joined spans are
what ``apply_chat_template`` gives.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from align_jax.core.schema import Example, Message
from align_jax.data.tokenizer import bos_ids


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of a response: its text, and whether the model is to learn it."""

    text: str
    loss: bool
    end: bool = False  # the tokenizer's end-of-sequence token is to follow


@dataclasses.dataclass(frozen=True)
class Rendered:
    """An example as text.

    Attributes:
        prompt: the prompt, with the header that asks for an answer.
        responses: each response's spans.
        last_turn: where the last user turn begins in the prompt, in characters.
        header: how many characters at the prompt's end stand after the user's words.
        templated: the texts come from a chat template, which writes its own beginning-of-sequence
            token.
        closing: what the template writes after each response's end, which is not learned.
    """

    prompt: str
    responses: tuple[tuple[Span, ...], ...]
    last_turn: int = 0
    header: int = 0
    templated: bool = False
    closing: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tokens:
    """An example as token ids; ``last_turn`` and ``header`` as in Rendered, in tokens."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    masks: tuple[list[bool], ...]
    last_turn: int
    header: int


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render an example's prompt and responses as text.

    Messages go through the tokenizer's chat template; plain text stays as it is.  If a response's
    text does not end with a special token of the tokenizer, an end-of-sequence token is to follow,
    once.

    Raises:
        ValueError: messages without a chat template, or a template that renders a conversation
            differently when it goes on (so that there is no telling prompt and response apart).
    """
    if isinstance(example.prompt, str):
        return _render_text(example.prompt, example, tokenizer)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{example.source}: messages, but the tokenizer has no chat template; give one by "
            "--config.data.chat_template, or data of prompts and responses as plain text"
        )
    prompt = list(example.prompt)
    asked = _apply(tokenizer, prompt, True, example.source)
    conversations = [prompt + _turns(response) for response in example.responses]
    texts = [_apply(tokenizer, turns, False, example.source) for turns in conversations]
    if not all(text.startswith(asked) for text in texts):
        # a header that goes further than the template's own assistant turn (an opened <think>): cut
        # where they part
        base = _apply(tokenizer, prompt, False, example.source)
        asked = os.path.commonprefix([asked, *texts])
        if len(asked) < len(base):
            raise ValueError(
                f"{example.source}: the chat template renders the prompt differently once an "
                f"answer follows: {base[len(asked) :][:60]!r}"
            )
    responses, closings = [], []
    for turns, text in zip(conversations, texts):
        spans, closing = _spans(tokenizer, turns, len(prompt), text, len(asked), example.source)
        responses.append(spans)
        closings.append(closing)
    last_turn, header = _last_turn(tokenizer, prompt, asked)
    return Rendered(asked, tuple(responses), last_turn, header, True, tuple(closings))


def _render_text(prompt: str, example: Example, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    responses = []
    for text in example.responses:
        if not isinstance(text, str):
            raise ValueError(
                f"{example.source}: the prompt is plain text, so the responses must be plain text "
                "too"
            )
        responses.append((Span(text, True, not _ends_turn(tokenizer, text)),))
    last_turn = max(prompt.rfind("\n\nHuman:"), 0)
    asks = prompt.rfind("\n\nAssistant:")
    header = len(prompt) - asks if asks > last_turn else 0
    return Rendered(prompt, tuple(responses), last_turn, header)


def _turns(response: str | tuple[Message, ...]) -> list[Message]:
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    return list(response)


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], header: bool, source: str
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=header
        )
    # templates raise what they like: Jinja's errors, TypeError, their own messages
    except Exception as error:
        raise ValueError(
            f"{source}: the chat template refuses this conversation "
            f"({[message['role'] for message in messages]}): {error}"
        ) from error
    return cast(str, text)


@functools.lru_cache(maxsize=8)
def _special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return tuple(
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    )


def _ends_turn(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return text.endswith(_special_texts(tokenizer))


def _spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    first: int,
    text: str,
    begin: int,
    source: str,
) -> tuple[tuple[Span, ...], str]:
    """Cut a rendered conversation's response into spans.

        [answer <end>] [closing, a user's turn, header] [answer <end>] [closing]
         loss: true     loss: false                      loss: true

    Args:
        tokenizer: has the template.
        messages: the conversation; the response begins with message number ``first``.
        text: as it is rendered; the response begins at ``begin``.
        source: of the example.

    Returns:
        The spans, and what follows the last one's end.
    """
    last = len(messages) - 1
    while messages[last]["role"] != "assistant":
        last -= 1
    spans: list[Span] = []
    closing = ""
    for index in range(first, last + 1):
        if messages[index]["role"] != "assistant":
            continue
        if index > first:
            between = len(_prefix(tokenizer, messages[:index], True, text, source))
            spans.append(Span(closing + text[begin:between], False))
            begin = between
        end = len(text)
        if index < len(messages) - 1:
            end = len(_prefix(tokenizer, messages[: index + 1], False, text, source))
        turn = text[begin:end]
        body = turn.rstrip()
        ends = _ends_turn(tokenizer, body)
        # keep the answer's own white space; what the template adds comes after the end
        if not ends and turn.endswith(messages[index]["content"]):
            body = turn
        spans.append(Span(body, True, not ends))
        closing, begin = turn[len(body) :], end
    return tuple(spans), closing


def _prefix(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    header: bool,
    text: str,
    source: str,
) -> str:
    part = _apply(tokenizer, messages, header, source)
    if not text.startswith(part):
        raise ValueError(
            f"{source}: the chat template renders turn {len(messages)} differently once another "
            "follows; train on the last answer only (--config.data.turns=last)"
        )
    return part


def _last_turn(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], asked: str
) -> tuple[int, int]:
    """Return where the last turn begins in the prompt, and the length of what follows its words; in
    characters."""
    content = prompt[-1]["content"].strip()
    at = asked.rfind(content)
    if at < 0 or not content:
        return 0, 0
    header = len(asked) - at - len(content)
    if len(prompt) == 1:
        return 0, header
    try:
        before = _apply(tokenizer, prompt[:-1], False, "")
    # a template may refuse a conversation of a system message alone; only truncation asks
    except ValueError:
        before = ""
    return len(before) if asked.startswith(before) and len(before) <= at else at, header


@functools.lru_cache(maxsize=8)
def _anchor(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what must stand before a text for it to be tokenized as in the middle of one.

    Nothing for byte-level tokenizers; a line end for SentencePiece ones, which else begin every
    text with a space.
    """

    encode = functools.partial(_encode, tokenizer)

    def agrees(anchor: str) -> int:
        """Count the texts whose second half it lets encode as in the whole."""
        skip = len(encode(anchor))
        return sum(
            encode(left + right) == encode(left) + encode(anchor + right)[skip:]
            for left, right in (("a:", " b c"), ("a:\n", "b c"))
        )

    return max(("", "\n"), key=agrees)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []


def _continue(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenize texts that stand in the middle of one."""
    if not texts:
        return []
    anchor = _anchor(tokenizer)
    lead = _encode(tokenizer, anchor)
    found = tokenizer(
        [anchor + text for text in texts], add_special_tokens=False, verbose=False
    ).input_ids
    return [
        ids[len(lead) :] if ids[: len(lead)] == lead else _encode(tokenizer, text)
        for ids, text in zip(found, texts)
    ]


def _encode_prompts(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], int, int]]:
    """Tokenize prompts.

    Returns:
        For each its ids, where its last turn begins, and how long its header is, in tokens.  A
        plain text gets the tokenizer's beginning-of-sequence token, unless it is written there
        already.
    """
    if not rendered:
        return []
    encoding: Any = tokenizer(
        [one.prompt for one in rendered],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    lead, found = bos_ids(tokenizer), []
    for one, ids, offsets in zip(rendered, encoding.input_ids, encoding.offset_mapping):
        last_turn = header = 0
        if one.last_turn:
            last_turn = sum(end <= one.last_turn for _, end in offsets)
        if one.header:
            header = sum(start >= len(one.prompt) - one.header for start, _ in offsets)
        if lead and not one.templated and ids[:1] != lead:
            ids, last_turn = lead + ids, last_turn + 1 if last_turn else 0
        found.append((list(ids), last_turn, header))
    return found


def encode_many(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Tokenize examples, many at once.

    Args:
        examples: the examples.
        tokenizer: the tokenizer; messages need its chat template.

    Returns:
        For each its prompt ids (the same for every response), each response's ids and loss mask:
        true on the assistant's tokens, the one that ends the turn included.

    Raises:
        ValueError: as ``render``.
    """
    rendered = [render(example, tokenizer) for example in examples]
    texts: list[str] = []
    for one in rendered:
        for spans in one.responses:
            texts += [span.text for span in spans]
    encoded = iter(_continue(tokenizer, texts))
    made = []
    for one, (prompt, last_turn, header) in zip(rendered, _encode_prompts(rendered, tokenizer)):
        responses, masks = [], []
        for spans in one.responses:
            ids: list[int] = []
            mask: list[bool] = []
            for span in spans:
                part = next(encoded) + ([tokenizer.eos_token_id] if span.end else [])
                ids += part
                mask += [span.loss] * len(part)
            if not prompt and mask:
                mask[0] = False  # nothing precedes the first token, so nothing predicts it
            responses.append(ids)
            masks.append(mask)
        made.append(Tokens(prompt, tuple(responses), tuple(masks), last_turn, header))
    return made


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Tokenize one example; see ``encode_many``."""
    return encode_many([example], tokenizer)[0]

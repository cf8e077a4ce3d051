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
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align_jax.core.progress import printable
from align_jax.core.schema import Example, Message
from align_jax.data import calls
from align_jax.data import template as templates
from align_jax.data.messages import REASONING, SAID
from align_jax.data.tokenizer import bos_ids
from align_jax.data.transcripts import RowError


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of a response: its text, and whether the model is to learn it."""

    text: str
    loss: bool
    end: bool = False  # the tokenizer's end-of-sequence token is to follow
    step: bool = False  # a step ends here: of its tokens the last one alone bears the loss


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
        notes: what the template makes otherwise of the turns before, to be counted.
    """

    prompt: str
    responses: tuple[tuple[Span, ...], ...]
    last_turn: int = 0
    header: int = 0
    templated: bool = False
    closing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tokens:
    """An example as token ids; ``last_turn`` and ``header`` as in Rendered, in tokens; ``refused``
    says why there are none; ``notes`` as in Rendered."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    masks: tuple[list[bool], ...]
    last_turn: int
    header: int
    refused: str = ""
    notes: tuple[str, ...] = ()


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render an example's prompt and responses as text.

    Messages go through the tokenizer's chat template; plain text stays as it is.  If a response's
    text does not end with a special token of the tokenizer, an end-of-sequence token is to follow,
    once.

    Raises:
        ValueError: messages without a chat template.
        RowError: a template that refuses the conversation, renders it differently when it goes on
            (so that there is no telling prompt and response apart), or loses a part of it.
    """
    if isinstance(example.prompt, str):
        return _render_text(example.prompt, example, tokenizer)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{example.source}: messages, but the tokenizer has no chat template; give one by "
            "--config.data.chat_template, or data of prompts and responses as plain text"
        )
    prompt = list(example.prompt)
    _check_continued(prompt, example)
    _check_read(example, tokenizer)
    apply: Apply = functools.partial(_apply, tokenizer, source=example.source, **example.template)
    asked = apply(prompt, header=True)
    conversations = [prompt + _turns(response) for response in example.responses]
    texts = [apply(turns, header=False) for turns in conversations]
    _check_kept(apply, example, conversations, texts)
    notes = _check_context(
        apply, tokenizer, conversations or [prompt], texts or [asked], len(prompt)
    )
    if not all(map(functools.partial(_stands_after, asked, len(prompt)), conversations, texts)):
        asked = _assistant_header(apply, example, conversations, texts)
    if texts and _ignores_header(tokenizer):
        _check_own_header(apply, tokenizer, prompt, asked)
    responses, closings = [], []
    for turns, text in zip(conversations, texts):
        spans, closing = _spans(tokenizer, apply, turns, len(prompt), text, len(asked), example)
        responses.append(spans)
        closings.append(closing)
    last_turn, header = _last_turn(apply, tokenizer, prompt, asked, example)
    return Rendered(asked, tuple(responses), last_turn, header, True, tuple(closings), notes)


def _check_continued(prompt: list[Message], example: Example) -> None:
    """Refuse an answer that goes on with words of the assistant in the prompt, which a template
    would take for two answers.

    Raises:
        RowError: it does.
    """
    goes_on = any(_turns(response)[0]["role"] == "assistant" for response in example.responses)
    if goes_on and prompt and prompt[-1]["role"] == "assistant":
        raise RowError(
            "the prompt ends with the assistant, whose answer follows: put the begun answer into "
            "the responses, and let the prompt end with the user"
        )


BESIDE = ("tools", "documents")  # of what the template is given beside the messages, the contents
_KEEPS = "--config.data.chat_template gives one that does"
STAND_IN = "\u2063words\u2063"  # an answer that no data has, to see where a template puts it


def _check_kept(
    apply: Apply, example: Example, conversations: list[list[Message]], texts: list[str]
) -> None:
    """Refuse an example of whose content the template would drop a part in silence.

    A template may leave out the reasoning of earlier turns; that of the answer it must keep.

    Raises:
        RowError: naming what is not rendered.
    """
    both = list(zip(conversations, texts))
    for name in BESIDE:
        if example.template.get(name) and both:
            without = functools.partial(apply, **{name: None})
            if not any(_differs(without, turns, text) for turns, text in both):
                raise RowError(f"the chat template does not render {name}", _KEEPS)
    for turns, text in both:
        for name in SAID:
            places = [i for i, turn in enumerate(turns) if turn.get(name)]
            places = [i for i in places if i == len(turns) - 1] if name in REASONING else places
            for i in places:
                for less in _lacking(turns[i], name):
                    if not _differs(apply, [*turns[:i], less, *turns[i + 1 :]], text):
                        one_of = "" if name not in less else "one of several "
                        raise RowError(f"the chat template does not render {one_of}{name}", _KEEPS)


def _lacking(turn: Message, name: str) -> list[Message]:
    """Return a turn without one of its keys; of several calls, without each of them, too."""
    found: list[Message] = [{key: value for key, value in turn.items() if key != name}]
    if name == "tool_calls" and len(calls := turn[name]) > 1:
        found += [{**turn, name: [*calls[:i], *calls[i + 1 :]]} for i in range(len(calls))]
    return found


def _differs(apply: Apply, turns: list[Message], text: str, *, header: bool = False) -> bool:
    """Tell whether a template makes another text of messages, or refuses them: such as a tool's
    answer before which nothing was called."""
    try:
        return apply(turns, header=header) != text
    except RowError:
        return True


def _check_read(example: Example, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse keyword arguments that the template does not name: they would do nothing.

    Raises:
        RowError: naming them.
    """
    named = _words(str(tokenizer.chat_template)) | set(BESIDE)
    if unread := [name for name in example.template if name not in named]:
        raise RowError(f"the chat template does not read {', '.join(map(str, unread))}")


@functools.lru_cache(maxsize=8)
def _words(template: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", template))


def _check_context(
    apply: Apply,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    texts: list[str],
    first: int,
) -> tuple[str, ...]:
    """Refuse a template that leaves out the words of a turn that is no answer; look what it makes
    of the answers before.

    Args:
        apply: renders messages.
        tokenizer: whose template it is.
        conversations: a prompt, with each response.
        texts: as they are rendered.
        first: how many turns the prompt has.

    Returns:
        What is to be counted: answers of the prompt that it rewrites, keys that it does not read.

    Raises:
        RowError: a turn's words are not there in any form.
    """
    known = _words(str(tokenizer.chat_template)) | {"loss", *SAID}
    notes: set[str] = set()
    for turns, text in zip(conversations, texts):
        asked = len(turns) == first
        roles = tuple(turn["role"] for turn in turns)
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        doubtful = _left_out(tokenizer, roles, asked)
        for i, turn in enumerate(turns if asked else turns[: answers[-1] + 1]):
            unread = turn.keys() - known
            notes |= {
                f"keys that the chat template does not read: {printable(key[:40])}"
                for key in unread
            }
            if turn["role"] != "assistant" and turn.get("loss"):
                notes.add("turns marked to be learned that are no assistant's, and are not")
            if any(turn[key].strip() not in text for key in REASONING if key in turn):
                notes.add("reasoning in the history that the chat template leaves out")
            if turn["content"].strip() in text and i not in doubtful:
                continue
            if turn["role"] != "assistant":
                other = [*turns[:i], {**turn, "content": STAND_IN}, *turns[i + 1 :]]
                if not _differs(apply, other, text, header=asked):
                    words = f"a turn's words: role {turn['role']}"
                    raise RowError(f"the chat template leaves out {words}")
                if turn["content"].strip() not in text:
                    notes.add(f"turns that the chat template rewrites: {turn['role']}'s")
            elif i < first:
                notes.add("answers in the history that the chat template rewrites")
            else:
                notes.add("answers whose white space around reasoning the chat template sets")
    return tuple(sorted(notes))


@functools.lru_cache(maxsize=256)
def _left_out(
    tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...], header: bool
) -> frozenset[int]:
    """Return which turns of such a conversation a template seems to leave out: short words are
    found in a text by chance."""
    words = [f"zq{i}qz" for i in range(len(roles))]
    turns = [{"role": role, "content": word} for role, word in zip(roles, words)]
    try:
        text = _apply(tokenizer, turns, header=header, source="").lower()
    except RowError:
        return frozenset()
    return frozenset(
        i
        for i, (role, word) in enumerate(zip(roles, words))
        if role != "assistant" and word not in text
    )


def _stands_after(asked: str, first: int, turns: list[Message], text: str) -> bool:
    """Tell whether a text begins with the prompt, and no word of the answer stands in it: a header
    may open a tag with which the answer begins as well."""
    if not text.startswith(asked):
        return False
    content = turns[first]["content"].strip()
    return content in text[len(asked) :] or content not in text


def _assistant_header(
    apply: Apply, example: Example, conversations: list[list[Message]], texts: list[str]
) -> str:
    """Return the prompt up to where the template's own assistant turn begins.

    The header that asks for an answer may go further, such as by an opened <think>.  A stand-in for
    the answer's words shows where they begin, so that none of them is taken for the header.

    Raises:
        RowError: the template renders the prompt differently once an answer follows.
    """
    first = len(example.prompt)
    headers = []
    for turns in conversations:
        words = {key: STAND_IN for key, value in turns[first].items() if isinstance(value, str)}
        stand_in = {**turns[first], **words, "content": STAND_IN, "role": turns[first]["role"]}
        headers.append(apply([*turns[:first], stand_in], header=False).partition(STAND_IN)[0])
    base = apply(conversations[0][:first], header=False)
    asked = min(headers, key=len)
    if not asked.startswith(base) or not all(one.startswith(asked) for one in texts):
        shared = os.path.commonprefix([base, *texts])
        raise RowError(
            "the chat template renders the prompt differently once an answer follows",
            f"{base[len(shared) :][:60]!r} ({example.source})",
        )
    return asked


@functools.lru_cache(maxsize=8)
def _ignores_header(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a template writes the same with and without a header asked for."""
    probe = [{"role": "user", "content": STAND_IN}]
    try:
        with_header, without = (
            _apply(tokenizer, probe, header=header, source="") for header in (True, False)
        )
    except RowError:
        return True  # it wants more than a user's turn: looked at row by row
    return with_header == without


def _check_own_header(
    apply: Apply, tokenizer: PreTrainedTokenizerBase, prompt: list[Message], asked: str
) -> None:
    """Refuse a template that writes the next turn's header after an answer, which would be learned.

    Raises:
        RowError: it does, whether a header is asked for or not.
    """
    if apply(prompt, header=False) != asked:
        return
    after_answer = _after(apply, [*prompt, {"role": "assistant", "content": STAND_IN}])
    after_prompt = _after(apply, [*prompt[:-1], {**prompt[-1], "content": STAND_IN}])
    specials = [one for one in _special_texts(tokenizer) if one and one in after_answer]
    rest = after_answer
    for special in specials:
        rest = rest.replace(special, "")
    if after_answer == after_prompt and (rest.strip() or len(specials) > 1):
        raise RowError(
            "the chat template writes the next answer's header after an answer; write it only "
            "where add_generation_prompt is true"
        )


def _after(apply: Apply, messages: list[Message]) -> str:
    """Return what the template writes after the last message's words, which are the stand-in."""
    return apply(messages, header=False).rpartition(STAND_IN)[2]


def _render_text(prompt: str, example: Example, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if beside := [name for name, value in example.template.items() if value is not None]:
        raise RowError(
            f"{', '.join(beside)}: the prompt is plain text, which no chat template renders; "
            "--config.data.strings=messages makes it a turn of a user"
        )
    responses = []
    for text in example.responses:
        if not isinstance(text, str):
            raise RowError("the prompt is plain text, so the responses must be plain text too")
        responses.append((Span(text, True, not _ends_turn(tokenizer, text)),))
    last_turn = max(prompt.rfind("\n\nHuman:"), 0)
    asks = prompt.rfind("\n\nAssistant:")
    header = len(prompt) - asks if asks > last_turn else 0
    return Rendered(prompt, tuple(responses), last_turn, header)


def _render_steps(example: Example, tokenizer: PreTrainedTokenizerBase, separator: str) -> Rendered:
    """Render an example of labeled steps: what is learned is the last token of the separator
    behind each labeled step, or of the step itself where there is no separator.

        [step] [separator] [step] [separator] [end of turn]
                        ^                  ^

    Plain text gets no end-of-sequence token, as in TRL.
    """
    texts = [text for text, _ in example.steps or ()]
    whole = separator.join(texts)
    rendered = render(dataclasses.replace(example, responses=(whole,)), tokenizer)
    turn = rendered.responses[0][0]
    before, found, after = turn.text.partition(whole)
    if not found:
        raise RowError("the chat template rewrites an answer", f"{whole!r:.60}")
    spans = [Span(before, False)]
    for text, label in example.steps or ():
        spans.append(Span(text, label is not None and not separator, step=True))
        spans.append(Span(separator, label is not None, step=True))
    closing = Span(after, False, turn.end and rendered.templated)
    return dataclasses.replace(rendered, responses=((*spans, closing),))


def _turns(response: str | tuple[Message, ...]) -> list[Message]:
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    return list(response)


Apply = Callable[..., str]  # (messages, header=...) -> the text that the template makes of them


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    header: bool,
    source: str,
    **template: Any,
) -> str:
    """Render messages; what a template raises is the row's fault.

    Raises:
        RowError: the template refuses them.
        Endless: it does not end.
    """
    turns: list[Message] = [
        {key: value for key, value in one.items() if key != "loss"} for one in messages
    ]
    if any(turn.get("tool_calls") for turn in turns):
        turns = calls.as_read(tokenizer, turns)
    try:
        text = templates.apply(tokenizer, turns, add_generation_prompt=header, **template)
        return text if header else text.removesuffix(_final(tokenizer))
    except templates.Endless:
        raise
    # templates raise what they like: Jinja's errors, TypeError, their own messages
    except Exception as error:
        roles = [message["role"] for message in messages]
        raise RowError(
            "the chat template refuses the conversation", f"{source}: {roles}: {error}"
        ) from error


@functools.lru_cache(maxsize=8)
def _final(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the end-of-sequence token if a template writes it at the end of a whole conversation
    alone, after the end of the last turn: no answer ends with it, and no turn follows it."""
    turns = [{"role": role, "content": STAND_IN} for role in ("user", "assistant")]
    try:
        asked, whole = (
            templates.apply(tokenizer, turns, add_generation_prompt=header)
            for header in (True, False)
        )
    # templates raise what they like; it is told of the rows
    except Exception:
        return ""
    end = str(tokenizer.eos_token)
    goes_on = asked.startswith(whole.removesuffix(end)) and not asked.startswith(whole)
    return end if whole.endswith(end) and goes_on else ""


@functools.lru_cache(maxsize=8)
def _special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return tuple(
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    )


def _ends_turn(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return text.endswith(_special_texts(tokenizer))


def _spans(
    tokenizer: PreTrainedTokenizerBase,
    apply: Apply,
    messages: list[Message],
    first: int,
    text: str,
    begin: int,
    example: Example,
) -> tuple[tuple[Span, ...], str]:
    """Cut a rendered conversation's response into spans.

        [answer <end>] [closing, a user's turn, header] [answer <end>] [closing]
         loss: true     loss: false                      loss: true

    Args:
        tokenizer: says which tokens end a turn.
        apply: renders messages.
        messages: the conversation; the response begins with message number ``first``.
        text: as it is rendered; the response begins at ``begin``.
        example: what it is of.

    Returns:
        The spans, and what follows the last one's end.

    Raises:
        RowError: the template rewrites an answer.
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
            between = len(_prefix(apply, messages[: index + 1], True, text))
            spans.append(Span(closing + text[begin:between], False))
            begin = between
        end = len(text)
        if index < len(messages) - 1:
            end = len(_prefix(apply, messages[: index + 1], False, text))
        turn, learned = text[begin:end], messages[index].get("loss", True)
        if learned:
            _check_answer(messages[index]["content"], turn)
        body = turn.rstrip()
        ends = _ends_turn(tokenizer, body)
        # keep the answer's own white space; what the template adds comes after the end
        content = messages[index]["content"]
        if not ends and content and turn.endswith(content):
            body = turn
        spans.append(Span(body, learned, not ends))
        closing, begin = turn[len(body) :], end
    return tuple(spans), closing


def _check_answer(content: str, turn: str) -> None:
    """Refuse a template that rewrites the answer: what is learned would not be what was said.

    The white space around the tags of reasoning is the template's to set.

    Raises:
        RowError: with the first words that are lost.
    """
    if content.strip() in turn or _tagged(content).strip() in _tagged(turn):
        return
    written = set(turn.split())
    lost = [word for word in content.split() if word not in written] or content.split()
    raise RowError(
        "the chat template rewrites the answer; give one that keeps it by "
        "--config.data.chat_template, or take what it drops out of the data",
        f"lost: {' '.join(lost[:6])!r}",
    )


def _tagged(text: str) -> str:
    """Return a text without the white space around the tags of its reasoning."""
    return re.sub(r"\s*(</?think(?:ing)?>)\s*", r"\1", text)


def _prefix(apply: Apply, messages: list[Message], header: bool, text: str) -> str:
    """Return what a text begins with: the messages, or (``header``) all that stands before the
    last one's words.

    Raises:
        RowError: it begins otherwise.
    """
    before = messages[:-1] if header else messages
    part = apply(before, header=header)
    if header and not _stands_after(part, len(before), messages, text):
        stand_in = {**messages[-1], "content": STAND_IN}
        own, found, _ = apply([*before, stand_in], header=False).partition(STAND_IN)
        part = own if found else part
    if not text.startswith(part):
        raise RowError(
            f"the chat template renders turn {len(before)} differently once another follows; "
            "make each answer an example of its own (--config.data.turns=each), or train on the "
            "last alone (--config.data.turns=last)"
        )
    return part


def _last_turn(
    apply: Apply,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    asked: str,
    example: Example,
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
    if not example.template and all(turn.keys() == {"role", "content"} for turn in prompt):
        lead = _lead(tokenizer, tuple(turn["role"] for turn in prompt))
        if lead and asked.endswith(lead, 0, at):
            return at - len(lead), header
    try:
        before = apply(prompt[:-1], header=False)
    # a template may refuse a conversation of a system message alone; only truncation asks
    except RowError:
        before = ""
    return len(before) if asked.startswith(before) and len(before) <= at else at, header


@functools.lru_cache(maxsize=256)
def _lead(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> str:
    """Return what a template writes between a conversation and the words of its last turn, all
    turns of which are plain; "" where it is not known."""
    turns: list[Message] = [{"role": role, "content": f"zq{i}qz"} for i, role in enumerate(roles)]
    try:
        before, text = (
            _apply(tokenizer, some, header=False, source="") for some in (turns[:-1], turns)
        )
    except RowError:
        return ""
    return text[len(before) :].partition(turns[-1]["content"])[0] if text.startswith(before) else ""


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


def _encode_batch(tokenizer: PreTrainedTokenizerBase, texts: list[str], **asked: bool) -> Any:
    """Tokenize texts as they are; what nobody reads is not made."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **asked,
    )


def _continue(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenize texts that stand in the middle of one."""
    if not texts:
        return []
    anchor = _anchor(tokenizer)
    lead = _encode(tokenizer, anchor)
    found = _encode_batch(tokenizer, [anchor + text for text in texts]).input_ids
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
    texts = [one.prompt for one in rendered]
    encoding = _encode_batch(tokenizer, texts, return_offsets_mapping=True)
    lead, found = bos_ids(tokenizer), []
    for one, ids, offsets in zip(rendered, encoding.input_ids, encoding.offset_mapping):
        last_turn = header = 0
        if one.last_turn:  # from the end, which is near
            after = (end <= one.last_turn for _, end in reversed(offsets))
            last_turn = len(offsets) - next(
                (i for i, past in enumerate(after) if past), len(offsets)
            )
        if one.header:
            at = len(one.prompt) - one.header
            before = (start < at for start, _ in reversed(offsets))
            header = next((i for i, past in enumerate(before) if past), len(offsets))
        if lead and not one.templated and ids[:1] != lead:
            ids, last_turn = lead + ids, last_turn + 1 if last_turn else 0
        found.append((list(ids), last_turn, header))
    return found


def encode_many(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    drop: bool = False,
    separator: str = "\n",
) -> list[Tokens]:
    """Tokenize examples, many at once.

    Args:
        examples: the examples.
        tokenizer: the tokenizer; messages need its chat template.
        drop: give an example that the template refuses no tokens and the reason, instead of an
            error.
        separator: what stands behind each of an example's steps.

    Returns:
        For each its prompt ids (the same for every response), each response's ids and loss mask:
        true on the assistant's tokens, the one that ends the turn included.

    Raises:
        ValueError: as ``render``, with the example's place.
    """
    with templates.watched():
        rendered, refused = _render_many(examples, tokenizer, drop=drop, separator=separator)
    texts: list[str] = []
    for one in rendered:
        for spans in one.responses:
            texts += [span.text for span in spans]
    encoded, eos = iter(_continue(tokenizer, texts)), tokenizer.eos_token_id
    made: list[Tokens] = []
    for one, (prompt, last_turn, header) in zip(rendered, _encode_prompts(rendered, tokenizer)):
        responses, masks = [], []
        for spans in one.responses:
            ids: list[int] = []
            mask: list[bool] = []
            for span in spans:
                part = next(encoded) + ([eos] if span.end else [])
                ids += part
                inner = len(part) - 1 if span.step else 0
                mask += [False] * inner + [span.loss] * (len(part) - max(inner, 0))
            if not prompt and mask:
                mask[0] = False  # nothing precedes the first token, so nothing predicts it
            responses.append(ids)
            masks.append(mask)
        reason = refused.get(len(made), "")
        made.append(
            Tokens(prompt, tuple(responses), tuple(masks), last_turn, header, reason, one.notes)
        )
    return made


def _render_many(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, drop: bool, separator: str
) -> tuple[list[Rendered], dict[int, str]]:
    """Render examples; return why some are refused, too, by their place."""
    rendered: list[Rendered] = []
    refused: dict[int, str] = {}
    for index, example in enumerate(examples):
        try:
            rendered.append(
                _render_steps(example, tokenizer, separator)
                if example.steps
                else render(example, tokenizer)
            )
        except RowError as error:
            if not drop:
                hint = "--config.data.invalid=drop leaves such rows out"
                raise ValueError(f"{example.source}: {error}; {hint}") from error
            refused[index] = error.reason
            rendered.append(Rendered("", ((),) * len(example.responses)))
    return rendered, refused


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Tokenize one example; see ``encode_many``."""
    return encode_many([example], tokenizer)[0]


def encode_reply(
    example: Example, tokenizer: PreTrainedTokenizerBase, reply: Message, end: str = ""
) -> list[int]:
    """Tokenize what stands between an answer's words and the words of the next answer.

    Of a templated prompt: what the template writes after an answer, the reply as a turn, and the
    header that asks for the next answer; of plain text the reply's text alone.

    Args:
        example: its prompt is messages or plain text; its ``template`` is given to the template.
        tokenizer: the tokenizer.
        reply: a turn, such as {"role": "tool", "content": "7"}.
        end: the end of turn that the answer has written itself, which is not written again.

    Raises:
        RowError: the template refuses a turn of this role, or does not render it.
    """
    content = reply["content"]
    if isinstance(example.prompt, str):
        return _continue(tokenizer, [content])[0]
    turns: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": STAND_IN},
        reply,
    ]
    text = _apply(tokenizer, turns, header=True, source=example.source, **example.template)
    between = text.partition(STAND_IN)[2]
    if content.strip() not in between:
        raise RowError("the chat template does not render the reply", f"{dict(reply)!r:.80}")
    if end and between.lstrip().startswith(end):
        between = between.lstrip().removeprefix(end)
    return _continue(tokenizer, [between])[0]

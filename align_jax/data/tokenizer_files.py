# SPDX-License-Identifier: Apache-2.0
"""A tokenizer's files, looked at before a library is given them.

    tokenizer.json           the vocabulary, and what is done before and after it
    tokenizer_config.json    special tokens, chat template
    special_tokens_map.json  special tokens, above the config's
    added_tokens.json        tokens beside the vocabulary
    chat_template.jinja      the chat template, above the config's

The libraries give a damaged file no name, give a token another id than it says, or end the process.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from align_jax.core.choose import nearest
from align_jax.core.fields import (
    Kind,
    faults,
    is_above_zero,
    is_bool,
    is_integer,
    is_list_of,
    is_object,
    is_object_of,
    is_text,
    or_null,
)
from align_jax.core.files import read_json, read_text

BACKEND, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIALS_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
VOCABULARY = r"tokenizer\.|vocab|merges|.*\.(model|spm)$"  # files that may hold one
SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")
_MARKS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def _is_token(value: Any) -> bool:
    if not is_object(value):
        return is_text(value)
    return is_text(value.get("content")) and all(is_bool(value.get(one, True)) for one in _MARKS)


def _is_templates(value: Any) -> bool:
    return value is None or is_text(value) or is_list_of(is_object_of(is_text))(value)


def _is_tokens(value: Any) -> bool:
    return is_list_of(_is_token)(value) or is_object_of(_is_token)(value)


def _is_decoder(value: Any) -> bool:
    return is_object(value) and all(id.isdecimal() and is_object(t) for id, t in value.items())


_TOKENS = (
    Kind("text, an object with 'content', or null", or_null(_is_token), SPECIALS),
    Kind(
        "a list or an object of tokens, or null",
        or_null(_is_tokens),
        ("additional_special_tokens", "extra_special_tokens"),
    ),
)
FIELDS = (  # of tokenizer_config.json
    *_TOKENS,
    Kind("a number above 0, or null", or_null(is_above_zero), ("model_max_length",)),
    Kind("text or null", or_null(is_text), ("tokenizer_class",)),
    Kind("a Jinja template, a list of named ones, or null", _is_templates, ("chat_template",)),
    Kind("true, false or null", or_null(is_bool), ("add_bos_token", "add_eos_token")),
    Kind("'left', 'right' or null", (None, "left", "right").__contains__, ("padding_side",)),
    Kind("an object, id -> token, or null", or_null(_is_decoder), ("added_tokens_decoder",)),
)


def has_tokenizer(folder: str) -> bool:
    """Tell whether a model's folder has files of a tokenizer."""
    return any(re.match(VOCABULARY, one) for one in os.listdir(folder))


def check(folder: str) -> None:
    """Refuse a folder of whose files no tokenizer can be made, or another than they say.

    Raises:
        ValueError: with the file, and the field.
    """
    if not has_tokenizer(folder):
        raise ValueError(
            f"tokenizer {folder!r}: the folder has no tokenizer.json; name another by "
            "config.tokenizer"
        )
    if os.path.exists(file := os.path.join(folder, CONFIG)):
        read_config(file)
    if os.path.exists(file := os.path.join(folder, SPECIALS_MAP)):
        _refuse(file, faults(read_json(file), _TOKENS))
    if os.path.exists(file := os.path.join(folder, ADDED)):
        added = read_json(file)
        ids = [Kind("the token's id", is_integer, tuple(added))]
        _refuse(file, faults(added, tuple(ids)))
    if os.path.exists(file := os.path.join(folder, TEMPLATE)):
        read_template(file)


def _refuse(path: str, wrong: list[str]) -> None:
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}")


def find_fault(folder: str) -> None:
    """Find which file of a folder it is that no tokenizer can be made with.

    Raises:
        ValueError: naming it.
    """
    if os.path.exists(file := os.path.join(folder, BACKEND)):
        read_backend(file)
    for name in ("vocab.json", "merges.txt", "vocab.txt"):
        if os.path.exists(file := os.path.join(folder, name)):
            _ = read_json(file) if name.endswith(".json") else read_text(file)
    if os.path.exists(file := os.path.join(folder, "config.json")):  # it is asked for the class
        read_json(file)
        from transformers import AutoConfig  # here, because it reads the names of every model

        try:
            AutoConfig.from_pretrained(folder)
        except Exception as error:
            raise ValueError(f"{file}: transformers refuses it: {said(error)}") from error


def said(error: Exception) -> str:
    """Return what a library says of a fault, on one line."""
    return " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())


def read_config(path: str) -> dict[str, Any]:
    """Read a tokenizer_config.json.

    Raises:
        ValueError: with its fields of wrong types.
    """
    config = read_json(path)
    _refuse(path, faults(config, FIELDS))
    return config


def read_template(path: str) -> str:
    """Read a chat template.

    Raises:
        ValueError: an empty file, or none of text.
    """
    if text := read_text(path).strip():
        return text
    raise ValueError(f"{path}: expected a Jinja template, got an empty file")


def template_beside(folder: str, config: dict[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template, or the named ones, of a folder as transformers finds them: files
    before what tokenizer_config.json says."""
    paths = {"default": os.path.join(folder, TEMPLATE)}
    for path in pathlib.Path(folder, "additional_chat_templates").glob("*.jinja"):
        paths[path.stem] = str(path)
    named = {name: read_template(file) for name, file in paths.items() if os.path.exists(file)}
    said = config.get("chat_template")
    if not named and isinstance(said, list):
        return {one["name"]: one["template"] for one in said}
    return named["default"] if named.keys() == {"default"} else named or said


def read_backend(path: str) -> Tokenizer:
    """Read a tokenizer.json, gzipped or not.

    Raises:
        ValueError: none, or one that ``check_made`` refuses.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise ValueError(f"tokenizer {path!r}: {error}") from error
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # the library has no error of its own
        read_json(path)
        raise ValueError(f"{path}: not a tokenizer: {error}") from error
    check_made(path, backend)
    return backend


def check_made(path: str, backend: Tokenizer) -> None:
    """Refuse a tokenizer that makes other tokens of a text than its file says.

    Raises:
        ValueError: with the file, and what it says.
    """
    content = read_json(path)
    _refuse(path, [*_model_faults(content, backend), *_end_faults(content, backend)])


def _model_faults(content: Mapping[str, Any], backend: Tokenizer) -> Iterator[str]:
    if not content["model"].get("vocab"):
        yield "its model's vocab: expected tokens, got none"
    if dropout := content["model"].get("dropout"):
        yield (
            f"its model's dropout = {dropout}: the same text would become other tokens each time; "
            "set it to null"
        )
    for token in content.get("added_tokens") or ():
        found = backend.token_to_id(token["content"])
        if found != token["id"]:
            yield (
                f"added_tokens: {token['content']!r} is to have the id {token['id']}, and the "
                f"vocabulary gives it {found}: a token is renamed in both, or in neither"
            )


def _end_faults(content: Mapping[str, Any], backend: Tokenizer) -> Iterator[str]:
    """Tell what is wrong with the special tokens that are put around a text: the library ends the
    process at one that is not explained, and believes every id."""
    whole = content.get("post_processor") or {}
    for step in whole.get("processors", [whole]):
        if step.get("type") == "TemplateProcessing":
            explained = step["special_tokens"]
            for name in [*step["single"], *step["pair"]]:
                special = name.get("SpecialToken", {}).get("id")
                if special is not None and special not in explained:
                    known = nearest(special, explained) if explained else ", of which it has none"
                    yield f"post_processor: {special!r} is not among its special_tokens{known}"
            if not any(name.get("Sequence", {}).get("id") == "A" for name in step["single"]):
                yield "post_processor.single: the text itself ($A) is not in it"
            pairs = [pair for one in explained.values() for pair in zip(one["tokens"], one["ids"])]
        else:
            pairs = [step[name] for name in ("sep", "cls") if name in step]
        for token, index in pairs:
            if (found := backend.token_to_id(token)) != index:
                yield (
                    f"post_processor: {token!r} has the id {index} there, and "
                    f"{'none' if found is None else found} in the vocabulary"
                )

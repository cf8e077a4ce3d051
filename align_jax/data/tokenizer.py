# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: Hugging Face ones from a directory, a file or the hub, and a byte tokenizer made in
code."""

from __future__ import annotations

import difflib
import hashlib
import os
import pathlib
import re
from typing import Any

import jinja2
import jinja2.meta
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from align_jax.core.choose import nearest
from align_jax.core.fields import (
    Kind,
    faults,
    is_above_zero,
    is_bool,
    is_list_of,
    is_object,
    is_object_of,
    is_text,
    or_null,
)
from align_jax.core.files import json_kind, read_json, read_text
from align_jax.data import template as template_at_work

CHOSEN, REJECTED = "<|chosen|>", "<|rejected|>"  # control tokens of conditional fine-tuning
BYTE_SPECIALS = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    CHOSEN,
    REJECTED,
)
# 256 bytes and the specials, filled up to a multiple of 16 so that a tensor axis can split it
BYTE_VOCAB = 272
BYTE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] "
    "}}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
VOCABULARY = r"tokenizer\.|vocab|merges|.*\.(model|spm)$"  # files that may hold one
_END_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")


def _is_token(value: Any) -> bool:
    return value is None or is_text(value.get("content") if is_object(value) else value)


def _is_templates(value: Any) -> bool:
    return value is None or is_text(value) or is_list_of(is_object_of(is_text))(value)


SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")
GIVEN = (  # what a chat template may read
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "raise_exception",
    "strftime_now",
    *SPECIALS,
)
FIELDS = (  # of tokenizer_config.json
    Kind("text, an object with 'content', or null", _is_token, SPECIALS),
    Kind("a number above 0, or null", or_null(is_above_zero), ("model_max_length",)),
    Kind("text or null", or_null(is_text), ("tokenizer_class",)),
    Kind("a Jinja template, a list of named ones, or null", _is_templates, ("chat_template",)),
    Kind("true, false or null", or_null(is_bool), ("add_bos_token", "add_eos_token")),
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose first 256 ids are the bytes of UTF-8, with a chat template.

    Returns:
        A real fast tokenizer, which saves and loads as any other: vocabulary 272, ``<|end|>`` ends
        a turn and a text.
    """
    # ids 0..255 are the bytes' own values, under the byte-level alphabet's printable names for them
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in printable}
    names.update(
        {byte: chr(256 + rank) for rank, byte in enumerate(b for b in range(256) if b not in names)}
    )
    backend = Tokenizer(models.BPE(vocab={names[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_{i}|>" for i in range(BYTE_VOCAB - 256 - len(BYTE_SPECIALS))]
    backend.add_special_tokens([*BYTE_SPECIALS, *reserved])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = BYTE_TEMPLATE
    return tokenizer


def load_tokenizer(
    path: str, *, chat_template: str | None = None, date: str = ""
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        path: ``byte``; a directory; a ``tokenizer.json`` file, also gzipped; or a hub id.
        chat_template: replaces the tokenizer's own: a Jinja template, or a file that holds one.
        date: that the template is given as today's, YYYY-MM-DD; "" = today's.

    Returns:
        A fast tokenizer.  Code that comes with a tokenizer is never run.

    Raises:
        ValueError: nothing there, a damaged file (named), no fast tokenizer, no end-of-sequence
            token, or a chat template that is no Jinja template (with its line) or never ends.
    """
    tokenizer = _load(path)
    template_at_work.set_date(tokenizer, date)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {path!r}: only fast tokenizers (with a tokenizer.json) are supported"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {path!r} has no end-of-sequence token; set eos_token in its "
            "tokenizer_config.json"
        )
    if chat_template is None:
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        own, config = os.path.join(folder, TEMPLATE), os.path.join(folder, CONFIG)
        if not os.path.exists(own):
            own = f"{config if os.path.exists(config) else path}: chat_template"
        _check_template(tokenizer, own)
    elif os.path.isfile(chat_template):
        tokenizer.chat_template = _read_template(chat_template)
        _check_template(tokenizer, chat_template)
    elif "{" in chat_template:
        tokenizer.chat_template = chat_template
        _check_template(tokenizer, "the chat template given")
    else:
        raise ValueError(f"chat template {chat_template!r}: neither a file nor a Jinja template")
    return tokenizer


def _check_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a chat template that is none.

    Raises:
        ValueError: with ``where`` and the line.
    """
    found = tokenizer.chat_template
    for template in found.values() if isinstance(found, dict) else [found or ""]:
        if not isinstance(template, str):
            raise ValueError(f"{where}: expected a Jinja template, got {json_kind(template)}")
        try:
            template_at_work.apply(
                tokenizer, [{"role": "user", "content": "a"}], chat_template=template
            )
        except template_at_work.Endless as error:
            raise ValueError(f"{where}: {error}") from error
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{where}:{error.lineno}: no Jinja template: {error.message}"
            ) from error
        except Exception:  # what it makes of conversations is looked at row by row
            pass
        _check_names(template, where)


def _check_names(template: str, where: str) -> None:
    """Refuse a template with a name that it is not given and that is nearly one that it is: Jinja
    writes nothing for a name that there is not.

    Raises:
        ValueError: with both names.
    """
    try:
        syntax = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        names = jinja2.meta.find_undeclared_variables(syntax)
    except jinja2.TemplateSyntaxError:
        return  # of transformers' own tags
    for name in names - set(GIVEN):
        # "message" and "tool" may be names of loops that have ended
        if close := difflib.get_close_matches(name, GIVEN, n=1, cutoff=0.85):
            if f"{name}s" != close[0]:
                raise ValueError(
                    f"{where}: the template reads {name!r}; did you mean {close[0]!r}?"
                )


def _load(path: str) -> PreTrainedTokenizerBase:
    zipped = os.path.join(path, "tokenizer.json.gz")
    if path == "byte":
        return byte_tokenizer()
    if path.endswith((".json", ".json.gz")):
        return _from_file(path)
    if os.path.exists(zipped):
        return _from_file(zipped)
    if os.path.isdir(path) and not has_tokenizer(path):
        raise ValueError(
            f"tokenizer {path!r}: the folder has no tokenizer.json; name another by "
            "config.tokenizer"
        )
    if os.path.exists(file := os.path.join(path, CONFIG)):
        _read_config(file)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if os.path.exists(file := os.path.join(path, name)):
            read_json(file)  # a damaged one is not always seen
    if os.path.exists(file := os.path.join(path, TEMPLATE)):
        _read_template(file)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # transformers and tokenizers raise what they like at a damaged file, and seldom name it
    except Exception as error:
        if os.path.isdir(path):
            _find_fault(path)
        raise ValueError(
            f"tokenizer {path!r}: expected 'byte', a directory, a tokenizer.json or a hub id"
            f"{_near(path)}: {_said(error)}"
        ) from error


def _near(path: str) -> str:
    """Say which name or folder is nearest to one that is none; "" where none is near."""
    above = os.path.dirname(path)
    beside = os.listdir(above or ".") if os.path.isdir(above or ".") else []
    close = nearest(path, ["byte", *(os.path.join(above, name) for name in beside)])
    return close if "did you mean" in close and not os.path.isdir(path) else ""


def has_tokenizer(folder: str) -> bool:
    """Tell whether a model's folder has files of a tokenizer."""
    return any(re.match(VOCABULARY, one) for one in os.listdir(folder))


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())


def _find_fault(folder: str) -> None:
    """Find which file of a folder it is that no tokenizer can be made with.

    Raises:
        ValueError: naming it.
    """
    if os.path.exists(file := os.path.join(folder, "tokenizer.json")):
        _read_backend(file)
    for name in ("vocab.json", "merges.txt", "vocab.txt"):
        if os.path.exists(file := os.path.join(folder, name)):
            _ = read_json(file) if name.endswith(".json") else read_text(file)
    if os.path.exists(file := os.path.join(folder, "config.json")):  # it is asked for the class
        read_json(file)
        try:
            AutoConfig.from_pretrained(folder)
        except Exception as error:
            raise ValueError(f"{file}: transformers refuses it: {_said(error)}") from error


def _read_config(path: str) -> dict[str, Any]:
    config = read_json(path)
    if wrong := faults(config, FIELDS):
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    return config


def _read_template(path: str) -> str:
    if text := read_text(path).strip():
        return text
    raise ValueError(f"{path}: expected a Jinja template, got an empty file")


def _read_backend(path: str) -> Tokenizer:
    try:
        text = read_text(path)
    except OSError as error:
        raise ValueError(f"tokenizer {path!r}: {error}") from error
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library has no error of its own
        read_json(path)
        raise ValueError(f"{path}: not a tokenizer: {error}") from error


def _from_file(path: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer.json, with the special tokens and the template of the config beside it."""
    backend = _read_backend(path)
    config_path = os.path.join(os.path.dirname(path), CONFIG)
    config = _read_config(config_path) if os.path.exists(config_path) else {}
    names = {}
    for key in SPECIALS:
        value = config.get(key)
        if value is not None:
            names[key] = value["content"] if isinstance(value, dict) else value
    known = [name for name in _END_NAMES if backend.token_to_id(name) is not None]
    if "eos_token" not in names and known:
        names["eos_token"] = known[0]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
    )
    tokenizer.name_or_path = path
    tokenizer.chat_template = _template_beside(os.path.dirname(path), config)
    return tokenizer


def _template_beside(folder: str, config: dict[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template, or the named ones, of a folder as transformers finds them: files
    before what tokenizer_config.json says."""
    files = {"default": os.path.join(folder, TEMPLATE)}
    for path in pathlib.Path(folder, "additional_chat_templates").glob("*.jinja"):
        files[path.stem] = str(path)
    named = {name: _read_template(file) for name, file in files.items() if os.path.exists(file)}
    said = config.get("chat_template")
    if not named and isinstance(said, list):
        return {one["name"]: one["template"] for one in said}
    return named["default"] if named.keys() == {"default"} else named or said


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills rows: the pad token, or the end-of-sequence token (masks never
    depend on it)."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what this tokenizer puts before a plain text: its beginning-of-sequence token, or
    nothing."""
    ids = tokenizer("a").input_ids
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that decides how texts become tokens: model, special tokens, chat
    template."""
    parts = (
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template),
        str(tokenizer.special_tokens_map),
        template_at_work.date_read(tokenizer),
    )
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]

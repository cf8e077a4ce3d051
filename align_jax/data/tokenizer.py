# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: Hugging Face ones from a directory, a file or the hub, and a byte tokenizer made in
code."""

from __future__ import annotations

import difflib
import hashlib
import os

import jinja2
import jinja2.meta
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from align_jax.core.choose import nearest
from align_jax.core.files import json_kind
from align_jax.data import template as template_at_work
from align_jax.data import tokenizer_files as files

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
_END_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")


GIVEN = (  # what a chat template may read
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "raise_exception",
    "strftime_now",
    *files.SPECIALS,
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
    above = os.path.join(path, files.SPECIALS_MAP)  # which stands above the config
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {path!r} has no end-of-sequence token; set eos_token in its "
            f"{files.SPECIALS_MAP if os.path.exists(above) else files.CONFIG}"
        )
    if chat_template is None:
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        own, config = os.path.join(folder, files.TEMPLATE), os.path.join(folder, files.CONFIG)
        if not os.path.exists(own):
            own = f"{config if os.path.exists(config) else path}: chat_template"
        _check_template(tokenizer, own)
    elif os.path.isfile(chat_template):
        tokenizer.chat_template = files.read_template(chat_template)
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
    if os.path.isdir(path):
        files.check(path)
    from transformers import AutoTokenizer  # here, because it reads the names of every model

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # transformers and tokenizers raise what they like at a damaged file, and seldom name it
    except Exception as error:
        if os.path.isdir(path):
            files.find_fault(path)
        raise ValueError(
            f"tokenizer {path!r}: expected 'byte', a directory, a tokenizer.json or a hub id"
            f"{_near(path)}: {files.said(error)}"
        ) from error
    if os.path.exists(file := os.path.join(path, files.BACKEND)) and tokenizer.is_fast:
        files.check_made(file, tokenizer.backend_tokenizer)
    return tokenizer


def _near(path: str) -> str:
    """Say which name or folder is nearest to one that is none; "" where none is near."""
    above = os.path.dirname(path)
    beside = os.listdir(above or ".") if os.path.isdir(above or ".") else []
    close = nearest(path, ["byte", *(os.path.join(above, name) for name in beside)])
    return close if "did you mean" in close and not os.path.isdir(path) else ""


def _from_file(path: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer.json, with the special tokens and the template of the config beside it."""
    backend = files.read_backend(path)
    config_path = os.path.join(os.path.dirname(path), files.CONFIG)
    config = files.read_config(config_path) if os.path.exists(config_path) else {}
    names = {}
    for key in files.SPECIALS:
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
    tokenizer.chat_template = files.template_beside(os.path.dirname(path), config)
    return tokenizer


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

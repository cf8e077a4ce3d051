# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: Hugging Face ones from a directory, a file or the hub, and a byte tokenizer made in
code."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

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


def load_tokenizer(path: str, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        path: ``byte``; a directory; a ``tokenizer.json`` file, also gzipped; or a hub id.
        chat_template: replaces the tokenizer's own: a Jinja template, or a file that holds one.

    Returns:
        A fast tokenizer.  Code that comes with a tokenizer is never run.

    Raises:
        ValueError: nothing there, no fast tokenizer, or no end-of-sequence token.
    """
    tokenizer = _load(path)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {path!r}: only fast tokenizers (with a tokenizer.json) are supported"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {path!r} has no end-of-sequence token; set eos_token in its "
            "tokenizer_config.json"
        )
    if chat_template is not None:
        if os.path.isfile(chat_template):
            with open(chat_template, encoding="utf-8") as file:
                chat_template = file.read()
        elif "{" not in chat_template:
            raise ValueError(
                f"chat template {chat_template!r}: neither a file nor a Jinja template"
            )
        tokenizer.chat_template = chat_template
    return tokenizer


def _load(path: str) -> PreTrainedTokenizerBase:
    zipped = os.path.join(path, "tokenizer.json.gz")
    if path == "byte":
        return byte_tokenizer()
    if path.endswith((".json", ".json.gz")):
        return _from_file(path)
    if os.path.exists(zipped):
        return _from_file(zipped)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"tokenizer {path!r}: expected 'byte', a directory, a tokenizer.json or a hub id: "
            f"{error}"
        ) from error


def _from_file(path: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer.json, with the special tokens and the template of the config beside it."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            backend = Tokenizer.from_str(file.read())
    except OSError as error:
        raise ValueError(f"tokenizer {path!r}: {error}") from error
    config_path = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    config: dict[str, Any] = {}
    if os.path.exists(config_path):
        with open(config_path, encoding="utf-8") as file:
            config = json.load(file)
    names = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        if value is not None:
            names[key] = value["content"] if isinstance(value, dict) else value
    known = [name for name in _END_NAMES if backend.token_to_id(name) is not None]
    if "eos_token" not in names and known:
        names["eos_token"] = known[0]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
    )
    tokenizer.chat_template = config.get("chat_template")
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
    )
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]

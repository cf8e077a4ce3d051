# SPDX-License-Identifier: Apache-2.0
"""Tokens that a tokenizer has and a checkpoint's embedding has no row for: people add special ones,
such as a chat template's <|im_start|>.  The vocabulary grows to the tokenizer's; the new rows are
the mean of those that there are (``interop.hf.load``)."""

from __future__ import annotations

import dataclasses
from typing import Any

from align_jax.core.choose import nearest
from align_jax.data.tokenizer import load_tokenizer
from align_jax.data.tokenizer_files import has_tokenizer
from align_jax.interop import hf
from align_jax.models.config import ModelConfig

NEW = "new"  # among ``model.lora.tokens``: those that the vocabulary has grown by


def size(tokenizer: Any) -> int:
    """Return how many rows a tokenizer's ids need."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def grown(model: ModelConfig, tokenizer: Any, path: str, key: str) -> ModelConfig:
    """Return the model with a vocabulary that the tokenizer fits.

    Args:
        model: as the checkpoint has it.
        tokenizer: the run's.
        path: the checkpoint's folder or hub id, "" = random weights.
        key: of the config that names it.

    Raises:
        ValueError: the weights are random, or the tokenizer is another than the checkpoint's with
            tokens added.
    """
    needed = size(tokenizer)
    if needed <= model.vocab_size:
        return model
    said = f"the tokenizer has {needed} tokens, the vocabulary of {key} = {path!r} only"
    if not path:
        raise ValueError(
            f"{said} {model.vocab_size}: set vocab_size in its config, or use a smaller tokenizer"
        )
    if different := differing(tokenizer, path):
        raise ValueError(
            f"{said} {model.vocab_size}, and it is not that model's own tokenizer with tokens "
            f"added: {len(different)} of its tokens differ, {different[0]!r} among them; use the "
            "model's own tokenizer"
        )
    return dataclasses.replace(model, vocab_size=needed, vocab_rows=needed)


def differing(tokenizer: Any, path: str) -> list[str]:
    """Return the tokens that a checkpoint's own tokenizer, if it has one, knows by another id."""
    folder = hf.locate(path)
    if not has_tokenizer(folder):
        return []
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
    names = {index: token for token, index in ours.items()}
    return sorted(
        token
        for token, index in theirs.items()
        if ours.get(token, index) != index or names.get(index, token) != token
    )


def added(tokenizer: Any, had: int) -> tuple[str, ...]:
    """Return the tokens that a vocabulary of so many lacks, by id."""
    known = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return tuple(token for index, token in known if index >= had)


def trained_rows(tokens: tuple[str, ...], tokenizer: Any, new: tuple[str, ...]) -> tuple[int, ...]:
    """Return the ids of ``model.lora.tokens``.

    Raises:
        ValueError: a token that is none; "new" where there are none.
    """
    known = tokenizer.get_vocab()
    if NEW in tokens and not new:
        raise ValueError(
            "config.model.lora.tokens: 'new' are the tokens that the checkpoint's vocabulary has "
            "no rows for, and there are none: name the tokens themselves"
        )
    names = [one for name in tokens for one in (new if name == NEW else (name,))]
    for name in names:
        if name not in known:
            raise ValueError(
                f"config.model.lora.tokens: {name!r} is no token of the tokenizer"
                f"{nearest(name, tokenizer.get_added_vocab())}"
            )
    return tuple(dict.fromkeys(known[name] for name in names))

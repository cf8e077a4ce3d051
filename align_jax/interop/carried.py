# SPDX-License-Identifier: Apache-2.0
"""Files beside the weights that decide how a model behaves: from a checkpoint to what is made of
it, byte for byte."""

from __future__ import annotations

import fnmatch
import os
import pathlib
import re

from etils import epath
from transformers import PreTrainedTokenizerBase

from align_jax.interop import hf, hub

TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|tekken)\.json"
    r"|(merges|vocab)\.txt|.*\.(model|model\.v\w+|spm|tiktoken)|chat_template\.jinja"
    r"|additional_chat_templates/.*\.jinja"
)
# generation_config.json, preprocessor_config.json, ..., and the code that auto_map names; those of
# codes describe weights that are no more
SETTINGS = "|".join(
    [
        r"(?!adapter_|tokenizer_|(hf_)?quant_|quantize_)\w+_config\.json",
        *map(fnmatch.translate, hub.CODE),
    ]
)
# those that are taken away where the checkpoint has none: a name of the user's own is left alone
REPLACED = r"(generation|processor|(video_)?preprocessor)_config\.json"


def carry(source: str, output: str) -> None:
    """Copy a checkpoint's settings of generation and processors, and its code.

    Args:
        source: folder or hub id of the checkpoint.
        output: folder of what was made of it; settings that it had before are replaced.
    """
    _replace(output, REPLACED, _copy(hf.locate(source), output, SETTINGS))


def carry_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str, output: str) -> None:
    """Write a tokenizer's files: those that it came from as they are, where there are such.

    What a newer transformers saves, older programs may refuse.

    Args:
        tokenizer: as it is used.
        source: folder or hub id that it came from and that it still equals; "" = there is none.
        output: folder to write to; files of another tokenizer there are taken away.
    """
    written: set[str] = set()
    folder = hf.locate(source) if os.path.isdir(source) or source.count("/") == 1 else ""
    if folder and os.path.isfile(os.path.join(folder, "tokenizer.json")):
        written = _copy(folder, output, TOKENIZER)
    else:
        epath.Path(output).mkdir(parents=True, exist_ok=True)
        written = {os.path.relpath(path, output) for path in tokenizer.save_pretrained(output)}
    _replace(output, TOKENIZER, written)


def _copy(folder: str, output: str, pattern: str) -> set[str]:
    """Copy the files whose name fits, and return their names."""
    names = {
        path.relative_to(folder).as_posix()
        for part in ("*", "additional_chat_templates/*")
        for path in pathlib.Path(folder).glob(part)
        if path.is_file()
    }
    written = {name for name in names if re.fullmatch(pattern, name)}
    for name in written:
        to = epath.Path(output) / name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes((pathlib.Path(folder) / name).read_bytes())
    return written


def _replace(output: str, pattern: str, written: set[str]) -> None:
    """Take away the files of a kind that were there before."""
    for file in epath.Path(output).iterdir():
        if re.fullmatch(pattern, file.name) and file.name not in written:
            file.unlink()

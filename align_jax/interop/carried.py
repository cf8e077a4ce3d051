# SPDX-License-Identifier: Apache-2.0
"""Files beside the weights that decide how a model behaves: from a checkpoint to what is made of
it, byte for byte."""

from __future__ import annotations

import fnmatch
import json
import os
import re

from etils import epath
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from align_jax.core.files import read_json
from align_jax.data import tokenizer_files as files
from align_jax.interop import hf, hub

TEMPLATES = r"chat_template\.(json|jinja)|additional_chat_templates/.*\.jinja"
TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken)\.json"
    rf"|(merges|vocab)\.txt|.*\.(model|model\.v\w+|spm|tiktoken)|{TEMPLATES}"
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
REPLACED = r"(generation|processor|(video_)?preprocessor|(hf_)?quant|quantize)_config\.json"


def carry(source: str, output: str) -> None:
    """Copy a checkpoint's settings of generation and processors, and its code.

    Args:
        source: folder or hub id of the checkpoint; "" = random weights, which have none.
        output: folder of what was made of it; settings that it had before are replaced.
    """
    written = _copy(hf.locate(source), output, SETTINGS) if source else set()
    _replace(output, REPLACED, written)


def carry_tokenizer(
    tokenizer: PreTrainedTokenizerBase, source: str, output: str, *, template: str = ""
) -> None:
    """Write a tokenizer's files: those that it came from as they are, where there are such.

    What a newer transformers saves, older programs may refuse.

    Args:
        tokenizer: as it is used.
        source: folder or hub id that it came from; "", ``byte`` or a file = it is written anew.
        output: folder to write to; files of another tokenizer there are taken away.
        template: the chat template that it has instead of its source's; "" = its source's.
    """
    anew = source in ("", "byte") or os.path.isfile(source)
    folder = "" if anew else hf.locate(source)
    if folder and os.path.isfile(os.path.join(folder, files.BACKEND)):
        written = _copy(folder, output, TOKENIZER)
        if template:
            written = {name for name in written if not re.fullmatch(TEMPLATES, name)}
            written |= _set_template(output, template)
    else:
        epath.Path(output).mkdir(parents=True, exist_ok=True)
        written = {os.path.relpath(path, output) for path in tokenizer.save_pretrained(output)}
        if type(tokenizer) is TokenizersBackend:  # by the name that transformers 4 knows it by too
            _change(epath.Path(output) / files.CONFIG, tokenizer_class="PreTrainedTokenizerFast")
    _replace(output, TOKENIZER, written)


def _set_template(output: str, template: str) -> set[str]:
    """Write a chat template where older and where newer programs look for it first; return the
    files' names."""
    (epath.Path(output) / files.TEMPLATE).write_text(template)
    _change(epath.Path(output) / files.CONFIG, chat_template=template)
    return {files.TEMPLATE, files.CONFIG}


def _change(file: epath.Path, **fields: str) -> None:
    """Set fields of a JSON file, which need not be there."""
    found = read_json(str(file)) if file.exists() else {}
    file.write_text(json.dumps(found | fields, indent=2, ensure_ascii=False) + "\n")


def _copy(folder: str, output: str, pattern: str) -> set[str]:
    """Copy the files whose name fits, and return their names."""
    written = {name for name in _names(folder) if re.fullmatch(pattern, name)}
    for name in written:
        to = epath.Path(output) / name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes((epath.Path(folder) / name).read_bytes())
    return written


def _replace(output: str, pattern: str, written: set[str]) -> None:
    """Take away the files of a kind that were there before."""
    for name in _names(output) - written:
        if re.fullmatch(pattern, name):
            (epath.Path(output) / name).unlink()


def _names(folder: str) -> set[str]:
    """Return a folder's files, and of those below it the chat templates."""
    here = epath.Path(folder)
    found = [*here.glob("*"), *here.glob("additional_chat_templates/*")]
    return {str(path.relative_to(here)) for path in found if path.is_file()}

# SPDX-License-Identifier: Apache-2.0
"""The tensors of adapter_model.safetensors, by one name each however they are called there.

base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight
base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
─►  layers.0.self_attn.q_proj.lora_A.weight
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from align_jax.interop.peft_modules import bare
from align_jax.interop.peft_settings import TENSORS
from align_jax.interop.tensor_files import DTYPES, NO_FLOATS, Reader, listed
from align_jax.models import find_family

PREFIX = "base_model.model."
# behind these PEFT puts the adapter's name, which is in the file where others than it write it
NAMED = re.compile(
    r"(.+\.(?:lora_A|lora_B|lora_magnitude_vector|lora_embedding_A|lora_embedding_B"
    r"|modules_to_save|trainable_tokens_delta))\.(?!weight$|bias$)[^.]+(\.weight|\.bias)?"
)
ORIGINAL = r"\.original_module\.|\.trainable_tokens_original(\.|$)"


class Tensors(NamedTuple):
    """The tensors of an adapter's file."""

    found: Mapping[str, np.ndarray]  # float32, by their names without prefixes
    prefix: str  # what stands before the layers' names in the file: "model."
    family: str

    def module(self, name: str) -> str:
        """Return the name that a module had where the adapter was made."""
        short = bare(name, self.family)
        return name if short == name else self.prefix + short


def plain(name: str) -> str:
    """Return a tensor's name as PEFT writes it, without its prefix; the module that an adapter
    wraps is called as it would be without."""
    name = name.removeprefix(PREFIX)
    if match := NAMED.fullmatch(name):
        name = match[1] + (match[2] or "")
    wrapped = r"\.(modules_to_save|base_layer|token_adapter\.base_layer)\.(weight|bias)$"
    name = re.sub(wrapped, r".\2", name)
    return re.sub(r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector", name)


def read(folder: str, family: str) -> Tensors:
    """Read an adapter's tensors.

    Raises:
        ValueError: a damaged file, no floats, not finite, several of one name.
    """
    file = os.path.join(folder, TENSORS)
    with Reader(folder, TENSORS) as reader:
        # the base has what PEFT put something in the place of
        stored = sorted(name for name in reader.names if not re.search(ORIGINAL, name))
        other = [f"{name}: {reader.code(name)}" for name in stored]
        other = [one for one in other if one.rpartition(" ")[2] not in DTYPES]
        if other:
            raise ValueError(f"{file}:\n{listed({NO_FLOATS: other})}")
        names: dict[str, list[str]] = {}
        for name in stored:
            names.setdefault(bare(plain(name), family), []).append(name)
        found = {}
        twice = []
        for short, (name, *others) in names.items():
            found[short] = reader.read(name).astype(np.float32)
            if any(not reader.equal(name, other) for other in others):
                twice.append(" and ".join((name, *others)))
        if twice:
            kind = "of one module (several adapters in one file? save the one that is meant)"
            raise ValueError(f"{file}:\n{listed({kind: twice})}")
        reader.check_finite()
    before = collections.Counter(
        plain(those[0]).removesuffix(short)
        for short, those in names.items()
        if re.search(r"\.\d+\.", short)
    )
    own = find_family(family).modules or find_family(family).base
    return Tensors(found, before.most_common(1)[0][0] if before else own, family)

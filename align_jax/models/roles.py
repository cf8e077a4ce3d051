# SPDX-License-Identifier: Apache-2.0
"""What a parameter is to those that treat parameters unlike: declared where the parameter is made.

``Model.roles()`` is a tree beside the parameters, as ``Model.axes()`` is.  It is read by

    weight decay, Muon               training.optim
    what is trained beside a base    training.partitioning, runs.weights
    adapters and their targets       models.lora, interop.peft
    quantization                     models.quantize
    the copy that generates          inference.resharding
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

PARTS = ("embedding", "norm", "linear", "router", "expert", "output", "adapter", "head")


@dataclasses.dataclass(frozen=True)
class Role:
    """What one parameter is.

    Attributes:
        part: of the model: a name of ``PARTS``.  "linear" is a linear map inside the layers,
            "output" the language-model head, "head" a scalar one.
        inputs: of a matrix, how many axes are contracted with what flows through; the axes behind
            them are its outputs.  0 = a table that is looked up, or no matrix.
        leading: axes before those, along which there are many such parameters: layers, experts.
        matrix: false for what scales or shifts a feature: a norm's scale, a bias, a magnitude.
        target: what an adapter's ``targets`` are matched with: "attention/query", "embed",
            "output"; "" = never.
    """

    part: str
    inputs: int = 0
    leading: int = 0
    matrix: bool = True
    target: str = ""

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"unknown part of a model {self.part!r}; known: {', '.join(PARTS)}")

    @property
    def decayed(self) -> bool:
        """Whether weight decay pulls it towards zero."""
        return self.matrix

    @property
    def beside_base(self) -> bool:
        """Whether it is trained beside a frozen base."""
        return self.part in ("adapter", "head")

    @property
    def adaptable(self) -> bool:
        """Whether an adapter may stand beside it."""
        return self.part in ("linear", "router", "embedding", "output") and bool(self.target)

    @property
    def quantized(self) -> bool:
        """Whether a frozen base in few bits holds it so."""
        return self.part in ("linear", "expert") and self.inputs > 0

    @property
    def hidden_matrix(self) -> bool:
        """Whether it is a matrix between hidden states, neither at the ends nor a scalar head."""
        return self.part in ("linear", "router", "expert", "adapter") and self.inputs > 0

    def vector(self) -> Role:
        """Return the role of what scales or shifts this matrix's outputs."""
        return Role(self.part, matrix=False)


def role_of(roles: Mapping[str, Any], path: str) -> Role:
    """Look a parameter's role up.

    Args:
        roles: path -> role, a flattened ``Model.roles()``.
        path: "layers/mlp/up/kernel".

    Raises:
        ValueError: none is declared.
    """
    if path not in roles:
        raise ValueError(f"parameter {path} has no role: declare one where the parameter is made")
    return roles[path]

# SPDX-License-Identifier: Apache-2.0
"""From files to batches: sources, formats, chat templates, truncation, packing; numpy only, no
device is touched.

    sources -> formats -> datasets (kinds converted) -> chat (spans) -> encoding (tokens) ->
    truncation -> packing -> layout (rows) -> pipeline (steps)

The tables: ``FORMATS``, ways of writing feedback down, and ``DATASETS``, public data sets by name.
"""

from align_jax.data.formats import FORMATS
from align_jax.data.named import DATASETS

__all__ = ["DATASETS", "FORMATS"]

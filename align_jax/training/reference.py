# SPDX-License-Identifier: Apache-2.0
"""The reference's token log-probabilities, computed once and kept on disk
(``reference.mode = "cached"``).

A cache holds, for every response of a data set, the log-probabilities of its loss tokens in order.
Its name is a hash of all they depend on: examples, tokenizer, truncation, weights, types.  Another
run with the same name reuses it; the file repeats the name and the lengths, so a wrong or damaged
one is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from align_jax.core.files import read_arrays, writing
from align_jax.core.schema import Batch


def weights_digest(folder: str | None, seed: int) -> list[Any]:
    """Tell a checkpoint's weights apart: file names, sizes, times and safetensors headers; random
    weights by seed.

    Args:
        folder: local folder of the checkpoint; None for random weights.
        seed: of random weights.
    """
    if folder is None:
        return ["random", seed]
    found: list[Any] = [
        hashlib.sha256((epath.Path(folder) / "config.json").read_bytes()).hexdigest()
    ]
    for path in sorted(epath.Path(folder).glob("*.safetensors")):
        stat = path.stat()
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        found.append([path.name, stat.length, stat.mtime, hashlib.sha256(header).hexdigest()])
    return found


def digest_of(inputs: Any) -> str:
    """Hash what a cache depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _responses(batch: Batch) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield of each response: its number in the data set (example * R + response), its row, and
    which of the row's tokens it bears loss on, bool [T]; fillers are left out."""
    assert batch.example_index is not None  # batches of a data set have it
    rows, count = batch.tokens.shape[0], batch.lengths.shape[1]
    slots = batch.lengths.size // rows
    for number in range(batch.lengths.size):
        group, response = divmod(number, count)
        example = int(batch.example_index[group])
        if example >= 0:
            row, slot = divmod(number, slots)
            tokens = batch.loss_mask[row] & (batch.slot[row] == slot)
            yield example * count + response, row, np.asarray(tokens)


class Cache:
    """Token log-probabilities by (example, response).

    Attributes:
        token_logps: float32, all responses' loss tokens one after another, in nats.
        ends: response ``r`` of example ``g`` is
            ``token_logps[ends[g * R + r]:ends[g * R + r + 1]]``.
    """

    def __init__(self, token_logps: np.ndarray, ends: np.ndarray):
        self.token_logps, self.ends = token_logps, ends

    def fill(self, batch: Batch, field: str = "reference_token_logps") -> Batch:
        """Return the batch with ``field`` [N, T], token log-probabilities.

        Raises:
            ValueError: a response has another number of loss tokens than the cache knows.
        """
        out = np.zeros(batch.tokens.shape, np.float32)
        for number, row, tokens in _responses(batch):
            values = self.token_logps[self.ends[number] : self.ends[number + 1]]
            if len(values) != tokens.sum():
                example, response = divmod(number, batch.lengths.shape[1])
                raise ValueError(
                    f"the reference cache has {len(values)} tokens for response {response} of "
                    f"example {example}, the batch {tokens.sum()}: delete the cache, it is not "
                    "this data's"
                )
            out[row, tokens] = values
        filled: dict[str, Any] = {field: out}
        return batch._replace(**filled)


def compute(batches: Iterable[Batch], step: Callable[[Batch], jax.Array], examples: int) -> Cache:
    """Run the reference over a data set once.

    Args:
        batches: each example once, this process's rows.
        step: a batch to its token log-probabilities [N, T] on the devices.
        examples: how many there are; those that truncation dropped have no tokens.
    """
    parts: dict[int, np.ndarray] = {}
    responses = 1
    for batch in batches:
        logps = multihost_utils.process_allgather(step(batch), tiled=True)
        if jax.process_count() > 1:
            batch = multihost_utils.process_allgather(batch, tiled=True)
        responses = batch.lengths.shape[1]
        for number, row, tokens in _responses(batch):
            parts[number] = np.asarray(logps[row][tokens], np.float32)
    none = np.zeros(0, np.float32)
    ordered = [parts.get(number, none) for number in range(examples * responses)]
    ends = np.concatenate([[0], np.cumsum([len(part) for part in ordered])])
    return Cache(np.concatenate(ordered), ends)


def save(path: epath.Path, cache: Cache, inputs: Mapping[str, Any]) -> None:
    """Write a cache; complete or not at all."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        token_logps=cache.token_logps,
        ends=cache.ends,
        inputs=digest_of(inputs),
        digest=hashlib.sha256(cache.token_logps.tobytes()).hexdigest(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f"{path.name}.partial"
    with writing(partial):
        partial.write_bytes(buffer.getvalue())
    partial.rename(path)


def load(path: epath.Path, inputs: Mapping[str, Any]) -> Cache | None:
    """Read a cache; None if there is none.

    Raises:
        ValueError: the file is damaged, or of other data or weights than its name says.
    """
    if not path.exists():
        return None
    try:
        file = read_arrays(path)
        cache = Cache(file["token_logps"], file["ends"])
        sound = str(file["digest"]) == hashlib.sha256(cache.token_logps.tobytes()).hexdigest()
        same = str(file["inputs"]) == digest_of(inputs)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"the reference cache {path} cannot be read ({error}): delete it, it will be made anew"
        ) from error
    if not (sound and same):
        fault = "of other data or weights" if sound else "damaged"
        raise ValueError(f"the reference cache {path} is {fault}: delete it, it will be made anew")
    return cache

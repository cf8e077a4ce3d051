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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

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


class Cache:
    """Token log-probabilities by (example, response).

    Attributes:
        token_logps: float32, all responses' loss tokens one after another, in nats.
        ends: response ``r`` of example ``g`` is
            ``token_logps[ends[g * R + r]:ends[g * R + r + 1]]``.
    """

    def __init__(self, token_logps: np.ndarray, ends: np.ndarray):
        self.token_logps, self.ends = token_logps, ends

    def fill(self, batch: Batch) -> Batch:
        """Return the batch with ``reference_token_logps`` [N, T].

        Raises:
            ValueError: a response has another number of loss tokens than the cache knows.
        """
        rows, responses = batch.tokens.shape[0], batch.lengths.shape[1]
        slots = batch.lengths.size // rows
        out = np.zeros(batch.tokens.shape, np.float32)
        for number in range(batch.lengths.size):
            group, response = divmod(number, responses)
            example = int(batch.example_index[group])
            if example < 0:
                continue
            row, slot = divmod(number, slots)
            places = np.nonzero(batch.loss_mask[row] & (batch.slot[row] == slot))[0]
            at = example * responses + response
            values = self.token_logps[self.ends[at] : self.ends[at + 1]]
            if len(values) != len(places):
                raise ValueError(
                    f"the reference cache has {len(values)} tokens for response "
                    f"{response} of example "
                    f"{example}, the batch {len(places)}: delete the cache, it is "
                    "not this data's"
                )
            out[row, places] = values
        return batch._replace(reference_token_logps=out)


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
        whole = (
            batch
            if jax.process_count() == 1
            else multihost_utils.process_allgather(batch, tiled=True)
        )
        responses = whole.lengths.shape[1]
        slots = whole.lengths.size // whole.tokens.shape[0]
        for number in range(whole.lengths.size):
            group, response = divmod(number, responses)
            if (example := int(whole.example_index[group])) >= 0:
                row, slot = divmod(number, slots)
                mask = whole.loss_mask[row] & (whole.slot[row] == slot)
                parts[example * responses + response] = np.asarray(logps[row][mask], np.float32)
    none = np.zeros(0, np.float32)
    ordered = [parts.get(number, none) for number in range(examples * responses)]
    return Cache(
        np.concatenate(ordered), np.concatenate([[0], np.cumsum([len(part) for part in ordered])])
    )


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
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            cache = Cache(file["token_logps"], file["ends"])
            sound = str(file["digest"]) == hashlib.sha256(cache.token_logps.tobytes()).hexdigest()
            same = str(file["inputs"]) == digest_of(inputs)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(
            f"the reference cache {path} cannot be read ({error}): delete it, it will be made anew"
        ) from error
    if not (sound and same):
        raise ValueError(
            f"the reference cache {path} is "
            f"{'of other data or weights' if sound else 'damaged'}: delete "
            "it, it will be made anew"
        )
    return cache

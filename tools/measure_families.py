# SPDX-License-Identifier: Apache-2.0
"""Measure each family of the tests against transformers, for the table of docs/families.md.

    python tools/measure_families.py [--only="llama;gpt_oss"]

Of a tiny random model in float32: the largest difference of the logits over padded rows, how many
greedily drawn tokens are the same, whether an export holds the same bytes. Some five seconds a
case.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]

import test_families as cases

from align_jax.interop import hf

NEW = 12  # tokens drawn


def measure(case: str, folder: pathlib.Path) -> str:
    """Return a row of the table."""
    family, changes = cases.CASES[case]
    theirs, ours, params = cases.make_peer(family, changes, folder)
    tokens, segments, positions = cases.padded_rows()
    extra = {} if family == "opt" else {"position_ids": torch.tensor(positions)}
    with torch.no_grad():
        mask = torch.tensor(segments)
        expected = theirs(torch.tensor(tokens), attention_mask=mask, **extra).logits.numpy()
    hidden, _ = jax.jit(ours.hidden)(params, tokens, segments, positions)
    got = np.asarray(ours.unembed(params, hidden))
    # transformers scales every row by the longest of the batch, we by the run's length
    real = segments * [[1], [0], [0]] if "dynamic" in case else segments
    error = np.abs(got - expected)[real > 0].max()
    hf.save(str(folder / "out"), ours.config, params, beside=str(folder))
    before, after = (load_file(at / "model.safetensors") for at in (folder, folder / "out"))
    same = before.keys() == after.keys() and all(
        torch.equal(x, after[n]) for n, x in before.items()
    )
    lines = len((ROOT / f"align_jax/models/families/{file_of(family)}.py").read_text().splitlines())
    kept = "yes" if same else "NO"
    return f"| {case} | {error:.0e} | {greedy(theirs, ours, params)} | {kept} | {lines} |"


def file_of(family: str) -> str:
    """Return the family's file."""
    own = ROOT / f"align_jax/models/families/{family}.py"
    return family if own.exists() else "towers"


def greedy(theirs, ours, params) -> str:
    """Draw with both from a prompt, and count the tokens that are the same."""
    prompt = np.asarray([[5, 9, 33, 17, 8]], np.int32)
    theirs.generation_config.eos_token_id = None
    text = theirs.generate(torch.tensor(prompt).long(), max_new_tokens=NEW, do_sample=False)
    width = prompt.shape[1]
    cache = ours.init_cache(1, width + NEW, jnp.float32)
    places = np.arange(width, dtype=np.int32)[None]
    hidden, cache = jax.jit(ours.prefill)(params, prompt, np.ones_like(prompt), places, cache)
    last, decode, drawn = hidden[:, -1], jax.jit(ours.decode), []
    for step in range(NEW):
        drawn.append(int(np.argmax(np.asarray(ours.unembed(params, last)))))
        token, place = (jnp.asarray([x], jnp.int32) for x in (drawn[-1], width + step))
        last, cache = decode(params, token, place, cache)
    same = sum(a == b for a, b in zip(drawn, text[0, width:].tolist()))
    return f"{same} of {NEW}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases, separated by semicolons; none = all")
    wanted = parser.parse_args().only
    for case in wanted.split(";") if wanted else cases.CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(case, pathlib.Path(folder)), flush=True)


if __name__ == "__main__":
    main()

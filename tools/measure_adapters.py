# SPDX-License-Identifier: Apache-2.0
"""Measure what adapters save, and what bfloat16 costs: bytes of a DPO run's state, and
log-probabilities of real text.

    python tools/measure_adapters.py [--model=HF_DIRECTORY] [--text=FILE]

Prints the bytes that a full fine-tune, LoRA and QLoRA hold (trained, optimizer, frozen; the frozen
base is the reference, and with adapters the policy's own base too), of a model and of a 7B's
shapes; then how far bfloat16 compute is from float32 on a text's stories (parts between
<|endoftext|>). One JSON line each.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from align_jax import losses
from align_jax.core import config as configs
from align_jax.core.config import ConfigDict, defaults
from align_jax.data.tokenizer import load_tokenizer
from align_jax.interop import hf
from align_jax.models.model import build
from align_jax.parallel.mesh import make_mesh
from align_jax.runs import setup

DATA = pathlib.Path(
    os.environ.get("ALIGN_JAX_TESTDATA", pathlib.Path(__file__).parents[2] / "shared" / "data")
)
SEVEN = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
)
# rank, quantization
KINDS = {"full": (0, ""), "lora": (16, ""), "lora int8": (16, "int8"), "lora nf4": (16, "nf4")}


def size(tree: object) -> int:
    """Return the bytes of a tree of shapes and types."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def held(kind: str, path: str, frozen: str) -> dict[str, object]:
    """Say what a DPO run of this kind holds, in bytes; path "" is the 7B's shapes."""
    config = defaults()
    config.model.path, config.model.family, config.reference.dtype = path, "mistral", frozen
    config.model.config = ConfigDict(SEVEN)
    config.model.lora.rank, config.model.quantize = KINDS[kind]
    config.objective = ConfigDict(losses.options("dpo"))
    config.data.train, config.total_steps, config.max_length = "builtin:preferences:train", 1, 128
    options = configs.read(config)
    resolved = setup.resolve_config(options, 1)
    step_spec = setup.make_step_spec(options, resolved, 1)
    specs = setup.make_state_specs(
        options, resolved, step_spec, make_mesh({"data": 1}, jax.devices()[:1])
    )
    sizes = {
        "trained": size(specs.trained),
        "optimizer": size(specs.state["opt_state"]),
        "frozen": size(specs.frozen),
    }
    return {
        "kind": kind,
        "model": path and pathlib.Path(path).name or "7B",
        "frozen_dtype": frozen,
        **sizes,
        "total": sum(sizes.values()),
    }


def log_probabilities(
    path: str, stories: list[str], length: int, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return each token's log-probability, and which are of the text, [stories, length - 1]."""
    tokenizer = load_tokenizer(path)
    rows = [
        (
            [tokenizer.bos_token_id]
            + tokenizer(story.strip(), add_special_tokens=False)["input_ids"]
        )[:length]
        for story in stories
    ]
    tokens = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    segments = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    config, params = hf.load(path, dtype="float32")
    model = build(config, compute_dtype=dtype, remat="none")

    @jax.jit
    def run_model(params, tokens, segments, positions):
        logits = model.unembed(params, model.hidden(params, tokens, segments, positions)[0][:, :-1])
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]

    return np.asarray(run_model(params, tokens, segments, positions)), segments[:, 1:] > 0


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DATA / "models" / "TinyStories-656K"))
    parser.add_argument("--text", default=str(DATA / "text" / "tinystories_sample_262k.txt"))
    parser.add_argument("--stories", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    for path, frozen in ((options.model, "float32"), ("", "bfloat16")):
        for kind in KINDS:
            print(json.dumps(held(kind, path, frozen)), flush=True)
    stories = (
        pathlib.Path(options.text)
        .read_text(encoding="utf-8")
        .split("<|endoftext|>")[1 : options.stories + 1]
    )
    exact, mask = log_probabilities(options.model, stories, options.length, "float32")
    near, _ = log_probabilities(options.model, stories, options.length, "bfloat16")
    change = np.abs(near - exact)[mask]
    print(
        json.dumps(
            {
                "text": pathlib.Path(options.text).name,
                "tokens": int(mask.sum()),
                "nll_float32": float(-exact[mask].mean()),
                "nll_bfloat16": float(-near[mask].mean()),
                "mean_change": float(change.mean()),
                "p99_change": float(np.percentile(change, 99)),
                "largest_change": float(change.max()),
            }
        )
    )


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Measure the train step on this machine: its variants side by side, in one run, as ratios.

    python -m align_jax.bench [--preset=llama_1b_dpo] [--variants=base,layout=packed] [--json=FILE]

Random weights and made-up text of the preset's lengths; every variant takes the same examples
through the same state. Rounds are interleaved, so that what else the machine does falls on all of
them alike.  Without ``--preset`` the one for the machine's kind of device is taken.
"""

from __future__ import annotations

from absl import flags

from align_jax.runs import command

if __name__ == "__main__":  # here, because what is imported next takes seconds
    flags.DEFINE_string("preset", "", "What to measure; by default what suits the device.")
    flags.DEFINE_list(
        "variants", [], "Variants of the step, the first one the base; by default the preset's."
    )
    flags.DEFINE_integer("batch_size", 0, "Pairs in a step; 0 = the preset's.", 0)
    flags.DEFINE_integer("rounds", 5, "Turns of each variant; the median counts.", 1)
    flags.DEFINE_integer("steps", 3, "Optimizer steps in a turn.", 1)
    flags.DEFINE_string("json", "", "Write the measurements to this file.")
    arguments = command.read()

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax import losses
from align_jax.core import config as configs
from align_jax.core.choose import choose
from align_jax.core.files import write_text
from align_jax.core.schema import Example
from align_jax.core.tree import flatten
from align_jax.data.datasets import Examples
from align_jax.parallel.chips import GIB, peak_flops
from align_jax.parallel.mesh import make_mesh
from align_jax.parallel.sharding import put_batch
from align_jax.runs import setup, weights
from align_jax.training import initialize, partitioning
from align_jax.training.flops import step_flops


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model and the shape of its data.

    Attributes:
        model: fields of a Hugging Face Llama config.
        objective: a key of losses.OBJECTIVES, for pairs.
        batch_size: pairs in a step.
        max_length: tokens of prompt and response.
        prompt, response: median tokens; lengths are log-normal, a third of a factor e wide.
        compute_dtype: of activations and products.
        variants: names of ``VARIANTS``, the first one the base of the ratios.
    """

    model: Mapping[str, Any]
    objective: str
    batch_size: int
    max_length: int
    prompt: int
    response: int
    compute_dtype: str
    variants: tuple[str, ...]


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "base": {},
    "remat=none": {"model.remat": "none"},
    "remat=dots": {"model.remat": "dots"},
    "remat=attention": {"model.remat": "attention"},
    "attention=xla": {"model.attention": "xla"},
    "attention=blocks": {"model.attention": "blocks"},
    "attention=segments": {"model.attention": "segments"},
    "attention=cudnn": {"model.attention": "cudnn"},
    "attention=splash": {"model.attention": "splash"},
    "layout=plain": {"data.layout": "plain"},
    "layout=packed": {"data.layout": "packed"},
    "layout=shared_prefix": {"data.layout": "shared_prefix"},
    "microbatches=2": {"microbatches": 2},
    "microbatches=4": {"microbatches": 4},
    "reference=cached": {"reference.mode": "cached"},
    "lora": {"model.lora.rank": 16},
}
_COMMON = (
    "base",
    "remat=none",
    "remat=dots",
    "remat=attention",
    "layout=plain",
    "layout=packed",
    "reference=cached",
)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_TINY = dict(zip(_SIZES, (2048, 192, 512, 4, 6, 2, 1024)))
_110M = dict(zip(_SIZES, (32000, 768, 2048, 12, 12, 12, 1024)))
_LLAMA_3_2_1B = dict(
    zip(_SIZES, (128256, 2048, 8192, 16, 32, 8, 131072)),
    head_dim=64,
    rope_theta=500000.0,
    tie_word_embeddings=True,
)
PRESETS: Mapping[str, Preset] = {
    "tiny_dpo": Preset(
        _TINY,
        "dpo",
        batch_size=8,
        max_length=256,
        prompt=128,
        response=48,
        compute_dtype="float32",
        variants=(*_COMMON, "attention=blocks", "microbatches=2"),
    ),
    "llama_110m_dpo": Preset(
        _110M,
        "dpo",
        batch_size=8,
        max_length=512,
        prompt=256,
        response=96,
        compute_dtype="bfloat16",
        variants=_COMMON,
    ),
    "llama_1b_dpo": Preset(
        _LLAMA_3_2_1B,
        "dpo",
        batch_size=16,
        max_length=1024,
        prompt=384,
        response=192,
        compute_dtype="bfloat16",
        variants=(*_COMMON, "attention=xla", "attention=blocks", "microbatches=4"),
    ),
}
DEFAULT = {"cpu": "tiny_dpo"}  # by backend; else llama_1b_dpo


def make_config(preset: Preset, changes: Mapping[str, Any]) -> ConfigDict:
    """Return a run's config for a preset with a variant's changes."""
    config = configs.defaults()
    config.total_steps = 1000
    config.batch_size, config.max_length = preset.batch_size, preset.max_length
    config.tokenizer = "byte"
    config.model.family = "llama"
    config.model.config = ConfigDict(dict(preset.model))
    config.model.compute_dtype = preset.compute_dtype
    config.reference.dtype = preset.compute_dtype
    config.data.train = "builtin:preferences:train"  # not read: the examples are made here
    config.objective = ConfigDict(losses.options(preset.objective))
    for key, value in changes.items():
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = value
    return config


def make_examples(preset: Preset, seed: int = 0) -> Examples:
    """Make pairs whose lengths in bytes, that is in tokens, are drawn log-normally and fit
    ``max_length``."""
    rng = np.random.default_rng(seed)
    letters = np.asarray(list("abcdefghijklmnopqrstuvwxyz "))

    def text(median: int, most: int) -> str:
        length = int(np.clip(median * np.exp(rng.normal() / 3), 4, most))
        return "".join(rng.choice(letters, length))

    room = preset.max_length - 8  # turn tokens
    items = tuple(
        Example(
            text(preset.prompt, room * 2 // 3),
            tuple(text(preset.response, room // 3) for _ in range(2)),
            source=f"made[{i}]",
        )
        for i in range(8 * preset.batch_size)
    )
    return Examples("pairs", items, (len(items),), None, f"bench-{seed}", {})


class Variant:
    """One variant of the step, compiled: it takes a state and gives one back."""

    def __init__(self, preset: Preset, changes: Mapping[str, Any], examples: Examples, mesh: Mesh):
        config = configs.read(make_config(preset, changes))
        resolved = setup.resolve_config(config, mesh.size)
        self.spec = setup.make_step_spec(config, resolved, total_steps=1000)
        self.specs = setup.make_state_specs(config, resolved, self.spec, mesh)
        self.config, self.seconds = config, list[float]()
        pipeline = setup.make_pipeline(config, resolved, mesh, examples, once=False)
        batch = pipeline.batch(0)
        if config.reference.mode == "cached":
            batch = batch._replace(reference_token_logps=np.zeros(batch.tokens.shape, np.float32))
        self.tokens, self.positions = int((batch.segment_ids > 0).sum()), batch.tokens.size
        self.groups = int((batch.weight > 0).sum())
        segment = None if pipeline.layout == "plain" else preset.prompt + preset.response
        self.flops = step_flops(self.spec, batch, segment_length=segment)
        self.batch = put_batch(mesh, batch)
        began = time.monotonic()
        self.step = partitioning.lower_train_step(
            self.spec, self.specs.state, self.specs.frozen, self.batch, mesh
        ).compile()
        self.compile_seconds = time.monotonic() - began

    @property
    def bytes(self) -> int:
        """Device memory that the step takes; 0 where the platform does not say."""
        stats = self.step.memory_analysis()
        if not stats:
            return 0
        new = stats.output_size_in_bytes - stats.alias_size_in_bytes
        return stats.argument_size_in_bytes + new + stats.temp_size_in_bytes

    def start(self) -> tuple[Any, Any]:
        """Return a first state and the frozen weights, drawn at random."""
        frozen, trained = weights.load_start(self.spec, self.specs, self.config)
        return initialize.first_state(self.spec, self.specs, trained), frozen

    def takes(self, state: Any, frozen: Any) -> bool:
        """Tell whether this variant can go on with another one's state and frozen weights."""
        wanted: Any = jax.tree.structure(self.specs.state)
        return (
            state is not None
            and wanted == jax.tree.structure(state)
            and not flatten(self.specs.frozen).keys() - flatten(frozen).keys()
        )

    def time(self, state: Any, frozen: Any, steps: int) -> Any:
        """Take so many steps and note the seconds of one; return the state."""
        frozen = {
            name: partitioning.select(frozen[name], part)
            for name, part in self.specs.frozen.items()
        }
        jax.block_until_ready(state)
        began = time.monotonic()
        for _ in range(steps):
            state, metrics = self.step(state, frozen, self.batch)
        jax.block_until_ready(metrics)
        self.seconds.append((time.monotonic() - began) / steps)
        return state

    def report(self, peak: float) -> dict[str, Any]:
        """Return what was measured."""
        seconds = statistics.median(self.seconds)
        return {
            "seconds": seconds,
            "spread": max(self.seconds) / min(self.seconds) - 1,
            "groups": self.groups,
            "groups_per_second": self.groups / seconds,
            "tokens_per_second": self.tokens / seconds,
            "padding_fraction": 1 - self.tokens / self.positions,
            "bytes": self.bytes,
            "mfu": self.flops.model / seconds / peak if peak else None,
            "compile_seconds": self.compile_seconds,
        }


def measure(
    preset: Preset, names: Sequence[str], mesh: Mesh, *, rounds: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Measure variants side by side.

    Args:
        preset: model and data.
        names: of ``VARIANTS``.
        mesh: over all devices.
        rounds: how often each variant has its turn; the median counts.
        steps: optimizer steps in a turn.

    Returns:
        name -> what was measured, or {"error": why it could not be}.
    """
    examples, found, variants = make_examples(preset), {}, {}
    with jax.set_mesh(mesh):
        for name in names:
            try:
                variants[name] = Variant(preset, VARIANTS[name], examples, mesh)
                _warm_up(variants[name])
            except (RuntimeError, ValueError) as error:  # JAX's own are of the former
                variants.pop(name, None)
                found[name] = {"error": str(error).splitlines()[0][:300]}
        state = frozen = None
        for _ in range(rounds):
            for variant in variants.values():
                # a tree of other parameters: a state of its own
                if not variant.takes(state, frozen):
                    state = frozen = None
                    state, frozen = variant.start()
                state = variant.time(state, frozen, steps)
    peak = peak_flops(list(mesh.devices.flat))
    return found | {name: variant.report(peak) for name, variant in variants.items()}


def _warm_up(variant: Variant) -> None:
    """Run once on a state of its own, which is then thrown away: a variant that cannot run is found
    here."""
    state, frozen = variant.start()
    variant.time(state, frozen, 1)
    variant.seconds.clear()


def table(rows: Mapping[str, Mapping[str, Any]], base: str) -> str:
    """Write the measurements as text; ratios are of pairs a second, to the first variant."""
    first = rows[base].get("groups_per_second")
    heads = (
        ("ms a step", 10),
        ("pairs/s", 9),
        ("tokens/s", 10),
        ("ratio", 7),
        ("padding", 9),
        ("GiB", 7),
        ("MFU", 7),
    )
    out = [f"{'variant':<22}" + "".join(f"{head:>{width}}" for head, width in heads)]
    for name, row in rows.items():
        if "error" in row:
            out.append(f"{name:<22}  {row['error'][:90]}")
            continue
        ratio = f"{row['groups_per_second'] / first:7.2f}" if first else "      -"
        mfu = f"{row['mfu']:7.1%}" if row["mfu"] else "      -"
        out.append(
            f"{name:<22}{1e3 * row['seconds']:10.1f}{row['groups_per_second']:9.2f}"
            f"{row['tokens_per_second']:10,.0f}{ratio}{row['padding_fraction']:9.1%}"
            f"{row['bytes'] / GIB:7.2f}{mfu}"
        )
    return "\n".join(out)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    options = flags.FLAGS
    written = command.output_path("json")
    name = options.preset or DEFAULT.get(jax.default_backend(), "llama_1b_dpo")
    preset = choose(PRESETS, name, "--preset")
    if options.batch_size:
        preset = dataclasses.replace(preset, batch_size=options.batch_size)
    names = tuple(options.variants) or preset.variants
    for one in names:
        choose(VARIANTS, one, "--variants")
    mesh = make_mesh({"fsdp": -1})
    rows = measure(preset, names, mesh, rounds=options.rounds, steps=options.steps)
    rows = {one: rows[one] for one in names}
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    print(
        f"{name} on {devices}, JAX {jax.__version__}: {preset.batch_size} pairs, at most "
        f"{preset.max_length} tokens"
    )
    print(table(rows, names[0]))
    if written is not None:
        write_text(
            written,
            json.dumps(
                {"preset": name, "devices": devices, "jax": jax.__version__, "variants": rows},
                indent=2,
            ),
        )


if __name__ == "__main__":
    command.run(main, arguments)

# SPDX-License-Identifier: Apache-2.0
"""Forecasts as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from align_jax.parallel.chips import GIB
from align_jax.planner.cost_model import Forecast

COLOURS = {
    "parameters": "#4269d0",
    "optimizer": "#efb118",
    "reference": "#6cc5b0",
    "rewards": "#a463f2",
    "generation": "#ff8ab7",
    "cache": "#97bbf5",
    "batch": "#9c6b4e",
    "temporaries": "#ff725c",
    "program": "#9498a0",
}
# of a rollout; all else is scoring
STAGES = {"prefill": "generating", "decode": "generating", "train": "training"}


def _count(number: float | int) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} "


def _bytes(size: float | int) -> str:
    return f"{size / GIB:8.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:8.2f} MiB"


def table(found: Forecast, lines: Sequence[str] = ()) -> str:
    """Write a forecast of a train step as text, and lines of advice below it."""
    memory, flops, seconds = found.memory, found.flops, found.seconds
    mesh = (
        " ".join(f"{axis}={size}" for axis, size in found.mesh.items() if size > 1) or "one device"
    )
    state = "fits" if found.fits else "DOES NOT FIT"
    out = [
        f"{found.topology.name}: {found.topology.chips} chips, mesh {mesh}: {state} "
        f"(compiled in {found.compile_seconds:.0f} s)",
        f"  HBM a device   {_bytes(memory.used)} of {memory.capacity / GIB:.2f}, "
        f"{memory.free / GIB:.2f} free",
    ]
    out += [
        f"    {kind:<13}{_bytes(size)}"
        for kind, size in memory.kinds.items()
        if memory.complete or size
    ]
    out += [
        f"  FLOPs a step   {_count(flops.model):>9}  ({_count(flops.model / flops.tokens)}a "
        "token; policy "
        f"{_count(flops.policy)}, reference {_count(flops.reference)}, statistics "
        f"{_count(flops.statistics)}); "
        f"recomputed besides {_count(flops.recomputed)}"
    ]
    if found.fits:
        out += ["  collectives a step, bytes that a chip receives"]
        out += [
            f"    {row['kind']:<19}{row['axes']:<12}{row['count']:>7} times "
            f"{_count(row['bytes']):>9}B  "
            f"{', '.join(row['dtypes'])}"
            for row in found.collectives
        ] or ["    none"]
        bounds = (
            ", ".join(f"{axes} {_count(size)}B" for axes, size in found.least.items()) or "nothing"
        )
        out += [f"    in all {_count(found.moved)}B; this mesh must move at least {bounds}"]
        out += [
            "  seconds a step at the peaks: "
            + ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
        ]
        for name, value in (("overlapped", found.overlapped), ("exposed", found.exposed)):
            out += [
                f"    {name:<11}{value:8.3f} s {flops.tokens / value:12,.0f} tokens/s   MFU "
                f"{found.mfu(value):.1%}"
            ]
    return "\n".join([*out, *_advised(lines)])


def _advised(lines: Sequence[str]) -> list[str]:
    return [f"  {'!' if i == 0 else '>'} {line}" for i, line in enumerate(lines)]


def summary(found: Forecast, lines: Sequence[str] = ()) -> str:
    """Write a forecast of another program than the train step on one line, and lines of advice
    below it."""
    memory = found.memory
    out = f"  {found.name:<18}{_bytes(memory.used)} of {memory.capacity / GIB:.2f}"
    if found.fits:
        out += (
            f"; {found.exposed:.4f} s exposed, moves {_count(found.moved)}B of at least "
            f"{_count(sum(found.least.values()))}B"
        )
    else:
        out += ": DOES NOT FIT"
    if found.runs > 1:
        out += f"; {found.runs:,} a rollout"
    return "\n".join([out, *_advised(lines)])


def rollout_line(found: Sequence[Forecast], completions: int) -> str:
    """Say where the time of one rollout goes, waiting for all communication.

    Args:
        found: the forecasts of all programs, the train step's among them.
        completions: that a rollout samples.
    """
    seconds = {"generating": 0.0, "scoring": 0.0, "training": 0.0}
    for one in found:
        seconds[STAGES.get(one.name, "scoring")] += one.runs * one.exposed
    total = sum(seconds.values())
    parts = ", ".join(
        f"{stage} {value:.1f} s ({value / total:.0%})" for stage, value in seconds.items() if value
    )
    return f"  a rollout of {completions:,} completions, all of the greatest length: {total:.1f} s: {parts}"


def bars(found: Sequence[Forecast]) -> str:
    """Draw HBM by kind, a bar a program and topology, as SVG."""
    width, left, height = 560, 190, 26
    kinds = [kind for kind in COLOURS if any(kind in one.memory.kinds for one in found)]
    parts = []
    for row, one in enumerate(found):
        y, x = 40 + row * (height + 14), float(left)
        scale = width / max(one.memory.capacity, one.memory.used)
        parts.append(
            f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{one.topology.name} '
            f"{one.name}</text>"
        )
        for kind, size in one.memory.kinds.items():
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="{height}" '
                f'fill="{COLOURS[kind]}"><title>{kind}: {size / GIB:.2f} '
                "GiB</title></rect>"
            )
            x += size * scale
        end = left + one.memory.capacity * scale
        parts.append(f'<path d="M{end:.1f} {y - 3}v{height + 6}" stroke="#222" stroke-width="2"/>')
        parts.append(
            f'<text x="{left + width + 10}" y="{y + 17}">{one.memory.used / GIB:.1f} of '
            f"{one.memory.capacity / GIB:.1f} GiB</text>"
        )
    for place, kind in enumerate(kinds):
        parts.append(
            f'<rect x="{left + place * 95}" y="10" width="12" height="12" '
            f'fill="{COLOURS[kind]}"/>'
            f'<text x="{left + 16 + place * 95}" y="20">{kind}</text>'
        )
    total = 40 + len(found) * (height + 14) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 140}" '
        f'height="{total}" '
        f'font-family="sans-serif" font-size="12">\n' + "\n".join(parts) + "\n</svg>\n"
    )

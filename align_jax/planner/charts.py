# SPDX-License-Identifier: Apache-2.0
"""Cost estimates as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from align_jax.parallel.chips import GIB
from align_jax.planner.cost_model import CostEstimate

COLORS = {
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
# of a program, by its first word
STAGES = {"prefill": "generating", "decode": "generating", "train": "training"}


def _count(number: float | int) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {prefix}"
    return f"{number:.0f} "


def _bytes(size: float | int) -> str:
    return f"{size / GIB:8.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:8.2f} MiB"


def table(estimate: CostEstimate, advice: Sequence[str] = ()) -> str:
    """Write a train step's estimate as text, and lines of advice below it."""
    memory, flops = estimate.memory, estimate.flops
    split = [f"{axis}={size}" for axis, size in estimate.mesh.items() if size > 1]
    state = "fits" if estimate.fits else "DOES NOT FIT"
    lines = [
        f"{estimate.topology.name}: {estimate.topology.chips} chips, mesh "
        f"{' '.join(split) or 'one device'}: {state} (compiled in {estimate.compile_seconds:.0f} "
        "s)",
        f"  HBM a device   {_bytes(memory.used)} of {memory.capacity / GIB:.2f}, "
        f"{memory.free / GIB:.2f} free",
    ]
    lines += [
        f"    {kind:<13}{_bytes(size)}"
        for kind, size in memory.kinds.items()
        if memory.complete or size
    ]
    lines.append(
        f"  FLOPs a step   {_count(flops.model):>9}  ({_count(flops.model / flops.tokens)}a token; "
        f"policy {_count(flops.policy)}, reference {_count(flops.reference)}, statistics "
        f"{_count(flops.statistics)}); recomputed besides {_count(flops.recomputed)}"
    )
    if estimate.fits:
        lines += _communication(estimate) + _times(estimate)
    return "\n".join(lines + _advised(advice))


def _communication(estimate: CostEstimate) -> list[str]:
    lines = ["  collectives a step, bytes that a chip receives"]
    for row in estimate.collectives:
        lines.append(
            f"    {row['kind']:<19}{row['axes']:<12}{row['count']:>7} times "
            f"{_count(row['bytes']):>9}B  {', '.join(row['dtypes'])}"
        )
    if not estimate.collectives:
        lines.append("    none")
    bounds = [f"{axes} {_count(size)}B" for axes, size in estimate.lower_bound.items()]
    lines.append(
        f"    in all {_count(estimate.received)}B; this mesh must move at least "
        f"{', '.join(bounds) or 'nothing'}"
    )
    return lines


def _times(estimate: CostEstimate) -> list[str]:
    alone = [f"{name} {value:.3f}" for name, value in estimate.seconds.items()]
    lines = ["  seconds a step at the peaks: " + ", ".join(alone)]
    for name, value in (("overlapped", estimate.overlapped), ("exposed", estimate.exposed)):
        lines.append(
            f"    {name:<11}{value:8.3f} s {estimate.flops.tokens / value:12,.0f} tokens/s   MFU "
            f"{estimate.mfu(value):.1%}"
        )
    return lines


def _advised(advice: Sequence[str]) -> list[str]:
    return [f"  {'>' if i else '!'} {line}" for i, line in enumerate(advice)]


def summary(estimate: CostEstimate, advice: Sequence[str] = ()) -> str:
    """Write the estimate of another program than the train step on one line, advice below it."""
    memory = estimate.memory
    line = f"  {estimate.name:<18}{_bytes(memory.used)} of {memory.capacity / GIB:.2f}"
    if estimate.fits:
        line += (
            f"; {estimate.exposed:.4f} s exposed, moves {_count(estimate.received)}B of at least "
            f"{_count(sum(estimate.lower_bound.values()))}B"
        )
    else:
        line += ": DOES NOT FIT"
    if estimate.runs > 1:
        line += f"; {estimate.runs:,} a rollout"
    return "\n".join([line, *_advised(advice)])


def rollout_line(estimates: Sequence[CostEstimate], completions: int) -> str:
    """Say where the time of one rollout goes, waiting for all communication.

    Args:
        estimates: of all programs, the train step's among them.
        completions: that a rollout samples.
    """
    seconds = {"generating": 0.0, "scoring": 0.0, "training": 0.0}
    for one in estimates:
        seconds[STAGES.get(one.name.partition(" ")[0], "scoring")] += one.runs * one.exposed
    total = sum(seconds.values())
    shares = [
        f"{stage} {value:.1f} s ({value / total:.0%})" for stage, value in seconds.items() if value
    ]
    return (
        f"  a rollout of {completions:,} completions, all of the greatest length: {total:.1f} s: "
        f"{', '.join(shares)}"
    )


def bars(estimates: Sequence[CostEstimate]) -> str:
    """Draw HBM by kind, a bar a program and topology, as SVG."""
    width, left, height = 560, 190, 26
    kinds = [kind for kind in COLORS if any(kind in one.memory.kinds for one in estimates)]
    parts = []
    for row, one in enumerate(estimates):
        memory, y, x = one.memory, 40 + row * (height + 14), float(left)
        scale = width / max(memory.capacity, memory.used)
        label = f"{one.topology.name} {one.name}"
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{label}</text>')
        for kind, size in memory.kinds.items():
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="{height}" '
                f'fill="{COLORS[kind]}"><title>{kind}: {size / GIB:.2f} GiB</title></rect>'
            )
            x += size * scale
        end = left + memory.capacity * scale
        parts.append(f'<path d="M{end:.1f} {y - 3}v{height + 6}" stroke="#222" stroke-width="2"/>')
        used = f"{memory.used / GIB:.1f} of {memory.capacity / GIB:.1f} GiB"
        parts.append(f'<text x="{left + width + 10}" y="{y + 17}">{used}</text>')
    for column, kind in enumerate(kinds):
        x = left + column * 95
        parts.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{COLORS[kind]}"/>')
        parts.append(f'<text x="{x + 16}" y="20">{kind}</text>')
    total = 40 + len(estimates) * (height + 14) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 140}" height="{total}" '
        'font-family="sans-serif" font-size="12">\n' + "\n".join(parts) + "\n</svg>\n"
    )

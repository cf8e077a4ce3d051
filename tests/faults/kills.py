# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed: start ``train`` in processes, kill one at a random moment, compare what
came of it."""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
import random
import shutil
import time

import processes

EVERY_STEPS = 10  # between checkpoints


def make_data(path: pathlib.Path) -> None:
    """Write forty preference pairs."""
    pairs = [
        {"prompt": f"say {i} ", "chosen": f"yes {i * i}", "rejected": f"no {i + 7}"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def start(
    folder: pathlib.Path, name: str, steps: int, count: int = 1, *overrides: str
) -> list[processes.Forked]:
    """Start ``train`` in ``folder/name``, ``count`` processes of it."""
    data = folder / "pairs.jsonl"
    if not data.exists():
        make_data(data)
    return processes.fork(
        "align_jax.train",
        [
            f"--config={processes.ROOT}/tests/faults/config.py:{data}",
            f"--workdir={folder / name}",
            f"--config.total_steps={steps}",
            f"--config.checkpoint.every_steps={EVERY_STEPS}",
            *overrides,
        ],
        count,
        log=folder / f"{name}.log",
    )


def finish(
    folder: pathlib.Path, name: str, started: list[processes.Forked], seconds: float = 600
) -> list[str]:
    """Wait for the processes to end well; return what they wrote."""
    return processes.wait(started, folder / f"{name}.log", seconds=seconds)


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """Read each step's loss; a step that stands there twice is an error."""
    path = workdir / "metrics.jsonl"
    found: dict[int, float] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # being written just now, or cut short by a kill
            continue
        if "loss" in row:
            assert row["step"] not in found, f"{path}: step {row['step']} stands there twice"
            found[row["step"]] = row["loss"]
    return found


def newest(workdir: pathlib.Path) -> int:
    """Return the newest committed step, 0 without one."""
    folder = workdir / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def checksums(workdir: pathlib.Path) -> dict[str, int]:
    """Return the bit sums of every array in the newest checkpoint."""
    return json.loads((workdir / f"checkpoints/{newest(workdir)}/extra/metadata").read_text())[
        "checksums"
    ]


def saving(workdir: pathlib.Path, since: float) -> bool:
    """Tell whether a checkpoint is half written that was begun after ``since``: an earlier kill's
    may lie there too."""
    with contextlib.suppress(FileNotFoundError):  # committed while we look
        return any(
            "tmp" in path.name and path.stat().st_mtime > since
            for path in (workdir / "checkpoints").glob("*")
        )
    return False


def last_step(workdir: pathlib.Path, since: float) -> int:
    """Return the last step logged since then, 0 if none: an earlier start's rows lie there until a
    run resumes."""
    path = workdir / "metrics.jsonl"
    return max(losses(workdir), default=0) if path.exists() and path.stat().st_mtime > since else 0


def kill_one(
    workdir: pathlib.Path, started: list[processes.Forked], draw: random.Random, seconds: float
) -> str:
    """Wait for a random moment, then kill one process with signal 9; return where it was, "" if the
    run had ended."""
    kind, began, since = (
        draw.choice(("time", "step", "save", "save")),
        time.monotonic(),
        time.time(),
    )
    first = newest(workdir)
    when, after, saves = draw.uniform(0, seconds), draw.randint(1, 25), draw.randint(1, 3)
    was_saving = False
    while all(process.poll() is None for process in started):
        if kind == "time" and time.monotonic() - began > when:
            break
        if kind == "step" and last_step(workdir, since) >= first + after:
            break
        if kind == "save":
            now = saving(workdir, since)
            saves -= now and not was_saving
            was_saving = now
            if saves <= 0:
                time.sleep(draw.choice((0, 0, 0.01, 0.05)))
                break
        time.sleep(0.001)
    alive = [process for process in started if process.poll() is None]
    if len(alive) < len(started):
        return ""
    draw.choice(alive).kill()
    for process in started:
        process.wait(120)  # the others notice, and end by themselves
    if saving(workdir, since):
        return "in a save"
    return "in a step" if last_step(workdir, since) > first else "in start-up"


def compare(reference: pathlib.Path, other: pathlib.Path) -> None:
    """Check that two finished runs are the same, bit for bit.

    Raises:
        AssertionError: naming what differs.
    """
    assert newest(reference) == newest(other), f"last steps {newest(reference)} and {newest(other)}"
    expected, found = checksums(reference), checksums(other)
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    assert not wrong, f"arrays that differ: {wrong}"
    expected, found = losses(reference), losses(other)
    wrong = [step for step in expected | found if expected.get(step) != found.get(step)]
    assert not wrong, (
        f"losses that differ: {[(step, expected.get(step), found.get(step)) for step in wrong[:5]]}"
    )


def campaign(
    folder: pathlib.Path, *, kills: int, count: int, steps: int, seed: int
) -> dict[str, int]:
    """Run the campaign; return how many kills fell where.

    Raises:
        AssertionError: a killed run did not come to the same end.
    """
    began = time.monotonic()
    if newest(folder / "reference") < steps:
        finish(folder, "reference", start(folder, "reference", steps, count))
    seconds = max(time.monotonic() - began, 5.0)
    draw, rounds = random.Random(seed), 0
    tally: collections.Counter[str] = collections.Counter()
    while sum(tally.values()) < kills:
        rounds += 1
        victim = f"victim{rounds}"
        while sum(tally.values()) < kills:
            where = kill_one(folder / victim, start(folder, victim, steps, count), draw, seconds)
            if not where:
                break
            tally[where] += 1
            print(
                f"kill {sum(tally.values())}: {where}; the newest checkpoint is step "
                f"{newest(folder / victim)}",
                flush=True,
            )
        finish(folder, victim, start(folder, victim, steps, count))
        compare(folder / "reference", folder / victim)
        shutil.rmtree(folder / victim)
    return {"runs": rounds, **tally}

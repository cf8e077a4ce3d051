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
import signal
import time
from typing import Any, NamedTuple

import processes

EVERY_STEPS = 10  # between checkpoints
# what a row says of the clock, which no two runs have alike
CLOCK = ("time", "tokens_per_second", "mfu", "rollout/seconds", "rollout/generation_seconds")
CLOCK += ("rollout/tokens_per_second", "rollout/share")


class Kind(NamedTuple):
    """A run to kill: what it trains, and on which (processes, devices of each) its starts are."""

    layouts: tuple[tuple[int, int], ...] = ((1, 1),)  # chosen anew at each start
    online: bool = False
    reference: str = "reference"  # the undisturbed run that it is held against
    exact: bool = True  # one mesh: the same bits; else the same numbers to seven digits

    @property
    def overrides(self) -> tuple[str, ...]:
        """Flags of the runs of this kind; a rollout lasts three steps, so that a save of every
        tenth step, or at a signal, may fall into the middle of one."""
        return ONLINE if self.online else ()


ONLINE = (
    "--config.objective.name=grpo",
    "--config.rewards={'length': {'target': 3, 'unit': 'characters'}}",
    "--config.batch_size=4",
    "--config.rollout.prompts=12",
    "--config.rollout.responses_per_prompt=2",
    "--config.rollout.max_new_tokens=4",
    "--config.rollout.log_samples_every_steps=3",
)
KINDS = {
    "offline": Kind(),
    "online": Kind(online=True, reference="reference-online"),
    "processes": Kind(((2, 1),), reference="reference-processes"),
    "devices": Kind(((1, 1), (1, 2), (2, 1), (1, 4)), exact=False),
}


def make_data(path: pathlib.Path) -> None:
    """Write forty preference pairs."""
    pairs = [
        {"prompt": f"say {i} ", "chosen": f"yes {i * i}", "rejected": f"no {i + 7}"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def start(
    folder: pathlib.Path, name: str, steps: int, count: int = 1, *overrides: str, devices: int = 1
) -> list[processes.Forked]:
    """Start ``train`` in ``folder/name``, ``count`` processes of it with ``devices`` each."""
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
        devices=devices,
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


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read a finished run's rows, each without the clock's numbers."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: x for name, x in row.items() if name not in CLOCK} for row in found]


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


def has_rows_since(workdir: pathlib.Path, since: float) -> bool:
    """Tell whether a row was written since then."""
    path = workdir / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > since and path.stat().st_size > 0


def kill_one(
    workdir: pathlib.Path,
    started: list[processes.Forked],
    draw: random.Random,
    seconds: float,
    stop: bool = False,
) -> str:
    """Wait for a random moment, then kill one process with signal 9, or with ``stop`` ask it to
    stop (SIGTERM); return where it was, "" if the run had ended."""
    moments = ("time", "first", "step", "save", "save")
    kind, began, since = draw.choice(moments), time.monotonic(), time.time()
    first = newest(workdir)
    when, after, saves = draw.uniform(0, seconds), draw.randint(1, 25), draw.randint(1, 3)
    was_saving = False
    while all(process.poll() is None for process in started):
        if kind == "time" and time.monotonic() - began > when:
            break
        if kind == "first" and has_rows_since(workdir, since):  # the first evaluation's, say
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
    how = "stopped" if stop else "killed"
    if stop:
        draw.choice(alive).send_signal(signal.SIGTERM)
    else:
        draw.choice(alive).kill()
    for process in started:
        process.wait(120)  # the others notice, and end by themselves
    if saving(workdir, since):
        return f"{how} in a save"
    if last_step(workdir, since) > first:
        return f"{how} in a step"
    evaluated = not first and has_rows_since(workdir, since)
    return f"{how} after the first evaluation" if evaluated else f"{how} in start-up"


def compare(reference: pathlib.Path, other: pathlib.Path, exact: bool = True) -> None:
    """Check that two finished runs are the same: the rows of their metrics and samples without a
    duplicate or a gap, the numbers, and with ``exact`` every bit.

    Raises:
        AssertionError: naming what differs.
    """
    assert newest(reference) == newest(other), f"last steps {newest(reference)} and {newest(other)}"
    for file in ("metrics.jsonl", "samples.jsonl"):
        expected, found = rows(reference / file), rows(other / file)
        steps = [[row["step"] for row in several] for several in (expected, found)]
        assert steps[0] == steps[1], f"{other / file}: steps {steps[1]} in place of {steps[0]}"
        wrong = [pair for pair in zip(expected, found) if not alike(*pair, exact)]
        assert not wrong, f"{other / file}: {len(wrong)} rows differ, such as {wrong[0]}"
    if exact:
        expected, found = checksums(reference), checksums(other)
        wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
        assert not wrong, f"arrays that differ: {wrong}"


def alike(one: dict[str, Any], other: dict[str, Any], exact: bool) -> bool:
    """Tell whether two rows say the same: to the bit, or the loss nearly."""
    if exact:
        return one == other
    return one.keys() == other.keys() and abs(one.get("loss", 0) - other.get("loss", 0)) < 1e-5


def campaign(
    folder: pathlib.Path, *, kills: int, steps: int, seed: int, kind: Kind = KINDS["offline"]
) -> dict[str, int]:
    """Run the campaign; return how many kills fell where.

    Raises:
        AssertionError: a killed run did not come to the same end.
    """
    draw, rounds = random.Random(seed), 0

    def begin(name: str, layout: tuple[int, int]) -> list[processes.Forked]:
        count, devices = layout
        return start(folder, name, steps, count, *kind.overrides, devices=devices)

    began = time.monotonic()
    if newest(folder / kind.reference) < steps:
        finish(folder, kind.reference, begin(kind.reference, kind.layouts[0]))
    seconds = max(time.monotonic() - began, 5.0)
    tally: collections.Counter[str] = collections.Counter()
    while sum(tally.values()) < kills:
        rounds += 1
        victim = f"victim{rounds}"
        while sum(tally.values()) < kills:
            started = begin(victim, draw.choice(kind.layouts))
            where = kill_one(folder / victim, started, draw, seconds, draw.random() < 0.25)
            if not where:
                break
            tally[where] += 1
            print(
                f"{sum(tally.values())}: {where}; the newest checkpoint is step "
                f"{newest(folder / victim)}",
                flush=True,
            )
        finish(folder, victim, begin(victim, draw.choice(kind.layouts)))
        compare(folder / kind.reference, folder / victim, kind.exact)
        shutil.rmtree(folder / victim)
    return {"runs": rounds, **tally}

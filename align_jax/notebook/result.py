# SPDX-License-Identifier: Apache-2.0
"""What a run has trained, to look at, talk to, measure and keep."""

from __future__ import annotations

import functools
import html
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from align_jax import evaluate, export, report, sample
from align_jax.core.choose import choose
from align_jax.core.metrics import read_rows
from align_jax.core.options import Config
from align_jax.core.schema import Example, Message
from align_jax.data import chat, datasets
from align_jax.data.given import given
from align_jax.evals import EVALS
from align_jax.inference.generate import Request
from align_jax.inference.samplers import Sampling
from align_jax.notebook.mistakes import told
from align_jax.online.rewards import resolve
from align_jax.runs import command
from align_jax.runs import trained as trained_runs
from align_jax.runs.reported import read_runs
from align_jax.runs.setup import ResolvedConfig
from align_jax.runs.trained import Trained
from align_jax.runs.weights import load_model

Prompt = str | Sequence[Message]
# the objective's kind of data -> the evaluation that fits it
FITS = {"completions": "perplexity", "unpaired": "feedback", "rollout": "generation"}


class Result:
    """A run's policy, metrics and folder; what it holds is read when it is first asked for.

    Args:
        workdir: the run's folder.
        step: the checkpoint: "latest", "best" or a step.
        temporary: what removes the folder once the result is gone.

    Attributes:
        workdir: the run's folder.
    """

    def __init__(self, workdir: str, step: str = "latest", *, temporary: Any = None):
        self.workdir, self._which, self._temporary = workdir, step, temporary
        self._samplers: dict[int, sample.SamplingPolicy] = {}

    def __repr__(self) -> str:
        rows = self.metrics
        last = rows[-1]["step"] if rows else 0
        return f"Result({self.workdir!r}, step {last})"

    @functools.cached_property
    def _trained(self) -> Trained:
        return trained_runs.restore(self.workdir, self._which)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What was logged: a dict a row, ``step`` in it, evaluations' names after ``eval/``."""
        return read_rows(epath.Path(self.workdir) / "metrics.jsonl")

    def frame(self) -> Any:
        """Return the metrics as a pandas frame, a row a logged step or evaluation.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(self.metrics)

    @property
    def config(self) -> Config:
        """The run's config, with what its first start has chosen."""
        return self._trained.config

    @property
    def params(self) -> Any:
        """The policy's parameters: nested dicts of arrays, adapters beside the base."""
        return self._trained.params

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self._trained.resolved.tokenizer

    @told
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        samples: int = 1,
        max_new_tokens: int = 256,
        temperature: float | int = 0.7,
        top_p: float | int = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Any:
        """Answer prompts.

        Args:
            prompts: one or a list; each a text, which is a user's turn where the tokenizer has a
                chat template, or messages (``[{"role": "user", "content": ...}]``).
            samples: answers to each.
            max_new_tokens: tokens of an answer at most.
            temperature: 0 is greedy.
            top_p: nucleus; 1 = all.
            seed: of the draws; prompt number i draws by seed + i.
            stop: texts that end an answer.

        Returns:
            A text for one prompt, a list of them for a list; with several samples, lists of texts
            in their places.

        Raises:
            ValueError: no prompt, no room for it, or settings out of range.
        """
        one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], Mapping))
        asked = [prompts] if one else list(prompts)
        if not asked:
            raise ValueError("prompts: expected a text, messages or a list of them, got none")
        template = bool(self.tokenizer.chat_template)
        examples = [
            Example(_prompt(each, template), (), source=f"prompts[{number}]")
            for number, each in enumerate(asked)
        ]
        for name, number in (("samples", samples), ("max_new_tokens", max_new_tokens)):
            if number < 1:
                raise ValueError(f"{name} = {number}: expected at least 1")
        how = Sampling(float(temperature), top_p=float(top_p))
        policy = self._sampler(min(64, len(asked) * samples))
        request = Request((1,), samples, max_new_tokens, how, seed, tuple(stop))
        sample.check_room(policy, request)
        requests = [
            Request(tuple(ids.prompt), samples, max_new_tokens, how, seed + number, tuple(stop))
            for number, ids in enumerate(chat.encode_many(examples, self.tokenizer))
        ]
        found = [[each.text for each in several] for several in policy.engine(requests)]
        texts = [several[0] if samples == 1 else several for several in found]
        return texts[0] if one else texts

    def _sampler(self, rows: int) -> sample.SamplingPolicy:
        """Return what answers, compiled for so many rows at once, or the next power of two."""
        if not self._trained.resolved.models.policy.options.unembed:
            raise ValueError("a reward model says nothing: evaluate it, or export it")
        rows = 1 << (rows - 1).bit_length()
        if rows not in self._samplers:
            self._samplers[rows] = sample.policy_of(self._trained, self.workdir, rows=rows)
        return self._samplers[rows]

    @told
    def evaluate(
        self, data: Any = None, name: str = "", *, limit: int | None = None, **options: Any
    ) -> dict[str, float]:
        """Measure the policy.

        Args:
            data: rows or a source, as ``train`` takes them; None: return what the last evaluation
                on held-out data gave.
            name: an evaluation of ``align-jax evaluate``; "" = what fits the objective:
                preference (pairs), feedback (a label each), reward (pairs, a reward model),
                process (labeled steps, one of steps), perplexity (answers), generation (prompts,
                scored by the run's own rewards).
            limit: at most so many rows.
            options: of that evaluation, such as ``batch_size``; what is not given is as in the run:
                its ``max_length``, ``beta`` and ``rollout``.

        Returns:
            metric -> number.

        Raises:
            ValueError: an unknown evaluation, rows that do not fit it, nothing was held out.
        """
        if data is None:
            rows = [row for row in self.metrics if any(key.startswith("eval/") for key in row)]
            if not rows:
                raise ValueError("nothing was held out, so nothing is measured: give data")
            found = {key.removeprefix("eval/"): value for key, value in rows[-1].items()}
            return {key: value for key, value in found.items() if key not in ("step", "time")}
        config = self._trained.config
        kind = learns_from(config, self._trained.resolved)
        policy = evaluate.policy_of(self._trained, self.workdir)
        own = {"score": "reward", "steps": "process"}.get(policy.head)
        name = name or own or FITS.get(kind, "preference")
        row = choose(EVALS, name, "name")
        evaluate.check_head(policy, row.head)
        source = os.fspath(data) if isinstance(data, (str, os.PathLike)) else given(data, "data")
        examples = datasets.load(
            [source], row.kind, config.data, chat=bool(self.tokenizer.chat_template), limit=limit
        )
        takes: list[Any] = []
        if row.takes:
            if not config.rewards:
                raise ValueError(f"{name}: the run has no rewards to score samples by")
            scored = resolve(config.rewards, load_model=load_model)
            takes = [evaluate.by_rewards(scored) if row.takes == "compare" else scored]
        as_held_out = evaluate.as_trained(config, kind)[name]
        return row.fn(policy, examples, *takes, **{**as_held_out, **options})

    @told
    def export(
        self, folder: str | os.PathLike[str], *, dtype: str | None = None, adapter: bool = False
    ) -> str:
        """Write a Hugging Face checkpoint with its tokenizer and a card; ``transformers`` and vLLM
        load it.

        Args:
            folder: to make.
            dtype: type of the stored tensors; None: the starting checkpoint's.
            adapter: write the adapter alone, in PEFT's form, instead of merging it.

        Returns:
            The folder.

        Raises:
            FileNotFoundError: the run has no checkpoint.
            ValueError: ``adapter`` of a run without one.
        """
        path = os.fspath(folder)
        command.writable(path, "folder", folder=True)
        export.export_run(self.workdir, path, step=self._which, dtype=dtype, adapter=adapter)
        return path

    @told
    def save(self, folder: str | os.PathLike[str]) -> str:
        """Copy the run's folder, from which ``load`` reads it and ``train`` goes on.

        Raises:
            FileExistsError: something is there already.
        """
        path = os.fspath(folder)
        if os.path.lexists(path):
            raise FileExistsError(f"{path} is there already: give another folder, or remove it")
        shutil.copytree(self.workdir, path)
        return path

    @told
    def report(self) -> str:
        """Return the page that ``align-jax report`` writes of the run: one HTML text."""
        return report.page_of(read_runs([self.workdir]))

    def _repr_html_(self) -> str:
        """Show the curves in a notebook."""
        page = html.escape(self.report(), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:40em;border:0"></iframe>'


@told
def load(workdir: str | os.PathLike[str], step: str | int = "latest") -> Result:
    """Open what a run has trained: from the command line, or ``train`` with a workdir.

    Args:
        workdir: the run's folder.
        step: the checkpoint: "latest", "best" or a step.

    Raises:
        FileNotFoundError: no run is there.

    >>> import align_jax
    >>> align_jax.load("no/such/run")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no/such/run is not a run's folder: it has no config.json
    """
    folder = os.fspath(workdir)
    if not (epath.Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"{folder} is not a run's folder: it has no config.json")
    return Result(folder, str(step))


def learns_from(config: Config, resolved: ResolvedConfig) -> str:
    """Return the kind of data that a run learns from: of an online DPO, too, its rollouts."""
    return "rollout" if config.rewards and resolved.rollouts is not None else resolved.kind


def _prompt(prompt: Any, template: bool) -> Any:
    """Return a prompt as an example has it."""
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},) if template else prompt
    return tuple(prompt)

# SPDX-License-Identifier: Apache-2.0
"""The model card of an export: what the weights are, from what and how they were made, and how they
did on held-out data.

It is public, so local folders are named by their last part and no address keeps a password.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from align_jax import losses
from align_jax.core import config as configs
from align_jax.core.files import escaped
from align_jax.core.metrics import read_rows
from align_jax.core.options import Config
from align_jax.interop import hf
from align_jax.storage.workdir import flat, read_record, versions

CARD, BESIDE = "README.md", "MODEL_CARD.md"
MARK = "<!-- written by align_jax.export ({}); once it is edited, no export writes over it -->"


class Base(NamedTuple):
    """The model that training began with.

    Attributes:
        name: as the card calls it.
        hub_id: "" where it is a local folder.
        header: what its own card says of its license, language and base.
    """

    name: str
    hub_id: str
    header: Mapping[str, Any]


_CARRIED = ("license", "license_name", "license_link", "language", "base_model")


def base_of(path: str) -> Base:
    """Read what is known of a checkpoint; no mistake in its card is an error."""
    from huggingface_hub import ModelCard  # here, because importing it is slow

    file = os.path.join(hf.locate(path), CARD)
    header: dict[str, Any] = {}
    if os.path.isfile(file):
        try:
            header = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
        except Exception:  # whatever stands there is another's, and the card can do without
            header = {}
    hub_id = "" if os.path.isdir(path) else path
    known = {name: header[name] for name in _CARRIED if header.get(name)}
    return Base(hub_id or os.path.basename(os.path.normpath(path)), hub_id, known)


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        name: the model's.
        base: what it was made of; None: random weights.
        record: the run's ``config.json``; {} where a checkpoint was passed through.
        rows: the run's metrics up to the exported step.
        step: the exported step.
        adapter: the files hold an adapter alone.
        reward: it is a reward model.
        note: what else its user must know.
    """

    name: str
    base: Base | None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    step: int = 0
    adapter: bool = False
    reward: bool = False
    note: str = ""

    @property
    def _config(self) -> dict[str, Any]:
        return flat(self.record.get("config", {}))

    def results(self) -> list[tuple[str, float, float]]:
        """Return each held-out metric, at the start and at the exported step."""
        held = [row for row in self.rows if any(name.startswith("eval/") for name in row)]
        if not held:
            return []
        first, last = held[0], held[-1]
        return [
            (name.removeprefix("eval/"), first.get(name, value), value)
            for name, value in last.items()
            if name.startswith("eval/") and value is not None
        ]

    def text(self) -> str:
        """Write the whole card."""
        parts = [f"---\n{self._header()}\n---", f"# {self.name}", self._about()]
        if results := self.results():
            lines = [f"| {name} | {_cell(a)} | {_cell(b)} |" for name, a, b in results]
            table = "\n".join([f"| | start | step {self.step} |", "|---|---|---|", *lines])
            parts += ["## On held-out data", self._held_out(), table]
        parts += ["## Use", self._use()]
        if self.record:
            parts += ["## How it was made", self._made()]
        body = escaped("\n\n".join(parts) + "\n")
        return f"{body}\n{MARK.format(_digest(body))}\n"

    def _header(self) -> str:
        from huggingface_hub import EvalResult, ModelCardData  # here, because importing it is slow

        config, base = self._config, self.base or Base("", "", {})
        known = dict(base.header)
        parent = base.hub_id or known.get("base_model")
        task = "text-classification" if self.reward else "text-generation"
        sources = [one for one in config.get("data.train", "").split(",") if one]
        datasets = [
            match[1] for one in sources if (match := re.match(r"hf:([\w.-]+/[\w.-]+)", one))
        ]
        method = str(config.get("objective.name", ""))
        results = [
            EvalResult(
                task_type=task,
                dataset_type="held-out",
                dataset_name=public(config.get("data.eval") or config.get("data.train", "")),
                metric_type=name,
                metric_value=round(value, 6),
            )
            for name, _, value in self.results()
        ]
        data = ModelCardData(
            base_model=parent,
            license=known.get("license"),
            license_name=known.get("license_name"),
            license_link=known.get("license_link"),
            language=known.get("language"),
            library_name="peft" if self.adapter else "transformers",
            pipeline_tag=task,
            tags=["align_jax", *(re.split(r"\+", method) if method else [])],
            datasets=datasets or None,
            model_name=self.name if results else None,
            eval_results=results or None,
        )
        return data.to_yaml().strip()

    def _about(self) -> str:
        config, base = self._config, self.base
        start = f"`{base.name}`" if base else "random weights"
        if not self.record:
            return f"The weights of {start}, written anew by align_jax; no tensor was changed."
        lora = config.get("model.lora.rank") or config.get("model.lora.path")
        what = "A low-rank adapter of" if self.adapter else "Made from"
        how = "a low-rank adapter" if lora else "all weights"
        lines = [
            f"{what} {start}, aligned with align_jax: `{config.get('objective.name', '')}`, "
            f"{self.step} steps of {config.get('batch_size')} groups, {how} trained, on "
            f"`{public(config.get('data.train', ''))}`."
        ]
        for name in str(config.get("objective.name", "")).split("+"):
            if (row := losses.OBJECTIVES.get(name)) is not None:
                lines.append(f"`{name}`: {row.formula} ({row.paper}).")
        license = self.base.header.get("license") if self.base else None
        if base is not None and not license:
            lines.append(f"License: that of {start}, which its files do not say.")
        return "\n\n".join(lines)

    def _held_out(self) -> str:
        config = self._config
        if config.get("data.eval"):
            return f"On `{public(config['data.eval'])}`."
        return "On examples of the training data whose prompts were kept out of it."

    def _use(self) -> str:
        model = "AutoModelForSequenceClassification" if self.reward else "AutoModelForCausalLM"
        if self.adapter:
            model = (
                "AutoPeftModelForSequenceClassification"
                if self.reward
                else "AutoPeftModelForCausalLM"
            )
        package = "peft" if self.adapter else "transformers"
        lines = [
            f"from {package} import {model}",
            "from transformers import AutoTokenizer",
            "",
            f'model = {model}.from_pretrained("PATH_OR_REPOSITORY")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPOSITORY")',
        ]
        note = f"\n\n{self.note[0].upper()}{self.note[1:]}." if self.note else ""
        if rounded := self.adapter and rounded_base(str(self._config.get("model.quantize", ""))):
            note += f"\n\n{rounded[0].upper()}{rounded[1:]}."
        if "reward_process" in str(self._config.get("objective.name")):
            separator = self._config.get("data.step_separator")
            note += (
                "\n\nIt scores steps: the logit that a step is right stands at the last token of "
                f"`{separator!r}` behind the step, not at the end of the answer."
            )
        return "\n".join(["```python", *lines, "```"]) + note

    def _objective_defaults(self) -> dict[str, Any]:
        """Return what the objective's own options are by default."""
        name = str(self._config.get("objective.name", ""))
        own = losses.options(name) if name else {}
        known = ("name", "weights")  # every objective's, whose defaults are the config's
        return {f"objective.{key}": value for key, value in own.items() if key not in known}

    def _made(self) -> str:
        defaults = flat(configs.to_dict(Config())) | self._objective_defaults()
        changed = {
            key: public(value)
            for key, value in self._config.items()
            if key not in defaults or defaults[key] != value
        }
        devices = self.record.get("devices", {})
        found = self.record.get("versions", {}) | {"align_jax": versions().get("align_jax", "")}
        kinds = ", ".join(f"{name} {version}" for name, version in sorted(found.items()) if version)
        command = " ".join(public(word) for word in self.record.get("command", []))
        commit = f" Commit {self.record['git_commit']}." if self.record.get("git_commit") else ""
        where = f"{devices.get('count', '?')} {devices.get('kind', '')}"
        return "\n\n".join(
            [
                f"```\n{command}\n```",
                f"Devices: {where}. Versions: {kinds}.{commit}",
                "<details><summary>Every key that is not at its default</summary>",
                f"```json\n{json.dumps(changed, indent=1)}\n```",
                "</details>",
            ]
        )


def rounded_base(quantize: str) -> str:
    """Say what becomes of an adapter that was trained beside a quantized base.

    Args:
        quantize: ``model.quantize``; "" of none, of which nothing is to be said.
    """
    return quantize and (
        f"the adapter was trained beside a base rounded to {quantize}; PEFT loads the base as it "
        "is stored, so its logits differ from the run's by what was rounded (a merged export's, "
        "without --adapter, are the run's)"
    )


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def public(value: Any) -> Any:
    """Return a value without what is nobody else's business.

    >>> public("/home/me/secret/pairs.jsonl"), public("https://me:word@host/v1?key=1")
    ('pairs.jsonl', 'https://host/v1')
    >>> public("gs://bucket/pairs.jsonl"), public(["--config=/home/me/dpo.py", 3])
    ('gs://bucket/pairs.jsonl', ['--config=dpo.py', 3])
    """
    if isinstance(value, list):
        return [public(one) for one in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"://[^/@\s]+@", "://", value)
    value = re.sub(r"(://[^\s?]+)\?\S*", r"\1", value)
    value = re.sub(r"hf_\w{6,}", "hf_...", value)
    return re.sub(r"(?<![\w./:~-])[/~][^\s,:=]*/([^\s,:=/]+)", r"\1", value)


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _is_ours(text: str) -> bool:
    """Tell whether a card is as an export wrote it."""
    body, _, last = text.rstrip("\n").rpartition("\n\n<!--")
    return bool(last) and f"<!--{last}" == MARK.format(_digest(f"{body}\n"))


def write(card: Card, output: str) -> str:
    """Write a card beside its weights; a ``README.md`` that is a person's own stays.

    Returns:
        The file's name: ``README.md``, or ``MODEL_CARD.md`` beside a person's own.
    """
    folder = epath.Path(output)
    own = (folder / CARD).exists() and not _is_ours((folder / CARD).read_text())
    (folder / (BESIDE if own else CARD)).write_text(card.text())
    if not own:
        (folder / BESIDE).unlink(missing_ok=True)
    return BESIDE if own else CARD


def of_run(workdir: str, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a run's record, and its rows of metrics up to a step."""
    folder = epath.Path(workdir)
    rows = read_rows(folder / "metrics.jsonl")
    return read_record(folder / "config.json"), [row for row in rows if row["step"] <= step]

# SPDX-License-Identifier: Apache-2.0
"""Every option of a run: one frozen class a config group, with default, unit, meaning and checks.

    options.Config ─ config.defaults() ─► ConfigDict ─ config file, flags ─► ConfigDict
                                                                  config.read ─► options.Config

A key is born here and nowhere else.  What lies below the programs takes these objects, passed
whole.  Names in tables (objectives, optimizers, families, ...) are checked by the table's owner,
still before the first compile.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from align_jax.core.address import server_address
from align_jax.core.fields import number_in


def option(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    choices: tuple[Any, ...] = (),
    table: str = "",
    low: int | float | None = None,
    high: int | float | None = None,
    above: int | float | None = None,
    below: int | float | None = None,
    resume: bool = False,
) -> Any:
    """Declare a key: a dataclass field that knows what it means.

    Args:
        default: its value; a dict stands for an open group, copied for each config.
        meaning: in one line, with the trade-off.
        unit: of a number: tokens, steps, groups, seconds, nats, ...
        choices: the values that it may have.
        table: the table whose keys it may have, as ``module:NAME``.
        low, high: the least and the greatest value.
        above, below: values that it must exceed, and stay under.
        resume: a resumed run may change it: where and how fast a run goes on, how long, and what
            is said of it, but not what a step computes.
    """
    metadata = {
        "meaning": meaning,
        "unit": unit,
        "choices": choices,
        "table": table,
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "resume": resume,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(options: type, *, resume: bool = False) -> Any:
    """Declare a group of keys; ``resume`` stands for all of them."""
    return dataclasses.field(default_factory=options, metadata={"resume": resume})


@dataclasses.dataclass(frozen=True)
class Checked:
    """A group whose keys hang together; most need no check beyond each key's own."""

    def check(self) -> Iterator[str]:
        """Yield what is wrong with keys of this group taken together: ``key = value: expected``."""
        yield from ()


def pattern_mistakes(name: str, patterns: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with a key's regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{name} = {pattern!r:.100}: no regular expression: {error}"


@dataclasses.dataclass(frozen=True)
class LoraOptions(Checked):
    """The policy's low-rank adapter (arXiv 2106.09685)."""

    rank: int = option(0, "0 = full fine-tune", low=0)
    alpha: float = option(
        16.0, "the adapter's output is scaled by alpha / rank (rslora: alpha / sqrt(rank))", above=0
    )
    dropout: float = option(
        0.0,
        "share of the adapter's inputs set to 0 in training; off in policy gradients on rollouts, "
        "whose old log-probabilities have none",
        low=0,
        below=1,
    )
    targets: str = option(
        "attention/.*|delta/.*|mlp/.*",
        "regular expression of the adapted matrices, as attention/query, mlp/down",
    )
    rslora: bool = option(False, "scale by alpha / sqrt(rank) (arXiv 2312.03732)")
    dora: bool = option(False, "train each column's norm too (arXiv 2402.09353)")
    tokens: tuple[str, ...] = option(
        (),
        "tokens whose rows of the embedding and the head are trained too; new = those that the "
        "vocabulary has grown by",
    )
    path: str = option(
        "",
        "a PEFT adapter to start from; its rank, alpha, targets and kind then hold (rank: 0 or the "
        "same)",
    )

    def check(self) -> Iterator[str]:
        yield from pattern_mistakes("targets", [self.targets])
        if self.rank or self.path:
            return
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) != field.default:
                yield f"{field.name} = {value!r} has no effect without an adapter: set rank > 0"


@dataclasses.dataclass(frozen=True)
class ModelOptions(Checked):
    """The policy: where its weights come from, what of it is trained, how it is computed."""

    path: str = option(
        "",
        "directory or hub id of a Hugging Face checkpoint; '' = random weights from family and "
        "config",
    )
    family: str = option(
        "llama",
        "for random weights: a Hugging Face model_type; or your own module:name, of path's too",
        table="align_jax.models:FAMILIES",
    )
    config: Mapping[str, Any] = option(
        {}, "for random weights: fields of that family's Hugging Face config"
    )
    param_dtype: str = option(
        "float32",
        "of what is trained; bfloat16 halves memory, and updates are rounded at random",
        choices=("float32", "bfloat16"),
    )
    compute_dtype: str = option(
        "auto",
        "of activations and matrix products; auto = bfloat16, on a CPU, which emulates it, float32",
        choices=("auto", "float32", "bfloat16"),
    )
    remat: str = option(
        "full",
        "what the backward pass recomputes",
        table="align_jax.models.transformer:REMAT",
        resume=True,
    )
    attention: str = option(
        "auto",
        "the attention's implementation; auto = the platform's fastest",
        table="align_jax.models.attention:ATTENTION",
        resume=True,
    )
    value_head: str = option(
        "value",
        "of objectives with values: linear, or three layers on detached states",
        choices=("value", "value_mlp"),
    )
    value_path: str = option(
        "",
        "a reward model's checkpoint whose score head the linear value head starts from (the "
        "decoder stays the policy's); '' = drawn at random, or as path has it",
    )
    value_warmup_steps: int = option(
        0, "first steps in which the value head alone moves", unit="steps", low=0
    )
    load_balancing: float = option(
        0.0, "coefficient of a mixture of experts' load-balancing loss", low=0
    )
    freeze: tuple[str, ...] = option(
        (), "regular expressions: parameters whose path matches are not trained"
    )
    quantize: str = option(
        "", "hold the frozen base quantized (with an adapter)", choices=("", "int8", "nf4")
    )
    lora: LoraOptions = group(LoraOptions)

    def check(self) -> Iterator[str]:
        yield from pattern_mistakes("freeze", self.freeze)
        if not self.path and not self.config:
            yield (
                "path is empty and so is model.config: name a checkpoint, or give the fields of a "
                f"{self.family} config for random weights"
            )
        if self.value_path and self.value_head != "value":
            yield (
                f"value_path = {self.value_path!r} gives a reward model's linear head to the "
                f"value head, which is {self.value_head!r}: set model.value_head = 'value'"
            )
        if self.quantize and not (self.lora.rank or self.lora.path):
            yield "quantize holds the frozen base quantized: it needs model.lora.rank > 0"


@dataclasses.dataclass(frozen=True)
class ReferenceOptions(Checked):
    """The frozen reference that the policy is compared with."""

    path: str = option("", "directory or hub id; '' = the starting weights")
    family: str = option(
        "llama", "of config; or your own module:name, of path's", table="align_jax.models:FAMILIES"
    )
    config: Mapping[str, Any] = option(
        {}, "fields of path's config.json, with which align_jax.plan does without the checkpoint"
    )
    dtype: str = option(
        "auto",
        "of the frozen weights; auto = bfloat16, on a CPU float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    mode: str = option(
        "in_graph",
        "in_graph, or cached: token log-probabilities computed once and kept on disk",
        choices=("in_graph", "cached"),
    )
    guide: str = option(
        "",
        "of tgdpo: a policy trained on preferences, whose log-ratios to the reference are the "
        "tokens' rewards; directory or hub id, computed once and kept; '' = the starting weights",
    )
    cache: str = option("", "folder of the cache; '' = WORKDIR/reference", resume=True)
    sync_every_steps: int = option(
        0,
        "TR-DPO (arXiv 2404.09656): reference <- mix * policy + (1 - mix) * reference; 0 = never",
        unit="steps",
        low=0,
    )
    sync_every_rollouts: int = option(
        0,
        "online, in rounds: the same after so many rollouts are used up, before the next",
        unit="rollouts",
        low=0,
    )
    mix: float = option(1.0, "the policy's share when the reference moves", above=0, high=1)

    @property
    def moves(self) -> bool:
        """Whether the reference moves with the policy."""
        return bool(self.sync_every_steps or self.sync_every_rollouts)

    def check(self) -> Iterator[str]:
        if self.config and not self.path:
            yield "config says what reference.path is, which is empty: name the checkpoint"
        if self.family != ReferenceOptions.family and not self.config:
            yield (
                f"family = {self.family!r} has no effect without reference.config: the "
                "checkpoint says what it is"
            )
        if self.mix != 1 and not self.moves:
            yield (
                f"mix = {self.mix:g} has no effect where the reference does not move: set "
                "reference.sync_every_steps > 0"
            )
        if self.sync_every_steps and self.sync_every_rollouts:
            yield (
                f"sync_every_rollouts = {self.sync_every_rollouts} and reference.sync_every_steps "
                f"= {self.sync_every_steps} say two things: set one of them to 0"
            )
        if self.moves and self.mode == "cached":
            yield (
                "sync_every_steps (or _rollouts) moves the reference, which reference.mode = "
                "'cached' has fixed; use in_graph"
            )


@dataclasses.dataclass(frozen=True)
class DataOptions(Checked):
    """What is trained and evaluated on, and how it becomes rows of tokens."""

    train: str = option(
        "",
        "one source, or several separated by commas: path, glob, tfds:..., hf:..., builtin:..., "
        "set:...",
    )
    eval: str = option(
        "",
        "likewise; '' = hold out eval_fraction of the training examples (builtin data: its own "
        "eval split)",
    )
    text: str = option(
        "", "of objective.ptx_coef: prompts with answers beside the rollouts, named as train is"
    )
    text_share: float = option(
        1.0, "of data.text: examples in a step, as a share of batch_size", above=0
    )
    eval_fraction: float = option(
        0.05,
        "of the training examples, whole prompts, at most eval.max_examples; 0 = hold nothing out",
        low=0,
        below=1,
    )
    weights: tuple[float, ...] = option(
        (), "shares of several training sources; () = each example once an epoch"
    )
    format: str = option(
        "auto",
        "of the rows: a format, a named data set, or your own module:name; auto = found from the "
        "fields",
        table="align_jax.data.formats:FORMATS",
    )
    columns: Mapping[str, str] = option({}, "field that the format expects -> column of the data")
    roles: Mapping[str, str] = option(
        {}, "role that the data names -> system, user, assistant or tool"
    )
    invalid: str = option(
        "error",
        "a row of which no example can be made: an error, or dropped and counted",
        choices=("error", "drop"),
    )
    strings: str = option(
        "plain",
        "a prompt that is a mere text: plain text, or one turn of a user",
        choices=("plain", "messages"),
    )
    turns: str = option(
        "all",
        "of a conversation with several answers, learn all, only the last, or each as an example "
        "of its own (for templates that render earlier answers otherwise)",
        choices=("all", "last", "each"),
    )
    responses: int = option(
        0,
        "responses a ranking has: longer ones are thinned, shorter left out; 0 = as they are",
        low=0,
    )
    step_separator: str = option(
        "\n", "behind each step of an answer whose steps are labeled: there a step is scored"
    )
    pairing: str = option(
        "best_worst",
        "which pairs are made of several scored responses to a prompt",
        choices=("best_worst", "adjacent", "all", "random"),
    )
    min_difference: float = option(
        0.0, "pairs whose scores differ by no more are left out", unit="of score", low=0
    )
    threshold: str = option(
        "median",
        "a scored response is desirable above this: a number, or mean or median of all scores",
    )
    labels: str = option(
        "natural",
        "balanced: as many desirable as undesirable examples",
        choices=("natural", "balanced"),
    )
    frac_unique_desirable: float = option(
        1.0,
        "of the desirable examples, those that are kept, chosen by seed: an imbalance to study",
        above=0,
        high=1,
    )
    frac_unique_undesirable: float = option(
        1.0, "of the undesirable examples, likewise", above=0, high=1
    )
    layout: str = option(
        "auto",
        "plain: a response a row; packed: groups a row; shared_prefix: packed, a prompt once; "
        "auto: what costs least for the data's lengths",
        choices=("auto", "plain", "packed", "shared_prefix"),
    )
    groups_per_row: float = option(
        0.0, "packed rows hold so many on average; 0 = as many as fit", low=0, high=4096
    )
    exact_batch: bool = option(
        False,
        "each training step has exactly batch_size groups, not on average: packed rows hold as "
        "many each, with more padding; what is too little for a row is left out",
    )
    truncation: str = option(
        "keep_end",
        "of the prompt: keep its start or its end; or drop such examples",
        choices=("keep_start", "keep_end", "drop"),
    )
    max_prompt_length: int = option(
        0, "0 = what the response leaves of max_length", unit="tokens", low=0
    )
    chat_template: str = option("", "a Jinja template or a file with one; '' = the tokenizer's own")
    date: str = option(
        "",
        "that chat templates are given as today's; '' = the day of the run's first start",
        unit="YYYY-MM-DD",
    )
    control_tokens: tuple[str, ...] = option((), "csft: before chosen, before rejected responses")
    trim: bool = option(
        True, "plain rows of the longest example's length where that is below max_length"
    )
    shuffle: bool = option(True, "a new order each epoch; else the data's own")
    prefetch: int = option(
        2, "batches made ahead on the host", unit="batches", low=1, high=1024, resume=True
    )
    cache: str = option("", "folder of the tokenized data; '' = not kept", resume=True)

    def check(self) -> Iterator[str]:
        if self.text_share != 1 and not self.text:
            yield f"text_share = {self.text_share:g} has no effect without data.text"
        if self.labels == "balanced" and self.frac_unique_desirable != self.frac_unique_undesirable:
            yield "labels = 'balanced' would undo the imbalance of frac_unique_*: give one of them"
        if not self.train:
            yield "train is empty: name a file, tfds:..., hf:... or builtin:preferences"
        if self.date:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError:
                yield f"date = {self.date!r}: expected YYYY-MM-DD, such as 2026-01-31"
        if self.exact_batch and self.groups_per_row:
            yield (
                "exact_batch fills rows with as many groups each; groups_per_row = "
                f"{self.groups_per_row:g} says how many on average: give one of them"
            )
        if self.threshold not in ("mean", "median") and number_in(self.threshold) is None:
            yield f"threshold = {self.threshold!r:.60}: expected a number, 'mean' or 'median'"


@dataclasses.dataclass(frozen=True)
class ObjectiveOptions(Checked):
    """What is minimized; the objective's own options stand beside its name in the config."""

    name: str = option(
        "dpo",
        "an objective, your own module:name, or a sum of several: dpo+sft",
        table="align_jax.losses:OBJECTIVES",
    )
    weights: tuple[float, ...] = option((), "of a sum's terms; () = 1 each")
    options: Mapping[str, Any] = option({}, "the objective's own, by name")

    def check(self) -> Iterator[str]:
        if any(weight <= 0 for weight in self.weights):
            yield f"weights = {self.weights}: expected numbers above 0, one a term"


@dataclasses.dataclass(frozen=True)
class OptimizerOptions(Checked):
    """How the parameters move."""

    name: str = option(
        "adamw",
        "the optimizer, or your own module:name",
        table="align_jax.training.optim:OPTIMIZERS",
    )
    learning_rate: float = option(1e-6, "the peak", above=0, high=1000)
    schedule: str = option(
        "linear",
        "after the warm-up: constant, linear, cosine (to final_fraction of the peak)",
        table="align_jax.training.optim:SCHEDULES",
    )
    final_fraction: float = option(0.0, "of the peak, at the last step", low=0, high=1)
    warmup_steps: int = option(
        0, "from peak / warmup_steps up; at most one of these two is positive", unit="steps", low=0
    )
    warmup_fraction: float = option(0.0, "of the run's steps", low=0, high=1)
    weight_decay: float = option(0.0, "on matrices; norms and biases are left out", low=0)
    clip_norm: float = option(1.0, "of the gradient's global norm; 0 = no clipping", low=0)
    b1: float = option(0.9, "decay of the first moment", low=0, below=1)
    b2: float = option(0.999, "decay of the second moment", low=0, below=1)
    eps: float = option(1e-8, "added to the second moment's root", above=0)
    moment_dtype: str = option(
        "float32",
        "of the first moment; bfloat16 saves two bytes a parameter",
        choices=("float32", "bfloat16"),
    )

    def check(self) -> Iterator[str]:
        if self.warmup_steps and self.warmup_fraction:
            yield "warmup_steps and optimizer.warmup_fraction are both set; set one"
        if self.schedule == "constant" and self.final_fraction:
            yield (
                f"final_fraction = {self.final_fraction:g} has no effect: optimizer.schedule = "
                "'constant' stays at the peak"
            )


@dataclasses.dataclass(frozen=True)
class MeshOptions(Checked):
    """How many ways each axis of the device mesh splits; one may be -1: the rest of the devices."""

    data: int = option(
        1, "copies of the weights; across slices the only axis on the data-center network", low=-1
    )
    fsdp: int = option(-1, "weights, optimizer and rows split", low=-1)
    expert: int = option(1, "a mixture's experts split", low=-1)
    sequence: int = option(1, "a row's tokens split", low=-1)
    tensor: int = option(1, "heads, feed-forward and vocabulary split", low=-1)


@dataclasses.dataclass(frozen=True)
class CheckpointOptions(Checked):
    """What is saved, how often, and what a restarted run goes on from."""

    every_steps: int = option(
        500, "between saves in the workdir; 0 = only at the end", unit="steps", low=0
    )
    keep: int = option(2, "newest checkpoints kept, the best one besides", low=1)
    best_metric: str = option(
        "",
        "such as eval/rewards/accuracies, or -eval/loss (smaller is better); '' = none is kept as "
        "the best",
    )
    restore: str = option(
        "latest", "what a restarted run continues from: latest, best, a step, or a path"
    )
    local: str = option(
        "",
        "folder on each host's own storage, such as /dev/shm/align_jax: a second, frequent tier; "
        "'' = off",
    )
    local_every_steps: int = option(
        50,
        "fewer steps lost, but each save holds the step up; three times the host's share of room",
        unit="steps",
        low=1,
    )

    def check(self) -> Iterator[str]:
        if "://" in self.local:
            yield (
                f"local = {self.local!r}: expected a folder on each host's own storage, such as "
                "/dev/shm/align_jax (what lies in a bucket is --workdir)"
            )
        if not self.local and self.local_every_steps != CheckpointOptions.local_every_steps:
            yield (
                f"local_every_steps = {self.local_every_steps} has no effect without "
                "checkpoint.local"
            )
        if self.local and 0 < self.every_steps <= self.local_every_steps:
            yield (
                f"local_every_steps = {self.local_every_steps}: expected less than "
                f"checkpoint.every_steps = {self.every_steps}: local saves come between the "
                "persistent ones"
            )


@dataclasses.dataclass(frozen=True)
class EvalOptions(Checked):
    """When and on how much a run is evaluated."""

    every_steps: int = option(100, "0 = only at the end", unit="steps", low=0, resume=True)
    max_examples: int = option(512, "always the same ones; 0 = all", unit="groups", low=0)
    batch_size: int = option(0, "0 = the training's", unit="groups", low=0, resume=True)
    stop_metric: str = option(
        "",
        "stop early by this, such as eval/rewards/accuracies, or -eval/loss (smaller is better); "
        "'' = run to the end",
        resume=True,
    )
    patience: int = option(
        3,
        "of stop_metric: stop after so many without a better one than the best",
        unit="evaluations",
        low=1,
        resume=True,
    )
    least_gain: float = option(
        0.0, "of stop_metric: what an evaluation must gain to be better", low=0, resume=True
    )

    def check(self) -> Iterator[str]:
        if self.stop_metric and not self.every_steps:
            yield (
                f"stop_metric = {self.stop_metric!r}: there is no evaluation on the way: set "
                "eval.every_steps > 0"
            )
        for name in ("patience", "least_gain"):
            value = getattr(self, name)
            if not self.stop_metric and value != getattr(EvalOptions, name):
                yield f"{name} = {value:g} has no effect without eval.stop_metric"


@dataclasses.dataclass(frozen=True)
class LogOptions(Checked):
    """Where metrics go beside WORKDIR/metrics.jsonl."""

    every_steps: int = option(1, "between logged steps", unit="steps", low=1)
    tensorboard: bool = option(False, "write WORKDIR/tensorboard")
    wandb: str = option("", "project name; '' = off")
    trackio: str = option("", "project name; '' = off")


@dataclasses.dataclass(frozen=True)
class ServerOptions(Checked):
    """An OpenAI-compatible server (vLLM, SGLang) that generates in place of the run's own mesh."""

    url: str = option("", "up to and without /v1; '' = the run generates itself")
    model: str = option("", "the name that it serves")
    weights: str = option("", "folder, seen by both, through which it is given the newest weights")
    push: str = option(
        "vllm",
        "the kind of server: how it is told to read the weights",
        table="align_jax.inference.engines:PUSHES",
    )
    logprobs: str = option(
        "raw",
        "what the server's log-probabilities are of: raw, the model's own distribution; processed, "
        "after temperature and filters (vLLM's --logprobs-mode processed_logprobs)",
        choices=("raw", "processed"),
    )
    concurrency: int = option(32, "requests under way at once", unit="requests", low=1)
    key_variable: str = option(
        "OPENAI_API_KEY", "environment variable with the API key; '' or unset: none is sent"
    )
    timeout_seconds: float = option(
        600.0, "for one whole answer", unit="seconds", above=0, high=86400
    )
    allow_http: bool = option(
        False, "take plain http to another host: only where the network between is trusted"
    )

    def check(self) -> Iterator[str]:
        if self.url:
            try:
                server_address(self.url, allow_http=self.allow_http)
            except ValueError as error:
                yield f"url: {error}"
        if self.key_variable and not self.key_variable.isidentifier():
            yield (
                "key_variable: expected the name of an environment variable, such as "
                "OPENAI_API_KEY, not the key itself"
            )
        if self.url and not self.model:
            yield "model is empty: name the model that the server serves"


@dataclasses.dataclass(frozen=True)
class RolloutOptions(Checked):
    """How an online run generates, scores and reuses samples; objectives on rollouts only."""

    prompts: int = option(0, "in a rollout; 0 = batch_size", unit="prompts", low=0)
    responses_per_prompt: int = option(8, "samples of each", unit="responses", low=1)
    eval_responses_per_prompt: int = option(
        0, "samples of each held-out prompt; 0 = responses_per_prompt", unit="responses", low=0
    )
    max_new_tokens: int = option(
        256, "of a response, with what the environment says in it", unit="tokens", low=1
    )
    rows: int = option(
        256,
        "completions decoded together, the whole mesh: more are faster, and their cache larger",
        unit="completions",
        low=1,
        resume=True,
    )
    tensor: int = option(
        0,
        "devices of a host that share a copy of the weights while generating; 0 = as training "
        "splits them",
        low=0,
        resume=True,
    )
    temperature: float = option(1.0, "the logits are divided by it; 0 = greedy", low=0)
    top_p: float = option(
        1.0,
        "share of the probability that is drawn from; policy gradients correct for what top_p, "
        "top_k, min_p and repetition_penalty change (objective.sampler_correction)",
        above=0,
        high=1,
    )
    top_k: int = option(0, "most probable tokens that are drawn from; 0 = all", low=0)
    min_p: float = option(0.0, "least probability, as a share of the greatest", low=0, high=1)
    repetition_penalty: float = option(
        1.0,
        "a token of the prompt or the response so far has its positive logit divided, its negative "
        "one multiplied by it; 1 = none",
        above=0,
    )
    stop: tuple[str, ...] = option((), "texts that end a response, or one of its answers")
    environment: str = option(
        "",
        "your function or class that answers the model between its turns, module:function; '' = "
        "one turn",
    )
    max_turns: int = option(8, "answers of the model in an episode", unit="answers", low=1)
    max_turn_tokens: int = option(
        0, "of one answer; 0 = what is left of max_new_tokens", unit="tokens", low=0
    )
    environment_seconds: float = option(
        3600.0,
        "for the environment's replies of a turn, all episodes together; 0 = for ever",
        unit="seconds",
        low=0,
        resume=True,
    )
    against: str = option(
        "auto",
        "what each sample meets: the data's answer, a sample of the reference, or one of its "
        "mixture with the policy; auto = none, but the objective's own of xpo and nash_md",
        choices=("auto", "none", "data", "reference", "mixture"),
    )
    mixture: float = option(
        0.5, "the reference's share of the logits of that mixture", above=0, below=1
    )
    epochs: int = option(
        0, "passes over a rollout; 0 = the objective's own, else one", unit="passes", low=0
    )
    rescore: bool = option(
        True,
        "old log-probabilities from a forward like the training one (the first ratio is exactly "
        "1); else from generation",
    )
    keep_unfinished: bool = option(
        True,
        "responses cut off by the limit bear the loss; False: their scores count in the baselines "
        "of policy gradients alone, preferences of them in nothing",
    )
    missing_eos_penalty: float = option(
        0.0, "taken from the score of a response that is cut off", unit="of reward"
    )
    overlong_buffer: int = option(
        0,
        "before the limit, in which the score falls by up to 1 (DAPO); 0 = off",
        unit="tokens",
        low=0,
    )
    normalize_scores: bool = option(False, "by running moments of all scores")
    score_clip: float = option(0.0, "scores are clipped to this size; 0 = off", low=0)
    tries: int = option(
        1, "dynamic sampling: draw until every group's scores differ; 1 = off", low=1
    )
    stop_kl: float = option(
        0.0,
        "skip a rollout's later epochs once the policy has moved so far; 0 = never",
        unit="nats a token",
        low=0,
    )
    overlap: bool = option(
        False,
        "make the next rollout while this one trains, with weights one rollout old; a resumed run "
        "makes it anew and is not the same to the bit",
    )
    pairing: str = option(
        "best_worst",
        "pairs: the best and the worst response, or the first two",
        choices=("best_worst", "random"),
    )
    min_difference: float = option(
        0.0, "pairs whose scores differ by no more get weight 0", unit="of reward", low=0
    )
    threshold: str = option(
        "mean",
        "unpaired: desirable from this score on: a number, mean or median of all, or prompt: the "
        "mean of the prompt's own",
    )
    log_samples_every_steps: int = option(
        10, "samples written to WORKDIR/samples.jsonl; 0 = never", unit="steps", low=0, resume=True
    )
    server: ServerOptions = group(ServerOptions)

    def check(self) -> Iterator[str]:
        for name in ("max_turns", "max_turn_tokens", "environment_seconds"):
            value, default = getattr(self, name), getattr(RolloutOptions, name)
            if value != default and not self.environment:
                yield f"{name} = {value} has no effect without rollout.environment"
        if self.max_turn_tokens > self.max_new_tokens:
            yield (
                f"max_turn_tokens = {self.max_turn_tokens}: expected at most max_new_tokens = "
                f"{self.max_new_tokens}, which holds all turns"
            )
        if self.threshold not in ("mean", "median", "prompt") and number_in(self.threshold) is None:
            yield (
                f"threshold = {self.threshold!r:.60}: expected a number, 'mean', 'median' or "
                "'prompt'"
            )


@dataclasses.dataclass(frozen=True)
class DebugOptions(Checked):
    """What helps to find a mistake or a slow place."""

    nan_check: bool = option(
        False, "run a step that gave a non-finite value again and name the operation"
    )
    profile_steps: tuple[int, ...] = option(
        (), "(first, last): write a profiler trace of these steps to WORKDIR/profile"
    )
    dump_hlo: bool = option(False, "write the compiled step's text to WORKDIR/hlo")
    compile_cache: str = option(
        "auto",
        "folder that keeps compiled programs for the next start; auto = "
        "JAX_COMPILATION_CACHE_DIR, which several CPU devices must not have, else "
        "align_jax/programs in the user's cache folder (several CPU devices or processes keep "
        "none); '' = none",
    )
    memory_profile_step: int = option(
        -1, "write a device memory profile after this step; -1 = never", low=-1
    )

    def check(self) -> Iterator[str]:
        if len(self.profile_steps) not in (0, 2):
            yield f"profile_steps = {self.profile_steps}: expected (first, last) or ()"
        elif self.profile_steps and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            yield f"profile_steps = {self.profile_steps}: expected 1 <= first <= last"
        if self.memory_profile_step == 0:
            yield "memory_profile_step = 0: steps count from 1; -1 = never"


LENGTHS = ("total_steps", "total_epochs", "total_examples")  # of a run: one is given


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """A whole run."""

    seed: int = option(0, "of the data order, random weights, dropout and sampling", low=0)
    total_steps: int = option(
        0,
        "length of the run: exactly one of these three is positive",
        unit="steps",
        low=0,
        resume=True,
    )
    total_epochs: float = option(0.0, "length of the run", unit="epochs", low=0, resume=True)
    total_examples: int = option(0, "length of the run", unit="groups", low=0, resume=True)
    batch_size: int = option(
        64, "prompts with their responses in a step, the whole mesh together", unit="groups", low=1
    )
    microbatches: int = option(
        1,
        "the step's batch in so many parts, one after another: less memory, same result",
        low=1,
        resume=True,
    )
    max_length: int = option(1024, "of a prompt with one response", unit="tokens", low=1)
    row_length: int = option(
        0, "of a packed row; 0 = what costs least for the data's lengths", unit="tokens", low=0
    )
    tokenizer: str = option(
        "", "directory, hub id, or byte; '' = the model's own (byte for random weights)"
    )
    model: ModelOptions = group(ModelOptions)
    reference: ReferenceOptions = group(ReferenceOptions)
    data: DataOptions = group(DataOptions)
    objective: ObjectiveOptions = group(ObjectiveOptions)
    optimizer: OptimizerOptions = group(OptimizerOptions)
    mesh: MeshOptions = group(MeshOptions, resume=True)
    checkpoint: CheckpointOptions = group(CheckpointOptions, resume=True)
    eval: EvalOptions = group(EvalOptions)
    log: LogOptions = group(LogOptions, resume=True)
    rollout: RolloutOptions = group(RolloutOptions)
    rewards: Mapping[str, Any] = option(
        {},
        "online: reward -> its weight, or a dict with weight and that reward's own options",
        table="align_jax.online.rewards:REWARDS",
    )
    debug: DebugOptions = group(DebugOptions, resume=True)

    def check(self) -> Iterator[str]:
        given = {name: getattr(self, name) for name in LENGTHS}
        if sum(value > 0 for value in given.values()) != 1:
            got = ", ".join(f"{name}={value}" for name, value in given.items())
            yield f"{', '.join(LENGTHS)}: exactly one must be positive; got {got}"
        if self.batch_size % self.microbatches:
            yield (
                f"batch_size = {self.batch_size} is not divisible by microbatches = "
                f"{self.microbatches}; --config.batch_size="
                f"{-(-self.batch_size // self.microbatches) * self.microbatches} is"
            )
        if 0 < self.total_examples < self.batch_size:
            yield (
                f"total_examples = {self.total_examples}: expected at least batch_size = "
                f"{self.batch_size}, which is a step"
            )
        if self.checkpoint.best_metric and not self.eval.every_steps:
            yield (
                f"checkpoint.best_metric = {self.checkpoint.best_metric!r}: there is no evaluation "
                "on the way: set eval.every_steps > 0"
            )
        if self.data.layout == "plain" and (self.row_length or self.data.groups_per_row):
            yield (
                "row_length and data.groups_per_row belong to data.layout = 'packed' or "
                "'shared_prefix'"
            )

    def total_steps_of(self, steps_per_epoch: int | float) -> int:
        """Return the run's length in optimizer steps, whichever of the three totals gives it.

        Args:
            steps_per_epoch: steps that see each example once.

        Returns:
            At least 1.
        """
        if self.total_steps:
            return self.total_steps
        if self.total_epochs:
            return max(1, round(self.total_epochs * steps_per_epoch))
        return max(1, self.total_examples // self.batch_size)

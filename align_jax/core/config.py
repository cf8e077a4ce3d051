# SPDX-License-Identifier: Apache-2.0
"""Every key of a run's configuration, and the checks made on it before anything is compiled.

A config file starts from ``defaults()``, which is the only place where a key is born; the dict is
locked, so a misspelled key fails on the command line and in the file alike.  ``validate`` sees the
config alone; what depends on tables (objectives, optimizers, model families) or on the data is
checked by whoever owns the table, still before the first compile.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict


def defaults() -> ConfigDict:
    """Return a config with every key at its default; units and trade-offs beside each."""
    c = ConfigDict()
    c.seed = 0  # of the data order, random weights, dropout and sampling
    c.total_steps = 0  # length of the run: exactly one of these three is positive
    c.total_epochs = 0.0
    c.total_examples = 0
    c.batch_size = 64  # groups (prompts with their responses) in a step, the whole mesh together
    # the step's batch in so many parts, one after another: less memory, same result
    c.microbatches = 1
    c.max_length = 1024  # tokens of a prompt with one response
    c.row_length = 0  # tokens of a packed row; 0 = that of R full-length responses
    c.tokenizer = ""  # directory, hub id, or "byte"; "" = the model's own (byte for random weights)

    c.model = m = ConfigDict()
    # directory or hub id of a Hugging Face checkpoint; "" = random weights from family and config
    m.path = ""
    m.family = "llama"  # for random weights: a key of models.FAMILIES
    m.config = ConfigDict()  # for random weights: fields of that family's Hugging Face config
    m.param_dtype = "float32"  # of what is trained; bfloat16 halves memory but loses small updates
    m.compute_dtype = "bfloat16"  # of activations and matrix products; float32 on a CPU
    m.remat = "full"  # what the backward pass recomputes; see models.transformer.REMAT
    m.attention = "auto"  # a key of models.attention.ATTENTION; auto = the platform's fastest
    # of objectives with values: value (linear) or value_mlp (three layers, detached states)
    m.value_head = "value"
    m.load_balancing = 0.0  # coefficient of a mixture of experts' load-balancing loss
    m.freeze = ()  # regular expressions: parameters whose path matches are not trained
    m.quantize = ""  # "int8" or "nf4": hold the frozen base quantized (with lora.rank > 0)
    m.lora = lora = ConfigDict()
    lora.rank = 0  # 0 = full fine-tune
    lora.alpha = 16.0  # the adapter's output is scaled by alpha / rank (rslora: alpha / sqrt(rank))
    lora.dropout = 0.0
    # regular expression of the adapted matrices, as attention/query, mlp/down
    lora.targets = "attention/.*|mlp/.*"
    lora.rslora = False
    lora.dora = False
    # a PEFT adapter to start from; its rank, alpha, targets and kind then hold (rank: 0 or the
    # same)
    lora.path = ""

    c.reference = r = ConfigDict()
    r.path = ""  # directory or hub id; "" = the starting weights
    r.dtype = "bfloat16"  # of the frozen weights
    # in_graph, or cached: token log-probabilities computed once and kept on disk
    r.mode = "in_graph"
    r.cache = ""  # folder of the cache; "" = WORKDIR/reference
    # TR-DPO: reference <- mix * policy + (1 - mix) * reference, every so many steps; 0 = never
    r.sync_every_steps = 0
    r.mix = 1.0

    c.data = d = ConfigDict()
    # one source, or several separated by commas: path, glob, tfds:..., hf:..., builtin:...
    d.train = ""
    # likewise; "" = hold out eval_fraction of the training examples (builtin data: its own eval
    # split)
    d.eval = ""
    # of the training examples, at most eval.max_examples; 0 = hold nothing out
    d.eval_fraction = 0.05
    d.weights = ()  # of several training sources; () = each example once an epoch
    # a key of data.FORMATS, a name of data.DATASETS, or auto: found from the fields
    d.format = "auto"
    d.columns = ConfigDict()  # field that the format expects -> column of the data
    # plain: a response a row; packed: groups a row; shared_prefix: packed, prompts stored once
    d.layout = "plain"
    d.groups_per_row = 0  # packed layouts; 0 = row_length / mean length of a group
    # of the prompt: keep_start, keep_end; or drop: leave such examples out
    d.truncation = "keep_end"
    d.max_prompt_length = 0  # tokens; 0 = what the response leaves of max_length
    d.chat_template = ""  # a Jinja template or a file with one; "" = the tokenizer's own
    d.options = ConfigDict()  # keyword arguments of the conversion between data kinds
    d.control_tokens = ()  # (before chosen, before rejected) responses: csft
    d.trim = True  # rows of the longest example's length where that is below max_length
    d.shuffle = True
    d.prefetch = 2  # batches made ahead on the host
    d.cache = ""  # folder of the tokenized data; "" = not kept

    c.objective = o = ConfigDict()
    o.name = "dpo"  # a key of losses.OBJECTIVES, or a sum of several: "dpo+sft"
    o.weights = ()  # of a sum's terms

    c.optimizer = p = ConfigDict()
    p.name = "adamw"  # a key of training.optim.OPTIMIZERS
    p.learning_rate = 1e-6
    # after the warm-up: constant, linear, cosine (to final_fraction of the peak)
    p.schedule = "linear"
    p.final_fraction = 0.0
    p.warmup_steps = 0  # at most one of these two is positive
    p.warmup_fraction = 0.0
    p.weight_decay = 0.0  # on matrices; norms and biases are left out
    p.clip_norm = 1.0  # of the gradient's global norm; 0 = no clipping
    p.b1 = 0.9
    p.b2 = 0.999
    p.eps = 1e-8
    p.moment_dtype = "float32"  # of the first moment; bfloat16 saves two bytes a parameter

    c.mesh = mesh = ConfigDict()
    mesh.data = 1  # copies of the weights; across slices the only axis on the data-center network
    mesh.fsdp = -1  # weights, optimizer and rows split; -1 = the rest of the devices
    mesh.expert = 1
    mesh.sequence = 1  # a row's tokens split
    mesh.tensor = 1  # heads, feed-forward and vocabulary split

    c.checkpoint = k = ConfigDict()
    k.every_steps = 500
    k.keep = 2  # newest checkpoints kept, the best one besides
    # e.g. "eval/rewards/accuracies" or "-eval/loss" (smaller is better); "" = none
    k.best_metric = ""
    k.restore = "latest"  # what a restarted run continues from: latest, best, a step, or a path
    # folder on each host's own storage, such as /dev/shm/align_jax: a second, frequent tier; "" =
    # off
    k.local = ""
    # fewer steps lost, but each save holds the step up; three times the host's share of room
    k.local_every_steps = 50

    c.eval = e = ConfigDict()
    e.every_steps = 100  # 0 = only at the end
    e.max_examples = 512  # groups; always the same ones
    e.batch_size = 0  # groups; 0 = batch_size

    c.log = log = ConfigDict()
    log.every_steps = 1
    log.tensorboard = False
    log.wandb = ""  # project name; "" = off

    c.rollout = roll = ConfigDict()  # online objectives only
    roll.prompts = 0  # prompts in a rollout; 0 = batch_size
    roll.responses_per_prompt = 8
    roll.max_new_tokens = 256
    # completions decoded together, the whole mesh: more are faster, and their cache larger
    roll.rows = 256
    # devices of a host that share a copy of the weights while generating; 0 = as training splits
    # them
    roll.tensor = 0
    roll.temperature = 1.0
    roll.top_p = 1.0
    roll.top_k = 0  # 0 = all
    roll.min_p = 0.0
    roll.stop = ()  # stop strings
    roll.log_samples_every_steps = 10
    roll.options = ConfigDict()  # keyword arguments of the online source, by the objective's kind

    # name of online.REWARDS -> weight, or a dict with weight and that reward's options
    c.rewards = ConfigDict()

    c.debug = debug = ConfigDict()
    debug.nan_check = False  # re-run a step that gave a non-finite value and name the operation
    # (first, last): write a profiler trace of these steps to WORKDIR/profile
    debug.profile_steps = ()
    debug.dump_hlo = False  # write the compiled step's text to WORKDIR/hlo
    debug.compile_cache = ""  # directory of the persistent compilation cache
    debug.memory_profile_step = -1  # write a device memory profile after this step
    return c.lock()


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """Return the config that was saved as nested dicts, keys of a newer version at their
    defaults."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return ConfigDict({key: plain(inner) for key, inner in value.items()})
        return tuple(map(plain, value)) if isinstance(value, list) else value

    config = defaults().unlock()
    config.update(plain(values))
    return config.lock()


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" for the known name most like this one, or the list of what is
    known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def choose(table: Mapping[str, Any], name: str, key: str) -> Any:
    """Look a name up in a table; raise a ValueError that names the config key and the nearest known
    name."""
    if name not in table:
        raise ValueError(f"config.{key} = {name!r} is unknown{nearest(str(name), table)}")
    return table[name]


CHOICES: Mapping[str, tuple[Any, ...]] = {
    "model.param_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.value_head": ("value", "value_mlp"),
    "model.quantize": ("", "int8", "nf4"),
    "reference.dtype": ("float32", "bfloat16", "float16"),
    "reference.mode": ("in_graph", "cached"),
    "data.layout": ("plain", "packed", "shared_prefix"),
    "data.truncation": ("keep_start", "keep_end", "drop"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
}
POSITIVE = (
    "batch_size",
    "microbatches",
    "max_length",
    "checkpoint.keep",
    "checkpoint.local_every_steps",
    "log.every_steps",
    "data.prefetch",
    "rollout.responses_per_prompt",
    "rollout.max_new_tokens",
    "rollout.rows",
)
NOT_NEGATIVE = (
    "total_steps",
    "total_epochs",
    "total_examples",
    "row_length",
    "model.lora.rank",
    "model.lora.dropout",
    "reference.sync_every_steps",
    "data.groups_per_row",
    "data.max_prompt_length",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.warmup_fraction",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "checkpoint.every_steps",
    "eval.every_steps",
    "eval.max_examples",
    "eval.batch_size",
    "rollout.prompts",
    "rollout.tensor",
    "rollout.temperature",
    "rollout.top_k",
)


def get(config: ConfigDict, key: str) -> Any:
    """Return the value at a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def validate(config: ConfigDict) -> None:
    """Check everything that the config alone can tell; report every mistake in one error.

    Raises:
        ValueError: listing each key, what was expected, what was got and the nearest fix.
    """
    wrong = []
    for key, known in CHOICES.items():
        if get(config, key) not in known:
            wrong.append(
                f"{key} = {get(config, key)!r}: expected one of {', '.join(map(repr, known))}"
            )
    for keys, least in ((POSITIVE, 1), (NOT_NEGATIVE, 0)):
        wrong += [
            f"{key} = {get(config, key)}: expected at least {least}"
            for key in keys
            if get(config, key) < least
        ]
    lengths = ("total_steps", "total_epochs", "total_examples")
    if sum(config[key] > 0 for key in lengths) != 1:
        wrong.append(
            f"exactly one of {', '.join(lengths)} must be positive; got "
            + ", ".join(f"{key}={config[key]}" for key in lengths)
        )
    if config.optimizer.warmup_steps and config.optimizer.warmup_fraction:
        wrong.append("optimizer.warmup_steps and optimizer.warmup_fraction are both set; set one")
    if config.optimizer.warmup_fraction > 1:
        wrong.append(
            f"optimizer.warmup_fraction = {config.optimizer.warmup_fraction}: expected at most 1"
        )
    if not config.data.train:
        wrong.append("data.train is empty: name a file, tfds:..., hf:... or builtin:preferences")
    if config.batch_size % config.microbatches:
        wrong.append(
            f"batch_size = {config.batch_size} is not divisible by microbatches = "
            f"{config.microbatches}"
        )
    if config.data.layout == "plain" and (config.row_length or config.data.groups_per_row):
        wrong.append(
            "row_length and data.groups_per_row belong to data.layout = 'packed' or 'shared_prefix'"
        )
    if 0 < config.row_length < config.max_length:
        wrong.append(
            f"row_length = {config.row_length} is shorter than max_length = {config.max_length}"
        )
    if not config.model.path and not config.model.config:
        wrong.append(
            "model.path is empty and so is model.config: name a checkpoint, or give the "
            "fields of a "
            f"{config.model.family} config for random weights"
        )
    if config.model.quantize and not (config.model.lora.rank or config.model.lora.path):
        wrong.append("model.quantize holds the frozen base quantized: it needs model.lora.rank > 0")
    if not 0 <= config.reference.mix <= 1:
        wrong.append(f"reference.mix = {config.reference.mix}: expected from 0 to 1")
    if config.reference.sync_every_steps and config.reference.mode == "cached":
        wrong.append(
            "reference.sync_every_steps moves the reference, which reference.mode = "
            "'cached' has fixed; "
            "use in_graph"
        )
    k = config.checkpoint
    if "://" in k.local:
        wrong.append(
            f"checkpoint.local = {k.local!r}: expected a folder on each host's own "
            "storage, such as "
            "/dev/shm/align_jax (what lies in a bucket is --workdir)"
        )
    if k.local and 0 < k.every_steps <= k.local_every_steps:
        wrong.append(
            f"checkpoint.local_every_steps = {k.local_every_steps}: expected less than "
            f"checkpoint.every_steps = {k.every_steps}: local saves come between the "
            "persistent ones"
        )
    if len(config.debug.profile_steps) not in (0, 2):
        wrong.append(
            f"debug.profile_steps = {config.debug.profile_steps}: expected (first, last) or ()"
        )
    if wrong:
        raise ValueError(
            "the config has mistakes:\n" + "\n".join(f"  config.{line}" for line in wrong)
        )


def resolve_steps(config: ConfigDict, steps_per_epoch: float | int) -> int:
    """Return the run's length in optimizer steps, whichever of the three totals gives it.

    Args:
        config: the config.
        steps_per_epoch: steps that see each example once.

    Returns:
        At least 1.
    """
    if config.total_steps:
        return config.total_steps
    if config.total_epochs:
        return max(1, round(config.total_epochs * steps_per_epoch))
    return max(1, config.total_examples // config.batch_size)

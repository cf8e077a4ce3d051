# SPDX-License-Identifier: Apache-2.0
"""A run, from its config: what ``train``, ``plan``, ``export``, ``sample`` and ``evaluate`` share.

    config ─ resolve_config ─► terms, tokenizer, models ─ prepare ─► data, specs ─► Run

What a run has trained is read back in ``runs.trained``.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from align_jax import losses
from align_jax.core import config as configs
from align_jax.core import metrics
from align_jax.core.options import (
    Config,
    DataOptions,
    ModelOptions,
    ReferenceOptions,
    RolloutOptions,
)
from align_jax.core.tree import flatten
from align_jax.data import datasets, pipeline, synthetic, template
from align_jax.data.datasets import Examples
from align_jax.data.layout import BatchSizes
from align_jax.data.pipeline import Pipeline
from align_jax.data.sources import Source
from align_jax.data.tokenizer import load_tokenizer, pad_id
from align_jax.interop import hf, peft
from align_jax.losses.logprobs import WHOLE
from align_jax.losses.objective import Term, data_kind
from align_jax.models.config import ModelConfig
from align_jax.models.lora import LoraConfig
from align_jax.online.config import RolloutConfig, is_online, make_rollout_config
from align_jax.online.rollout import Rollouts, make_rollouts
from align_jax.parallel import compile_cache
from align_jax.parallel.mesh import AXES, make_mesh, mesh_shape, row_shards
from align_jax.runs import early, memory, reported, vocabulary, weights
from align_jax.storage import workdir as record
from align_jax.training import initialize, optim, partitioning
from align_jax.training.flops import attention_cost
from align_jax.training.steps import CHUNK, CHUNKS, StepSpec

# The embedding's rows are padded to this whatever the mesh, so that a checkpoint of one tensor axis
# is read on another.
VOCABULARY_MULTIPLE = 16


class ResolvedConfig(NamedTuple):
    """What a config means before any weight or example is read."""

    terms: tuple[Term, ...]
    tokenizer: Any
    model_config: ModelConfig
    models: initialize.Models
    kind: str  # of data the objective trains on
    rollouts: RolloutConfig | None  # how an online run generates; None of an offline one
    new_tokens: tuple[str, ...] = ()  # that the checkpoint's vocabulary has grown by


def objective_terms(config: Config) -> tuple[Term, ...]:
    """Resolve the objective and its options."""
    return losses.resolve(
        config.objective.name, config.objective.options, config.objective.weights or None
    )


def adapter(
    config: Config, model_config: ModelConfig, tokenizer: Any, new_tokens: tuple[str, ...] = ()
) -> LoraConfig | None:
    """Return the policy's adapter: as the config says, or as the PEFT adapter is that it starts
    from.

    Args:
        config: the config.
        model_config: what the base is.
        tokenizer: the run's, whose ids ``model.lora.tokens`` have.
        new_tokens: that the vocabulary has grown by.

    Raises:
        ValueError: the config gives another rank than that adapter's, or tokens beside it, or ones
            that are none.
    """
    options = config.model.lora
    if not options.path:
        if not options.rank:
            return None
        tokens = vocabulary.trained_rows(options.tokens, tokenizer, new_tokens)
        return LoraConfig(
            options.rank,
            alpha=options.alpha,
            dropout=options.dropout,
            targets=options.targets,
            rank_stabilized=options.rslora,
            dora=options.dora,
            tokens=tokens,
            head_tokens=() if model_config.tied else tokens,
        )
    if options.tokens:
        raise ValueError(
            f"config.model.lora.tokens = {options.tokens}: the rows that the adapter "
            f"{options.path!r} trains hold; leave tokens empty, or merge the adapter first"
        )
    lora, _ = peft.load(options.path, model_config)
    if options.rank not in (0, lora.rank):
        raise ValueError(
            f"config.model.lora.rank = {options.rank}, but the adapter {options.path!r} has rank "
            f"{lora.rank}; leave the rank at 0"
        )
    return dataclasses.replace(lora, dropout=options.dropout)


def resolve_config(config: Config, devices: int) -> ResolvedConfig:
    """Turn a config into terms, tokenizer and models; every mistake that needs no data is found
    here.

    Args:
        config: the config.
        devices: how many there are (the vocabulary is padded to what the tensor axes divide).

    Raises:
        ValueError, KeyError, FileNotFoundError: what was expected, what was got, the nearest fix.
    """
    terms = objective_terms(config)
    # first the model's own file, of which a tokenizer's loader would say less
    path, family = config.model.path, config.model.family
    model_config = hf.load_config(path, family=family) if path else None
    tokenizer = load_tokenizer(
        config.tokenizer or config.model.path or "byte",
        chat_template=config.data.chat_template or None,
        date=config.data.date,
    )
    if model_config is None:
        fields = {"vocab_size": len(tokenizer), **config.model.config}
        model_config = hf.config_of(family, fields)
    had = model_config.vocab_size
    model_config = vocabulary.grown(model_config, tokenizer, config.model.path, "config.model.path")
    new_tokens = vocabulary.added(tokenizer, had)
    tensor = mesh_shape(dataclasses.asdict(config.mesh), devices)[AXES.index("tensor")]
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor, config.rollout.tensor or 1)
    model_config = dataclasses.replace(model_config.padded(multiple), run_length=config.max_length)
    if any({"scores", "step_scores"} & set(term.needs) for term in terms):
        model_config = model_config.with_pad(pad_id(tokenizer))
    early.check_positions(config, model_config)
    _check_reference(config, terms)
    _check_guide(config, terms)
    _check_model(config, terms, model_config)
    lora, online = adapter(config, model_config, tokenizer, new_tokens), is_online(terms, config)
    if lora is not None and lora.untied:
        model_config = model_config.untied()
    models = initialize.make_models(
        model_config,
        terms,
        config.model,
        lora,
        unembed=online,
        reference=_reference_config(config, tokenizer, model_config, multiple),
    )
    if config.model.path and models.policy.options.unembed:
        weights.check_speaks(model_config, config.model.path)
    _check_text(config, terms)
    _check_data(config, "samples" if online else data_kind(terms))
    if not online:
        _check_rollout(config)
    rollouts = make_rollout_config(terms, config) if online else None
    kind = data_kind(terms)
    return ResolvedConfig(terms, tokenizer, model_config, models, kind, rollouts, new_tokens)


def _check_reference(config: Config, terms: Sequence[Term]) -> None:
    """Refuse keys of the reference that would do nothing, or cannot hold together.

    Raises:
        ValueError: the key, and what to give instead.
    """
    r, name = config.reference, config.objective.name
    if r.mode == "cached" and is_online(terms, config):
        raise ValueError(
            "config.reference.mode = 'cached' computes the reference's log-probabilities of a "
            "fixed data set once; an online run trains on new samples: use in_graph"
        )
    if r.mode == "cached" and any(WHOLE & set(term.needs) for term in terms):
        raise ValueError(
            "config.reference.mode = 'cached' keeps token log-probabilities; the objective "
            f"{name!r} needs whole distributions of the reference; use in_graph"
        )
    if r.mode == "cached" and any(term.objective.mismatched for term in terms):
        raise ValueError(
            "config.reference.mode = 'cached' does not hold the mismatched pairs of the objective "
            f"{name!r}; use in_graph, or kto_zero"
        )
    wants = any(term.reference or term.rollout.get("kl_coef") for term in terms)
    wants = wants or config.rollout.against in ("reference", "mixture")
    default = ReferenceOptions()
    for key in ("path", "mode", "sync_every_steps", "sync_every_rollouts"):
        if not wants and (value := getattr(r, key)) != getattr(default, key):
            raise ValueError(
                f"config.reference.{key} = {value!r}: the objective {name!r} compares with no "
                "reference, with these options"
            )
    kept = r.mode == "cached" or any(term.loss.wants_guide for term in terms)
    if r.cache and not kept:
        raise ValueError(
            f"config.reference.cache = {r.cache!r} has no effect: nothing of the reference is "
            "kept; set reference.mode = 'cached'"
        )
    whole = not (config.model.lora.rank or config.model.lora.path or config.model.freeze)
    if r.path and r.moves and not whole:
        raise ValueError(
            f"config.reference.path = {r.path!r} cannot be where a moving reference starts of "
            "which only a part is trained (model.lora, model.freeze): what moves is that part, "
            "over the policy's own weights; leave reference.path at '', or set "
            "reference.sync_every_steps = 0"
        )
    if r.sync_every_rollouts and not is_online(terms, config):
        raise ValueError(
            f"config.reference.sync_every_rollouts = {r.sync_every_rollouts}: this run has no "
            "rollouts; set reference.sync_every_steps"
        )
    if r.sync_every_rollouts and config.rollout.stop_kl:
        raise ValueError(
            "config.rollout.stop_kl ends rollouts early, so that the steps of "
            "config.reference.sync_every_rollouts are not known: set one of them to 0"
        )


def _check_guide(config: Config, terms: Sequence[Term]) -> None:
    """Refuse a guide that no term reads, and one of samples, which cannot be computed once.

    Raises:
        ValueError: the objective or the key, and what to give instead.
    """
    guided = [term.name for term in terms if term.loss.wants_guide]
    if guided and is_online(terms, config):
        raise ValueError(
            f"the objective {guided[0]!r} reads a guide's log-probabilities of a fixed data set, "
            "computed once; an online run trains on new samples: use dpo"
        )
    if (guide := config.reference.guide) and not guided:
        raise ValueError(
            f"config.reference.guide = {guide!r} has no effect: the objective "
            f"{config.objective.name!r} reads no guide; tgdpo does"
        )


def _check_model(config: Config, terms: Sequence[Term], model_config: ModelConfig) -> None:
    """Refuse keys of the model that would do nothing, or that do not fit it.

    Raises:
        ValueError: the key.
        FileNotFoundError: there is no such reward model.
    """
    if config.model.load_balancing and not model_config.num_experts:
        raise ValueError(
            f"config.model.load_balancing = {config.model.load_balancing:g} has no effect: the "
            "model is no mixture of experts"
        )
    valued = any("values" in term.needs for term in terms)
    for key in ("value_head", "value_path", "value_warmup_steps"):
        value = getattr(config.model, key)
        if value != getattr(ModelOptions(), key) and not valued:
            raise ValueError(
                f"config.model.{key} = {value!r} has no effect: the objective "
                f"{config.objective.name!r} needs no values"
            )
    head = f"{config.model.value_head}/out/kernel"
    if valued and (held := [one for one in config.model.freeze if re.search(one, head)]):
        raise ValueError(
            f"config.model.freeze = {held[0]!r} holds the value head, which the objective "
            f"{config.objective.name!r} learns"
        )
    if path := config.model.value_path:
        weights.check_value_path(path, model_config)


def _check_text(config: Config, terms: Sequence[Term]) -> None:
    """Refuse text that no term learns, and a term that has none.

    Raises:
        ValueError: what to give.
    """
    learns_text = any(term.loss.text for term in terms)
    if learns_text != bool(config.data.text):
        raise ValueError(
            f"config.data.text = {config.data.text!r}: "
            + (
                f"the objective {config.objective.name!r} learns text beside its rollouts "
                "(ptx_coef): name a source"
                if learns_text
                else f"the objective {config.objective.name!r} has no term that learns it: set "
                "config.objective.ptx_coef"
            )
        )


# keys of the data that make something of one kind of examples alone
_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "unpaired": ("labels", "frac_unique_desirable", "frac_unique_undesirable", "threshold"),
    "pairs": ("pairing", "min_difference"),
    "ranked": ("responses",),
    "stepwise": ("step_separator",),
}
_TRAINS_ON = {
    "unpaired": "labels, as kto does",
    "pairs": "pairs, as dpo does",
    "ranked": "rankings, as reward_ranked does",
    "stepwise": "labeled steps, as reward_process does",
}


def _check_data(config: Config, kind: str) -> None:
    """Refuse keys that make something of examples of another kind.

    Raises:
        ValueError: the key, and what trains on such examples.
    """
    for wanted, keys in _OF_KIND.items():
        for key in keys if kind != wanted else ():
            if (value := getattr(config.data, key)) != getattr(DataOptions(), key):
                raise ValueError(
                    f"config.data.{key} = {value!r} has no effect: the objective "
                    f"{config.objective.name!r} trains on {kind}, not on {_TRAINS_ON[wanted]}"
                )


def _check_rollout(config: Config) -> None:
    """Refuse keys of rollouts where there are none.

    Raises:
        ValueError: the keys.
    """
    given, default = (
        flatten(configs.to_dict(options), "config/rollout/")
        for options in (config.rollout, RolloutOptions())
    )
    if named := [key for key in given if key not in default or given[key] != default[key]]:
        raise ValueError(
            f"{', '.join(named).replace('/', '.')}: no effect: the objective "
            f"{config.objective.name!r} trains on data; with config.rewards it would train on its "
            "own samples"
        )


def _reference_config(
    config: Config, tokenizer: Any, policy: ModelConfig, multiple: int
) -> ModelConfig | None:
    """Read what the reference is, where it has a checkpoint of its own.

    Raises:
        ValueError: it moves and is no model of the policy's kind, its positions are too few, or it
            has another tokenizer (tokens that were added to it aside).
    """
    path, known = config.reference.path, dict(config.reference.config)
    if not path and not known:
        return None
    family = config.reference.family
    found = hf.load_config(path, family=family) if path else hf.config_of(family, known)
    weights.check_speaks(found, path)
    found = vocabulary.grown(found, tokenizer, path, "config.reference.path").padded(multiple)
    found = dataclasses.replace(found, run_length=config.max_length)
    if found.max_positions < config.max_length:
        raise ValueError(
            f"config.reference.path = {path!r} has {found.max_positions} positions; this run needs "
            f"{config.max_length}"
        )
    if path and (other := vocabulary.differing(tokenizer, path)):
        raise ValueError(
            f"config.reference.path = {path!r} has another tokenizer: {len(other)} of its tokens "
            f"differ from the policy's, {other[0]!r} among them; the reference sees the policy's "
            "token ids"
        )
    if config.reference.moves:
        if unlike := found.differences(policy):
            named = ", ".join(f"{name} ({a!r}, {b!r})" for name, a, b in unlike)
            raise ValueError(
                f"config.reference.path = {path!r} and the policy differ in {named}: a "
                "reference that moves with the policy (reference.sync_every_steps) is a model of "
                "its kind"
            )
        return None
    return found


def make_step_spec(config: Config, resolved: ResolvedConfig, total_steps: int) -> StepSpec:
    """Put together what the steps are compiled from."""
    r, rollouts = config.reference, resolved.rollouts
    round_steps = r.sync_every_rollouts * rollouts.steps if rollouts is not None else 0
    models, schedule = resolved.models, optim.make_schedule(config.optimizer, total_steps)
    optimizer = optim.make_optimizer(config.optimizer, schedule, models.policy.roles())
    return StepSpec(
        models.policy,
        models.base,
        resolved.terms,
        optimizer,
        schedule,
        other=models.other,
        microbatches=config.microbatches,
        chunk=CHUNKS.get(jax.default_backend(), CHUNK),
        seed=config.seed,
        value_head=config.model.value_head,
        value_warmup_steps=config.model.value_warmup_steps,
        load_balancing=config.model.load_balancing,
        temperature=1.0 if rollouts is None else rollouts.temperature,
        sync_every_steps=r.sync_every_steps or round_steps,
        mix=r.mix,
    )


def make_state_specs(
    config: Config, resolved: ResolvedConfig, step_spec: StepSpec, mesh: Mesh
) -> initialize.StateSpecs:
    """Say what lies where on the mesh."""
    in_step = step_spec.wants_reference and config.reference.mode == "in_graph"
    rollouts = resolved.rollouts
    in_rollout = rollouts is not None and (
        rollouts.needs_reference or rollouts.options.against in ("reference", "mixture")
    )
    return initialize.make_state_specs(
        step_spec, mesh, config.model, config.reference, in_step or in_rollout
    )


def make_reference_specs(
    config: Config, resolved: ResolvedConfig, step_spec: StepSpec, mesh: Mesh
) -> initialize.StateSpecs:
    """Say what lies where while the reference's log-probabilities are computed that the run will
    find cached."""
    in_graph = dataclasses.replace(
        config, reference=dataclasses.replace(config.reference, mode="in_graph")
    )
    return make_state_specs(in_graph, resolved, step_spec, mesh)


class Run(NamedTuple):
    """A run ready to step: everything the loop touches."""

    config: Config
    workdir: str
    mesh: Mesh
    resolved: ResolvedConfig
    step_spec: StepSpec
    state_specs: initialize.StateSpecs
    train: Pipeline | Rollouts
    eval: Pipeline | None  # of held-out examples; None of prompts, which the source itself samples
    eval_text: Pipeline | None  # of held-out text, where a step gets text beside its rollout
    examples: Examples
    held_out: Examples | None
    total_steps: int


def read_data(
    config: Config, resolved: ResolvedConfig, given: Mapping[str, Source] | None = None
) -> tuple[Examples, Examples | None]:
    """Read the training and the held-out examples; every malformed row is found here.

    Args:
        config, resolved: of the run.
        given: name in ``config.data`` -> the rows from Python that it stands for.
    """
    d, kind = config.data, resolved.kind
    if resolved.rollouts is not None:
        kind = "completions" if resolved.rollouts.answers else "prompts"
    load = functools.partial(
        datasets.load,
        kind=kind,
        options=d,
        seed=config.seed,
        chat=bool(resolved.tokenizer.chat_template),
    )

    def sources(names: str) -> list[str | Source]:
        return [(given or {}).get(name, name) for name in names.split(",")]

    examples = load(sources(d.train), weights=d.weights, strict=True)
    _check_columns(resolved.terms, examples)
    if held_out := d.eval or (synthetic.eval_split(d.train) if d.eval_fraction else ""):
        return examples, load(sources(held_out), limit=config.eval.max_examples or None)
    return datasets.hold_out(
        examples, d.eval_fraction, most=config.eval.max_examples, seed=config.seed, folder=d.cache
    )


def _check_columns(terms: Sequence[Term], examples: Examples) -> None:
    """Refuse pairs without margins, and rows without weights, for an objective that learns them."""
    wanting = [term.name for term in terms if term.loss.wants_margin]
    if wanting and not any(example.margin for example in examples.items):
        raise ValueError(
            f"objective {wanting[0]!r} learns by how much the chosen answer is better: none of the "
            f"{len(examples)} pairs has a margin; name its column, such as "
            '--config.data.columns=\'{"margin": "score_gap"}\''
        )
    weighing = [term.name for term in terms if term.loss.wants_weights]
    if weighing and all(example.weight == 1 for example in examples.items):
        raise ValueError(
            f"objective {weighing[0]!r} with density_ratio multiplies losses by the data's weights:"
            f" none of the {len(examples)} examples has one; give a column weight, such as "
            "align_jax.data.density.density_ratios makes"
        )


def make_text(
    config: Config, resolved: ResolvedConfig, mesh: Mesh
) -> tuple[Pipeline | None, Pipeline | None]:
    """Tokenize the text that a step gets beside its rollout, and what is held out of it; None where
    there is none.

    Raises:
        ValueError: the share makes a number of examples that does not divide.
    """
    d = config.data
    if not d.text:
        return None, None
    count, multiple = round(d.text_share * config.batch_size), config.microbatches
    multiple *= row_shards(mesh)
    if count < 1 or count % multiple:
        raise ValueError(
            f"config.data.text_share = {d.text_share:g} of batch_size = {config.batch_size} are "
            f"{count} examples of text, which do not divide into {multiple} parts (devices over "
            f"rows times microbatches); the next share that does: "
            f"{-(-max(count, 1) // multiple) * multiple / config.batch_size:g}"
        )
    options = dataclasses.replace(d, layout="plain", format="auto", columns={}, groups_per_row=0.0)
    load = functools.partial(
        datasets.load,
        kind="completions",
        options=options,
        seed=config.seed,
        chat=bool(resolved.tokenizer.chat_template),
    )
    most = config.eval.max_examples
    held_out: Examples | None
    if own := synthetic.eval_split(d.text) if d.eval_fraction else "":
        train, held_out = load([d.text]), load([own], limit=most or None)
    else:
        train, held_out = datasets.hold_out(
            load(d.text.split(",")), d.eval_fraction, most=most, seed=config.seed, folder=d.cache
        )
    make = functools.partial(
        pipeline.make_pipeline,
        tokenizer=resolved.tokenizer,
        options=options,
        sizes=BatchSizes(count, config.max_length, row_multiple=multiple),
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return make(train), None if held_out is None else make(held_out, once=True)


def make_pipeline(
    config: Config, resolved: ResolvedConfig, mesh: Mesh, examples: Examples, *, once: bool
) -> Pipeline:
    """Tokenize and pack examples: for training (shuffled, endless), or once in fixed order
    (evaluation)."""
    scored = any("scores" in term.needs for term in resolved.terms)
    return pipeline.make_pipeline(
        examples,
        resolved.tokenizer,
        config.data,
        BatchSizes.of(
            config,
            row_shards(mesh),
            once=once,
            attention_cost=attention_cost(resolved.model_config, config.model.attention),
        ),
        seed=config.seed,
        mismatched=any(term.objective.mismatched for term in resolved.terms),
        once=once,
        unread=resolved.model_config.pad_token if scored else None,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def as_first_started(config: Config, workdir: str) -> Config:
    """Return the config with what a run's first start has chosen: types, the layout and its row
    length; the platform's types where it has not started yet."""
    path = epath.Path(workdir) / "config.json"
    found = record.read_record(path)["config"] if path.exists() else {}
    model, reference = config.model, config.reference
    if model.compute_dtype == "auto":
        dtype = found.get("model", {}).get("compute_dtype", "auto")
        model = dataclasses.replace(model, compute_dtype=initialize.own_dtype(dtype))
    if reference.dtype == "auto":
        dtype = found.get("reference", {}).get("dtype", "auto")
        reference = dataclasses.replace(reference, dtype=initialize.own_dtype(dtype))
    config = dataclasses.replace(config, model=model, reference=reference)
    if config.data.layout == "auto":
        layout = found.get("data", {}).get("layout", "auto")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, layout=layout))
    if not config.row_length and config.data.layout != "plain":
        config = dataclasses.replace(config, row_length=found.get("row_length", 0))
    return config


def first_day(workdir: str) -> str:
    """Return the day of a run's first start, the same on all processes; today where it has not
    started yet."""
    path = epath.Path(workdir) / "config.json"
    if path.exists():
        return str(record.read_record(path)["config"].get("data", {}).get("date", ""))
    today = np.int32(datetime.date.today().toordinal())
    agreed = multihost_utils.broadcast_one_to_all(today) if jax.process_count() > 1 else today
    return datetime.date.fromordinal(int(agreed)).isoformat()


def _resolve_dated(config: Config, workdir: str) -> tuple[Config, ResolvedConfig]:
    """Resolve a config; where the chat template reads the date, with that of the first start.

    Raises:
        ValueError: as ``resolve_config``, or a date that no template reads.
    """
    resolved, date = resolve_config(config, jax.device_count()), config.data.date
    if bool(date) == bool(template.date_read(resolved.tokenizer)):
        return config, resolved
    if date:
        raise ValueError(
            f"config.data.date = {date!r} has no effect: the chat template reads no date"
        )
    data = dataclasses.replace(config.data, date=first_day(workdir))
    config = dataclasses.replace(config, data=data)
    return config, resolve_config(config, jax.device_count())


def _check_measured(config: Config, held_out: Examples | None) -> None:
    """Refuse metrics of held-out examples where there are none, and those whose worst is kept.

    Raises:
        ValueError: the key.
    """
    names: dict[str, Any] = {
        "eval.stop_metric": config.eval.stop_metric,
        "checkpoint.best_metric": config.checkpoint.best_metric,
        "rollout.eval_responses_per_prompt": config.rollout.eval_responses_per_prompt,
    }
    for key, name in names.items():
        if name and held_out is None:
            raise ValueError(
                f"config.{key} = {name!r}: nothing is held out to measure it on: name data.eval, "
                "or set data.eval_fraction > 0"
            )
        metric = str(name).removeprefix("-")
        if (better := reported.direction(metric)) and (better < 0) != (metric != name):
            size, wanted = ("greater", metric) if better > 0 else ("smaller", f"-{metric}")
            raise ValueError(f"config.{key} = {name!r}: {size} is better there: write {wanted!r}")


def _check_total(config: Config, total: int) -> None:
    """Refuse a run that is too long to count, one in which the policy would never learn, and keys
    of steps that it does not have.

    Raises:
        ValueError: naming the key.
    """
    if total > configs.LARGEST:
        raise ValueError(
            f"config.total_epochs = {config.total_epochs:g} are {total:,} steps: expected at most "
            f"{configs.LARGEST:,}"
        )
    steps = {
        "reference.sync_every_steps": config.reference.sync_every_steps,
        "debug.profile_steps": (config.debug.profile_steps or (0,))[0],
        "debug.memory_profile_step": config.debug.memory_profile_step,
    }
    for key, step in steps.items():
        if step > total:
            raise ValueError(f"config.{key}: step {step} never comes: the run has {total} steps")
    if (first := config.model.value_warmup_steps) >= total:
        raise ValueError(
            f"config.model.value_warmup_steps = {first} of {total} steps: the policy would never "
            "learn; give fewer"
        )


def _as_laid_out(config: Config, train: Pipeline | Rollouts) -> Config:
    """Return the config with the layout and the row length that its data have chosen."""
    data = dataclasses.replace(config.data, layout=train.layout)
    length = config.row_length
    if isinstance(train, Pipeline) and train.layout != "plain" and not data.groups_per_row:
        length = train.shape.length
    return dataclasses.replace(config, data=data, row_length=length)


def _check_before_reading(config: Config) -> None:
    """Refuse what is a mistake whatever the data are.

    Raises:
        ValueError: a writer of metrics that is not installed, a warm-up that is longer than the
            run, or a folder of compiled programs on several CPU devices.
    """
    metrics.check_installed(dataclasses.asdict(config.log))
    if config.total_steps:  # else the data say how long the run is
        optim.make_schedule(config.optimizer, config.total_steps)
    named = config.debug.compile_cache not in ("", compile_cache.AUTO)
    if named and jax.default_backend() == "cpu" and jax.device_count() > 1:
        raise ValueError(
            f"config.debug.compile_cache = {config.debug.compile_cache!r} on {jax.device_count()} "
            "CPU devices: a program read from it would lose the order of its collectives and "
            "hang; --config.debug.compile_cache='' compiles it anew"
        )


def prepare(
    config: Config, workdir: str, *, here: bool = True, given: Mapping[str, Source] | None = None
) -> Run:
    """Check the config, index the data, lay out the parameters; nothing is compiled and no weight
    is read.

    Args:
        config: of the run.
        workdir: of the run; it need not exist.
        here: the run is to step on these devices: sizes that they cannot hold are refused.
        given: as ``read_data`` takes it.

    Raises:
        ValueError, KeyError, FileNotFoundError: a mistake in the config, the data or the workdir.
    """
    _check_before_reading(config)
    config = as_first_started(config, workdir)
    config, resolved = _resolve_dated(config, workdir)
    record.check(workdir, configs.to_dict(config), configs.may_change())
    mesh = make_mesh(dataclasses.asdict(config.mesh))
    examples, held_out = read_data(config, resolved, given)
    _check_measured(config, held_out)
    held: Pipeline | None = None
    held_text: Pipeline | None = None
    if resolved.rollouts is None:
        train: Pipeline | Rollouts = make_pipeline(config, resolved, mesh, examples, once=False)
        if held_out is not None:
            chosen = _as_laid_out(config, train)
            held = make_pipeline(chosen, resolved, mesh, held_out, once=True)
    else:
        text, held_text = make_text(config, resolved, mesh)
        train = make_rollouts(
            resolved.rollouts,
            config,
            examples.items,
            resolved.tokenizer,
            policy=resolved.models.policy,
            # one that moves is a policy of an earlier step, with its adapter
            reference=resolved.models.policy
            if config.reference.moves
            else resolved.models.other or resolved.models.base,
            mesh=mesh,
            load_model=weights.load_model,
            export=functools.partial(weights.save_policy, resolved.models.policy),
            held_out=() if held_out is None else held_out.items,
            text=text,
        )
        if held_out is not None and resolved.rollouts.answered:  # held-out answers are there
            held = make_pipeline(config, resolved, mesh, held_out, once=True)
    config = _as_laid_out(config, train)
    total = config.total_steps_of(train.steps_per_epoch)
    _check_total(config, total)
    step_spec = make_step_spec(config, resolved, total)
    specs = make_state_specs(config, resolved, step_spec, mesh)
    run = Run(
        config,
        workdir,
        mesh,
        resolved,
        step_spec,
        specs,
        train,
        held,
        held_text,
        examples,
        held_out,
        total,
    )
    if here:
        check_memory(run)
    return run


def check_memory(run: Run) -> None:
    """Refuse sizes that these devices cannot hold.

    Raises:
        ValueError: what a device must hold at least, by part, and what it has.
    """
    kept = (run.state_specs.state, run.state_specs.frozen)
    memory.check(run.config, run.resolved.model_config, kept, run.train.abstract(), run.mesh)


def lower(run: Run) -> jax.stages.Lowered:
    """Lower the run's very train step."""
    batch = partitioning.abstract_batch(run.mesh, run.train.abstract())
    return partitioning.lower_train_step(
        run.step_spec, run.state_specs.state, run.state_specs.frozen, batch, run.mesh
    )

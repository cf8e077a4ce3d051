# SPDX-License-Identifier: Apache-2.0
"""Every objective with every option away from its default, as runs of two steps.

A *case* is an objective, one option (or none), and a setting: how it is trained, laid out, split
and compared.  Every option of every objective has a case; settings are dealt to them so that each
objective and each option meets every weights, layout, microbatches and reference, and these meet
each other: pairwise covering, not the whole product.

    PYTHONPATH=. python tests/training/covering.py [few | FIRST:LAST] [LOG]     # all cases, or some

What came of each is a line of the file LOG, too; what stands there already is not run again.  A
process holds the programs of some 400 cases (Linux's vm.max_map_count); more are run in slices.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import random
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from align_jax import losses
from align_jax.core import config as configs
from align_jax.core.tree import flatten
from align_jax.interop import hf
from align_jax.losses import OBJECTIVES
from align_jax.models.model import build
from align_jax.parallel.mesh import make_mesh
from align_jax.parallel.sharding import put_batch
from align_jax.runs import loop, setup, weights
from align_jax.runs.source import make_source
from align_jax.training import partitioning, steps
from tests import xla_flags

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SETTINGS = {
    "weights": ("full", "lora", "dora"),
    "layout": ("plain", "packed", "shared_prefix"),
    "microbatches": (1, 4),
    "reference": ("in_graph", "cached", "moving"),
}
KEYS = {
    "full": {},
    "lora": {"model.lora.rank": 2},
    "dora": {"model.lora.rank": 2, "model.lora.dora": True},
    "in_graph": {},
    "cached": {"reference.mode": "cached"},  # in a folder of its own, which they share
    "moving": {"reference.sync_every_steps": 1, "reference.mix": 0.5},
}
# A value that two steps of a tiny model can tell from the default, and what it needs beside it: a
# rollout is used twice, so that ratios differ from 1 in the second step.
_LETTERS = list("abcdefghijklmnopqrstuvwxyz")  # of some samples, not of all
# ends of some samples that are worth nothing by themselves, so that finished ones differ in rewards
_ENDS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_FILTERED = {"advantages": "filtered", "kl_coef": 0.0, "rollout.responses_per_prompt": 4}
CHANGES: dict[str, dict[str, Any]] = {
    "advantages": {"advantages": "batch"},
    "alpha": {"alpha": 0.4},
    "beta": {"beta": 0.7},
    "bootstrap": {"bootstrap": True},
    "center_coef": {"center_coef": 0.5},
    "clip": {"clip": 1e-4},
    "clip_form": {"clip_form": "reciprocal", "clip": 0.9999},
    "cov_coef": {"cov_coef": 0.1, "cov_share": 0.2},
    "cov_high": {"cov_high": 0.2, "cov_low": 1e-3, "cov_share": 1.0},
    "cov_low": {"cov_low": 1e-3, "cov_share": 1.0},
    "cov_share": {"cov_share": 0.5, "cov_low": 1e-3},
    "critic_coef": {"critic_coef": 0.5},
    "critic_target": {"critic_target": "gae"},
    "delta": {"delta": 1.00001},
    "density_ratio": {"density_ratio": True},
    "desirable_weight": {"desirable_weight": 1.5},
    "dft": {"dft": True},
    "dual_clip": {"dual_clip": 1.00001},
    "entropy_coef": {"entropy_coef": 0.1},
    "epochs": {"epochs": 1},
    "epsilon": {"epsilon": 1e-5},
    "epsilon_high": {"epsilon_high": 1e-5},
    "entropy_step": {"entropy_step": 0.5, "entropy_target": 9.0},
    "entropy_target": {"entropy_target": 9.0},
    "epsilon_low": {"epsilon_low": 1e-5},
    "eta": {"eta": 2.0},
    "f_alpha": {"f_divergence": "alpha", "f_alpha": 0.3},
    "f_divergence": {"f_divergence": "js"},
    "form": {"form": "the last of its choices"},
    "gamma": {"gamma": 0.5},
    "gamma_beta_ratio": {"gamma_beta_ratio": 0.3},
    "humanline": {"humanline": True, "log_eps_p": -1e-5, "log_eps_r": 1e-5},
    "importance": {"importance": "sequence"},
    "k_negative": {"k_negative": 1.0},
    "k_positive": {"k_positive": 1.0},
    "kl_coef": {"kl_coef": 0.5, "epochs": 1},
    "kl_estimator": {"kl_estimator": "k3", "kl_coef": 5.0, "epochs": 1},
    "kl_horizon": {"kl_horizon": 8.0, "kl_target": 1e-6, "kl_coef": 5.0, "epochs": 1},
    # what is wanted alone, so that the estimates are above 0
    "kl_scope": {"kl_scope": "microbatch", "undesirable_weight": 0.0},
    "kl_sign": {"kl_sign": -1},
    "kl_target": {"kl_target": 1e-6, "kl_coef": 5.0, "epochs": 1},
    "label_smoothing": {"label_smoothing": 0.2},
    "lam": {"lam": 0.5},
    "lambda_negative": {"lambda_negative": 1.0},
    "lambda_positive": {"lambda_positive": 1.0},
    "ld_alpha": {"ld_alpha": 0.3},
    "lengths": {"lengths": "sum"},
    "log_eps_p": {"humanline": True, "log_eps_p": -1e-5, "log_eps_r": 1e-5},
    "log_eps_r": {"humanline": True, "log_eps_p": -1e-5, "log_eps_r": 1e-6},
    "loss_type": {"loss_type": "dr_grpo"},
    "max_length": {"loss_type": "dr_grpo", "max_length": 99},
    "length_normalization": {"length_normalization": False},
    "minibatches": {"minibatches": 2},
    "missing_eos_penalty": {"missing_eos_penalty": 0.5, "rollout.missing_eos_penalty": 0.0},
    "momentum": {"momentum": 0.5},
    "on_policy": {"on_policy": 0.5, "rollout.responses_per_prompt": 1, "rollout.max_new_tokens": 6},
    "off_policy_threshold": {"off_policy_threshold": 1e-6},
    "pass_k": {"pass_k": 1, "advantages": "pass_at_k", "kl_coef": 0.0},
    "keep_by": {"keep_by": "efficiency", **_FILTERED},
    "keep_count": {"keep_count": 3, **_FILTERED},
    "keep_hard": {"keep_hard": 4, **_FILTERED},
    "pass_score": {"pass_score": 0.2, "pass_k": 1, "advantages": "pass_at_k", "kl_coef": 0.0},
    "per": {"per": "sequence"},
    "positive_weight": {"positive_weight": 3.0},
    "ptx_coef": {"ptx_coef": 0.5, "data.text": "builtin:completions:train?size=16"},
    "reference_free": {"reference_free": True},
    "reward": {"reward": "score"},
    "sampler_correction": {"sampler_correction": "token_mask"},
    "sampler_ratio_max": {"sampler_ratio_max": 0.5, "sampler_correction": "token_truncate"},
    "sampler_ratio_min": {"sampler_ratio_min": 1.5, "sampler_correction": "token_truncate"},
    "scale": {"scale": "none"},
    "seq_kd": {"seq_kd": True, "rollout.responses_per_prompt": 1, "rollout.max_new_tokens": 6},
    "sft_coef": {"sft_coef": 0.5},
    "shift": {"shift": 0.5},
    "single_step": {"single_step": False},
    "steps": {"steps": "last"},
    "stop_gradient_chosen": {"stop_gradient_chosen": False},
    "target": {"target": "scores"},
    "tau": {"tau": 2.0},
    "tau_negative": {"tau_negative": 0.5},
    "tau_positive": {"tau_positive": 2.0},
    "teacher_share": {"teacher_share": 0.5},
    "temperature": {"temperature": 2.0, "target": "scores"},
    "top_entropy_quantile": {"top_entropy_quantile": 0.5},
    "unbiased_kl": {"unbiased_kl": True, "beta": 0.5},
    "undesirable_weight": {"undesirable_weight": 2.0},
    "value_clip": {"value_clip": 1e-5},
    "vf_coef": {"vf_coef": 1.0},
    "whiten": {"whiten": False},
    "whiten_advantages": {"whiten_advantages": None},  # the other of the two
    "whiten_rewards": {"whiten_rewards": True},
    "wpo": {"wpo": True},
}
# keys of the config that act on what an objective sees, each with objectives to try it on
OTHERS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"model.lora.rank": 2, "model.lora.dropout": 0.5}) for name in ("dpo", "kto")),
    *((name, {"model.value_head": "value_mlp"}) for name in ("ppo", "ppo_offline")),
    *((name, {"rollout.top_p": 0.5}) for name in ("grpo", "ppo", "online_dpo")),
    *((name, {"rollout.top_k": 100}) for name in ("grpo", "rloo")),  # digits among them: rewards
    *((name, {"rollout.temperature": 0.5}) for name in ("grpo", "online_kto")),
    *((name, {"rollout.repetition_penalty": 3.0}) for name in ("grpo", "online_dpo")),
    ("grpo", {"rollout.overlong_buffer": 3}),
    ("online_dpo", {"rollout.stop": _ENDS, "rollout.overlong_buffer": 3}),
    *((name, {"rollout.score_clip": 0.1}) for name in ("reinforce", "grpo")),
    ("grpo", {"rollout.normalize_scores": True, "objective.scale": "none"}),
    ("online_dpo", {"rollout.stop": _LETTERS, "rollout.missing_eos_penalty": 0.5}),
    ("rloo", {"rollout.stop": _ENDS, "rollout.keep_unfinished": False}),
    ("ppo", {"rollout.rescore": False}),
    ("online_dpo", {"rollout.responses_per_prompt": 4, "rollout.pairing": "random"}),
    # a difference of one letter is too little
    ("online_dpo", {"rollout.responses_per_prompt": 4, "rollout.min_difference": 0.4}),
    ("online_kto", {"rollout.threshold": "prompt"}),
    *(
        ("grpo", {"objective.advantages": method})
        for method in ("decoupled", "length_weighted", "optimal_token", "greedy", "group_global")
    ),
    ("reinforce_pp", {"objective.advantages": "group_global"}),
    ("rloo", {"objective.advantages": "optimal_token"}),
    ("reinforce", {"objective.advantages": "greedy"}),
    ("ppo", {"objective.advantages": "length_weighted"}),
    ("dpo+sft", {}),
    ("kto+sft", {}),
    ("dpo+bco_pair+sft", {}),
]
# The first two steps are the same: sizes are another test's, and the mean that momentum moves is
# the first step's own in the second one too.
SAME = ("minibatches", "momentum")


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of two steps; ``option`` None: the defaults."""

    name: str
    option: str | None
    keys: str  # JSON: what is set beside the setting
    setting: tuple[Any, ...]  # a value of each of SETTINGS

    def __str__(self) -> str:
        return "-".join(map(str, (self.name, self.option or self.keys, *self.setting)))


Row = tuple[str, str | None, str]  # objective, option, keys


def rows() -> list[Row]:
    """Return every (objective, option, keys) that is to be run."""
    found = []
    for name, objective in OBJECTIVES.items():
        found += [(name, None, "{}")]
        for option in objective.options:
            found.append((name, option, json.dumps(changed(name, option))))
    online = [f"online_{name}" for name in ("dpo", "ipo", "kto", "reward", "sft")]
    found += [(name, None, "{}") for name in online]
    return found + [(name, None, json.dumps(keys)) for name, keys in OTHERS]


def changed(name: str, option: str) -> dict[str, Any]:
    """Return the keys that change an option of an objective.

    Raises:
        AssertionError: an option that has no line in ``CHANGES``.
    """
    assert option in CHANGES, f"give {option!r}, an option of {name!r}, a line in covering.CHANGES"
    declared, change = OBJECTIVES[name].declared, dict(CHANGES[option])
    if option == "importance" and name == "gspo":
        # the same where a response's tokens weigh the same, as these do not
        change = {"importance": "sequence_token", "rollout.top_p": 0.5}
    if change[option] is None:
        change[option] = not declared[option].default
    if option == "form":
        change = {"form": declared[option].choices[-1]}
    if change[option] == declared[option].default and option != "epochs":
        change |= {option: "global" if option == "advantages" else 0.5 * change[option]}
    if option == "delta" and name == "slic":  # beside sums of hundreds of nats
        change = {"delta": 2.0}
    if option == "epsilon_high" and name == "cispo":
        change = {"epsilon_high": 0.5}
    known = losses.describe_options(name)
    return {
        key if "." in key else f"objective.{key}": value
        for key, value in change.items()
        if "." in key or key in known
    }


@functools.cache
def traits(row: Row) -> tuple[bool, bool, bool]:
    """Tell whether a row learns online, compares with a reference, and could do so with a cached
    one."""
    name, keys = row[0].removeprefix("online_"), json.loads(row[2])
    own = {
        key.removeprefix("objective."): value
        for key, value in keys.items()
        if key.startswith("objective.")
    }
    terms = losses.resolve(name, own)
    online = name != row[0] or any(
        term.objective.data == "rollout" or term.loss.own_share or term.loss.teacher_answers
        for term in terms
    )
    compares = any(term.reference or term.rollout.get("kl_coef") for term in terms)
    whole = any(term.objective.mismatched or setup.WHOLE & set(term.needs) for term in terms)
    return online, compares, compares and not online and not whole


def refused(row: Row, setting: tuple[Any, ...]) -> bool:
    """Tell whether a setting has to be refused for these options."""
    online, compares, cached = traits(row)
    _, layout, _, reference = setting
    teacher = row[0] == "gkd"  # of other sizes than the student, which would have to move to it
    return (
        (online and layout == "packed")
        or (reference == "cached" and not cached)
        or (reference == "moving" and (teacher or not compares))
    )


def pairs_of(row: Row, setting: tuple[Any, ...]) -> set[tuple]:
    """Return the pairs of values that a case covers."""
    values = [("objective", row[0]), ("option", row[1] or row[2]), *zip(SETTINGS, setting)]
    return set(itertools.combinations(values, 2))


@functools.cache
def cases() -> tuple[Case, ...]:
    """Deal settings to the rows, greedily, until every pair of values is covered.

    The defaults come first; options then prefer settings that their objective has been run in, so
    that there is something to compare with.
    """
    every = list(itertools.product(*SETTINGS.values()))
    covered: set[tuple] = set()
    found: list[Case] = []

    def deal(row: Row, least: int, able: list[tuple[Any, ...]]) -> bool:
        gains = [len(pairs_of(row, setting) - covered) for setting in able]
        if not gains or max(gains) < least:
            return False
        best = [setting for setting, gain in zip(able, gains) if gain == max(gains)]
        setting = best[len(found) % len(best)]  # equals take turns: no setting is favored
        found.append(Case(*row, setting))
        covered.update(pairs_of(row, setting))
        return True

    defaults = [row for row in rows() if row[2] == "{}"]
    for wrong in (False, True):  # what must be refused covers what nothing else can
        for row in defaults:
            able = [setting for setting in every if refused(row, setting) == wrong]
            while deal(row, 1, able):
                pass
    changes = [row for row in rows() if row[2] != "{}"]
    for least in (0, 1):  # each once, then what is left of each option with each setting
        for row in changes:
            able = [setting for setting in every if not refused(row, setting)]
            own = {case.setting for case in found if case.name == row[0] and case.keys == "{}"}
            able = [setting for setting in able if setting in own] or able
            while deal(row, least, able) and least:
                pass
    return tuple(found)


def check_covered() -> None:
    """Check that nothing was left out.

    Raises:
        AssertionError: an option without a case, or an objective that a setting has not met.
    """
    found = cases()
    options = {(case.name, case.option) for case in found if case.option}
    assert options == {(name, option) for name, row in OBJECTIVES.items() for option in row.options}
    met: set[tuple] = set()
    for case in found:
        met |= pairs_of((case.name, case.option, case.keys), case.setting)
    for name, (factor, values) in itertools.product(OBJECTIVES, SETTINGS.items()):
        for value in values:
            assert (("objective", name), (factor, value)) in met, (name, factor, value)


def few(seed: int = 0, refusals: int = 6) -> list[Case]:
    """Return some of the cases: of each kind of data an objective's defaults, in a setting drawn at
    random, with one of its options; and some that are to be refused."""
    every, found = list(cases()), {}
    random.Random(seed).shuffle(every)
    wrong = [refused((case.name, case.option, case.keys), case.setting) for case in every]
    able = [case for case, one in zip(every, wrong) if not one]
    for default in [case for case in able if case.keys == "{}" and case.name in OBJECTIVES]:
        same = [one for one in able if (one.name, one.setting) == (default.name, default.setting)]
        option = next((one for one in same if one.option), None)
        if option is not None:
            found.setdefault(OBJECTIVES[default.name].data, (default, option))
    runs = [case for both in found.values() for case in both]
    return runs + [case for case, one in zip(every, wrong) if one][:refusals]


# -------------------------------------------------------------------------------------- runs


@functools.cache
def module(name: str) -> Any:
    """Import a config file."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@functools.cache
def shared_folder() -> str:
    """Return where the reference's log-probabilities are kept between cases."""
    return tempfile.mkdtemp()


@functools.cache
def with_weights() -> str:
    """Write pairs of which each weighs another amount."""
    path = pathlib.Path(shared_folder()) / "weights.jsonl"
    pairs = (
        {"prompt": f"say {i}", "chosen": "yes " * (i + 1), "rejected": "no"} for i in range(16)
    )
    rows = [{**pair, "weight": 0.5 + 0.1 * number} for number, pair in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@functools.cache
def guide() -> str:
    """Save a random model that is neither the policy nor the reference."""
    folder = str(pathlib.Path(shared_folder()) / "guide")
    sizes = dict(vocab_size=272, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)
    drawn = dict(model_type="llama", initializer_range=0.5, tie_word_embeddings=True)
    config = hf.config_from({**drawn, **sizes, **heads})
    model = build(config, compute_dtype="float32", remat="none", attention="xla")
    hf.save(folder, config, model.init(jax.random.key(1)))
    return folder


def config_of(case: Case) -> Any:
    """Return a case's config: configs/tiny.py, as small as can be."""
    config = module("tiny").get_config(case.name)
    config.model.config.update(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    config.model.config.update(num_attention_heads=2, num_key_value_heads=1)
    chosen = dict(zip(SETTINGS, case.setting))
    online = bool(config.rewards)
    keys = {
        "total_steps": 2,
        "batch_size": 8,
        "max_length": 40 if online else 112,
        "eval.every_steps": 0,
        "data.eval_fraction": 0.0,
        "data.train": f"{config.data.train}?size=16",
        "data.layout": chosen["layout"],
        "microbatches": chosen["microbatches"],
        "optimizer.learning_rate": 1e-2,
        "optimizer.schedule": "constant",
        "optimizer.warmup_fraction": 0.0,
        "mesh.fsdp": 1,
    }
    if not online and chosen["layout"] != "plain":
        keys["data.groups_per_row"] = 1.0
    if online:
        keys |= {"rollout.responses_per_prompt": 2, "rollout.max_new_tokens": 6}
        keys |= {"rollout.rows": 16, "rewards.regex.reward": 0.3}
        if "epochs" in config.objective:
            keys["objective.epochs"] = 2
    if case.name == "bco":
        keys["data.train"] = with_weights()
    if case.name == "tgdpo":
        keys["reference.guide"] = guide()
    if case.name == "gkd":  # a student that is its own teacher has nothing to learn
        keys["reference.path"] = guide()
    keys |= KEYS[chosen["weights"]] | KEYS[chosen["reference"]] | json.loads(case.keys)
    if chosen["reference"] == "cached":
        keys["reference.cache"] = shared_folder()
    if "rollout.stop" in keys:
        keys["rollout.stop"] = tuple(keys["rollout.stop"])
    if "objective.ptx_coef" in keys or "ptx" in case.name:
        keys |= {"data.text": "builtin:completions:train?size=16", "max_length": 112}
    config.unlock()
    config.update_from_flattened_dict(keys)
    return config


_WEIGHTS: dict[Any, Any] = {}  # starting weights, numpy, by what they are drawn for


def start(run: setup.Run) -> tuple[Any, Any]:
    """Return (state, frozen) of step 0; runs that start alike draw their weights once."""
    spec, specs = run.step_spec, run.state_specs
    named = (specs.trained, specs.base, specs.reference or {})
    key = (spec.policy, spec.base, *(tuple(flatten(tree)) for tree in named))
    if key not in _WEIGHTS:
        frozen = weights.load_frozen(spec, specs, run.config)
        trained = weights.load_trained(spec, specs, frozen, run.config)
        _WEIGHTS[key] = jax.device_get((frozen, trained))
    frozen, trained = jax.tree.map(jax.numpy.asarray, _WEIGHTS[key])
    reference = weights.load_moving_reference(spec, specs, run.config)
    return steps.init_state(spec, trained, reference), frozen


_STEPS: dict[str, Any] = {}  # compiled, by what they are compiled from


def compiled(run: setup.Run) -> Any:
    """Return a run's train step; runs that differ in their rollouts alone compile it once."""
    terms = [dataclasses.replace(term, rollout={}) for term in run.step_spec.terms]
    # optimizers are functions, which have no equals; all cases have the same
    spec = run.step_spec._replace(terms=tuple(terms), optimizer=None, schedule=None)
    state = run.state_specs.state
    key = repr((spec, jax.tree.structure(state)))
    if key not in _STEPS:
        _STEPS[key] = partitioning.jit_train_step(run.step_spec, state, run.mesh)
    return _STEPS[key]


UNTIMED = ("seconds", "share", "tokens_per_second")


def two_steps(case: Case) -> dict[str, np.ndarray]:
    """Run a case; return every metric of both steps and every trained parameter.

    Raises:
        ValueError: the config is refused.
    """
    config = configs.read(config_of(case))
    with tempfile.TemporaryDirectory() as workdir:
        run = setup.prepare(config, workdir)
    found: dict[str, np.ndarray] = {}
    with jax.set_mesh(run.mesh):
        state, frozen = start(run)
        source = make_source(run, 0, {})
        step = compiled(run)
        for number in range(2):
            batch = source.next(functools.partial(loop.weights_of, state, frozen))
            state, values = step(state, frozen, put_batch(run.mesh, batch))
            for name, value in {**values, **source.metrics}.items():
                if not any(word in name for word in UNTIMED):
                    found[f"{name}@{number}"] = np.asarray(value)
        source.close()
    params = {name: np.asarray(leaf) for name, leaf in flatten(state["params"]).items()}
    return found | params


def one_device(patch: Any) -> None:
    """Let runs have one of the simulated devices: eight would compile for minutes."""
    patch(setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))


_DEFAULTS: dict[Case, Any] = {}


def check(case: Case) -> str:
    """Run a case and say what came of it: "changed", "trained" or "refused: why".

    Raises:
        AssertionError: a loss that is not finite, no gradient, or an option without effect.
    """
    wrong = refused((case.name, case.option, case.keys), case.setting)
    try:
        found = _DEFAULTS[case] if case in _DEFAULTS else two_steps(case)
    except ValueError as error:
        assert wrong, f"{case}: {error}"
        return f"refused: {error}"
    assert not wrong, f"{case}: was not refused"
    for number in range(2):
        assert np.isfinite(found[f"loss@{number}"]), f"{case}: loss {found[f'loss@{number}']}"
    # a student that is its own teacher has nothing to learn from its own samples, to the bit
    nothing = case.option == "on_policy"
    assert nothing or found["grad_norm@0"] > 0 or found["grad_norm@1"] > 0, f"{case}: no gradient"
    own = json.loads(case.keys)
    if not own:
        _DEFAULTS[case] = found
    whole = case.option == "kl_scope" and "microbatch" in case.keys and 1 in case.setting
    if not own or case.option in SAME or whole:  # one microbatch is the global batch
        return "trained"
    changed_key = f"objective.{case.option}" if case.option else list(own)[-1]
    rest = {key: value for key, value in own.items() if key != changed_key}
    if case.option in ("humanline", "on_policy", "seq_kd"):  # the rest has no effect without it
        rest = {}
    if "ptx" in changed_key:
        rest.pop("data.text", None)
    if case.option == "log_eps_r":
        rest["objective.log_eps_r"] = 1e-5
        rest.pop("objective.log_eps_p")
        rest["objective.log_eps_p"] = -1e-5
    if case.option == "kl_horizon":
        rest["objective.kl_horizon"] = 10000.0
    setting, keys = case.setting, json.dumps(rest)
    if refused((case.name, None, keys), setting):  # the option itself brings the reference
        setting = (*setting[:3], "in_graph")
    plain = Case(case.name, None, keys, setting)
    if plain not in _DEFAULTS:
        _DEFAULTS[plain] = two_steps(plain)
    default = _DEFAULTS[plain]
    same = found.keys() == default.keys() and all(
        np.array_equal(found[name], default[name], equal_nan=True) for name in found
    )
    assert not same, f"{case}: {changed_key} = {own[changed_key]!r} changed nothing"
    return "changed"


def read_log(file: pathlib.Path | None) -> dict[str, dict[str, Any]]:
    """Return what came of the cases that ran before, by their names."""
    if file is None or not file.exists():
        return {}
    return {line["case"]: line for line in map(json.loads, file.read_text().splitlines())}


def attempt(case: Case) -> dict[str, Any]:
    """Run a case; return its line of the log, with its seconds of CPU."""
    began = time.process_time()
    try:
        result = check(case)
    except Exception as error:  # a campaign: all of it is wanted
        result = f"FAILED: {type(error).__name__}: {error}"
    seconds = time.process_time() - began
    return {"case": str(case), "seconds": round(seconds, 2), "result": result}


def main(argv: list[str]) -> None:
    """Run all cases (or some: "few", or a slice as "0:100"), and say what came of each."""
    os.environ.setdefault("XLA_FLAGS", xla_flags.of_cpu(1))
    one_device(setattr)
    check_covered()
    chosen = few() if "few" in argv else list(cases())
    for first, last in (map(int, one.split(":")) for one in argv if one[0].isdigit()):
        chosen = chosen[first:last]
    files = [pathlib.Path(one) for one in argv if one != "few" and not one[0].isdigit()]
    log = files[0] if files else None
    done = read_log(log)
    counts: dict[str, int] = {}
    for number, case in enumerate(chosen):
        known = str(case) in done
        line = done[str(case)] if known else attempt(case)
        if log is not None and not known:
            with log.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
        done[str(case)], word = line, line["result"].partition(":")[0]
        counts[word] = counts.get(word, 0) + 1
        said = f"{number} {line['seconds']:.1f}s {case}: {line['result']}"
        print(said[:600].replace("\n", " "), flush=True)
    total = sum(done[str(case)]["seconds"] for case in chosen)
    print(f"{len(chosen)} cases, {total:.0f} s of CPU: {counts}", flush=True)
    sys.exit(bool(counts.get("FAILED")))


if __name__ == "__main__":
    main(sys.argv[1:])

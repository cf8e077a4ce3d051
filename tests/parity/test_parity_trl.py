# SPDX-License-Identifier: Apache-2.0
"""Every objective and option that TRL has equals TRL's own code: losses and gradients, from
goldens."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses
from align_jax.core import config as configs
from align_jax.core.metrics import means
from align_jax.losses import advantages, arrays, baselines
from align_jax.losses.logprobs import spread_to_tokens, token_outputs
from align_jax.losses.sampler import Correction, correct

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "trl_objectives.npz"
with np.load(GOLDEN) as _file:
    ARRAYS = dict(_file)
HEADER = json.loads(ARRAYS.pop("cases").item())
CASES = HEADER["cases"]
ADVICE = (
    "our loss and TRL {trl}'s differ: find out which formula is right; if TRL's has changed on "
    "purpose, make the golden anew with tools/make_trl_goldens.py in a commit of its own that "
    "gives the reason"
).format(**HEADER["versions"])
# all loss types of DPOTrainer, KTOTrainer, CPOTrainer, ORPOTrainer, RewardTrainer, SFTTrainer, ...
TRL_OBJECTIVES = {
    "dpo",
    "robust",
    "ipo",
    "hinge",
    "dpo_norm",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "simpo",
    "orpo",
    "cpo",
    "alphapo",
    "kto",
    "apo_zero_unpaired",
    "reward",
    "grpo",
    "gspo",
    "cispo",
    "sapo",
    "vespo",
    "gmpo",
    "rloo",
    "reinforce_pp",
}


COMING = pathlib.Path(__file__).parents[2] / "docs/coming_from.md"
# of each of TRL's configs, the rows of the page's table that tell its fields
PARTS = {
    "DPOConfig": "DPO",
    "KTOConfig": "KTO",
    "RewardConfig": "reward",
    "SFTConfig": "SFT",
    "GRPOConfig": "GRPO",
    "RLOOConfig": "RLOO",
    "OnlineDPOConfig": "online DPO",
    "GKDConfig": "GKD",
    "ORPOConfig": "ORPO",
    "CPOConfig": "CPO",
    "TPOConfig": "TPO",
    "GMPOConfig": "GMPO",
    "DistillationConfig": "distillation",
}
SHARED = {"all", "references", "GRPO, RLOO"}
BASES = {"GKDConfig": {"SFT"}, "GMPOConfig": {"GRPO"}, "OnlineDPOConfig": {"GRPO, RLOO", "DPO"}}


def named_in_the_table():
    """Return part -> (TRL's fields, our keys) of the page's table of every field."""
    table = COMING.read_text().split("## Every field of its configs")[1].split("\n## ")[0]
    found, part = {}, ""
    for line in re.findall(r"^\|(.*)\|$", table, re.M)[2:]:
        first, fields, keys, _ = line.split("|")
        part = first.strip() or part
        own = found.setdefault(part, (set(), set()))
        for names, cell in zip(own, (fields, keys)):
            names |= set(re.findall(r"`([^`]+)`", cell))
    return found


def test_every_field_of_trls_configs_is_told_and_every_key_named_for_it_is_one():
    told = named_in_the_table()
    assert told.keys() == SHARED | set(PARTS.values())
    for kind, fields in HEADER["fields"].items():
        parts = {PARTS[kind], *SHARED, *BASES.get(kind, ())}
        known = set().union(*(told[part][0] for part in parts))
        assert not set(fields) - known, (kind, set(fields) - known)
    keys = configs.may_change(all_keys=True)
    for row in losses.OBJECTIVES.values():
        keys |= {f"objective.{option}" for option in row.options}
    assert not set().union(*(own for _, own in told.values())) - keys


def label(index):
    case = CASES[index]
    return f"{index}-{case['name']}-" + ",".join(
        f"{key}={value}" for key, value in case["options"].items()
    )


def close(found, expected, rtol=1e-5):
    """Compare relative to the largest entry: a sum's rounding does not shrink with a small
    entry."""
    np.testing.assert_allclose(
        found, expected, rtol=rtol, atol=rtol * np.abs(expected).max(initial=1e-6), err_msg=ADVICE
    )


def test_goldens_hold_every_objective_that_trl_has():
    found = {part for case in CASES for part in case["name"].split("+")}
    assert found == TRL_OBJECTIVES


@pytest.mark.parametrize("index", range(len(CASES)), ids=label)
def test_loss_gradient_and_metrics_equal_trl(index):
    case = CASES[index]
    columns = {key: jnp.asarray(ARRAYS[f"{index}/{key}"]) for key in case["columns"]}
    terms = losses.resolve(case["name"], case["options"], case["weights"])
    kind = losses.objective.data_kind(terms)
    policy, mask = columns.pop("policy"), columns.pop("mask", None)
    if case["name"] == "sft" and case["data"] == "pairs":
        kind = "pairs"  # TRL's "sft" loss type trains on the chosen of each pair
    if not any(term.reference for term in terms):
        columns.pop("reference", None)
    if mask is not None:
        columns["mask"] = mask

    def f(policy):
        found = arrays.evaluate(
            terms, arrays.make_inputs(terms, kind, {"policy": policy, **columns})
        )
        return found.loss, found.metrics

    (loss, metrics), grad = jax.value_and_grad(f, has_aux=True)(policy)
    close(loss, ARRAYS[f"{index}/loss"])
    close(grad, ARRAYS[f"{index}/grad"])
    for key, value in case["metrics"].items():
        if key.startswith("sampling/"):
            continue  # of a rollout, not of a step
        np.testing.assert_allclose(
            metrics[key], value, rtol=2e-5, atol=2e-6, err_msg=f"{key}: {ADVICE}"
        )


CORRECTED = [i for i, case in enumerate(CASES) if "sampler_ratio" in case["columns"]]


@pytest.mark.parametrize("index", CORRECTED, ids=label)
def test_the_correction_for_the_sampler_equals_trl(index):
    case = CASES[index]
    columns = {key: ARRAYS[f"{index}/{key}"] for key in case["columns"]}
    rows = {
        key: columns[key].reshape(-1, columns[key].shape[-1])
        for key in ("policy", "mask", "old_token_logps", "sampler_token_logps")
    }
    batch, _ = arrays.make_batch(rows.pop("policy"), responses=columns["policy"].shape[1], **rows)
    options = case["options"]
    names = ("sampler_correction", "sampler_ratio_max", "sampler_ratio_min")
    defaults = losses.OBJECTIVES["grpo"].options
    given = Correction(*(options.get(name, defaults[name]) for name in names))
    ratio, sums = correct(batch, given)
    by_token = ratio if ratio.shape == batch.tokens.shape else spread_to_tokens(ratio, batch)
    close(by_token, columns["sampler_ratio"].reshape(by_token.shape))
    found = means(sums)
    expected = {key: x for key, x in case["metrics"].items() if key.startswith("sampling/")}
    assert expected.keys() == found.keys() and len(found) == 5
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-5, atol=2e-6, err_msg=key)


def test_the_adaptive_entropy_bonus_equals_trl_step_by_step():
    options, running = HEADER["control"], None
    terms = losses.resolve("grpo", options)
    steps = {
        key.removeprefix("control/"): x for key, x in ARRAYS.items() if key.startswith("control/")
    }
    expected, coefs = steps.pop("loss"), steps.pop("coef")
    steps.pop("reference")
    for number in range(len(expected)):
        columns = {key: jnp.asarray(x[number]) for key, x in steps.items()}
        inputs = arrays.make_inputs(terms, "rollout", columns)
        stats, running = losses.own_statistics(terms, inputs, running)
        close(losses.total(terms, inputs, stats).loss, expected[number])
        np.testing.assert_allclose(
            options["entropy_coef"] * running["1"]["factor"], coefs[number], rtol=1e-6, atol=1e-8
        )


ADVANTAGES = GOLDEN.parent / "trl_advantages.npz"


@pytest.mark.parametrize("index", range(5))
def test_advantages_equal_trl(index):
    with np.load(ADVANTAGES) as file:
        case = json.loads(file["cases"].item())["cases"][index]
        each, expected = file[f"{index}/each"], file[f"{index}/advantages"]
    weights = case["weights"]
    if case["multi_objective_aggregation"] == "normalize_then_sum":
        found = baselines.decoupled(jnp.asarray(each), weights, jnp.ones(len(each)))
    else:
        scores = jnp.asarray(each @ np.float32(weights))
        found = advantages.group_advantages(scores, scale=case["scale"])
    close(found, expected)


DIVERGENCE = GOLDEN.parent / "trl_divergence.npz"
with np.load(DIVERGENCE) as _file:
    DISTILLED = json.loads(_file["cases"].item())["cases"]


@pytest.mark.parametrize("index", range(len(DISTILLED)), ids=lambda i: str(DISTILLED[i]))
def test_distillation_equals_trl(index):
    case = DISTILLED[index]
    terms = losses.resolve("gkd", {key: case[key] for key in ("beta", "temperature")})
    with np.load(DIVERGENCE) as file:
        student, teacher, mask, loss, grad = (
            file[f"{index}/{name}"] for name in ("student", "teacher", "mask", "loss", "grad")
        )
    batch, _ = arrays.make_batch(np.zeros(mask.shape), responses=1, mask=mask)
    batch = batch._replace(source_index=batch.positions)  # the logits stand at their tokens

    def f(student):
        said = token_outputs(
            student,
            jnp.asarray,
            batch,
            needs=("divergence",),
            reference=(jnp.asarray(teacher), jnp.asarray),
            divergence=terms[0].loss.divergence,
            chunk=2,
        )
        return losses.total(terms, losses.Inputs(batch, said, said)).loss

    found = jax.value_and_grad(f)(jnp.asarray(student))
    close(found[0], loss)
    close(found[1], grad)

# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: the batch it assumes is the data layer's own, what it prints is what the
compiler said."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import runpy
import types
import xml.etree.ElementTree

import jax
import pytest

from align_jax import plan
from align_jax.core import config as configs
from align_jax.core.options import Config, EvalOptions, ModelOptions
from align_jax.parallel.chips import CHIPS, GIB
from align_jax.parallel.mesh import make_mesh
from align_jax.planner import charts, cost_model, programs
from align_jax.planner.abstract_run import offline_batch
from align_jax.planner.advice import advise
from align_jax.planner.collectives import Collective
from align_jax.planner.cost_model import CostEstimate, Memory
from align_jax.planner.search import candidates
from align_jax.planner.topology import Topology
from align_jax.runs import setup
from align_jax.training.flops import StepFlops

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def _config(name: str, *argument: str):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](*argument)


def _device(coords, slice_index=0):
    return types.SimpleNamespace(coords=coords, slice_index=slice_index)


def _topology(chip="v5e", shape=(2, 4), slices=1) -> Topology:
    coords = [(x, y, 0) for x in range(shape[0]) for y in range(shape[1])]
    return Topology(
        f"{chip}:{'x'.join(map(str, shape))}",
        CHIPS[chip],
        shape,
        slices,
        tuple(_device(place, s) for s in range(slices) for place in coords),
    )


def _estimate(temporaries=1 * GIB, **changes) -> CostEstimate:
    kinds = {
        "parameters": 3 * GIB,
        "optimizer": 6 * GIB,
        "reference": 2 * GIB,
        "batch": 0,
        "temporaries": temporaries,
    }
    memory = Memory(kinds, CHIPS["v5e"].hbm)
    flops = StepFlops(3e15, 1e15, 0.0, 1e15, 65536)
    seconds = {"compute": 3.0, "memory": 1.0, "interconnect": 2.0, "network": 0.5}
    rows = [{"kind": "all-gather", "axes": "fsdp", "count": 7, "bytes": 2e9, "dtypes": {"bf16": 7}}]
    whole = CostEstimate(
        "train",
        1,
        _topology(),
        {"data": 1, "fsdp": 8},
        memory,
        flops,
        rows,
        {"fsdp": 1.5e9},
        seconds,
        1.0,
        [],
    )
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize(
    "objective, layout",
    [("dpo", "plain"), ("kto", "plain"), ("sft", "packed"), ("dpo", "shared_prefix")],
)
def test_the_planned_batch_is_the_data_layers_own(objective, layout):
    config = _config("tiny", objective)
    config.data.layout, config.data.trim = layout, False
    if layout != "plain":
        config.row_length, config.data.groups_per_row = 256, 2
    config = configs.read(config)
    resolved = setup.resolve_config(config, 8)
    mesh = make_mesh({"fsdp": -1})
    examples, _ = setup.read_data(config, resolved)
    real = setup.make_pipeline(config, resolved, mesh, examples, once=False).abstract()
    planned = offline_batch(
        config,
        resolved.kind,
        mesh,
        mismatched=any(term.objective.mismatched for term in resolved.terms),
        loss_positions=real.loss_index.shape[1],
    )
    assert jax.tree.structure(real) == jax.tree.structure(planned)
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), batch) for batch in (real, planned)]
    # its budget of loss positions is the data's, the plan's the most it can be
    if real.mismatched is not None:
        shapes = [
            batch._replace(mismatched=batch.mismatched._replace(loss_index=None))
            for batch in shapes
        ]
    assert shapes[0] == shapes[1]


def test_the_time_lies_between_all_hidden_and_all_exposed():
    found = _estimate()
    assert (found.overlapped, found.exposed) == (3.0, 5.5)
    assert found.mfu(3.0) == pytest.approx(4e15 / (3 * 8 * 197e12))


def test_the_table_says_what_fills_the_memory_and_what_moves():
    text = charts.table(_estimate())
    for part in (
        "fits",
        "12.00 GiB of 15.75",
        "optimizer",
        "6.00 GiB",
        "4.00 P",
        "all-gather",
        "2.00 GB",
        "21,845 tokens/s",
        "in all 2.00 GB; this mesh must move at least fsdp 1.50 GB",
    ):
        assert part in text, (part, text)


@pytest.mark.parametrize(
    "name, rows, remat, expected",
    [
        ("train", 4, "none", ("microbatches=4", "remat=full")),
        ("train", 1, "full", ("mesh.sequence",)),
        ("eval", 4, "full", ("config.eval.batch_size=32",)),
        ("decode", 4, "full", ("config.rollout.rows",)),
        ("reward model", 4, "full", ("config.rewards.model.rows",)),
    ],
)
def test_a_step_that_does_not_fit_is_told_by_how_much_and_what_to_change(
    name, rows, remat, expected
):
    config = Config(
        microbatches=2, model=ModelOptions(remat=remat), eval=EvalOptions(batch_size=64)
    )
    found = _estimate(temporaries=9 * GIB, name=name)
    lines = advise(found, config, rows)
    assert f"{found.name} needs 20.00 GiB of 15.75 GiB: 4.25 GiB too much" == lines[0]
    for part in expected:
        assert any(part in line for line in lines), lines
    assert "DOES NOT FIT" in charts.table(found, lines)
    assert "DOES NOT FIT" in charts.summary(found, lines)


def test_an_estimate_survives_json_and_draws_as_svg():
    found = _estimate()
    row = json.loads(json.dumps(found.to_dict()))
    assert row["hbm"]["used"] + row["hbm"]["free"] == row["hbm"]["capacity"]
    assert row["tokens_per_second"][0] < row["tokens_per_second"][1]
    drawing = xml.etree.ElementTree.fromstring(charts.bars([found, found]))
    assert len(drawing.findall("{http://www.w3.org/2000/svg}rect")) == 2 * 5 + 5


def test_a_rollouts_time_is_divided_among_its_programs():
    found = [_estimate(), _estimate(name="decode", runs=10), _estimate(name="rescore", runs=3)]
    line = charts.rollout_line(found, 128)
    assert "128 completions" in line and "77.0 s" in line
    assert "generating 55.0 s (71%), scoring 16.5 s (21%), training 5.5 s (7%)" in line
    found[1] = _estimate(name="decode opponent", runs=10)
    assert charts.rollout_line(found, 128) == line


def test_a_ring_uses_the_links_of_the_torus_axes_that_it_spans():
    topology = _topology("v5e", (4, 16))
    rates = {}
    for name, group in {
        "open": (0, 16, 32, 48),
        "closed": tuple(range(16)),
        "both": tuple(range(64)),
    }.items():
        rates[name] = cost_model.bandwidth(
            Collective("all-gather", group, 1, 1, ""), topology, topology.devices
        )
    assert rates == {"open": 50e9, "closed": 100e9, "both": 150e9}
    between = Collective("all-reduce", (0, 16), 1, 1, "", network=True)
    assert cost_model.bandwidth(between, topology, topology.devices) == CHIPS["v5e"].network


def test_a_real_models_config_is_planned_without_the_hub():
    config = plan.for_planning(_config("dpo_7b"))
    assert (config.model.path, config.model.attention) == ("", "splash")
    resolved = setup.resolve_config(config, 64)
    assert resolved.model_config.num_layers == 32


def test_candidates_divide_the_model_the_rows_and_the_devices():
    model = setup.resolve_config(plan.for_planning(_config("dpo_7b")), 64).model_config
    found = list(
        candidates(
            model, _topology("v5e", (8, 8)), remat="full", rows=256, length=1024, trained_bytes=16
        )
    )
    assert len(found) > 10 and len(set(found)) == len(found)
    for one in found:
        assert one.data * one.fsdp * one.expert * one.sequence * one.tensor == 64
        assert model.num_heads % one.tensor == 0
        assert 256 % (one.data * one.fsdp * one.expert * one.microbatches) == 0
    assert found[0].tensor <= 2  # 256 rows on 64 chips: FSDP alone, or nearly, moves least


@pytest.mark.parametrize(
    "rows, expected",
    [
        (32, {"prefill": 1, "decode": 8 + 2 * 8 + 6}),  # replies too are decoded, 6 tokens at most
        (16, {"prefill": 2, "decode": 2 * 8, "later prefill": 2 * 2, "later decode": 2 * 2 * 8}),
    ],
)
def test_later_turns_are_prefilled_only_where_the_cache_is_not_kept(rows, expected):
    config = _config("tiny", "grpo")
    config.model.config.update(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    config.batch_size, config.max_length, config.data.layout = 8, 64, "plain"
    config.rollout.update(responses_per_prompt=4, rows=rows, max_turns=3, max_turn_tokens=8)
    config.rollout.max_new_tokens = 30
    config.rollout.environment = "align_jax.online.tools:calculator"
    topology = dataclasses.replace(_topology(shape=(1, 1)), devices=tuple(jax.devices()[:1]))
    run = plan.make_run(configs.read(config), topology)
    found = {one.name: one.runs for one in programs.rollout_programs(run, run.rollouts)}
    later = "{} of later turns".format
    names = {later("prefill"): "later prefill", later("decode"): "later decode"}
    found = {names.get(name, name): runs for name, runs in found.items() if "rescore" not in name}
    assert found == expected

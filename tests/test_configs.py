# SPDX-License-Identifier: Apache-2.0
"""Every file in configs/ is a recipe that works: it loads, means something, and its shrunk twin
trains two steps."""

import importlib.util
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from align_jax import losses, plan
from align_jax.core import config as configs
from align_jax.data.layout import BatchSizes, batch_shape
from align_jax.interop import hf
from align_jax.losses.objective import data_kind
from align_jax.models.model import build
from align_jax.online.config import is_online
from align_jax.parallel.chips import CHIPS
from align_jax.parallel.mesh import AXES, ROWS, mesh_shape
from align_jax.runs import config_file, loop, setup

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))
RECIPES = [name for name in FILES if name not in ("tiny", "start")]
SPECS = [*RECIPES, "dpo_pythia_2p8b:sft"]
# Trained are those of a kind that no other recipe has; a family's gradients are tests/models'.
ALIKE = {
    "dpo_70b": "dpo_7b",
    "dpo_gemma3_27b": "dpo_7b",
    "dpo_pythia_2p8b": "dpo_7b",
    "dpo_pythia_2p8b:sft": "sft_7b",
    "dpo_qwen3_30b_a3b": "dpo_mixtral",
    "kto_llama3_8b": "kto_7b",
    "rloo_7b": "grpo_7b",
    "simpo_7b": "dpo_7b",
}
TRAINED = [spec for spec in SPECS if spec not in ALIKE]
ONLINE = ("dpo", "kto", "ipo", "simpo")  # as tiny.py:online_NAME

# A model small enough for a test: what a family's fields are shrunk to, where the recipe has them.
SMALL = dict(
    vocab_size=272,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=4,
    num_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    max_position_embeddings=512,
    sliding_window=32,
    shared_expert_intermediate_size=16,
    full_attention_interval=2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
MADE = {
    "completions": "completions",
    "pairs": "preferences",
    "unpaired": "unpaired",
    "prompts": "arithmetic",
}


def module(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def load(spec):
    name, _, argument = spec.partition(":")
    return module(name).get_config(*([argument] if argument else []))


def online(config):
    """Does it learn from the policy's own samples?"""
    options = configs.read(config)
    return is_online(setup.objective_terms(options), options)


def topology(name):
    """The chips that a recipe's docstring says it is laid out for."""
    kind, sizes = re.search(
        r"^Topology: (\w+):([\dx]+)\.  Not yet run", module(name).__doc__, re.MULTILINE
    ).groups()
    assert kind in CHIPS
    return int(np.prod([int(size) for size in sizes.split("x")])) * CHIPS[kind].devices_per_chip


def shrunk(spec):
    """The same recipe for a CPU: a tiny model of its family, data made by code, the mesh's axes
    kept at two."""
    config = load(spec)
    kind = data_kind(setup.objective_terms(configs.read(config)))
    if online(config):
        kind = "completions" if config.rollout.against == "data" else "prompts"
    with config.unlocked():
        fields = config.model.config.get("text_config", config.model.config)
        fields.update({key: value for key, value in SMALL.items() if fields.get(key)})
        if fields.get("kv_lora_rank"):  # every head has its keys
            fields.num_key_value_heads = fields.num_attention_heads
        if "rope_scaling" in fields:
            fields.rope_scaling.original_max_position_embeddings = 64
        if config.rewards:  # no reward model to load
            config.rewards = configs.ConfigDict({"length": {"target": 3}})
    config.model.path, config.tokenizer, config.data.format = "", "byte", "auto"
    config.reference.path, config.reference.config = "", configs.ConfigDict()
    config.model.compute_dtype = "float32"
    config.data.train, config.data.eval = f"builtin:{MADE[kind]}:train?size=64", ""
    config.data.eval_fraction = 0.0
    config.data.max_prompt_length = min(config.data.max_prompt_length, 32)
    config.total_steps, config.total_epochs, config.total_examples = 2, 0.0, 0
    config.max_length, config.row_length = 112, 224 if config.row_length else 0
    config.batch_size, config.microbatches = 16, min(config.microbatches, 2)
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)
    config.checkpoint.best_metric = ""  # nothing is held out
    if online(config):
        config.rollout.max_new_tokens = 8
        config.rollout.prompts = min(config.rollout.prompts, config.batch_size)
        config.rollout.max_turn_tokens = min(config.rollout.max_turn_tokens, 4)
        config.rollout.tensor = min(config.rollout.tensor, SMALL["num_key_value_heads"])
    config.mesh.update({axis: min(config.mesh[axis], 2) for axis in AXES})
    config.log.every_steps = 1
    return config


def other_weights(config, folder):
    """Save a model of the config's shape with weights of its own."""
    own = hf.config_from({"model_type": config.model.family, **config.model.config.to_dict()})
    model = build(own, compute_dtype="float32", remat="none", attention="xla")
    hf.save(str(folder), own, model.init(jax.random.key(1)))
    return str(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_to_run_it_on_what_and_where_it_is_from(name):
    source, doc = (FOLDER / f"{name}.py").read_text(), module(name).__doc__
    assert f"python -m align_jax.train --config=configs/{name}.py" in doc
    found = re.search(
        rf"python -m align_jax.plan --config=configs/{name}.py --topology=(\S+)\n", doc
    )
    assert found and f"Topology: {found[1]}.  Not yet run" in doc
    assert re.search(r"arXiv \d{4}\.\d{5}|/[\w./-]+\.(yaml|py|sh|md)", doc), (
        "no paper and no file of a repository"
    )
    assert 30 <= len(source.splitlines()) <= 80


@pytest.mark.parametrize("spec", SPECS)
def test_a_recipe_is_valid_and_its_objective_resolves(spec):
    config = load(spec)
    terms = setup.objective_terms(configs.read(config))
    assert terms[0].objective is losses.OBJECTIVES[config.objective.name]
    assert config.model.path and config.model.family
    best = config.checkpoint.best_metric.lstrip("-")
    assert not best if online(config) else best.startswith("eval/")


@pytest.mark.parametrize("spec", SPECS)
def test_a_recipe_fits_its_topology(spec):
    config = load(spec)
    sizes = dict(zip(AXES, mesh_shape(config.mesh.to_dict(), topology(spec.partition(":")[0]))))
    shards = int(np.prod([sizes[axis] for axis in ROWS]))
    model = hf.config_from({"model_type": config.model.family, **config.model.config.to_dict()})
    assert config.max_length <= model.max_positions
    assert model.num_kv_heads % sizes["tensor"] == 0 == config.max_length % sizes["sequence"]
    if model.num_experts:
        assert model.num_experts % sizes["expert"] == 0
    options = configs.read(config)
    kind = data_kind(setup.objective_terms(options))
    responses = {"pairs": 2, "rollout": config.rollout.responses_per_prompt}.get(kind, 1)
    multiple = shards * config.microbatches
    sizes = BatchSizes(config.batch_size, config.max_length, config.row_length, multiple)
    shape = batch_shape(plan.for_planning(options).data, sizes, responses)
    assert shape.rows == config.batch_size * responses // max(1, config.data.groups_per_row), (
        "filler rows"
    )


@pytest.fixture
def only_devices(monkeypatch):
    """Leave a test so many of the devices: of a mesh that splits nothing further, eight take a
    third longer than two."""

    def leave(count: int) -> None:
        given = jax.devices()[:count]
        for name in ("devices", "local_devices"):
            monkeypatch.setattr(jax, name, lambda *_, **__: given)
        monkeypatch.setattr(jax, "device_count", lambda *_: count)

    return leave


@pytest.mark.parametrize("spec", TRAINED)
def test_a_shrunk_recipe_trains_two_steps(spec, tmp_path, quick_compiles, only_devices):
    config = shrunk(spec)
    only_devices(2 ** sum(config.mesh[axis] != 1 for axis in AXES))
    if load(spec).reference.path:  # a student that is its own teacher would have nothing to learn
        config.reference.path = other_weights(config, tmp_path / "teacher")
    loop.train(config, str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(
        np.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["learning_rate"] > 0
        for row in steps
    )


@pytest.mark.parametrize(
    "name", [*losses.OBJECTIVES, *(f"online_{name}" for name in ONLINE), "dpo+sft"]
)
def test_the_tiny_config_is_valid_for_every_objective(name):
    config = module("tiny").get_config(name)
    configs.read(config)
    resolved = setup.resolve_config(configs.read(config), 1)
    assert resolved.kind == data_kind(setup.objective_terms(configs.read(config)))
    assert (resolved.rollouts is not None) == (
        resolved.kind == "rollout" or name.startswith("online_")
    )


@pytest.mark.parametrize(
    "name", [*losses.OBJECTIVES, *(f"online_{name}" for name in ONLINE), "dpo+sft"]
)
def test_an_objective_s_name_is_a_config_that_lacks_model_and_data_alone(name):
    config = config_file.load(name)
    with pytest.raises(ValueError) as error:
        configs.read(config)
    assert len(str(error.value).splitlines()) == 3, error.value  # model.path, data.train
    config.model.config, config.data.train = configs.ConfigDict(module("tiny").LLAMA), "rows.jsonl"
    config.max_length, config.data.text = 512, "text.jsonl" if name == "ptx" else ""
    if "online_" in name or losses.resolve(name)[0].objective.data == "rollout":
        config.rewards = configs.ConfigDict({"length": {"target": 3}})
    resolved = setup.resolve_config(configs.read(config), 1)
    assert resolved.kind == data_kind(setup.objective_terms(configs.read(config)))


@pytest.mark.parametrize("vocabulary", [275, 272])
def test_the_vocabulary_has_the_same_rows_on_every_mesh(vocabulary):
    config, rows = load("tiny:grpo"), set()
    config.model.config.vocab_size = vocabulary
    for tensor, decoding in ((1, 0), (2, 0), (1, 2), (2, 8)):
        config.mesh.tensor, config.rollout.tensor = tensor, decoding
        rows.add(setup.resolve_config(configs.read(config), 8).model_config.vocab_rows)
    # else a checkpoint of one mesh would be another model's on the next
    assert rows == {-(-vocabulary // 16) * 16}


def test_the_settings_that_tiny_makes_for_an_objective_name_objectives():
    names = set(losses.OBJECTIVES) | {f"online_{name}" for name in losses.OBJECTIVES}
    assert set(module("tiny").LEARNING_RATE) <= names


def test_a_recipe_reads_as_assignments():
    for name in RECIPES:
        body = (FOLDER / f"{name}.py").read_text()
        assert not re.search(r"^\s*(for|while|try|with|class) ", body, re.MULTILINE), name

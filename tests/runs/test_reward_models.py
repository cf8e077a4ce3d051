# SPDX-License-Identifier: Apache-2.0
"""Reward models of numbers, labels and steps: exported, they say in a run's rewards and in
align_jax.label what they said in training, and are refused where something is to speak."""

import dataclasses
import functools
import json
import pathlib
import runpy

import jax
import numpy as np
import pytest

from align_jax import evaluate, export, label, losses, sample
from align_jax.core import config as configs
from align_jax.core.metrics import means
from align_jax.online import rewards
from align_jax.parallel.mesh import make_mesh
from align_jax.runs import setup, trained
from align_jax.runs.weights import load_model
from align_jax.training.steps import forward

TINY = pathlib.Path(__file__).parents[2] / "configs/tiny.py"
MODEL = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    initializer_range=0.4,
)
ROWS = {
    "reward_regression": [
        {"prompt": "p ", "responses": ["a b", "cc"], "scores": [0.5, -2.0]},
        {"prompt": "q ", "responses": ["ddd", "e"], "scores": [1.0, 0.0]},
    ],
    "reward_classification": [
        {"prompt": "p ", "completion": "a b", "label": True},
        {"prompt": "q ", "completion": "cc", "label": False},
    ],
    "reward_process": [
        {"prompt": "p ", "completions": ["a", "bb"], "labels": [True, False]},
        {"prompt": "q ", "completions": ["ccc"], "labels": [True]},
    ],
}
NEEDS = {"reward_process": "step_scores"}


@pytest.fixture(scope="module", params=ROWS)
def exported(request, tmp_path_factory):
    """(objective, its data, what it says of them in training, the checkpoint, the run's config)."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    config = runpy.run_path(str(TINY))["get_config"](name)
    config.model.config.update(MODEL)
    sizes = {"batch_size": 4 if name == "reward_regression" else 2, "max_length": 32}
    rows = {"data.train": str(data), "data.layout": "plain", "data.eval_fraction": 0.0}
    config.update_from_flattened_dict(sizes | rows)
    read = configs.read(config)
    resolved = setup.resolve_config(read, 1)
    policy = resolved.models.policy
    params = jax.jit(policy.init)(jax.random.key(0))
    run = trained.Trained(read, resolved, make_mesh({"data": 1}, jax.devices()[:1]), params, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "restore", lambda workdir, step: run)
        patch.setattr(export.card, "of_run", lambda *given: ({}, []))
        export.export_run("run", str(folder / "hf"))
    examples, _ = setup.read_data(read, resolved)
    batch = setup.make_pipeline(read, resolved, run.mesh, examples, once=True).batch(0)
    needs = (NEEDS.get(name, "scores"),)
    scoring = functools.partial(forward, policy, needs=needs, chunk=8, logps=False)
    said, _ = jax.jit(scoring)(params, batch)
    order = np.argsort(batch.example_index)
    return name, examples, batch, jax.tree.map(np.asarray, said), order, str(folder / "hf"), read


def test_it_says_in_rewards_what_it_said_in_training(exported):
    name, examples, batch, said, order, path, _ = exported
    prompts = [one.prompt for one in examples.items]
    completions = [one.responses[0] for one in examples.items]
    extras = [{} for _ in prompts]
    kind = "process" if name in NEEDS else "model"
    options = {"kind": kind, "path": path} | ({"form": "logit"} if name in NEEDS else {})
    scored = rewards.resolve({"rm": options}, load_model=load_model, online=True)
    if name not in NEEDS:
        found, _ = scored(prompts, completions, extras)
        np.testing.assert_allclose(found, said.scores[order, 0], atol=1e-5)
        rows = [
            {"prompt": p, "output": c, "prompt_id": i, "sample_id": 0}
            for i, (p, c) in enumerate(zip(prompts, completions))
        ]
        labeled = label.score(rows, scored)
        np.testing.assert_allclose([one["reward"] for one in labeled], found, atol=1e-6)
        return
    found, _ = scored.of_steps(prompts, completions, extras)
    for row, steps in zip(order, found):
        expected = said.step_scores[row][batch.loss_mask[row]]
        np.testing.assert_allclose([reward for _, reward in steps], expected, atol=1e-5)
    assert json.loads((pathlib.Path(path) / "config.json").read_text())["step_separator"] == "\n"
    policy = evaluate.model_policy(path, dtype="float32", heads=("steps",))
    item = f"process={pathlib.Path(path).parent / 'rows.jsonl'}"
    measured = evaluate.evaluate(policy, [item])[item]
    (term,) = losses.resolve(name)
    inputs = losses.Inputs(*jax.tree.map(jax.numpy.asarray, (batch, said)))
    expected = means(term.loss.losses(inputs)[1])
    for key in expected.keys() - {"mean_reward"}:
        assert measured[key] == pytest.approx(expected[key], rel=1e-5, nan_ok=True), key
    assert (measured["steps"], measured["too_long"]) == (3, 0)
    with pytest.raises(ValueError, match="scores steps alone: --eval=process=STEPS"):
        evaluate.check_head(policy, "score")
    record = {"config": {"objective": {"name": name}}}
    assert "It scores steps" in export.card.Card("x", None, record)._use()


def test_it_is_refused_where_something_is_to_speak(exported, monkeypatch, tmp_path):
    name, _, _, _, _, path, config = exported
    for act in (
        lambda: sample.load_checkpoint(path, rows=1),
        lambda: evaluate.model_policy(path),
        lambda: setup.resolve_config(
            dataclasses.replace(
                configs.read(runpy.run_path(str(TINY))["get_config"]("dpo")),
                model=dataclasses.replace(config.model, path=path),
                max_length=32,
            ),
            1,
        ),
    ):
        with pytest.raises(ValueError, match="is a reward model .*which says nothing"):
            act()
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(
        trained.record, "read_record", lambda path: {"config": configs.to_dict(config)}
    )
    for act in (sample.load_run, evaluate.run_policy):
        with pytest.raises(ValueError, match=f"trained a reward model .*{name}.*export it"):
            act(str(tmp_path), **({"rows": 1} if act is sample.load_run else {}))


def test_a_reward_model_of_another_kind_is_named(exported):
    name, _, _, _, _, path, _ = exported
    kind, words = ("model", "'process'") if name in NEEDS else ("process", "'model'")
    with pytest.raises(ValueError, match=f"its kind of reward is {words}"):
        rewards.resolve({"rm": {"kind": kind, "path": path}}, load_model=load_model, online=True)

# SPDX-License-Identifier: Apache-2.0
"""Do the online methods learn?  Each trains the same model on the same prompts; reward against KL,
held out.

    python experiments/online_study.py --model=HF_DIR --prompts=PROMPTS.jsonl
    --lexicon=vader_lexicon.txt --output=DIR
        [--methods=GRPO,PPO --seeds=0,1,2 --steps=30]

Every method sees 128 samples a rollout.  The last eighth of the prompts is held out: after
training, each is sampled eight times; reward and KL (nats a completion, against the starting
weights) are means over these.  Results that DIR/results.json already has are not computed again.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from align_jax import evaluate, losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.core.options import DataOptions, RolloutOptions
from align_jax.data import datasets
from align_jax.evals.generation import generation
from align_jax.evals.policy import EvaluatedPolicy
from align_jax.online import rewards
from align_jax.runs import loop
from align_jax.runs.weights import load_model

NEW_TOKENS = 24
# Method -> (objective, its options, groups in a step, samples a prompt, learning rate).
METHODS: Mapping[str, tuple[str, dict[str, Any], int, int, float]] = {
    "GRPO": ("grpo", {"beta": 0.1}, 16, 8, 5e-4),
    "RLOO": ("rloo", {"kl_coef": 0.05}, 16, 8, 5e-4),
    "REINFORCE++": ("reinforce_pp", {"kl_coef": 0.05}, 128, 1, 5e-4),
    "PPO": ("ppo", {"kl_coef": 0.05, "epochs": 2, "minibatches": 2}, 64, 1, 5e-4),
    "online DPO": ("dpo", {"beta": 0.1}, 16, 8, 5e-4),
    "online KTO": ("kto", {"beta": 0.1}, 128, 8, 5e-4),
}


def make_config(
    method: str, seed: int, steps: int, model: str, prompts: str, lexicon: str
) -> ConfigDict:
    """Return a run's config; ``steps`` counts rollouts."""
    name, options, batch_size, samples, rate = METHODS[method]
    config = defaults()
    slices = options.get("epochs", 1) * options.get("minibatches", 1)
    config.seed, config.total_steps, config.batch_size, config.max_length = (
        seed,
        steps * slices,
        batch_size,
        96,
    )
    config.model.path, config.model.compute_dtype, config.model.remat = model, "float32", "none"
    config.reference.dtype = "float32"
    config.data.train, config.data.eval_fraction = prompts, 0.0  # they are held out already
    config.objective = ConfigDict(losses.options(name) | {"name": name} | options)
    config.rollout.responses_per_prompt, config.rollout.max_new_tokens = samples, NEW_TOKENS
    config.rewards = ConfigDict({"lexicon": {"path": lexicon}})
    config.optimizer.learning_rate, config.optimizer.schedule = rate, "constant"
    config.optimizer.b2, config.optimizer.warmup_steps = 0.99, 5
    config.checkpoint.every_steps = 0
    return config


def split(prompts: str, folder: pathlib.Path) -> tuple[str, str]:
    """Write seven eighths of the prompts to one file and the last eighth to another."""
    lines = pathlib.Path(prompts).read_text().splitlines(keepends=True)
    border = len(lines) * 7 // 8
    names = []
    for name, part in (("train", lines[:border]), ("held_out", lines[border:])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(part))
        names.append(str(path))
    return names[0], names[1]


def measure(policy: EvaluatedPolicy, held_out: str, lexicon: str) -> dict[str, float]:
    """Sample the held-out prompts."""
    examples = datasets.load(held_out, "prompts", DataOptions(), chat=False)
    scored = rewards.resolve({"lexicon": {"path": lexicon}}, load_model=load_model)
    options = RolloutOptions(responses_per_prompt=8, max_new_tokens=NEW_TOKENS, rows=128)
    return generation(policy, examples, scored, options, seed=1000)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Write means and standard deviations over seeds as a Markdown table."""
    lines = ["| method | seeds | reward | KL, nats | distinct |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(one["method"] for one in results):
        runs = [one for one in results if one["method"] == method]
        cells = []
        for name in ("reward", "objective/kl", "distinct"):
            found = [one[name] for one in runs]
            spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.3f}{spread}")
        lines.append(f"| {method} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draw reward against KL, a point a run."""
    from matplotlib.figure import Figure  # here, because it is only installed with the plots

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(one["method"] for one in results):
        runs = [one for one in results if one["method"] == method]
        axes.scatter(
            [one["objective/kl"] for one in runs],
            [one["reward"] for one in runs],
            label=method,
            s=24,
        )
    axes.set(
        xlabel="KL from the starting weights, nats a completion",
        ylabel="mean reward, held-out prompts",
    )
    axes.legend(fontsize=8)
    figure.savefig(path)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    folder = pathlib.Path(values.output)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else []
    train_prompts, held_out = split(values.prompts, folder)
    jobs = [("start", 0)] + [
        (method, int(seed)) for seed in values.seeds for method in values.methods or METHODS
    ]
    for method, seed in jobs:
        if any((one["method"], one["seed"]) == (method, seed) for one in results):
            continue
        if method == "start":
            policy = evaluate.model_policy(values.model, values.model)
        else:
            workdir = str(folder / f"{method.replace(' ', '_')}_{seed}")
            config = make_config(
                method, seed, values.steps, values.model, train_prompts, values.lexicon
            )
            loop.train(config, workdir)
            policy = evaluate.run_policy(workdir)
            if not policy.name.endswith(f"@{config.total_steps}"):
                raise SystemExit(f"{workdir} was stopped early; the same command goes on")
        results.append(
            {"method": method, "seed": seed, **measure(policy, held_out, values.lexicon)}
        )
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(table(results), flush=True)
    plot(results, folder / "reward_kl.svg")


if __name__ == "__main__":
    for name in ("model", "prompts", "lexicon", "output"):
        flags.DEFINE_string(name, None, f"See the file's head: {name}.", required=True)
    flags.DEFINE_list("methods", [], f"Of {', '.join(METHODS)}; default: all.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
    flags.DEFINE_integer("steps", 30, "Rollouts of each run.", 1)
    app.run(main)

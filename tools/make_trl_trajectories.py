# SPDX-License-Identifier: Apache-2.0
"""Make ``trl_trajectories/``: per-step losses of TRL's DPO, KTO and reward trainers on a tiny
random Llama.

    python tools/make_trl_trajectories.py

Needs ``pip install torch trl==1.16.0 datasets accelerate``; the test that replays the batches needs
none of them. Kept: the initial weights as Hugging Face checkpoints (``causal/``, ``reward/``), and
in ``trajectories.npz`` for each method the batches as TRL collated them, the losses of 20 steps,
the settings and the versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

FOLDER = pathlib.Path(__file__).parents[1] / "tests/golden/trl_trajectories"
SEED, STEPS, BATCH, WORDS = 7, 20, 4, 40
OPTIMIZER = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
}
METHODS = {
    "dpo": {"beta": 0.1},
    "kto": {"beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.9},
    "reward": {"center_rewards_coefficient": 0.01},
}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Make a tokenizer of 40 words, padding and end."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def make_config() -> transformers.LlamaConfig:
    """Make a configuration of two small layers with grouped queries."""
    return transformers.LlamaConfig(
        vocab_size=WORDS + 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        attention_dropout=0.0,
        num_labels=1,
    )


def make_rows(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Make pairs of random words in which the chosen response has lower word numbers."""

    def text(low, high):
        return (
            " " + " ".join(f"w{i}" for i in rng.integers(low, high, rng.integers(2, 7))) + " <eos>"
        )

    def prompt():
        return " ".join(f"w{i}" for i in rng.integers(0, WORDS, rng.integers(2, 6)))

    return [
        {"prompt": prompt(), "chosen": text(0, 25), "rejected": text(15, WORDS)}
        for _ in range(count)
    ]


def recorded(base: type) -> type:
    """Subclass a trainer so that it keeps what goes into each step and the loss that comes out."""

    class Recorded(base):
        def compute_loss(self, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
            copy = {
                key: np.asarray(value)
                for key, value in inputs.items()
                if isinstance(value, torch.Tensor)
            }
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.__dict__.setdefault("seen", []).append((copy, loss.item()))
            return loss

    Recorded.__name__ = base.__name__
    return Recorded


def train(method: str, rows: list[dict[str, Any]], tokenizer: Any) -> tuple[list, Any]:
    """Train with TRL for ``STEPS`` steps and return what was recorded."""
    trainer_type, config_type = {
        "dpo": (DPOTrainer, DPOConfig),
        "kto": (KTOTrainer, KTOConfig),
        "reward": (RewardTrainer, RewardConfig),
    }[method]
    kind = "AutoModelForSequenceClassification" if method == "reward" else "AutoModelForCausalLM"
    folder = FOLDER / ("reward" if method == "reward" else "causal")
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    if method == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for i, row in enumerate(rows)
            for side in (("chosen", "rejected") if i % 3 else ("rejected",))
        ]
    with tempfile.TemporaryDirectory() as scratch:
        args = config_type(
            output_dir=scratch,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            lr_scheduler_type="constant",
            warmup_steps=0,
            optim="adamw_torch",
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            seed=SEED,
            disable_tqdm=True,
            dataloader_num_workers=0,
            max_length=None,
            **OPTIMIZER,
            **METHODS[method],
        )
        trainer = recorded(trainer_type)(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    return trainer.seen


def pad(arrays: list[np.ndarray]) -> np.ndarray:
    """Stack steps of different lengths with zeros on the right."""
    width = max(x.shape[-1] for x in arrays)
    if arrays[0].ndim == 1:
        return np.stack(arrays)
    return np.stack([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in arrays])


def main() -> None:
    """Make weights, train three times, write everything."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    transformers.set_seed(SEED)
    transformers.LlamaForCausalLM(make_config()).save_pretrained(FOLDER / "causal")
    transformers.LlamaForSequenceClassification(make_config()).save_pretrained(FOLDER / "reward")
    (FOLDER / "causal" / "generation_config.json").unlink(missing_ok=True)
    rng, arrays = np.random.default_rng(SEED), {}
    for method in METHODS:
        seen = train(method, make_rows(rng, STEPS * BATCH), make_tokenizer())
        for key in seen[0][0]:
            stacked = pad([inputs[key] for inputs, _ in seen])
            narrow = bool if key in ("attention_mask", "label") or key.endswith("mask") else np.int8
            arrays[f"{method}/{key}"] = stacked.astype(narrow)
        arrays[f"{method}/loss"] = np.array([loss for _, loss in seen])
        print(method, arrays[f"{method}/loss"].round(4).tolist())
    versions = {
        name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers", "numpy")
    }
    arrays["header"] = np.array(
        json.dumps({"versions": versions, "seed": SEED, "optimizer": OPTIMIZER, "methods": METHODS})
    )
    np.savez_compressed(FOLDER / "trajectories.npz", **arrays)
    for path in sorted(FOLDER.rglob("*")):
        if path.is_file():
            print(path.relative_to(FOLDER), path.stat().st_size)


if __name__ == "__main__":
    main()

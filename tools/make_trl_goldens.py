# SPDX-License-Identifier: Apache-2.0
"""Make ``trl_objectives.npz``: losses and gradients that TRL's own code gives on random token
log-probabilities.

    python tools/make_trl_goldens.py

Needs ``pip install torch trl==1.16.0 datasets accelerate``; the tests that read the file need none
of them.  A trainer's loss method is called on a stand-in that has the attributes it reads, with a
stand-in model that returns given token log-probabilities, so what is recorded is TRL's arithmetic
and nothing else.  Layout, for every case i:

    cases.json (an array of the npz):  [{"name", "options", "weights", "source", "data", "columns"},
    ...] and versions
    i/loss, i/grad, i/<column>         grad is with respect to the policy's token log-probabilities

Arrays are grouped by data: ``pairs``: [B, 2, T] (chosen first), ``unpaired``: [B, T],
``completions``: [B, T], ``reward``: scores [B, 2], ``rollout``: [B, R, T].
"""

from __future__ import annotations

import collections
import functools
import importlib.metadata
import inspect
import json
import math
import pathlib
import textwrap
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from trl.experimental.cpo import CPOConfig
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.gkd import GKDConfig
from trl.experimental.gmpo import GMPOConfig
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig
from trl.experimental.orpo import ORPOConfig
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.experimental.tpo import TPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import nanmax, nanmin

SEED = 20240611
OUTPUT = pathlib.Path(__file__).parents[1] / "tests/golden/trl_objectives.npz"
BATCH, LENGTH = 5, 8


class Accelerator:
    """One process, one device."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True
    parallelism_config = None
    gather = gather_for_metrics = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction="sum": x)
    pad_across_processes = staticmethod(lambda x, dim=0, pad_index=0: x)


class Model(torch.nn.Module):
    """Answers any call with the outputs that it was given."""

    is_gradient_checkpointing = False

    def __init__(self, **outputs: Any):
        super().__init__()
        self.outputs = SimpleNamespace(**outputs)

    def forward(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        return self.outputs


def trainer(**attributes: Any) -> SimpleNamespace:
    """Make a stand-in trainer."""
    defaults = {
        "accelerator": Accelerator(),
        "aux_loss_enabled": False,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "_metrics": collections.defaultdict(lambda: collections.defaultdict(list)),
        "current_gradient_accumulation_steps": 1,
        "is_encoder_decoder": False,
    }
    return SimpleNamespace(**(defaults | attributes))


def draw(rng: np.random.Generator, *shape: int, spread: float) -> dict[str, np.ndarray]:
    """Draw token log-probabilities of policy and reference, a mask of 1 to T tokens, and log Σ p²;
    [..., T] float32."""
    lengths = rng.integers(1, shape[-1] + 1, shape[:-1])
    mask = np.arange(shape[-1]) < lengths[..., None]
    reference = -rng.gamma(2.0, 0.8, shape) - 0.05
    policy = np.minimum(reference + spread * rng.normal(size=shape), -0.01)
    arrays = {"policy": policy, "reference": reference, "log_sum_sq": -rng.gamma(1.0, 1.0, shape)}
    return {name: np.where(mask, x, 0).astype(np.float32) for name, x in arrays.items()} | {
        "mask": mask
    }


def outputs_of(log_probs: torch.Tensor, mask: torch.Tensor, **more: Any) -> dict[str, Any]:
    """Make what TRL's fused head returns."""
    zeros = torch.zeros_like(log_probs)
    return {
        "log_probs": log_probs,
        "entropy": zeros,
        "mean_logits": zeros,
        "is_top1": zeros.bool(),
        "label_mask": mask.bool(),
        **more,
    }


def joined(x: np.ndarray) -> torch.Tensor:
    """[B, 2, T] -> [2 B, T], the chosen ones first, as TRL has them."""
    return torch.tensor(np.concatenate([x[:, 0], x[:, 1]]))


def dpo(
    arrays: dict, loss_types: list[str], weights: list[float], options: dict
) -> dict[str, np.ndarray]:
    """Call DPOTrainer._compute_loss."""
    policy = joined(arrays["policy"]).requires_grad_()
    mask = joined(arrays["mask"])
    model = Model(**outputs_of(policy, mask, log_sum_sq_probs=joined(arrays["log_sum_sq"])))
    reference = Model(**outputs_of(joined(arrays["reference"]), mask))
    kinds = {"js": "js_divergence", "alpha": "alpha_divergence"}
    kind = options.get("f_divergence", "reverse_kl")
    args = SimpleNamespace(
        gradient_checkpointing_kwargs=None, discopop_tau=options.get("tau", 0.05)
    )
    me = trainer(
        model=model,
        ref_model=reference,
        precompute_ref_logps=False,
        args=args,
        loss_types=loss_types,
        loss_weights=weights,
        beta=options.get("beta", 0.1),
        ld_alpha=options.get("ld_alpha"),
        label_smoothing=options.get("label_smoothing", 0.0),
        f_divergence_type=kinds.get(kind, kind),
        f_alpha_divergence_coef=options.get("f_alpha", 0.5),
        use_weighting=options.get("wpo", False),
    )
    # One prompt token before each completion, which no loss counts.
    full = torch.nn.functional.pad(mask.long(), (1, 0))
    loss = DPOTrainer._compute_loss(
        me, model, {"input_ids": full, "attention_mask": full + 1, "completion_mask": full}, False
    )
    loss.backward()
    gradient = policy.grad.numpy()
    metrics = {
        key: value[0]
        for key, value in me._metrics["train"].items()
        if key.split("/")[0] in ("rewards", "logps")
    }
    if "ld_alpha" in options or loss_types == ["sft"]:  # ours are plain sums; sft has no rewards
        metrics = {}
    return {
        "loss": loss.item(),
        "grad": np.stack([gradient[:BATCH], gradient[BATCH:]], axis=1),
        "metrics": metrics,
    }


def kto(arrays: dict, loss_type: str, options: dict) -> dict[str, np.ndarray]:
    """Call KTOTrainer._compute_loss."""
    policy = torch.tensor(arrays["policy"]).requires_grad_()
    mask = torch.tensor(arrays["mask"])
    model, reference = (
        Model(**outputs_of(policy, mask)),
        Model(**outputs_of(torch.tensor(arrays["reference"]), mask)),
    )
    kl = {
        id(model): torch.tensor(arrays["mismatched_policy"]),
        id(reference): torch.tensor(arrays["mismatched_reference"]),
    }
    me = trainer(
        model=model,
        ref_model=reference,
        precompute_ref_logps=False,
        loss_type=loss_type,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        beta=options.get("beta", 0.1),
        calculate_KL=loss_type == "kto",
        desirable_weight=options.get("desirable_weight", 1.0),
        undesirable_weight=options.get("undesirable_weight", 1.0),
        _compute_kl_logps=lambda model, batch: kl[id(model)],
    )
    full = torch.nn.functional.pad(mask.long(), (1, 0))
    inputs = {
        "input_ids": full,
        "attention_mask": full + 1,
        "completion_mask": full,
        "label": torch.tensor(arrays["label"]),
    }
    loss = KTOTrainer._compute_loss(me, model, inputs, False)
    loss.backward()
    metrics = {
        key: value[0]
        for key, value in me._metrics["train"].items()
        if key.split("/")[0] in ("rewards", "logps", *(["kl"] if loss_type == "kto" else []))
    }
    return {"loss": loss.item(), "grad": policy.grad.numpy(), "metrics": metrics}


def contrastive(arrays: dict, kind: type, attributes: dict) -> dict[str, np.ndarray]:
    """Call CPOTrainer's or ORPOTrainer's get_batch_loss_metrics, which want logits.

    A vocabulary of two, in float64: the token's log-probability a, and log(1 - e^a) for the other
    token.
    """
    policy = torch.tensor(arrays["policy"].astype(np.float64), requires_grad=True)
    both = torch.cat([policy[:, 0], policy[:, 1]])
    mask = joined(arrays["mask"])
    safe = torch.where(mask, both, torch.full_like(both, -0.5))
    logits = torch.stack([safe, torch.log(-torch.expm1(safe))], dim=-1)
    model = Model(logits=torch.nn.functional.pad(logits, (0, 0, 0, 1)))
    names = (
        "concatenated_inputs",
        "get_batch_logps",
        "cpo_loss",
        "odds_ratio_loss",
        "concatenated_forward",
    )
    methods = {}
    me = trainer(pad_token_id=0, padding_value=0, **attributes)
    for name in names:
        if hasattr(kind, name):
            method = getattr(kind, name)
            static = isinstance(kind.__dict__.get(name), staticmethod)
            methods[name] = method if static else method.__get__(me)
    me.__dict__.update(methods)
    full = torch.nn.functional.pad(mask.long(), (1, 0), value=1)
    labels = torch.nn.functional.pad(torch.where(mask, 0, -100), (1, 0), value=-100)
    batch = {}
    for i, side in enumerate(("chosen", "rejected")):
        rows = slice(i * BATCH, (i + 1) * BATCH)
        batch |= {
            f"{side}_input_ids": 0 * full[rows],
            f"{side}_attention_mask": full[rows],
            f"{side}_labels": labels[rows],
        }
    loss, metrics = kind.get_batch_loss_metrics(me, model, batch)
    loss.backward()
    metrics = {
        key: float(value)
        for key, value in metrics.items()
        if key.split("/")[0] in ("rewards", "logps")
    }
    # TRL reports means per token as logps there
    if kind is ORPOTrainer or attributes["loss_type"] in ("ipo", "simpo"):
        metrics = {key: value for key, value in metrics.items() if not key.startswith("logps")}
    # ours are beta x always
    if kind is CPOTrainer and (attributes["loss_type"] == "ipo" or attributes["alpha"]):
        metrics = {}
    return {"loss": loss.item(), "grad": policy.grad.numpy(), "metrics": metrics}


def reward(arrays: dict, options: dict) -> dict[str, np.ndarray]:
    """Call RewardTrainer.compute_loss; the gradient is with respect to the scores."""
    scores = torch.tensor(arrays["policy"]).requires_grad_()
    model = Model(logits=torch.cat([scores[:, 0], scores[:, 1]])[:, None])
    me = trainer(
        model=model, args=SimpleNamespace(center_rewards_coefficient=options.get("center_coef"))
    )
    inputs = {"attention_mask": torch.ones(2 * BATCH, 1)}
    if "margin" in arrays:
        inputs["margin"] = torch.tensor(arrays["margin"])
    loss = RewardTrainer.compute_loss(me, model, inputs)
    loss.backward()
    found = me._metrics["train"]
    return {
        "loss": loss.item(),
        "grad": scores.grad.numpy(),
        "metrics": {key: found[key][0] for key in ("mean_reward", "accuracy", "margin")},
    }


def sft(arrays: dict, options: dict) -> dict[str, np.ndarray]:
    """Call SFTTrainer.compute_loss."""
    policy = torch.tensor(arrays["policy"]).requires_grad_()
    mask = torch.tensor(arrays["mask"])
    model = Model(**outputs_of(policy, mask))
    args = SimpleNamespace(
        loss_type="dft" if options.get("dft") else "nll",
        max_length=None,
        use_liger_kernel=False,
        average_tokens_across_devices=False,
    )
    me = trainer(
        model=model,
        args=args,
        compute_loss_func=None,
        label_smoother=None,
        num_virtual_tokens=0,
        get_tp_size=lambda: 1,
        use_liger_kernel=False,
    )
    labels = torch.nn.functional.pad(torch.where(mask, 1, -100), (1, 0), value=-100)
    loss = SFTTrainer.compute_loss(
        me,
        model,
        {"input_ids": labels, "labels": labels, "attention_mask": torch.ones_like(labels)},
    )
    loss.backward()
    return {"loss": loss.item(), "grad": policy.grad.numpy(), "metrics": {}}


def sampler_ratio(me: SimpleNamespace, inputs: dict, sampler: torch.Tensor) -> torch.Tensor:
    """Run the parts of GRPOTrainer._generate_and_score_completions that compare the sampler's
    log-probabilities with the trainer's: the ratio, and its metrics."""
    condition = "if self.use_vllm and self.vllm_importance_sampling_correction:"
    lines = inspect.getsource(GRPOTrainer._generate_and_score_completions).splitlines()
    scope = {
        "self": me,
        "torch": torch,
        "math": math,
        "nanmin": nanmin,
        "nanmax": nanmax,
        "tool_mask": None,
        "mode": "train",
        "device": "cpu",
        "completion_mask": inputs["completion_mask"],
        "old_per_token_logps": inputs["old_per_token_logps"],
        "sampling_per_token_logps": sampler,
        "output": {},
    }
    for first in (i for i, line in enumerate(lines) if line.strip() == condition):
        depth = len(lines[first]) - len(lines[first].lstrip())
        body = [lines[first]]
        for line in lines[first + 1 :]:
            if line.strip() and len(line) - len(line.lstrip()) <= depth:
                break
            body.append(line)
        exec(textwrap.dedent("\n".join(body)), scope)
    return scope["output"]["importance_sampling_ratio"]


def rollout(
    arrays: dict, name: str, options: dict, by_token: bool = False, control: dict | None = None
) -> dict[str, np.ndarray]:
    """Call the _compute_loss of GRPOTrainer, RLOOTrainer or GMPOTrainer on [B, R, T] flattened to
    rows, with an advantage for each response, or for each token; ``control`` is what the adaptive
    entropy bonus remembers."""
    shape = arrays["policy"].shape
    flat = {
        key: torch.tensor(arrays[key].reshape(-1, shape[-1]))
        for key in ("reference", "old_token_logps")
    }
    policy = torch.tensor(arrays["policy"]).requires_grad_()
    rows, mask = (
        policy.reshape(-1, shape[-1]),
        torch.tensor(arrays["mask"].reshape(-1, shape[-1]).astype(np.float32)),
    )
    entropies = torch.tensor(arrays["entropy"].reshape(-1, shape[-1]))
    # a response's advantage stands at all of its tokens, and 0 elsewhere
    most = np.abs(arrays["advantages"]).argmax(axis=-1, keepdims=True)
    each = torch.tensor(np.take_along_axis(arrays["advantages"], most, axis=-1).reshape(-1))
    if by_token:
        each = torch.tensor(arrays["advantages"].reshape(-1, shape[-1]))
    loss_type = {"gspo": "grpo", "reinforce_pp": "bnpo"}.get(name, options.get("loss_type", name))
    low = options.get("epsilon_low", {"gspo": 3e-4, "gmpo": options.get("epsilon")}.get(name, 0.2))
    high = {"gspo": 4e-4, "cispo": 5.0, "dapo": 0.28}.get(
        loss_type if name == "grpo" else name, low
    )
    shape_of = {"positive": "pos", "negative": "neg"}
    defaults = {
        "k_positive": 2.0,
        "lambda_positive": 3.0,
        "k_negative": 3.0,
        "lambda_negative": 2.0,
    }
    args = SimpleNamespace(
        delta=options.get("delta"),
        use_bias_correction_kl=options.get("unbiased_kl", False),
        **{
            f"vespo_{key.split('_')[0]}_{shape_of[key.split('_')[1]]}": options.get(key, value)
            for key, value in defaults.items()
        },
        steps_per_generation=1,
        entropy_target=options.get("entropy_target"),
        entropy_coef_min=0.0,
        entropy_coef_max=options.get("entropy_coef"),
        entropy_coef_delta=options.get("entropy_coef", 0.0) * options.get("entropy_step", 0.0),
        sapo_temperature_pos=options.get("tau_positive", 1.0),
        sapo_temperature_neg=options.get("tau_negative", 1.05),
    )
    importance = "sequence" if name == "gspo" else options.get("importance", "token")
    me = trainer(
        model=Model(),
        args=args,
        loss_type=loss_type,
        epsilon_low=low,
        beta=options.get("beta", 0.0),
        epsilon_high=options.get("epsilon_high", high),
        importance_sampling_level=importance,
        top_entropy_quantile=options.get("top_entropy_quantile", 1.0),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        off_policy_mask_threshold=options.get("off_policy_threshold"),
        use_vllm="sampler_token_logps" in arrays,
        vllm_importance_sampling_mode=options.get("sampler_correction"),
        vllm_importance_sampling_clip_max=options.get("sampler_ratio_max", 3.0),
        vllm_importance_sampling_clip_min=options.get("sampler_ratio_min"),
        entropy_coef=options.get("entropy_coef", 0.0),
        _entropy_bonus_enabled="entropy_coef" in options,
        use_adaptive_entropy=control is not None,
        _entropy_window_stats=None,
        max_completion_length=options.get("max_length"),
        vllm_importance_sampling_correction="sampler_token_logps" in arrays,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (rows, entropies, None),
    )
    vars(me).update(control or {})
    me.get_high_entropy_mask = functools.partial(GRPOTrainer.get_high_entropy_mask, me)
    ones = torch.ones(rows.shape[0], 1)
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": each,
        "old_per_token_logps": flat["old_token_logps"],
        "old_logps": (flat["old_token_logps"] * mask).sum(-1),
        "ref_per_token_logps": flat["reference"],
        "num_items_in_batch": mask.sum(),
    }
    if me.use_vllm:
        sampler = torch.tensor(arrays["sampler_token_logps"].reshape(-1, shape[-1]))
        ratio = sampler_ratio(me, inputs, sampler)
        inputs |= {"importance_sampling_ratio": ratio, "sampling_per_token_logps": sampler}
        arrays["sampler_ratio"] = (ratio * mask).reshape(shape).numpy()
    kind = {"rloo": RLOOTrainer, "gmpo": GMPOTrainer}.get(name, GRPOTrainer)
    loss = kind._compute_loss(me, me.model, inputs)
    loss.backward()
    for key in control or ():
        control[key] = getattr(me, key)
    found = me._metrics["train"]
    keys = (
        "kl",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "cispo_clip_ratio",
        "vespo/phi_seq_mean",
        *(key for key in found if key.startswith("sampling/")),
    )
    return {
        "loss": loss.item(),
        "grad": policy.grad.numpy(),
        "metrics": {key: found[key][0] for key in keys if key in found},
    }


PAIRS: list[tuple[str, dict]] = [  # our name and options
    ("dpo", {}),
    ("dpo", {"beta": 0.5}),
    ("dpo", {"ld_alpha": 0.3}),
    ("dpo", {"wpo": True}),
    *[
        ("dpo", {"f_divergence": kind, **more})
        for kind in ("forward_kl", "js", "alpha")
        for more in ({}, {"wpo": True})
    ],
    ("dpo", {"f_divergence": "alpha", "f_alpha": 0.2}),
    ("dpo", {"f_divergence": "alpha", "f_alpha": 1.0}),
    ("robust", {"label_smoothing": 0.1}),
    ("robust", {"f_divergence": "js", "ld_alpha": 0.5}),
    ("ipo", {}),
    ("ipo", {"f_divergence": "alpha"}),
    ("ipo", {"ld_alpha": 0.2}),
    ("hinge", {}),
    ("hinge", {"beta": 0.3}),
    ("hinge", {"f_divergence": "forward_kl"}),
    ("dpo_norm", {}),
    ("dpo_norm", {"beta": 5.0, "f_divergence": "js"}),
    ("exo_pair", {"label_smoothing": 1e-3}),
    ("exo_pair", {"label_smoothing": 0.2, "f_divergence": "js"}),
    ("exo_pair", {"label_smoothing": 0.1, "wpo": True}),
    ("nca_pair", {}),
    ("nca_pair", {"beta": 0.5, "wpo": True}),
    ("bco_pair", {}),
    ("bco_pair", {"ld_alpha": 0.4}),
    ("sppo_hard", {}),
    ("sppo_hard", {"beta": 0.5}),
    ("aot", {}),
    ("aot", {"label_smoothing": 0.2, "beta": 0.5}),
    ("aot", {"ld_alpha": 0.3}),
    ("aot_unpaired", {}),
    ("aot_unpaired", {"label_smoothing": 0.2, "beta": 0.5}),
    ("apo_zero", {}),
    ("apo_zero", {"wpo": True}),
    ("apo_down", {}),
    ("apo_down", {"beta": 0.5}),
    ("discopop", {}),
    ("discopop", {"tau": 0.5, "beta": 0.5}),
    ("discopop", {"f_divergence": "js"}),
    ("sft", {}),
    ("dpo", {"sft_coef": 0.7}),
    ("dpo+bco_pair+sft", {}),
    ("hinge+exo_pair", {"label_smoothing": 1e-2}),
]
TRL_NAMES = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm"}
WEIGHTS = {"dpo+bco_pair+sft": [0.8, 0.2, 1.0], "hinge+exo_pair": [0.3, 2.0]}
CONTRASTIVE: list[tuple[str, dict, type, dict]] = [  # ... and TRL's class and settings
    ("cpo", {"alpha": 1.0}, CPOTrainer, {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
    (
        "cpo",
        {"alpha": 0.0, "label_smoothing": 0.1},
        CPOTrainer,
        {"loss_type": "sigmoid", "label_smoothing": 0.1},
    ),
    ("cpo", {"alpha": 0.3, "form": "hinge"}, CPOTrainer, {"loss_type": "hinge", "cpo_alpha": 0.3}),
    (
        "cpo",
        {"alpha": 0.0, "form": "ipo", "beta": 0.3},
        CPOTrainer,
        {"loss_type": "ipo", "beta": 0.3},
    ),
    ("simpo", {}, CPOTrainer, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0}),
    (
        "simpo",
        {"beta": 2.5, "gamma_beta_ratio": 0.2, "label_smoothing": 0.1, "sft_coef": 0.5},
        CPOTrainer,
        {
            "loss_type": "simpo",
            "beta": 2.5,
            "simpo_gamma": 0.5,
            "label_smoothing": 0.1,
            "cpo_alpha": 0.5,
        },
    ),
    (
        "alphapo",
        {"alpha": 0.25},
        CPOTrainer,
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "alpha": 0.25},
    ),
    (
        "alphapo",
        {"alpha": -0.5},
        CPOTrainer,
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "alpha": -0.5},
    ),
    ("orpo", {}, ORPOTrainer, {"beta": 0.1}),
    ("orpo", {"lam": 0.5}, ORPOTrainer, {"beta": 0.5}),
]
KTO: list[tuple[str, dict]] = [
    ("kto", {}),
    ("kto", {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}),
    ("apo_zero_unpaired", {}),
    ("apo_zero_unpaired", {"beta": 0.5, "desirable_weight": 0.5, "undesirable_weight": 2.0}),
]
ROLLOUT: list[tuple[str, dict]] = [
    ("grpo", {}),
    ("grpo", {"beta": 0.1}),
    ("grpo", {"delta": 1.1, "epsilon_high": 0.4}),
    ("grpo", {"entropy_coef": 0.05}),
    ("grpo", {"importance": "sequence", "beta": 0.05}),
    *[("grpo", {"loss_type": kind, "beta": 0.04}) for kind in ("bnpo", "dapo")],
    ("grpo", {"loss_type": "dr_grpo", "max_length": 12}),
    ("grpo", {"loss_type": "luspo", "importance": "sequence"}),
    ("gspo", {}),
    ("gspo", {"beta": 0.1}),
    ("cispo", {}),
    ("cispo", {"epsilon_high": 1.2, "beta": 0.1}),
    ("sapo", {}),
    ("sapo", {"tau_positive": 1.5, "tau_negative": 0.8, "beta": 0.1}),
    ("rloo", {}),
    ("rloo", {"epsilon_low": 0.1, "epsilon_high": 0.3}),
    ("reinforce_pp", {}),
]
# Drawn after all others, whose random numbers stay what they were.
ROLLOUT_LATER: list[tuple[str, dict]] = [
    *[(name, {"beta": 0.1, "unbiased_kl": True}) for name in ("grpo", "gspo", "cispo", "sapo")],
    *[(name, {"off_policy_threshold": 0.1}) for name in ("grpo", "gspo", "cispo", "sapo", "vespo")],
    ("vespo", {}),
    ("vespo", {"beta": 0.1, "unbiased_kl": True, "k_positive": 1.0, "lambda_negative": 3.0}),
]


# Later still: samples of another distribution than the trainer's.
_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CORRECTED: list[tuple[str, dict]] = [
    *[("grpo", {"sampler_correction": mode}) for mode in _MODES],
    ("grpo", {"sampler_correction": "token_mask", "sampler_ratio_min": 0.5, "beta": 0.1}),
    (
        "grpo",
        {
            "sampler_correction": "sequence_truncate",
            "sampler_ratio_min": 0.9,
            "sampler_ratio_max": 1.1,
            "loss_type": "dapo",
        },
    ),
    ("grpo", {"sampler_correction": "token_truncate", "off_policy_threshold": 0.1}),
    ("gspo", {"sampler_correction": "token_truncate", "sampler_ratio_max": 1.05}),
    ("cispo", {"sampler_correction": "sequence_mask"}),
    ("sapo", {"sampler_correction": "token_mask", "sampler_ratio_max": 1.05}),
    ("vespo", {"sampler_correction": "token_truncate", "sampler_ratio_max": 1.05}),
    ("vespo", {"sampler_correction": "token_mask", "sampler_ratio_min": 0.9}),
]
# And after those: some tokens alone.
SOME_TOKENS: list[tuple[str, dict]] = [
    *[("grpo", {"top_entropy_quantile": share}) for share in (0.2, 0.0, 0.85)],
    ("grpo", {"top_entropy_quantile": 0.5, "loss_type": "dapo", "entropy_coef": 0.05}),
    ("grpo", {"top_entropy_quantile": 0.3, "importance": "sequence", "beta": 0.1}),
    *[(name, {"top_entropy_quantile": 0.3}) for name in ("gspo", "cispo", "sapo", "vespo")],
]


# Last: tokens of a tool's among the response's, and responses without any.
WITH_HOLES: list[tuple[str, dict]] = [
    *[(name, {"importance": "sequence", "beta": 0.1}) for name in ("cispo", "sapo")],
    ("cispo", {"importance": "sequence", "epsilon_high": 1.01, "unbiased_kl": True, "beta": 0.1}),
    ("grpo", {"loss_type": "dr_grpo", "max_length": 8, "importance": "sequence", "delta": 1.05}),
    (
        "grpo",
        {"loss_type": "dapo", "beta": 0.1, "unbiased_kl": True, "off_policy_threshold": 0.1}
        | {"top_entropy_quantile": 0.5, "entropy_coef": 0.1},
    ),
    ("grpo", {"loss_type": "luspo", "importance": "sequence", "top_entropy_quantile": 0.4}),
    ("vespo", {"top_entropy_quantile": 0.5, "beta": 0.1, "off_policy_threshold": 0.1}),
    ("gmpo", {"epsilon": 0.4}),
    ("gmpo", {"epsilon": 0.05, "epsilon_high": 0.2, "beta": 0.1}),
    ("gmpo", {"epsilon": 0.1, "top_entropy_quantile": 0.4}),
]
CONFIGS = (  # whose fields docs/coming_from.md tells one by one
    *(trl.DPOConfig, trl.KTOConfig, trl.RewardConfig, trl.SFTConfig, trl.GRPOConfig),
    *(trl.RLOOConfig, OnlineDPOConfig, GKDConfig, ORPOConfig, CPOConfig, TPOConfig, GMPOConfig),
    trl.DistillationConfig,
)
# the adaptive entropy bonus, over some steps
CONTROL = {"entropy_coef": 0.2, "entropy_target": 1.0, "entropy_step": 0.4}


def fields() -> dict[str, list[str]]:
    """Return the fields that each of TRL's configs declares by itself, or by a base of TRL's."""
    return {
        kind.__name__: sorted(
            {
                name
                for base in kind.__mro__
                if base.__module__.startswith("trl.")
                for name in vars(base).get("__annotations__", {})
                if not name.startswith("_")
            }
        )
        for kind in CONFIGS
    }


def main() -> None:
    """Make all cases, at small and at large log-ratios."""
    rng = np.random.default_rng(SEED)
    cases, arrays = [], {}

    def add(name: str, options: dict, data: str, source: str, columns: dict, found: dict) -> None:
        index = len(cases)
        cases.append(
            {
                "name": name,
                "options": options,
                "weights": WEIGHTS.get(name),
                "data": data,
                "source": source,
                "columns": sorted(columns),
                "metrics": found["metrics"],
            }
        )
        arrays.update({f"{index}/{key}": value for key, value in columns.items()})
        # Where the mask is false TRL's head gives constants, so no gradient passes.
        grad = np.where(columns["mask"], found["grad"], 0) if "mask" in columns else found["grad"]
        arrays.update({f"{index}/loss": found["loss"], f"{index}/grad": grad.astype(np.float32)})

    def draw_rollout(spread: float, holes: bool = False) -> dict[str, np.ndarray]:
        columns = draw(rng, 3, 4, LENGTH, spread=spread)
        if holes:
            mask = columns["mask"] & (rng.random(columns["mask"].shape) < 0.7)
            mask[0, 1] = False
            columns = {key: np.where(mask, x, x.dtype.type(0)) for key, x in columns.items()}
        old = columns["policy"] + np.where(
            columns["mask"], spread * rng.normal(size=(3, 4, LENGTH)), 0
        )
        columns["old_token_logps"] = np.minimum(old, 0).astype(np.float32)
        each = rng.normal(size=(3, 4, 1)).astype(np.float32)
        columns["advantages"] = np.where(columns["mask"], each, np.float32(0))
        entropy = rng.gamma(1.0, 1.0, columns["mask"].shape).astype(np.float32)
        columns["entropy"] = np.where(columns["mask"], entropy, np.float32(0))
        return columns

    def add_rollout(
        name: str, options: dict, spread: float, sampler: bool = False, holes: bool = False
    ) -> None:
        columns = draw_rollout(spread, holes)
        if sampler:
            gap = np.where(columns["mask"], spread * rng.normal(size=columns["mask"].shape), 0)
            columns["sampler_token_logps"] = columns["old_token_logps"] - gap.astype(np.float32)
        add(
            name,
            options,
            "rollout",
            {"rloo": "RLOOTrainer", "gmpo": "GMPOTrainer"}.get(name, "GRPOTrainer"),
            columns,
            rollout(columns, name, options),
        )

    for spread in (0.05, 0.8):
        for name, options in PAIRS:
            columns = draw(rng, BATCH, 2, LENGTH, spread=spread)
            trl_options = {key: value for key, value in options.items() if key != "sft_coef"}
            types = [TRL_NAMES.get(part, part) for part in name.split("+")]
            weights = WEIGHTS.get(name, [1.0])
            if "sft_coef" in options:
                types, weights = types + ["sft"], weights + [options["sft_coef"]]
            add(
                name,
                options,
                "pairs",
                "DPOTrainer",
                columns,
                dpo(columns, types, weights, trl_options),
            )
        for name, options, kind, attributes in CONTRASTIVE:
            columns = draw(rng, BATCH, 2, LENGTH, spread=spread)
            settings = {
                "beta": 0.1,
                "label_smoothing": 0.0,
                "alpha": 0.0,
                "cpo_alpha": 0.0,
                "simpo_gamma": 0.0,
            }
            add(
                name,
                options,
                "pairs",
                kind.__name__,
                columns,
                contrastive(columns, kind, settings | attributes),
            )
        for labels in ([True, False, True, True, False], [True] * 5, [False] * 5):
            for name, options in KTO:
                columns = draw(rng, BATCH, LENGTH, spread=spread) | {"label": np.array(labels)}
                columns["mismatched_reference"] = -rng.gamma(4.0, 2.0, BATCH).astype(np.float32)
                shift = rng.normal(0.2, 1.0, BATCH).astype(np.float32)
                columns["mismatched_policy"] = columns["mismatched_reference"] + shift
                add(name, options, "unpaired", "KTOTrainer", columns, kto(columns, name, options))
        for options in ({}, {"center_coef": 0.01}):
            for with_margin in (False, True):
                columns = {"policy": (10 * spread * rng.normal(size=(BATCH, 2))).astype(np.float32)}
                if with_margin:
                    columns["margin"] = rng.gamma(1.0, 1.0, BATCH).astype(np.float32)
                add("reward", options, "reward", "RewardTrainer", columns, reward(columns, options))
        for options in ({}, {"dft": True}):
            columns = draw(rng, BATCH, LENGTH, spread=spread)
            add("sft", options, "completions", "SFTTrainer", columns, sft(columns, options))
        for name, options in ROLLOUT:
            add_rollout(name, options, spread)
    for spread in (0.05, 0.8):
        for name, options in ROLLOUT_LATER:
            add_rollout(name, options, spread)
    for spread in (0.05, 0.8):
        for name, options in CORRECTED:
            add_rollout(name, options, spread, sampler=True)
    for spread in (0.05, 0.8):
        for name, options in SOME_TOKENS:
            add_rollout(name, options, spread)
    for spread in (0.05, 0.8):
        for name, options in WITH_HOLES:
            add_rollout(name, options, spread, holes=True)
    control, steps = {"entropy_coef": 0.0, "_last_world_entropy": math.inf}, []
    for number in range(6):
        columns = draw_rollout(0.3, holes=True)
        columns["entropy"] *= np.float32(2.0 if number % 3 == 2 else 0.5)
        found = rollout(columns, "grpo", CONTROL, control=control)
        steps.append(columns | {"loss": np.float32(found["loss"]), "coef": control["entropy_coef"]})
    arrays |= {f"control/{key}": np.stack([step[key] for step in steps]) for key in steps[0]}
    versions = {
        package: importlib.metadata.version(package)
        for package in ("trl", "torch", "transformers", "numpy")
    }
    header = {"versions": versions, "seed": SEED, "control": CONTROL, "fields": fields()}
    header["cases"] = cases
    arrays["cases"] = np.array(json.dumps(header))
    np.savez_compressed(OUTPUT, **arrays)
    print(
        f"{OUTPUT.name}: {len(cases)} cases, trl {trl.__version__}, {OUTPUT.stat().st_size} bytes"
    )


if __name__ == "__main__":
    main()

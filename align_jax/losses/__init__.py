# SPDX-License-Identifier: Apache-2.0
"""The table of objectives.  To add one: write its function, add a row here; the tests loop over the
table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align_jax.losses import (
    arrays,
    batchwise,
    kto,
    objective,
    policy_gradient,
    ppo_offline,
    preference,
    reference_free,
    supervised,
    targets,
)
from align_jax.losses.arrays import Evaluated, dpo_from_indices
from align_jax.losses.objective import Objective, Term
from align_jax.losses.pairs import paired

__all__ = ["OBJECTIVES", "dpo_from_indices", "jitted", "resolve"]

_UP = {"metric": "rewards/accuracies up"}
_WPO = {"option_needs": {"wpo": ("log_sum_sq",)}}
_PAIRS: dict[str, Any] = {"data": "pairs", "reference": True, **_UP, **_WPO}
_FREE: dict[str, Any] = {"data": "pairs", **_UP, **_WPO}
_UNPAIRED: dict[str, Any] = {"data": "unpaired", "reference": True, **_UP}
_KL: dict[str, Any] = {"mismatched": True, "measure": kto.measure_kl, "summarize": kto.summarize_kl}
_ENTROPY = {"entropy_coef": ("entropy", 0.0)}
_ROLLOUT: dict[str, Any] = {"data": "rollout", "metric": "reward up"}
_GROUPED: dict[str, Any] = {
    "reference": True,
    "reference_option": "beta",
    "adds": _ENTROPY,
    **_ROLLOUT,
}

OBJECTIVES: dict[str, Objective] = {
    # supervised, and reward models
    "sft": Objective(
        supervised.sft,
        data="completions",
        formula="Σ -m a / Σ m over the global batch",
        paper="arXiv 2203.02155",
        metric="nll down",
    ),
    "csft": Objective(
        supervised.csft,
        data="pairs",
        formula="sft on both responses, each after a control token",
        paper="arXiv 2302.08582",
        metric="nll down",
    ),
    "reward": Objective(
        supervised.reward,
        data="pairs",
        formula="-log σ(r_w - r_l - margin) + center_coef (r_w + r_l)²",
        paper="arXiv 2203.02155",
        metric="accuracy up",
        needs=("scores",),
    ),
    "reward_ranked": Objective(
        supervised.reward_ranked,
        data="ranked",
        formula="-Σ_k log softmax(r_k..r_K)[k], or -log σ(r_i - r_j) over pairs, or -log "
        "softmax(r)[best]",
        paper="arXiv 2305.18290",
        metric="accuracy up",
        needs=("scores",),
    ),
    # pairs, with a reference
    "dpo": Objective(
        paired(preference.dpo),
        formula="-(1-ε) log σ(β d) - ε log σ(-β d) + sft_coef NLL(chosen)",
        paper="arXiv 2305.18290",
        adds={"sft_coef": ("sft", 0.0)},
        **_PAIRS,
    ),
    "robust": Objective(
        paired(preference.robust),
        formula="(-(1-ε) log σ(β d) + ε log σ(-β d)) / (1 - 2ε)",
        paper="arXiv 2403.00409",
        **_PAIRS,
    ),
    "ipo": Objective(
        paired(preference.ipo),
        formula="(x_w/n_w - x_l/n_l - 1/(2β))²",
        paper="arXiv 2310.12036",
        **_PAIRS,
    ),
    "hinge": Objective(
        paired(preference.hinge), formula="max(0, 1 - β d)", paper="arXiv 2309.06657", **_PAIRS
    ),
    "dpo_norm": Objective(
        paired(preference.dpo_norm),
        formula="-log σ(β (x_w/n_w - x_l/n_l))",
        paper="arXiv 2411.15124",
        **_PAIRS,
    ),
    "exo_pair": Objective(
        paired(preference.exo_pair),
        formula="σ(β d)(log σ(β d) - log(1-ε)) + σ(-β d)(log σ(-β d) - log ε)",
        paper="arXiv 2402.00856",
        **_PAIRS,
    ),
    "nca_pair": Objective(
        paired(preference.nca_pair, divergences=False),
        formula="-log σ(β x_w) - ½ log σ(-β x_w) - ½ log σ(-β x_l)",
        paper="arXiv 2402.05369",
        **_PAIRS,
    ),
    "bco_pair": Objective(
        paired(preference.bco_pair, divergences=False),
        formula="-log σ(β x_w) - log σ(-β x_l)",
        paper="arXiv 2404.04656",
        **_PAIRS,
    ),
    "sppo_hard": Objective(
        paired(preference.sppo_hard, divergences=False),
        formula="(x_w - 1/(2β))² + (x_l + 1/(2β))²",
        paper="arXiv 2405.00675",
        **_PAIRS,
    ),
    "aot": Objective(
        batchwise.aot,
        data="pairs",
        reference=True,
        formula="dpo on u = sort(P_w - P_l) - sort(R_w - R_l) over the global batch",
        paper="arXiv 2406.05882",
        measure=batchwise.measure_aot,
        summarize=batchwise.summarize_aot,
        **_UP,
    ),
    "aot_unpaired": Objective(
        batchwise.aot_unpaired,
        data="pairs",
        reference=True,
        formula="dpo on u = sort(x_w) - sort(x_l) over the global batch",
        paper="arXiv 2406.05882",
        measure=batchwise.measure_aot_unpaired,
        summarize=batchwise.summarize_aot_unpaired,
        **_UP,
    ),
    "apo_zero": Objective(
        paired(preference.apo_zero, divergences=False),
        formula="1 - σ(β x_w) + σ(β x_l)",
        paper="arXiv 2408.06266",
        **_PAIRS,
    ),
    "apo_down": Objective(
        paired(preference.apo_down, divergences=False),
        formula="σ(β x_w) + 1 - σ(β (x_w - x_l))",
        paper="arXiv 2408.06266",
        **_PAIRS,
    ),
    "discopop": Objective(
        paired(preference.discopop),
        formula="(1-g)(-log σ(z)) + g e^(-z), z = β d, g = σ(z/τ)",
        paper="arXiv 2406.08414",
        **_PAIRS,
    ),
    "dpo_sigmoid": Objective(
        paired(preference.dpo_sigmoid), formula="-σ(β d)", paper="arXiv 2404.04102", **_PAIRS
    ),
    "dpop": Objective(
        paired(preference.dpop),
        formula="-log σ(β (d - λ max(0, R_w - P_w)))",
        paper="arXiv 2402.13228",
        **_PAIRS,
    ),
    "tdpo": Objective(
        batchwise.tdpo,
        data="pairs",
        reference=True,
        formula="-log σ(β d - α β (D_l - sg(D_w))), D = Σ_t KL(π_ref||π)",
        paper="arXiv 2404.11999",
        needs=("kl",),
        **_UP,
    ),
    "beta_dpo": Objective(
        batchwise.beta_dpo,
        data="pairs",
        reference=True,
        formula="-log σ(β d), β = β₀ (1 + α (mean β₀ d - M₀)), M₀ a running mean",
        paper="arXiv 2407.08639",
        measure=batchwise.measure_gap,
        summarize=batchwise.summarize_gap,
        carry=batchwise.BETA_CARRY,
        **_UP,
    ),
    # pairs, without a reference
    "simpo": Objective(
        paired(reference_free.simpo, reference=False, divergences=False, reward="mean"),
        formula="-log σ(β (p̄_w - p̄_l - γ/β))",
        paper="arXiv 2405.14734",
        adds={"sft_coef": ("sft", 0.0)},
        **_FREE,
    ),
    "orpo": Objective(
        paired(reference_free.orpo, reference=False, divergences=False, reward="mean", scale="lam"),
        formula="sft_coef NLL(chosen) - λ log σ(log odds ratio)",
        paper="arXiv 2403.07691",
        adds={"sft_coef": ("sft", 1.0)},
        **_FREE,
    ),
    "cpo": Objective(
        paired(reference_free.cpo, reference=False, divergences=False),
        formula="-(1-ε) log σ(β (P_w - P_l)) - ε log σ(-β (P_w - P_l)) + alpha NLL(chosen)",
        paper="arXiv 2401.08417",
        adds={"alpha": ("sft", 1.0)},
        **_FREE,
    ),
    "slic": Objective(
        paired(reference_free.slic, reference=False, divergences=False),
        formula="max(0, δ - P_w + P_l) - λ P_w",
        paper="arXiv 2305.10425",
        **_FREE,
    ),
    "alphapo": Objective(
        paired(reference_free.alphapo, reference=False, divergences=False, reward="mean"),
        formula="-log σ(β (r_w - r_l - γ/β)), r = (1 - e^(-α p̄)) / α",
        paper="arXiv 2501.03884",
        adds={"sft_coef": ("sft", 0.0)},
        **_FREE,
    ),
    # unpaired feedback
    "kto": Objective(
        kto.kto,
        formula="w_D (1 - σ(β (x - z₀))), w_U (1 - σ(β (z₀ - x)))",
        paper="arXiv 2402.01306",
        **_UNPAIRED,
        **_KL,
    ),
    "kto_zero": Objective(
        kto.kto_zero,
        formula="w_D (1 - σ(β x)), w_U (1 - σ(-β x))",
        paper="arXiv 2402.01306",
        **_UNPAIRED,
    ),
    "kto_logsigmoid": Objective(
        kto.kto_logsigmoid,
        formula="-w_D log σ(β (x - z₀)), -w_U log σ(β (z₀ - x))",
        paper="arXiv 2402.01306",
        **_UNPAIRED,
        **_KL,
    ),
    "apo_zero_unpaired": Objective(
        kto.apo_zero_unpaired,
        formula="w_D (1 - σ(β x)), w_U σ(β x)",
        paper="arXiv 2408.06266",
        **_UNPAIRED,
    ),
    "bco": Objective(
        kto.bco,
        formula="-w_D log σ(β x - δ), -w_U log σ(-(β x - δ)), δ = running mean of β x",
        paper="arXiv 2404.04656",
        measure=kto.measure_rewards,
        summarize=kto.summarize_rewards,
        carry=kto.BCO_CARRY,
        **_UNPAIRED,
    ),
    "ppo_offline": Objective(
        ppo_offline.ppo_offline,
        needs=("values",),
        formula="max(-A w, -A clip(w)) + critic_coef ½ (V - target)² + kl_coef (a - b), w = e^(a "
        "- b)",
        paper="arXiv 1707.06347",
        measure=ppo_offline.measure_advantages,
        summarize=ppo_offline.summarize_advantages,
        **{**_UNPAIRED, "metric": "rewards/margins up"},
    ),  # its KL term moves all rewards together
    # policy gradients on rollouts
    "ppo": Objective(
        policy_gradient.ppo,
        needs=("values",),
        adds={"entropy_coef": ("entropy", 0.0), "ptx_coef": ("ptx", 0.0)},
        formula="max(-A w, -A clip(w, 1±c)) + vf_coef ½ max((V - ret)², (clip(V, V_old ± c_v) - "
        "ret)²)",
        paper="arXiv 1707.06347",
        rollout=targets.PPO,
        **_ROLLOUT,
    ),
    "grpo": Objective(
        policy_gradient.grpo,
        formula="-min(min(w, δ) A, clip(w, 1-ε_low, 1+ε_high) A) + β k3, summed by loss_type",
        paper="arXiv 2402.03300",
        rollout=targets.GRPO,
        **_GROUPED,
    ),
    "gspo": Objective(
        policy_gradient.gspo,
        formula="grpo with w = exp(mean_t (a - a_old)) for the whole sequence",
        paper="arXiv 2507.18071",
        rollout=targets.GRPO,
        **_GROUPED,
    ),
    "cispo": Objective(
        policy_gradient.cispo,
        formula="-sg(min(w, ε_high)) A a_t + β k3",
        paper="arXiv 2506.13585",
        rollout=targets.GRPO,
        **_GROUPED,
    ),
    "sapo": Objective(
        policy_gradient.sapo,
        formula="-(4/τ) σ(τ (w - 1)) A + β k3",
        paper="arXiv 2511.20347",
        rollout=targets.GRPO,
        **_GROUPED,
    ),
    "rloo": Objective(
        policy_gradient.rloo,
        formula="-min(w A, clip(w, 1-ε_low, 1+ε_high) A), w of the whole sequence",
        paper="arXiv 2402.14740",
        adds=_ENTROPY,
        rollout=targets.RLOO,
        **_ROLLOUT,
    ),
    "reinforce": Objective(
        policy_gradient.reinforce,
        formula="-A a_t, A with the batch's mean as baseline",
        paper="Williams 1992",
        adds=_ENTROPY,
        rollout=targets.REINFORCE,
        **_ROLLOUT,
    ),
    "reinforce_pp": Objective(
        policy_gradient.reinforce_pp,
        formula="-min(w A, clip(w, 1-ε_low, 1+ε_high) A), A normalized globally",
        paper="arXiv 2501.03262",
        adds=_ENTROPY,
        rollout=targets.REINFORCE_PP,
        **_ROLLOUT,
    ),
    "entropy": Objective(
        policy_gradient.entropy,
        formula="-H, mean over tokens; the term that entropy_coef adds",
        paper="arXiv 1602.01783",
        needs=("entropy",),
        data="rollout",
        metric="entropy up",
    ),
    "ptx": Objective(
        policy_gradient.ptx,
        formula="NLL of the groups whose label is false; the term that ptx_coef adds",
        paper="arXiv 2203.02155",
        data="rollout",
        metric="ptx_nll down",
    ),
}


def resolve(
    name: str, options: Mapping[str, Any] | None = None, weights: Sequence[float] | None = None
) -> tuple[Term, ...]:
    """Turn "dpo+bco_pair+sft" with options and weights into terms; see ``objective.resolve``."""
    return objective.resolve(OBJECTIVES, name, options, weights)


def options(name: str, weights: Sequence[float] = (), **values: Any) -> dict[str, Any]:
    """Return the ``objective`` section of a config: the name, and every option at its default or
    the value given.

    >>> options("ipo", beta=0.2)["beta"]
    0.2

    Raises:
        KeyError, ValueError: as ``resolve``.
    """
    terms = resolve(name, values, weights or None)
    known = {
        option: default
        for part in name.split("+")
        for option, default in OBJECTIVES[part.strip()].options.items()
    }
    known |= {option: value for term in terms for option, value in term.options.items()}
    return {"name": name, "weights": tuple(weights), **known, **values}


def jitted(
    name: str, weights: Sequence[float] | None = None, **options: Any
) -> Callable[..., Evaluated]:
    """Compile an objective (or a weighted sum) into a function of plain arrays.

    Args:
        name: "dpo", or "dpo+sft".
        weights: one for each objective named.
        options: the objectives' options.

    Returns:
        A function of log-probabilities, sums [B] or tokens [B, T], to
        ``Evaluated(losses, rewards, weights, loss, metrics)``.  Positional arguments, by kind of
        data: pairs (policy_chosen, policy_rejected, reference_chosen, reference_rejected), or one
        stacked [B, 2]; unpaired (policy, label, reference), and by name ``mismatched_policy`` and
        ``mismatched_reference`` for KTO; completions (policy); ranked and reward models (scores [B,
        R]).  By name: ``mask`` or ``lengths``, ``weight``, ``margin``, ``label``, ``kl``, ...

    >>> import jax.numpy as jnp
    >>> dpo = jitted("dpo", beta=0.1)
    >>> found = dpo(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]), jnp.array([-11.0]))
    >>> [round(x, 4) for x in found.losses.tolist()], [round(x, 4) for x in found.rewards[0].tolist()]
    ([0.5981], [0.1, -0.1])
    """
    return arrays.compile_terms(resolve(name, options, weights))

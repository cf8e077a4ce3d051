# SPDX-License-Identifier: Apache-2.0
"""The table of objectives.  To add one: write its function, add a row here; the tests loop over the
table.

A paired loss is a function of a ``Pair`` and becomes a row by ``paired``; any other is a class of
frozen values with the methods of ``objective.Loss``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align_jax.core import own
from align_jax.losses import (
    arrays,
    batchwise,
    contests,
    covariance,
    distillation,
    guided,
    kto,
    objective,
    pointwise,
    policy_gradient,
    ppo,
    ppo_offline,
    preference,
    rankings,
    reference_free,
    sequence_gradient,
    supervised,
    targets,
)
from align_jax.losses.arrays import Evaluated, dpo_from_indices
from align_jax.losses.objective import Inputs, Objective, Term
from align_jax.losses.options import Option
from align_jax.losses.pairs import Paired, ReferencePaired, paired
from align_jax.losses.reduction import (
    batch_statistics,
    first_running,
    needs_statistics,
    own_statistics,
    reduce_statistics,
    total,
    weights,
)

__all__ = [
    "OBJECTIVES",
    "Inputs",
    "batch_statistics",
    "describe_options",
    "dpo_from_indices",
    "find",
    "first_running",
    "jitted",
    "needs_statistics",
    "options",
    "own_statistics",
    "reduce_statistics",
    "resolve",
    "total",
    "weights",
]

_pairs = functools.partial(Objective, data="pairs", metric="rewards/accuracies up")
_unpaired = functools.partial(Objective, data="unpaired", metric="rewards/accuracies up")
_rollout = functools.partial(Objective, data="rollout", metric="reward up")
_SFT = {"sft_coef": ("sft", 0.0)}
_ENTROPY = {"entropy_coef": ("entropy", 0.0)}

OBJECTIVES: dict[str, Objective] = {
    # supervised, and reward models
    "sft": Objective(
        supervised.Sft,
        "Σ -m a / Σ m over the global batch",
        "arXiv 2203.02155",
        "first of all, on answers that are to be imitated",
        data="completions",
        metric="nll down",
    ),
    "gkd": Objective(
        distillation.Gkd,
        "β KL(q||m) + (1-β) KL(p||m), m = β q + (1-β) p; β = 0: KL(q||p), β = 1: KL(p||q)",
        "arXiv 2306.13649",
        "a larger teacher of the same tokenizer, whose whole distributions are to be learned",
        data="completions",
        metric="divergence down",
        adds=_SFT,
    ),
    "minillm": Objective(
        distillation.MiniLlm,
        "KL_t(p||q) - min(w A, clip(w, 1±ε) A), A_t = A + mean_{s>t} log(q/p)(y_s)",
        "arXiv 2306.08543",
        "a teacher of own samples, whose best answers are to be kept rather than all of them",
        data="rollout",
        metric="reward up",  # reverse_kl down where there are no rewards
        adds={"entropy_coef": ("entropy", 0.0), "ptx_coef": ("ptx", 0.0)},
        rollout=targets.GrpoRollout,
    ),
    "csft": Objective(
        supervised.Csft,
        "sft on both responses, each after a control token",
        "arXiv 2302.08582",
        "pairs, without a reference or a second model: a control token says which kind to write",
        data="pairs",
        metric="nll down",
    ),
    "reward": Objective(
        supervised.Reward,
        "-log σ(r_w - r_l - margin) + center_coef (r_w + r_l)²",
        "arXiv 2203.02155",
        "a reward model of pairs, for rollouts, labels or best-of-n",
        data="pairs",
        metric="accuracy up",
    ),
    "reward_ranked": Objective(
        supervised.RewardRanked,
        "-Σ_k log softmax(r_k..r_K)[k], or -log σ(r_i - r_j) over pairs, or -log softmax(r)[best]",
        "arXiv 2305.18290",
        "a reward model of rankings of more than two answers",
        data="ranked",
        metric="accuracy up",
    ),
    "reward_regression": Objective(
        pointwise.RewardRegression,
        "(r - s)², s the data's score",
        "arXiv 2406.08673",
        "a reward model of answers with ratings on a scale",
        data="scored",
        metric="absolute_error down",
    ),
    "reward_classification": Objective(
        pointwise.RewardClassification,
        "-w log σ(r) of desirable responses, -log σ(-r) of undesirable ones",
        "arXiv 2110.14168",
        "a reward model of thumbs up and down, or of right and wrong",
        data="unpaired",
        metric="accuracy up",
    ),
    "reward_process": Objective(
        pointwise.RewardProcess,
        "-w y log σ(r_t) - (1-y) log σ(-r_t), mean over the ends t of steps",
        "arXiv 2305.20050",
        "a reward model of reasoning whose single steps are labeled",
        data="stepwise",
        metric="accuracy up",
    ),
    # pairs, with a reference
    "dpo": _pairs(
        paired(preference.dpo),
        "-(1-ε) log σ(β d) - ε log σ(-β d) + sft_coef NLL(chosen)",
        "arXiv 2305.18290",
        "pairs, and no reason for another: the usual first choice",
        adds=_SFT,
    ),
    "robust": _pairs(
        paired(preference.robust),
        "(-(1-ε) log σ(β d) + ε log σ(-β d)) / (1 - 2ε)",
        "arXiv 2403.00409",
        "pairs of which a known share is labeled the wrong way round",
    ),
    "ipo": _pairs(
        paired(preference.ipo),
        "(x_w/n_w - x_l/n_l - 1/(2β))²",
        "arXiv 2310.12036",
        "pairs that are always ordered alike, on which dpo drives log-ratios on without end",
    ),
    "hinge": _pairs(
        paired(preference.hinge),
        "max(0, 1 - β d)",
        "arXiv 2309.06657",
        "pairs, where those that are far enough apart are to be left alone",
    ),
    "dpo_norm": _pairs(
        paired(preference.dpo_norm),
        "-log σ(β (x_w/n_w - x_l/n_l))",
        "arXiv 2411.15124",
        "pairs whose chosen answers are the longer ones, and that is not to be learned",
    ),
    "exo_pair": _pairs(
        paired(preference.exo_pair),
        "σ(β d)(log σ(β d) - log(1-ε)) + σ(-β d)(log σ(-β d) - log ε)",
        "arXiv 2402.00856",
        "pairs, with a reverse KL to the preferences: fewer modes are kept than by dpo",
    ),
    "nca_pair": _pairs(
        paired(preference.nca_pair, ReferencePaired),
        "-log σ(β x_w) - ½ log σ(-β x_w) - ½ log σ(-β x_l)",
        "arXiv 2402.05369",
        "pairs, where dpo makes the chosen answers less likely too",
    ),
    "bco_pair": _pairs(
        paired(preference.bco_pair, ReferencePaired),
        "-log σ(β x_w) - log σ(-β x_l)",
        "arXiv 2404.04656",
        "pairs as thumbs up and down of each answer, when the two need not compete",
    ),
    "sppo_hard": _pairs(
        paired(preference.sppo_hard, ReferencePaired),
        "(x_w - 1/(2β))² + (x_l + 1/(2β))²",
        "arXiv 2405.00675",
        "rounds of self-play: pairs of the policy's own samples, ordered by a judge",
    ),
    "aot": _pairs(
        batchwise.Aot,
        "dpo on u = sort(P_w - P_l) - sort(R_w - R_l) over the global batch",
        "arXiv 2406.05882",
        "many pairs, of which the whole set, not each one, is to be better than the reference's",
    ),
    "aot_unpaired": _pairs(
        batchwise.AotUnpaired,
        "dpo on u = sort(x_w) - sort(x_l) over the global batch",
        "arXiv 2406.05882",
        "chosen and rejected answers that do not belong to the same prompts",
    ),
    "apo_zero": _pairs(
        paired(preference.apo_zero, ReferencePaired),
        "1 - σ(β x_w) + σ(β x_l)",
        "arXiv 2408.06266",
        "pairs whose chosen answers are better than what the policy writes",
    ),
    "apo_down": _pairs(
        paired(preference.apo_down, ReferencePaired),
        "σ(β x_w) + 1 - σ(β (x_w - x_l))",
        "arXiv 2408.06266",
        "pairs whose chosen answers are worse than what the policy writes already",
    ),
    "discopop": _pairs(
        paired(preference.discopop),
        "(1-g)(-log σ(z)) + g e^(-z), z = β d, g = σ(z/τ)",
        "arXiv 2406.08414",
        "pairs, for a loss that was searched by a program; not convex, so with care",
    ),
    "dpo_sigmoid": _pairs(
        paired(preference.dpo_sigmoid),
        "-σ(β d)",
        "arXiv 2404.04102",
        "pairs with wrong labels: a bounded loss, which outliers do not rule",
    ),
    "dpop": _pairs(
        paired(preference.dpop),
        "-log σ(β (d - λ max(0, R_w - P_w)))",
        "arXiv 2402.13228",
        "pairs that differ in few tokens, of which dpo makes the chosen one less likely",
    ),
    "dpo_shift": _pairs(
        paired(preference.dpo_shift, ReferencePaired),
        "-log σ(β x_w - f(λ) β x_l)",
        "arXiv 2502.07599",
        "pairs, to trade how far the chosen answer rises against the margin",
    ),
    "rpo": _pairs(
        paired(preference.rpo, wants_margin=True),
        "KL of σ(β d) from σ(η margin), or (β d - η margin)²",
        "arXiv 2502.00203",
        "pairs with ratings: the margin is learned, not only its sign",
    ),
    "tdpo": _pairs(
        batchwise.Tdpo,
        "-log σ(β d - α β (D_l - sg(D_w))), D = Σ_t KL(π_ref||π)",
        "arXiv 2404.11999",
        "pairs, when the policy drifts too far token by token",
    ),
    "tgdpo": _pairs(
        guided.Tgdpo,
        "-log σ(Σ_t β (1 + α r_t) x_w,t - Σ_t β (1 - α r_t) x_l,t), r_t = β log(π_guide/π_ref)",
        "arXiv 2506.14574",
        "pairs, and a policy that was trained on preferences before: its tokens' rewards guide",
    ),
    "beta_dpo": _pairs(
        batchwise.BetaDpo,
        "-log σ(β d), β = β₀ (1 + α (mean β₀ d - M₀)), M₀ a running mean",
        "arXiv 2407.08639",
        "pairs of mixed quality: β follows how far apart the batch's are",
    ),
    # pairs, without a reference
    "simpo": _pairs(
        paired(reference_free.simpo, Paired, per_token=True),
        "-log σ(β (p̄_w - p̄_l - γ/β))",
        "arXiv 2405.14734",
        "pairs, at half the memory: no reference; sensitive to the learning rate",
        adds=_SFT,
    ),
    "orpo": _pairs(
        paired(reference_free.orpo, Paired, per_token=True, scale="lam"),
        "sft_coef NLL(chosen) - λ log σ(log odds ratio)",
        "arXiv 2403.07691",
        "pairs, in place of sft and dpo at once: no reference, from a base model",
        adds={"sft_coef": ("sft", 1.0)},
    ),
    "cpo": _pairs(
        paired(reference_free.cpo, Paired),
        "-(1-ε) log σ(β (P_w - P_l)) - ε log σ(-β (P_w - P_l)) + alpha NLL(chosen)",
        "arXiv 2401.08417",
        "pairs, at half the memory, of tasks with good references such as translation",
        adds={"alpha": ("sft", 1.0)},
    ),
    "slic": _pairs(
        paired(reference_free.slic, Paired),
        "max(0, δ - P_w + P_l) - λ P_w",
        "arXiv 2305.10425",
        "pairs, without a reference, with a margin after which nothing is learned",
    ),
    "alphapo": _pairs(
        paired(reference_free.alphapo, Paired, per_token=True),
        "-log σ(β (r_w - r_l - γ/β)), r = (1 - e^(-α p̄)) / α",
        "arXiv 2501.03884",
        "as simpo, when its answers become too long or too short: α shapes the reward",
        adds=_SFT,
    ),
    "simper": _pairs(
        paired(reference_free.simper, Paired, per_token=True),
        "-e^p̄_w + e^p̄_l",
        "arXiv 2502.00883",
        "as simpo, without anything to tune",
    ),
    # rankings
    "tpo": Objective(
        rankings.Tpo,
        "-log σ(β (p̄_w - p̄_l) - γ) - α p̄_gold of (gold, chosen, rejected)",
        "arXiv 2405.16681",
        "a gold answer beside each pair, to imitate and to compare in one run",
        data="ranked",
        metric="rewards/accuracies up",
    ),
    "adpo": Objective(
        rankings.Adpo,
        "-Σ_i q_i log softmax(β x)_i, q on the best response or softmax(scores)",
        "arXiv 2510.18913",
        "rankings, or scores whose whole distribution is to be matched, with a reference",
        data="ranked",
        metric="rewards/accuracies up",
    ),
    # unpaired feedback
    "kto": _unpaired(
        kto.Kto,
        "w_D (1 - σ(β (x - z₀))), w_U (1 - σ(β (z₀ - x)))",
        "arXiv 2402.01306",
        "thumbs up and down, also far more of one than of the other",
    ),
    "kto_zero": _unpaired(
        kto.KtoZero,
        "w_D (1 - σ(β x)), w_U (1 - σ(-β x))",
        "arXiv 2402.01306",
        "as kto, at less cost: no mismatched answers are run",
    ),
    "kto_logsigmoid": _unpaired(
        kto.KtoLogsigmoid,
        "-w_D log σ(β (x - z₀)), -w_U log σ(β (z₀ - x))",
        "arXiv 2402.01306",
        "as kto, when its bounded value learns too little from what is far off",
    ),
    "apo_zero_unpaired": _unpaired(
        kto.KtoZero,
        "w_D (1 - σ(β x)), w_U σ(β x)",
        "arXiv 2408.06266",
        "as kto_zero; the name that TRL has",
    ),
    "bco": _unpaired(
        kto.Bco,
        "-w_D log σ(β x - δ), -w_U log σ(-(β x - δ)), δ = running mean of β x",
        "arXiv 2404.04656",
        "thumbs up and down, also of prompts of two kinds (density_ratio)",
    ),
    # its KL term moves all rewards together, so the accuracies say little
    "ppo_offline": _unpaired(
        ppo_offline.PpoOffline,
        "max(-A w, -A clip(w)) + critic_coef ½ (V - target)² + kl_coef (a - b), w = e^(a - b)",
        "arXiv 1707.06347",
        "thumbs up and down or scores of fixed answers, with a value head, as HALOs' PPO",
        metric="rewards/margins up",
    ),
    # policy gradients on rollouts
    "ppo": _rollout(
        ppo.Ppo,
        "max(-A w, -A clip(w, 1±c)) + vf_coef ½ max((V - ret)², (clip(V, V_old ± c_v) - ret)²)",
        "arXiv 1707.06347",
        "a reward model, and memory for a critic: rewards token by token, long answers",
        adds={"entropy_coef": ("entropy", 0.0), "ptx_coef": ("ptx", 0.0)},
        rollout=targets.PpoRollout,
    ),
    "grpo": _rollout(
        policy_gradient.Grpo,
        "-min(min(w, δ) A, clip(w, 1-ε_low, 1+ε_high) A) + β k3, summed by loss_type",
        "arXiv 2402.03300",
        "rewards that can be checked, or a reward model, without a critic: the usual first choice",
        adds=_ENTROPY,
        rollout=targets.GrpoRollout,
    ),
    "gspo": _rollout(
        policy_gradient.Gspo,
        "grpo with w = exp(mean_t (a - a_old)) for the whole sequence",
        "arXiv 2507.18071",
        "as grpo, of mixtures of experts and long answers, where ratios of tokens are noisy",
        adds=_ENTROPY,
        rollout=targets.GrpoRollout,
    ),
    "cispo": _rollout(
        policy_gradient.Cispo,
        "-sg(min(w, ε_high)) A a_t + β k3",
        "arXiv 2506.13585",
        "as grpo, when clipping silences the rare tokens that matter",
        adds=_ENTROPY,
        rollout=targets.GrpoRollout,
    ),
    "sapo": _rollout(
        policy_gradient.Sapo,
        "-(4/τ) σ(τ (w - 1)) A + β k3",
        "arXiv 2511.20347",
        "as grpo, with ratios that are damped rather than clipped",
        adds=_ENTROPY,
        rollout=targets.GrpoRollout,
    ),
    "vespo": _rollout(
        sequence_gradient.Vespo,
        "-sg(φ(W)) A a_t + β k3, φ(W) = W^k e^(λ (1 - W)), W of the whole sequence",
        "arXiv 2602.10693",
        "as grpo, with samples that are several steps old",
        adds=_ENTROPY,
        rollout=targets.GrpoRollout,
    ),
    "gmpo": _rollout(
        sequence_gradient.Gmpo,
        "-A exp(mean_t l_t) + β k3, l_t = log w_t clipped to ±ε on the side of A",
        "arXiv 2507.20673",
        "as grpo, when single tokens of large ratio upset the training",
        adds=_ENTROPY,
        rollout=targets.GrpoRollout,
    ),
    "clip_cov": _rollout(
        covariance.ClipCov,
        "grpo over all tokens, without a few of large Cov = (a - mean a) (A - mean A)",
        "arXiv 2505.22617",
        "as grpo, when the entropy collapses: the tokens that cause it are left out",
        adds=_ENTROPY,
        rollout=targets.GrpoRollout,
    ),
    "kl_cov": _rollout(
        covariance.KlCov,
        "-A w, + cov_coef |log w| where Cov = (a - mean a) (A - mean A) is greatest",
        "arXiv 2505.22617",
        "as grpo, when the entropy collapses: the tokens that cause it are held by a KL",
        adds=_ENTROPY,
        rollout=targets.GrpoRollout,
    ),
    "rloo": _rollout(
        policy_gradient.Rloo,
        "-min(w A, clip(w, 1-ε_low, 1+ε_high) A), w of the whole sequence",
        "arXiv 2402.14740",
        "a reward model and a KL in the reward, without a critic",
        adds=_ENTROPY,
        rollout=targets.RlooRollout,
    ),
    "reinforce": _rollout(
        policy_gradient.Reinforce,
        "-A a_t, A with the batch's mean as baseline",
        "Williams 1992",
        "the plainest policy gradient, to compare with; one sample a prompt will do",
        adds=_ENTROPY,
        rollout=targets.ReinforceRollout,
    ),
    "reinforce_pp": _rollout(
        policy_gradient.ReinforcePp,
        "-min(w A, clip(w, 1-ε_low, 1+ε_high) A), A normalized globally",
        "arXiv 2501.03262",
        "as rloo with few samples a prompt: normalized over the batch, not the group",
        adds=_ENTROPY,
        rollout=targets.ReinforcePpRollout,
    ),
    # each sample against another player's
    "xpo": _rollout(
        contests.Xpo,
        "-log σ(β d) + α P_ref, d of a sample of the policy and one of the reference",
        "arXiv 2405.21046",
        "online pairs by a judge, when the policy's samples are too alike: it explores",
    ),
    "nash_md": _rollout(
        contests.NashMd,
        "-(p - ½) P + β Σ_t sg(a - b) a, p = σ(score - score of a sample of the mixture)",
        "arXiv 2312.00886",
        "a judge whose preferences go in circles, so that no reward can stand for them",
    ),
    "entropy": Objective(
        ppo.Entropy,
        "-H, mean over tokens; the term that entropy_coef adds",
        "arXiv 1602.01783",
        "a term of a sum: it keeps samples apart; entropy_coef adds it",
        data="rollout",
        metric="entropy up",
    ),
    "ptx": Objective(
        ppo.Ptx,
        "NLL of the text beside the rollout; the term that ptx_coef adds",
        "arXiv 2203.02155",
        "a term of a sum: what the model knew of other text is kept; ptx_coef adds it",
        data="rollout",
        metric="ptx_nll down",
    ),
}


@functools.cache
def _of_function(function: Callable[..., Any]) -> Objective:
    """Make a row of a user's function of a ``Pair``, as those of ``preference`` are."""
    return _pairs(paired(function), formula="", paper="", use="")


def find(name: str) -> Objective:
    """Return an objective by name: the table's, or the user's own, ``module:name``.

    The user's is an ``Objective``, or a function of a ``Pair``.

    Raises:
        ValueError: an unknown name; something else than an objective.
    """
    return own.row(OBJECTIVES, name, "objective", _of_function)


def resolve(
    name: str, options: Mapping[str, Any] | None = None, weights: Sequence[float] | None = None
) -> tuple[Term, ...]:
    """Turn "dpo+bco_pair+sft" with options and weights into terms; see ``objective.resolve``."""
    return objective.resolve(find, name, options, weights)


def options(name: str, weights: Sequence[float] = (), **values: Any) -> dict[str, Any]:
    """Return the ``objective`` section of a config: the name, and every option at its default or
    the value given.

    >>> options("ipo", beta=0.2)["beta"]
    0.2

    Raises:
        ValueError: as ``resolve``.
    """
    terms = resolve(name, values, weights or None)
    known = {
        option: default
        for part in name.split("+")
        for option, default in find(part.strip()).options.items()
    }
    for term in terms:
        known |= term.loss.values()
    return {"name": name, "weights": tuple(weights), **known, **values}


def describe_options(name: str) -> dict[str, Option]:
    """Return what is known of each option that an objective, or a sum, accepts.

    The options of the terms that it may add (``sft`` by ``sft_coef``) are among them.

    >>> describe_options("dpo")["beta"].range
    'above 0'

    Raises:
        ValueError: an unknown objective.
    """
    return objective.accepted(find, name)


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
        ``mismatched_reference`` for KTO; completions (policy); stepwise (scores at the ends of
        steps, step_labels, both [B, T]); ranked and reward models (scores [B, R], or [B]).  By
        name: ``mask`` or ``lengths``, ``weight``, ``margin``, ``label``, ``kl``, ...

    >>> import jax.numpy as jnp
    >>> dpo = jitted("dpo", beta=0.1)
    >>> found = dpo(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-11.0]), jnp.array([-11.0]))
    >>> round(found.losses.item(), 4), [round(x, 4) for x in found.rewards[0].tolist()]
    (0.5981, [0.1, -0.1])
    """
    return arrays.compile_terms(resolve(name, options, weights))

# SPDX-License-Identifier: Apache-2.0
"""Objectives that TRL lacks, against float64 NumPy written from the papers; gradients by central
differences.

Each function takes a dict of float64 arrays (pairs: [B, 2, T], chosen first; else [B, T] or [B, R,
T]; mask alike) and returns the scalar loss.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses
from align_jax.losses import arrays, batchwise, kto, supervised

B, T = 4, 5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sums(a, name="policy"):
    return (a[name] * a["mask"]).sum(-1)


def x_of(a):
    """log π(y|x) - log π_ref(y|x), summed over the response."""
    return sums(a) - sums(a, "reference")


def d_of(a):
    x = x_of(a)
    return x[:, 0] - x[:, 1]


def csft(a):
    """Korbak et al. 2302.08582, section 2: maximum likelihood on tagged text of both kinds."""
    return -sums(a).sum() / a["mask"].sum()


def plackett_luce(a):
    """Rafailov et al. 2305.18290, equation 18: Π_k exp(r_k) / Σ_{j ≥ k} exp(r_j)."""
    r = a["policy"]
    return -np.mean(
        [sum(row[k] - np.log(np.exp(row[k:]).sum()) for k in range(len(row))) for row in r]
    )


def all_pairs(a):
    """Ouyang et al. 2203.02155, equation 1: 1 / (K choose 2) Σ -log σ(r_w - r_l)."""
    r, size = a["policy"], a["policy"].shape[1]
    return np.mean(
        [
            [-log_sigmoid(row[i] - row[j]) for i in range(size) for j in range(i + 1, size)]
            for row in r
        ]
    )


def best_of(a):
    """Ziegler et al. 1909.08593, equation 1: log of exp(r_b) / Σ_i exp(r_i)."""
    r = a["policy"]
    return -np.mean(np.log(np.exp(r[:, 0]) / np.exp(r).sum(1)))


def dpo_sigmoid(a):
    """The symmetric loss of Liang et al. 2404.04102: -σ(β d)."""
    return np.mean(-sigmoid(0.1 * d_of(a)))


def dpop(a):
    """Pal et al. 2402.13228, the DPOP loss, λ = 50."""
    penalty = np.maximum(0, sums(a, "reference")[:, 0] - sums(a)[:, 0])
    return np.mean(-log_sigmoid(0.1 * (d_of(a) - 50 * penalty)))


def tdpo(alpha):
    def loss(a):
        """Zeng et al. 2404.11999: u - α δ, δ of the sequential forward KLs."""
        kl = sums(a, "kl")
        return np.mean(-log_sigmoid(0.1 * d_of(a) - alpha * 0.1 * (kl[:, 1] - kl[:, 0])))

    return loss


def tgdpo(alpha):
    def loss(a):
        """Zhu et al. 2506.14574, section 4; the released code's line: logsigmoid((β (1 + α β r_w)
        x_w).sum - (β (1 - α β r_l) x_l).sum), r = log π_guide - log π_ref of each token."""
        x, r = (a[name] - a["reference"] for name in ("policy", "guide_token_logps"))
        chosen = (0.1 * (1 + alpha * 0.1 * r) * x * a["mask"])[:, 0].sum(-1)
        rejected = (0.1 * (1 - alpha * 0.1 * r) * x * a["mask"])[:, 1].sum(-1)
        return np.mean(-log_sigmoid(chosen - rejected))

    return loss


def beta_dpo(a):
    """Wu et al. 2407.08639: at the first batch M₀ is its own mean, so β is β₀."""
    return np.mean(-log_sigmoid(0.1 * d_of(a)))


def odpo(a):
    """Amini et al. 2402.10571: -log σ(Δ - offset)."""
    return np.mean(-log_sigmoid(0.1 * d_of(a) - a["margin"]))


def ipo_sum(a):
    """Azar et al. 2310.12036, equation 17: (h - τ⁻¹/2)², sums over the response."""
    return np.mean((d_of(a) - 1 / (2 * 0.1)) ** 2)


def reference_free(a):
    """DPO with a uniform reference, which cancels."""
    total = sums(a)
    return np.mean(-log_sigmoid(0.1 * (total[:, 0] - total[:, 1])))


def weighted(a):
    """DPO on pairs that weigh differently: one weighted mean."""
    return np.average(-log_sigmoid(0.1 * d_of(a)), weights=a["weight"])


def slic(a):
    """Zhao et al. 2305.10425, SLiC-HF: max(0, δ - log P(y+) + log P(y-)) - λ log P(y_ref)."""
    total = sums(a)
    return np.mean(np.maximum(0, 1.0 - total[:, 0] + total[:, 1]) - 0.1 * total[:, 0])


def per_sequence(a):
    """RPO as Pang et al. 2404.19733 have it: DPO + α NLL / |y|, a mean over sequences."""
    nll = -sums(a)[:, 0] / a["mask"][:, 0].sum(-1)
    return np.mean(-log_sigmoid(0.1 * d_of(a))) + 0.7 * np.mean(nll)


def humanline(a):
    """Liu et al. 2509.24207: token log-ratios clamped to [-1.0, 1.5], then DPO."""
    x = (np.clip(a["policy"] - a["reference"], -1.0, 1.5) * a["mask"]).sum(-1)
    return np.mean(-log_sigmoid(0.1 * (x[:, 0] - x[:, 1])))


def dpo_shift(a):
    """Yang et al. 2502.07599: -log σ(β x_w - f(λ) β x_l)."""
    x = x_of(a)
    return np.mean(-log_sigmoid(0.1 * x[:, 0] - 0.95 * 0.1 * x[:, 1]))


def rpo(form):
    def loss(a):
        """Sun et al. 2502.00203: KL of two Bernoulli distributions, or a squared distance."""
        z, g = 0.1 * d_of(a), 0.5 * a["margin"]
        if form == "square":
            return np.mean((z - g) ** 2)
        p, q = (sigmoid(z), sigmoid(g)) if form == "forward_kl" else (sigmoid(g), sigmoid(z))
        return np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))

    return loss


def simper(a):
    """Xiao et al. 2502.00883: inverse perplexities."""
    means = sums(a) / a["mask"].sum(-1)
    return np.mean(np.exp(means[:, 1]) - np.exp(means[:, 0]))


def tpo(form, beta=2.0, smoothing=0.0):
    def loss(a):
        """Saeidi et al. 2405.16681: a preference term, and the gold response's likelihood."""
        x = sums(a) / a["mask"].sum(-1) if form in ("mean", "ipo") else sums(a)
        d = x[:, 1] - x[:, 2]
        z = beta * d - (0.5 if form == "mean" else 0.0)
        terms = {
            "hinge": np.maximum(0, 1 - z),  # Zhao et al. 2305.10425
            "ipo": (d - 1 / (2 * beta)) ** 2,  # Azar et al. 2310.12036, equation 17
        }
        logistic = -(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z)
        return np.mean(terms.get(form, logistic) - x[:, 0])

    return loss


def adpo(soft):
    def loss(a):
        """Wang 2510.18913: cross entropy of a target over the list of anchored scores."""
        u = 0.1 * x_of(a)
        log_p = u - np.log(np.exp(u).sum(1, keepdims=True))
        q = np.exp(a["scores"]) if soft else np.eye(3)[[0] * B]
        return -np.mean((q / q.sum(1, keepdims=True) * log_p).sum(1))

    return loss


def by_label(a, desirable, undesirable):
    return np.mean(np.where(a["label"], desirable, undesirable))


def z0(a):
    """Ethayarajh et al. 2402.01306, section 4.1: max(0, mean over mismatched pairs)."""
    return max(0.0, np.mean(a["mismatched_policy"] - a["mismatched_reference"]))


def kto_logsigmoid(a):
    """The loss of 2402.01306, equation 8, with a logistic value in place of the sigmoid."""
    z = 0.1 * (x_of(a) - z0(a))
    return by_label(a, -1.3 * log_sigmoid(z), -0.7 * log_sigmoid(-z))


def kto_zero(a):
    """2402.01306, equation 8, with z₀ = 0."""
    z = 0.1 * x_of(a)
    return by_label(a, 1 - sigmoid(z), 1 - sigmoid(-z))


def bco(a, delta=None):
    """Jung et al. 2404.04656: -log σ(r - δ) and -log σ(-(r - δ)); δ is held, as the gradient
    does."""
    z = 0.1 * x_of(a) - a["delta"]
    return by_label(a, -log_sigmoid(z), -log_sigmoid(-z))


def regression(a):
    """Squared error: transformers' MSELoss of one label."""
    return np.mean((a["policy"] - a["scores"][:, 0]) ** 2)


def classification(weight):
    """Binary cross-entropy, arXiv 2110.14168 section 4.2; torch's ``pos_weight``."""

    def loss(a):
        r, y = a["policy"], a["label"]
        return np.mean(np.where(y, -weight * log_sigmoid(r), -log_sigmoid(-r)))

    return loss


def process(a, last=False, weight=1.0):
    """Cross-entropy at the ends of steps: arXiv 2312.08935, equation 2."""
    mask = a["mask"] > 0
    if last:
        mask = mask & (np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    y, r = a["step_labels"], a["policy"]
    each = -weight * y * log_sigmoid(r) - (1 - y) * log_sigmoid(-r)
    return each[mask].mean()


def gae_loop(rewards, values, gamma, lam):
    """Schulman et al. 1506.02438, equation 16, token by token."""
    advantage, found = 0.0, np.zeros(len(rewards))
    for t in reversed(range(len(rewards))):
        following = values[t + 1] if t + 1 < len(rewards) else 0.0
        advantage = rewards[t] + gamma * following - values[t] + gamma * lam * advantage
        found[t] = advantage
    return found


def ppo_offline(clip=(0.5, 1.5), kl_sign=1, target="discounted", whiten=True):
    def loss(a):
        """Schulman et al. 1707.06347, equation 7, with the reference as behavior policy; HALOs
        4831988."""
        gamma, lam, parts = 0.99, 0.95, []
        advantages, targets = [], []
        for i, mask in enumerate(a["mask"].astype(bool)):
            size = mask.sum()
            rewards = np.zeros(size)
            rewards[-1] = 1.0 if a["label"][i] else -1.0
            held = a["held_values"][i][mask]  # no gradient through the advantages and the targets
            advantages.append(gae_loop(rewards, held, gamma, lam))
            togo = rewards[-1] * gamma ** np.arange(size)[::-1]
            targets.append(togo if target == "discounted" else advantages[-1] + held)
        flat = np.concatenate(advantages)
        if whiten:
            flat = (flat - flat.mean()) / np.sqrt(flat.var() + 1e-8)
        mask = a["mask"].astype(bool)
        ratio = a["policy"][mask] - a["reference"][mask]
        w = np.exp(ratio)
        parts = (
            np.maximum(-flat * w, -flat * np.clip(w, *clip))
            + 0.01 * 0.5 * (a["values"][mask] - np.concatenate(targets)) ** 2
            + 0.1 * kl_sign * ratio
        )
        return parts.mean()

    return loss


def ppo(a):
    """1707.06347, equations 7 and 9, with the value clipped about the old one; entropy bonus 0."""
    mask = a["mask"].astype(bool)
    policy, old, advantage, values, old_values, returns = (
        a[key][mask]
        for key in ("policy", "old_token_logps", "advantages", "values", "old_values", "returns")
    )
    w = np.exp(policy - old)
    near = old_values + np.clip(values - old_values, -0.2, 0.2)
    return np.mean(
        np.maximum(-advantage * w, -advantage * np.clip(w, 0.8, 1.2))
        + 0.1 * 0.5 * np.maximum((values - returns) ** 2, (near - returns) ** 2)
    )


def dual_clip(a):
    """Ye et al. 1912.09729, equation 2: where A < 0 the objective is at least c A, c = 1.1."""
    mask, held = a["mask"].astype(bool), {**a, "values": a["returns"], "old_values": a["returns"]}
    policy, old, advantage = (a[key][mask] for key in ("policy", "old_token_logps", "advantages"))
    w = np.exp(policy - old)
    objective = np.minimum(w * advantage, np.clip(w, 0.8, 1.2) * advantage)
    objective = np.where(advantage < 0, np.maximum(objective, 1.1 * advantage), objective)
    return np.mean(-objective) + ppo(a) - ppo(held)


def gspo_token(a):
    """Zheng et al. 2507.18071, section 4.3: s_t = sg(s) π / sg(π), clipped with A_t, a mean over
    tokens."""
    size = a["mask"].sum(-1, keepdims=True)
    gap = (a["held_policy"] - a["old_token_logps"]) * a["mask"]
    s = np.exp(gap.sum(-1, keepdims=True) / size + a["policy"] - a["held_policy"])
    losses = -np.minimum(s * a["advantages"], np.clip(s, 1 - 0.2, 1 + 0.2) * a["advantages"])
    return np.mean((losses * a["mask"]).sum(-1) / size[:, 0])


def covariances(a):
    """Cui et al. 2505.22617, section 4.2: (log π - its mean) (A - its mean), over all tokens."""
    mask = a["mask"].astype(bool)
    logps, advantages = a["held_policy"][mask], a["advantages"][mask]
    return (logps - logps.mean()) * (advantages - advantages.mean())


def clip_cov(a):
    """Their Clip-Cov with r = 1: all tokens within the bounds have no gradient."""
    mask, cov = a["mask"].astype(bool), covariances(a)
    advantage = a["advantages"][mask]
    w = np.exp(a["policy"][mask] - a["old_token_logps"][mask])
    loss = np.maximum(-advantage * w, -advantage * np.clip(w, 0.8, 1.2))
    free = loss == -advantage * w
    return np.mean(np.where(free & (cov >= 0.05) & (cov <= 0.9), 0.0, loss))


def kl_cov(a):
    """Their KL-Cov, k = 0.3 of the tokens."""
    mask, cov = a["mask"].astype(bool), covariances(a)
    log_w = a["policy"][mask] - a["old_token_logps"][mask]
    chosen = np.argsort(np.argsort(-cov)) < int(0.3 * len(cov))
    return np.mean(-a["advantages"][mask] * np.exp(log_w) + 0.5 * chosen * np.abs(log_w))


def gmpo(a):
    """Zhao et al. 2507.20673: A (Π_t of the clipped ratios)^(1/n), the clip on the side of A."""
    size = a["mask"].sum(-1)
    advantage = (a["advantages"] * a["mask"]).sum(-1) / size
    sign = np.where(advantage > 0, 1.0, -1.0)[:, None]
    ratio = sign * (a["policy"] - a["old_token_logps"]) * a["mask"]
    return -np.mean(advantage * np.exp((sign * np.minimum(ratio, 0.4)).sum(-1) / size))


def xpo(ipo=False):
    """Xie et al. 2405.21046, algorithm 1, with two pairs in a group: the policy's samples first."""

    def loss(a):
        policy, base = a["policy"].sum(-1), a["reference"].sum(-1)
        found = []
        for i in range(len(policy)):
            for own, other in ((0, 2), (1, 3)):
                pair = (
                    (own, other) if a["scores"][i, own] >= a["scores"][i, other] else (other, own)
                )
                w, r = (policy[i, k] - base[i, k] for k in pair)
                gap = (w - r - 5.0) ** 2 if ipo else np.log1p(np.exp(-0.1 * (w - r)))
                found.append(gap + 0.3 * policy[i, other])
        return np.mean(found)

    return loss


def nash_md(a):
    """Munos et al. 2312.00886, section 7: the preference above 1/2 reinforces, the KL's gradient
    beside it."""
    ratio = a["held_policy"] - a["reference"]
    gain = (a["scores"] - 0.5) * a["policy"].sum(-1)
    return np.mean(0.4 * (ratio * a["policy"]).sum(-1) - gain)


def minillm(gamma=1.0, normal=True, single=True, drawn="old"):
    """Gu et al. 2306.08543: equation 3's rewards to go, of later tokens beside the single step's
    KL, their mean where normalized; ratios to the probabilities that drew."""

    def loss(a):
        mask, total = a["mask"].astype(bool), 0.0
        for i, t in zip(*np.nonzero(mask)):
            first = t + 1 if single else t
            later = range(first, int(mask[i].sum()))
            r = [a["reference"][i, s] - a["held_policy"][i, s] for s in later]
            discounts = np.array([gamma ** (s - first) for s in later])
            to_go = (discounts * r).sum() / (max(discounts.sum(), 1.0) if normal else 1.0)
            advantage = a["advantages"][i, t] + to_go
            ratio = np.exp(a["policy"][i, t] - a[f"{drawn}_token_logps"][i, t])
            total -= min(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
            total += a["divergence"][i, t] if single else 0.0
        return total / mask.sum()

    return loss


def reinforce(a):
    """Williams 1992: -A log π, a mean over tokens."""
    mask = a["mask"].astype(bool)
    return np.mean(-a["advantages"][mask] * a["policy"][mask])


RPO_FORMS = ("backward_kl", "forward_kl", "square")
CASES = {
    "csft": ("csft", {}, csft),
    "plackett_luce": ("reward_ranked", {}, plackett_luce),
    "all_pairs": ("reward_ranked", {"form": "pairs"}, all_pairs),
    "best_of": ("reward_ranked", {"form": "best_of"}, best_of),
    "dpo_sigmoid": ("dpo_sigmoid", {}, dpo_sigmoid),
    "dpop": ("dpop", {}, dpop),
    "tdpo2": ("tdpo", {}, tdpo(0.5)),
    "tdpo1": ("tdpo", {"alpha": 1.0, "stop_gradient_chosen": False}, tdpo(1.0)),
    "tgdpo": ("tgdpo", {}, tgdpo(0.5)),
    "tgdpo_steep": ("tgdpo", {"alpha": 3.0}, tgdpo(3.0)),
    "tgdpo_is_dpo": ("tgdpo", {"alpha": 0.0}, tgdpo(0.0)),
    "beta_dpo": ("beta_dpo", {}, beta_dpo),
    "odpo": ("dpo", {}, odpo),
    "ipo_sum": ("ipo", {"lengths": "sum"}, ipo_sum),
    "reference_free": ("dpo", {"reference_free": True}, reference_free),
    "weighted": ("dpo", {}, weighted),
    "slic": ("slic", {}, slic),
    "rpo_per_sequence": ("dpo", {"sft_coef": 0.7, "per": "sequence"}, per_sequence),
    "humanline": ("dpo", {"humanline": True}, humanline),
    "dpo_shift": ("dpo_shift", {}, dpo_shift),
    **{f"rpo_{form}": ("rpo", {"eta": 0.5, "form": form}, rpo(form)) for form in RPO_FORMS},
    "simper": ("simper", {}, simper),
    "tpo_mean": ("tpo", {}, tpo("mean")),
    "tpo_sum": ("tpo", {"form": "sum"}, tpo("sum")),
    "tpo_hinge": ("tpo", {"form": "hinge", "beta": 0.01}, tpo("hinge", 0.01)),
    "tpo_ipo": ("tpo", {"form": "ipo", "beta": 0.3}, tpo("ipo", 0.3)),
    "tpo_smoothed": ("tpo", {"label_smoothing": 0.2}, tpo("mean", smoothing=0.2)),
    "adpo_best": ("adpo", {}, adpo(False)),
    "adpo_scores": ("adpo", {"target": "scores"}, adpo(True)),
    "kto_zero": ("kto_zero", {}, kto_zero),
    "kto_logsigmoid": (
        "kto_logsigmoid",
        {"desirable_weight": 1.3, "undesirable_weight": 0.7},
        kto_logsigmoid,
    ),
    "bco": ("bco", {}, bco),
    "reward_regression": ("reward_regression", {}, regression),
    "reward_classification": ("reward_classification", {}, classification(1.0)),
    "reward_classification_weighted": (
        "reward_classification",
        {"positive_weight": 2.5},
        classification(2.5),
    ),
    "reward_process": ("reward_process", {}, process),
    "reward_process_last": (
        "reward_process",
        {"steps": "last", "positive_weight": 0.5},
        lambda a: process(a, True, 0.5),
    ),
    "ppo_offline": ("ppo_offline", {}, ppo_offline()),
    "ppo_offline_reciprocal": (
        "ppo_offline",
        {"clip_form": "reciprocal", "kl_sign": -1},
        ppo_offline((0.5, 2.0), -1),
    ),
    "ppo_offline_gae": (
        "ppo_offline",
        {"critic_target": "gae", "whiten": False},
        ppo_offline(target="gae", whiten=False),
    ),
    "ppo": ("ppo", {}, ppo),
    "dual_clip": ("ppo", {"dual_clip": 1.1}, dual_clip),
    "gspo_token": (
        "gspo",
        {"importance": "sequence_token", "epsilon_low": 0.2, "epsilon_high": 0.2},
        gspo_token,
    ),
    "clip_cov": ("clip_cov", {"cov_share": 1.0, "cov_low": 0.05, "cov_high": 0.9}, clip_cov),
    "kl_cov": ("kl_cov", {"cov_share": 0.3, "cov_coef": 0.5}, kl_cov),
    "gmpo": ("gmpo", {}, gmpo),
    "xpo": ("xpo", {"alpha": 0.3}, xpo()),
    "xpo_ipo": ("xpo", {"alpha": 0.3, "form": "ipo"}, xpo(ipo=True)),
    "nash_md": ("nash_md", {"beta": 0.4}, nash_md),
    "minillm": ("minillm", {"gamma": 0.9}, minillm(0.9)),
    "minillm_sum": ("minillm", {"length_normalization": False}, minillm(normal=False)),
    "minillm_undecomposed": ("minillm", {"single_step": False}, minillm(single=False)),
    "minillm_mixed": ("minillm", {"teacher_share": 0.3}, minillm(drawn="sampler")),
    "reinforce": ("reinforce", {}, reinforce),
}
COVERED = {name for name, _, _ in CASES.values()}


def draw(name, case, spread):
    """Draw what a case wants, float64, representable in float32."""
    rng = np.random.default_rng(len(case))
    kind = losses.OBJECTIVES[name].data

    def exact(x):
        return np.asarray(x).astype(np.float32).astype(np.float64)

    if name.startswith("reward_ranked"):
        return {"policy": exact(10 * spread * rng.normal(size=(B, 4)))}
    if name in ("reward_regression", "reward_classification"):
        feedback = {"scores": exact(rng.normal(size=(B, 1)))}
        if kind == "unpaired":
            feedback = {"label": np.array([True, False, False, True])}
        return {"policy": exact(10 * spread * rng.normal(size=B)), **feedback}
    if kind == "stepwise":
        mask = (np.arange(T) % 3 == 1) & (np.arange(T) < rng.integers(3, T + 1, B)[:, None])
        found = {"policy": rng.normal(size=(B, T)), "step_labels": rng.uniform(size=(B, T))}
        return {"mask": mask.astype(np.float64), **{k: exact(x * mask) for k, x in found.items()}}
    shape = {"pairs": (B, 2, T), "ranked": (B, 3, T), "unpaired": (B, T), "rollout": (B, T)}[kind]
    shape = (B, 4, T) if name in ("xpo", "nash_md") else shape
    mask = np.arange(T) < rng.integers(1, T + 1, shape[:-1])[..., None]
    reference = -rng.gamma(2.0, 0.8, shape) - 0.5
    a = {"mask": mask.astype(np.float64), "reference": exact(reference * mask)}
    a["policy"] = exact(np.minimum(reference + spread * rng.normal(size=shape), -0.01) * mask)
    if kind == "pairs":
        a |= {"kl": exact(rng.gamma(1.0, 1.0, shape) * mask)} if name == "tdpo" else {}
        if name == "tgdpo":
            a["guide_token_logps"] = exact((reference + rng.normal(size=shape)) * mask)
        a |= {"margin": exact(rng.gamma(1.0, 1.0, B))} if case == "odpo" or name == "rpo" else {}
        a |= {"weight": np.array([1.0, 0.0, 2.0, 0.5])} if case == "weighted" else {}
    if kind == "ranked":
        a |= {"scores": exact(rng.normal(size=(B, 3)))} if case == "adpo_scores" else {}
    if kind == "unpaired":
        a["label"] = np.array([True, False, False, True])
    if losses.OBJECTIVES[name].mismatched:
        a |= {
            f"mismatched_{who}": exact(-rng.gamma(4.0, 1.0, B)) for who in ("policy", "reference")
        }
    if "ppo" in name:
        a |= {
            key: exact(rng.normal(size=shape) * mask) for key in ("values", "old_values", "returns")
        }
    if name in ("xpo", "nash_md"):
        a |= {"scores": exact(rng.normal(size=shape[:2])), "held_policy": a["policy"]}
        return a
    if name == "minillm":
        a["held_policy"], a["divergence"] = a["policy"], exact(rng.gamma(1.0, 1.0, shape) * mask)
    if kind == "rollout":
        a["old_token_logps"] = exact((reference + 0.3 * rng.normal(size=shape)) * mask)
        a["advantages"] = exact(rng.normal(size=shape) * mask)
    if case == "minillm_mixed":
        a["sampler_token_logps"] = exact((reference + 0.3 * rng.normal(size=shape)) * mask)
    return a


def differences(loss, a, key, step=1e-5):
    """Central differences of a loss with respect to one of its arrays, where the mask is true."""
    grad = np.zeros_like(a[key])
    for index in np.ndindex(*a[key].shape):
        if "mask" in a and not a["mask"][index]:
            continue
        high, low = ({**a, key: a[key].copy()} for _ in range(2))
        high[key][index] += step
        low[key][index] -= step
        grad[index] = (loss(high) - loss(low)) / (2 * step)
    return grad


@pytest.mark.parametrize("spread", [0.1, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_numpy_from_the_paper(case, spread):
    name, options, loss = CASES[case]
    a = draw(name, case, spread)
    terms = losses.resolve(name, options)
    kind = losses.objective.data_kind(terms)
    given = {
        key: jnp.asarray(value, jnp.float32 if value.dtype == np.float64 else None)
        for key, value in a.items()
        if not (key == "reference" and not any(term.reference for term in terms))
    }
    if "mask" in given:
        given["mask"] = given["mask"] > 0
    if name == "ppo_offline":
        given = {key: x for key, x in given.items() if key not in ("old_values", "returns")}
        a["held_values"] = a["values"]
    a["held_policy"] = a["policy"]  # what has no gradient
    if name == "bco":
        a["delta"] = np.mean(0.1 * x_of(a))
    given.pop("held_policy", None)
    if case == "minillm_undecomposed":
        given.pop("divergence")
    keys = [key for key in ("policy", "values", "kl", "divergence") if key in given]
    rest = {key: x for key, x in given.items() if key not in keys}

    def f(said):
        return arrays.evaluate(terms, arrays.make_inputs(terms, kind, {**said, **rest})).loss

    value, grads = jax.value_and_grad(f)({key: given[key] for key in keys})
    np.testing.assert_allclose(value, loss(a), rtol=1e-5)
    for key in keys:
        expected = differences(loss, a, key)
        if case == "tdpo2" and key == "kl":
            expected[:, 0] = 0.0  # TDPO₂ stops the gradient of the chosen response's KL
        np.testing.assert_allclose(
            grads[key], expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max() + 1e-9
        )


def test_every_objective_has_a_parity_test():
    from test_parity_trl import TRL_OBJECTIVES

    # a mean and an NLL, whose doctests are their tests; and a mean of what test_logprobs compares
    pieces = {"entropy", "ptx", "gkd"}
    assert set(losses.OBJECTIVES) == COVERED | TRL_OBJECTIVES | pieces


def test_beta_dpo_follows_the_running_mean_of_the_gaps():
    """Wu et al. 2407.08639: β = β₀ (1 + α (mean M - M₀)), M₀ <- m M₀ + (1 - m) mean M."""
    loss = batchwise.BetaDpo(beta=0.5, alpha=0.6, momentum=0.9)
    gaps, kept, running = [[1.0, 3.0], [4.0, 0.0], [-1.0, 1.0]], loss.running, None
    for gap in gaps:
        found, weights = {"gap": 0.5 * jnp.asarray([gap])}, jnp.ones((1, 2))
        beta, kept = loss.reduce_statistics(found, weights, kept)
        mean = 0.5 * np.mean(gap)
        running = mean if running is None else running
        np.testing.assert_allclose(beta, [0.5 * (1 + 0.6 * (mean - running))], rtol=1e-6)
        running = 0.9 * running + 0.1 * mean
        np.testing.assert_allclose(kept["mean"], running, rtol=1e-6)


def test_bco_keeps_the_mean_of_all_rewards_so_far():
    loss, running = kto.Bco(), kto.Bco.running
    rewards = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    for step in range(3):
        found = {"reward": jnp.asarray(rewards[step])}
        delta, running = loss.reduce_statistics(found, jnp.ones((2, 4)), running)
        np.testing.assert_allclose(delta, np.full(2, rewards[: step + 1].mean()), rtol=1e-5)


def test_ties_and_missing_responses_do_not_count_in_rankings():
    scores = np.array([[0.5, 1.5, -0.5, 9.0]], np.float32)
    batch, outputs = arrays.make_batch(jnp.asarray(scores[0]), responses=4, lengths=[3, 2, 4, 0])
    outputs = outputs._replace(scores=outputs.logps)
    three = {"policy": scores[:, :3].astype(np.float64)}
    for form, loss in (
        ("plackett_luce", plackett_luce),
        ("pairs", all_pairs),
        ("best_of", best_of),
    ):
        found, _ = supervised.RewardRanked(form=form).losses(losses.Inputs(batch, outputs))
        np.testing.assert_allclose(found, [loss(three)], rtol=1e-5)
    tied = batch._replace(scores=jnp.asarray([[2.0, 1.0, 1.0, 0.0]]))
    loss = supervised.RewardRanked(form="pairs")
    found, metrics = loss.losses(losses.Inputs(tied, outputs))
    np.testing.assert_allclose(
        found, [-np.mean([log_sigmoid(0.5 - 1.5), log_sigmoid(0.5 + 0.5)])], rtol=1e-5
    )
    assert float(metrics["accuracy"][0]) == 1.0 and float(metrics["accuracy"][1]) == 2.0

# SPDX-License-Identifier: Apache-2.0
"""The online batch source: generate with the current policy, score, and hand out batches of the
usual form.

    prompts ─ engine ─ rewards ─ selection ─ rows ─ old and reference log-probabilities, values ─ targets
                                                └──────► slices, ``epochs`` times over ──► train steps

The training loop sees ``next(weights) -> Batch`` and nothing of this.  A rollout is a function of
(seed, place in the stream of prompts, weights), so a resumed run goes on exactly; a rollout in the
middle of its slices is saved beside the checkpoint, since the weights that made it are gone.
"""

from __future__ import annotations

import concurrent.futures
import functools
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from align_jax.core.schema import Batch
from align_jax.data.batching import Shape
from align_jax.data.tokenizer import pad_id
from align_jax.inference.engines import Engine
from align_jax.inference.generate import local
from align_jax.inference.score import rescore
from align_jax.losses import advantages as estimators
from align_jax.losses.targets import make_targets
from align_jax.models.model import Model
from align_jax.online import batches, sampling
from align_jax.online.config import RolloutConfig
from align_jax.online.prompts import Prompts
from align_jax.online.rewards import WeightedRewards
from align_jax.online.selection import SELECTIONS
from align_jax.parallel.mesh import row_shards
from align_jax.parallel.sharding import put_batch

FOLDER = "rollouts"  # in the workdir: rollouts that a checkpoint was taken in the middle of


class Weights(NamedTuple):
    """What generates and what it is held against: whole parameter trees."""

    policy: Any
    reference: Any = None


class Control(NamedTuple):
    """What moves from rollout to rollout beside the weights."""

    place: int  # in the stream of prompts, of all processes together
    kl_coef: float
    moments: sampling.Moments


class Rollout(NamedTuple):
    """One rollout: this process's rows, what is said of it, and where the next one goes on."""

    batch: Batch
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    control: Control


@functools.partial(jax.jit, static_argnames="options")
def _targets(
    batch: Batch,
    reference: jax.Array | None,
    kl_coef: jax.Array,
    options: tuple[tuple[str, Any], ...],
) -> tuple[jax.Array, jax.Array | None, dict[str, Any]]:
    keywords = dict(options)
    if keywords.get("kl_coef"):
        keywords["kl_coef"] = kl_coef
    filled, metrics = make_targets(batch, reference_token_logps=reference, **keywords)
    return filled.advantages, filled.returns, metrics


class Rollouts:
    """Batches from the policy itself.

    Args:
        config: how.
        prompts: the stream of prompts.
        engine: what generates.
        rewards: what a completion is worth.
        tokenizer: the policy's.
        policy, reference: the models of the weights that `next` is given.
        mesh: where the forwards run.
        held_out: prompts that are never trained on, for ``evaluate``.

    Attributes:
        shape: a step's sizes on the whole mesh.
    """

    def __init__(
        self,
        config: RolloutConfig,
        prompts: Prompts,
        engine: Engine,
        rewards: WeightedRewards,
        tokenizer: PreTrainedTokenizerBase,
        *,
        policy: Model,
        reference: Model,
        mesh: jax.sharding.Mesh,
        held_out: Prompts | None = None,
    ) -> None:
        self._config, self._prompts, self._held_out = config, prompts, held_out
        self._engine, self._rewards = engine, rewards
        self._pad, self._policy, self._reference, self._mesh = (
            pad_id(tokenizer),
            policy,
            reference,
            mesh,
        )
        self.shape: Shape = batches.plan_shape(
            groups=config.batch_size,
            responses=config.groups[1],
            prompt=prompts.longest,
            response=config.max_new_tokens,
            layout=config.layout,
        )
        rows, shards = self.shape.rows // config.microbatches, row_shards(mesh)
        if rows % shards:
            raise ValueError(
                f"a microbatch of {config.batch_size // config.microbatches} groups has "
                f"{rows} rows, which do "
                f"not divide over {shards} devices: choose another batch_size, "
                "microbatches or mesh"
            )
        self._next = Control(
            0, float((config.targets or {}).get("kl_coef", 0.0)), dict(estimators.SCORE_CARRY)
        )
        self._now: Rollout | None = None
        self._slice = 0  # the next one of the rollout now
        # when the rollout now was asked for, on the monotonic clock
        self._renewed: float | None = None
        self._ahead: concurrent.futures.Future | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1) if config.overlap else None

    # ---------------------------------------------------------------------------------- what train sees

    def abstract(self) -> Batch:
        """Return the whole mesh's batch as arrays of the right shape and dtype that take no
        memory."""
        return batches.batch_shapes(self.shape, self._config)

    @property
    def num_examples(self) -> int:
        """Prompts."""
        return len(self._prompts)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps after which every prompt was drawn once (rounded down, at least 1)."""
        return max(
            1,
            len(self._prompts) * self._config.slices * self._config.epochs // self._config.prompts,
        )

    @property
    def report(self) -> dict[str, Any]:
        """Counts of what was read and truncated."""
        return dict(self._prompts.report)

    @property
    def metrics(self) -> dict[str, float]:
        """The newest rollout's metrics."""
        return {} if self._now is None else self._now.metrics

    def next(self, weights: Callable[[], Weights]) -> Batch:
        """Return this process's rows of the next optimizer step.

        Args:
            weights: gives the current weights; called where a new rollout is due.
        """
        slices, last = self._config.slices, self._config.slices * self._config.epochs
        if (
            self._now is not None
            and 0 < self._slice < last
            and self._slice % slices == 0
            and self._config.stop_kl
        ):
            if self._divergence(weights().policy) > self._config.stop_kl:
                self._slice = last
        if self._now is None or self._slice >= last:
            self._renew(weights)
        epoch, index = divmod(self._slice, slices)
        self._slice += 1
        return batches.take(self._now.batch, self._chosen(epoch, index))

    def _chosen(self, epoch: int, index: int) -> np.ndarray:
        """Return which groups a slice has, in this process: the first epoch in order, the others
        shuffled."""
        share, groups = self._config.batch_size // jax.process_count(), len(self._now.batch.weight)
        order = np.arange(groups)
        if epoch:
            order = np.random.default_rng((self._config.seed, self._next.place, epoch)).permutation(
                groups
            )
        return order[index * share : (index + 1) * share]

    def _renew(self, weights: Callable[[], Weights]) -> None:
        newest = jax.block_until_ready(weights())  # the last step's time is not the generation's
        before, began, self._renewed = self._now, self._renewed, time.monotonic()
        self._now = self._make(newest, self._next) if self._ahead is None else self._ahead.result()
        # else this is the first rollout, or the first after resuming
        known = before is not None and began is not None
        self._now.metrics["rollout/share"] = (
            before.metrics["rollout/generation_seconds"] / (self._renewed - began)
            if known
            else math.nan
        )
        self._next, self._slice = self._now.control, 0
        if self._pool is not None:
            copy = jax.tree.map(jnp.copy, newest)  # the train step donates what it is given
            self._ahead = self._pool.submit(self._make, copy, self._next)

    def evaluate(self, weights: Weights) -> dict[str, float]:
        """Sample the held-out prompts as training's are sampled, always with the same draws.

        Several processes take equal shares; what is left over of the prompts stays out.

        Returns:
            What ``describe`` says of a rollout but for its speed: ``reward``, ``rewards/...``,
            ``completions/...``.
        """
        if self._ahead is not None:
            concurrent.futures.wait([self._ahead])  # the engine holds one set of weights
        share = len(self._held_out) // jax.process_count()
        first = jax.process_index() * share
        with jax.set_mesh(self._mesh):
            self._engine.update(weights.policy)
            asked, moments, seconds = sampling.sample(
                range(first, first + share),
                self._config,
                self._held_out,
                self._engine,
                self._rewards,
                self._next.moments,
            )
            self._engine.release()
        found = sampling.describe(
            sampling.Drawn(asked, 1, moments, seconds, tokens=0), self._config
        )
        return {name: value for name, value in found.items() if not name.startswith("rollout/")}

    # --------------------------------------------------------------------------------- making a rollout

    def _make(self, weights: Weights, control: Control) -> Rollout:
        """Generate, score and write one rollout."""
        started = time.monotonic()
        with jax.set_mesh(self._mesh):
            self._engine.update(weights.policy)
            drawn = sampling.draw(
                control.place,
                self._config,
                self._prompts,
                self._engine,
                self._rewards,
                control.moments,
            )
            self._engine.release()
            batch, metrics, kl_coef = self._write(drawn.asked, weights, control.kl_coef)
        metrics |= sampling.describe(drawn, self._config)
        metrics["rollout/seconds"] = time.monotonic() - started
        place = control.place + drawn.tries * self._config.prompts
        return Rollout(
            batch, metrics, sampling.records(drawn), Control(place, kl_coef, drawn.moments)
        )

    def _write(
        self, asked: Sequence[sampling.Asked], weights: Weights, kl_coef: float
    ) -> tuple[Batch, dict[str, float], float]:
        config = self._config
        scores = np.stack([one.scores for one in asked])
        groups = SELECTIONS[config.kind](
            scores, sampling.gather(scores.reshape(-1)), **config.selection
        )
        prompts, completions = [one.ids for one in asked], [one.completions for one in asked]
        batch = batches.write(
            groups,
            prompts,
            completions,
            scores,
            self.shape,
            layout=config.layout,
            pad=self._pad,
            keep_unfinished=config.keep_unfinished,
        )
        numbers = np.array([self._prompts.number(asked[p].place) for p in groups.prompts], np.int32)
        batch = batch._replace(example_index=numbers)
        if config.mismatched:
            batch = batch._replace(
                mismatched=batches.mismatch(groups, prompts, completions, self.shape, pad=self._pad)
            )
        if config.targets is None:
            return batch, {}, kl_coef
        old = (
            None
            if config.rescore
            else batches.token_field(batch, groups, completions, "token_logps")
        )
        if config.rescore or config.value_head:
            logps, values = self._rescore(self._policy, weights.policy, batch, config.value_head)
            old, batch = logps if old is None else old, batch._replace(old_values=values)
        reference = None
        if config.needs_reference:
            reference, _ = self._rescore(self._reference, weights.reference, batch, "")
        return self._with_targets(batch._replace(old_token_logps=old), reference, kl_coef)

    def _rescore(
        self, model: Model, params: Any, batch: Batch, value_head: str
    ) -> tuple[Float[np.ndarray, "N T"], Float[np.ndarray, "N T"] | None]:
        """Run forwards over rows in parts of a microbatch's size; fetch this process's rows."""
        size = self._config.batch_size // self._config.microbatches // jax.process_count()
        logps, values = [], []
        for begin in range(0, len(batch.weight), size):
            part = batches.take(batch._replace(mismatched=None), np.arange(begin, begin + size))
            token_logps, found = rescore(
                model,
                params,
                put_batch(self._mesh, part),
                value_head=value_head,
                temperature=self._config.temperature,
            )
            logps.append(local(token_logps))
            values.append(found if found is None else local(found))
        return np.concatenate(logps), np.concatenate(values) if value_head else None

    def _with_targets(
        self, batch: Batch, reference: Float[np.ndarray, "N T"] | None, kl_coef: float
    ) -> tuple[Batch, dict[str, float], float]:
        """Fill in advantages and returns, whose statistics are over the whole rollout, and move the
        KL coefficient."""
        config = self._config
        whole = put_batch(self._mesh, batch._replace(mismatched=None))
        held = None if reference is None else put_batch(self._mesh, reference)
        advantages, returns, sums = _targets(
            whole, held, jnp.float32(kl_coef), tuple(sorted(config.targets.items()))
        )
        batch = batch._replace(
            advantages=local(advantages), returns=None if returns is None else local(returns)
        )
        metrics = {
            name: float(top) / max(float(bottom), 1e-8) for name, (top, bottom) in sums.items()
        }
        if config.needs_reference:
            metrics["objective/kl_coef"] = kl_coef
            if config.kl_target is not None:
                kl_coef = float(
                    estimators.adaptive_kl_coef(
                        jnp.float32(kl_coef),
                        jnp.float32(metrics["objective/kl"]),
                        config.prompts * config.responses,
                        target=config.kl_target,
                        horizon=config.kl_horizon,
                    )
                )
        return batch, metrics, kl_coef

    def _divergence(self, params: Any) -> float:
        """Estimate how far the policy has moved since the rollout: mean of (log π - log π_old)² /
        2, nats a token."""
        share = self._config.batch_size // self._config.microbatches // jax.process_count()
        part = batches.take(self._now.batch, np.arange(share))
        with jax.set_mesh(self._mesh):
            now, _ = self._rescore(self._policy, params, part, "")
        gap = np.square(now - part.old_token_logps)[part.loss_mask]
        sums = (
            sampling.gather(np.array([gap.sum() / 2, gap.size], np.float32))
            .reshape(-1, 2)
            .sum(axis=0)
        )
        return float(sums[0] / max(sums[1], 1.0))

    # -------------------------------------------------------------------------------- saving, reporting

    def save(
        self, workdir: str | epath.PathLike, step: int, kept: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Return what a checkpoint of this step has to hold, and write the rollout that is not yet
        used up.

        Args:
            workdir: of the run.
            step: of the checkpoint.
            kept: steps whose checkpoints still exist; the rollouts of others are deleted.
        """
        state = {
            "place": self._next.place,
            "kl_coef": self._next.kl_coef,
            "moments": dict(self._next.moments),
            "slice": self._slice,
            "metrics": self.metrics,
            "processes": jax.process_count(),
            "file": "",
        }
        folder = epath.Path(workdir) / FOLDER
        if self._now is None or self._slice >= self._config.slices * self._config.epochs:
            return state
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, **_flat(self._now.batch))
        (folder / f"{step}-{jax.process_index()}.npz").write_bytes(buffer.getvalue())
        if jax.process_index() == 0:
            for old in folder.iterdir():
                if int(old.name.split("-")[0]) not in (*kept, step):
                    old.unlink()
        return state | {"file": f"{FOLDER}/{step}"}

    def restore(self, workdir: str | epath.PathLike, state: Mapping[str, Any]) -> None:
        """Go on where `save` stood.

        Raises:
            FileNotFoundError: the rollout beside the checkpoint is gone.
        """
        self._next = Control(state["place"], state["kl_coef"], state["moments"])
        self._slice, self._now = state["slice"], None
        if state["file"]:
            paths = [
                epath.Path(workdir) / f"{state['file']}-{p}.npz" for p in range(state["processes"])
            ]
            parts = [np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) for path in paths]
            fields = {
                name: np.concatenate([part[name] for part in parts]) for name in parts[0].files
            }
            share = len(fields["weight"]) // jax.process_count()
            mine = np.arange(jax.process_index() * share, (jax.process_index() + 1) * share)
            self._now = Rollout(
                batches.take(_deep(fields), mine), dict(state["metrics"]), [], self._next
            )

    def log_samples(self, workdir: str | epath.PathLike, step: int) -> None:
        """Append the newest rollout's samples, with their rewards, to ``samples.jsonl``; for
        process 0."""
        if self._now is not None:
            path = epath.Path(workdir) / "samples.jsonl"
            before = path.read_text() if path.exists() else ""
            path.write_text(
                before
                + "".join(json.dumps({"step": step, **one}) + "\n" for one in self._now.samples)
            )


def _flat(batch: Batch, prefix: str = "") -> dict[str, np.ndarray]:
    found = {}
    for name, value in batch._asdict().items():
        if isinstance(value, Batch):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = np.asarray(value)
    return found


def _deep(fields: Mapping[str, np.ndarray]) -> Batch:
    inner = {name.partition(".")[2]: value for name, value in fields.items() if "." in name}
    outer = {name: value for name, value in fields.items() if "." not in name}
    return Batch(**outer, mismatched=Batch(**inner) if inner else None)

# SPDX-License-Identifier: Apache-2.0
"""The online batch source: generate with the current policy, score, and hand out batches of the
usual form.

    prompts ─ engine ─ rewards ─ selection ─ rows ─ old and reference log-probabilities ─ targets
       └──── RolloutMaker: a rollout from (weights, state) ────────────────────────────────┘ │
                            train steps ◄── Rollouts: slices, ``epochs`` times over ◄────────┘

The training loop sees ``next(weights) -> Batch`` and nothing of this.  A rollout is a function of
(seed, position in the stream of prompts, weights), so a resumed run goes on exactly; a rollout in
the middle of its slices is saved beside the checkpoint, since the weights that made it are gone.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import io
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from align_jax.core.files import read_arrays, writing
from align_jax.core.metrics import JsonLines, means
from align_jax.core.options import Config
from align_jax.core.schema import Batch, Example, Outputs
from align_jax.data.layout import BatchShape
from align_jax.data.pipeline import Pipeline
from align_jax.data.tokenizer import pad_id
from align_jax.inference.engines import Engine, Local, Server
from align_jax.inference.generate import Completion, local_rows
from align_jax.inference.resharding import make_resharder
from align_jax.inference.score import Values, outputs_of
from align_jax.losses import advantages as estimators
from align_jax.losses.sampler import correct
from align_jax.losses.targets import Extras, make_targets
from align_jax.models.model import Model, Params
from align_jax.online import batches, rewards, sampling
from align_jax.online.config import RolloutConfig
from align_jax.online.environment import make_player
from align_jax.online.generators import generation_mesh, make_generator, make_opponent
from align_jax.online.partners import judge
from align_jax.online.sampling import Prompts, PromptSampler, PromptSamples, SampledRollout
from align_jax.online.selection import SELECTIONS, Groups
from align_jax.online.steps import check_separator
from align_jax.parallel.mesh import row_shards
from align_jax.parallel.sharding import put_batch
from align_jax.training.flops import attention_cost

FOLDER = "rollouts"  # in the workdir: rollouts that a checkpoint was taken in the middle of

Export = Callable[[str, Params], None]  # writes the policy's weights to a server's folder


class Weights(NamedTuple):
    """What generates and what it is held against: whole parameter trees."""

    policy: Params
    reference: Params | None = None


class RolloutState(NamedTuple):
    """What moves from rollout to rollout beside the weights."""

    position: int  # in the stream of prompts, of all processes together
    kl_coef: float
    moments: sampling.Moments


class Rollout(NamedTuple):
    """One rollout: this process's rows, what is said of it, and where the next one goes on."""

    batch: Batch
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    state: RolloutState


@functools.partial(jax.jit, static_argnames="options")
def _targets(
    batch: Batch,
    reference: jax.Array | None,
    kl_coef: jax.Array,
    extras: Extras,
    options: tuple[tuple[str, Any], ...],
) -> tuple[jax.Array, jax.Array | None, dict[str, tuple[jax.Array, jax.Array]]]:
    keywords = dict(options)
    if keywords.get("kl_coef"):
        keywords["kl_coef"] = kl_coef
    filled, metrics = make_targets(
        batch, reference_token_logps=reference, extras=extras, **keywords
    )
    assert filled.advantages is not None  # it fills them always
    return filled.advantages, filled.returns, metrics


_correct = jax.jit(correct, static_argnums=1)


@dataclasses.dataclass(frozen=True)
class RolloutMaker:
    """Makes rollouts; holds nothing that changes but the engine's weights.

    Attributes:
        config: how.
        prompts: the stream of prompts.
        sampler: samples and scores them.
        pad: the token that fills rows.
        policy, reference: the models of the weights that are given.
        mesh: where the forwards run.

    Raises:
        ValueError: a microbatch's rows do not divide over the devices.
    """

    config: RolloutConfig
    prompts: Prompts
    sampler: PromptSampler
    pad: int
    policy: Model
    reference: Model
    mesh: Mesh

    def __post_init__(self) -> None:
        config, shards = self.config, row_shards(self.mesh)
        rows = self.shape.rows // config.microbatches
        if rows % shards:
            raise ValueError(
                f"a microbatch of {config.batch_size // config.microbatches} groups has {rows} "
                f"rows, which do not divide over {shards} devices: choose another batch_size, "
                "microbatches or mesh"
            )

    @functools.cached_property
    def shape(self) -> BatchShape:
        """A step's sizes on the whole mesh."""
        return batches.rollout_shape(self.config, self.prompts.longest)

    def make(self, weights: Weights, state: RolloutState) -> Rollout:
        """Generate, score and write one rollout."""
        began, engine = time.monotonic(), self.sampler.engine
        with jax.set_mesh(self.mesh):
            if not self.sampler.mixed:
                engine.update(weights.policy)
            if (opponent := self.sampler.opponent) is not None:
                opponent.update(weights.policy, weights.reference)
            sampled = self.sampler.sample_rollout(self.prompts, state.position, state.moments)
            engine.release()
            if opponent is not None:
                opponent.engine.release()
            batch, metrics, kl_coef = self._write(sampled.prompts, weights, state.kl_coef)
        metrics |= sampling.describe(sampled)
        metrics["rollout/seconds"] = time.monotonic() - began
        position = state.position + sampled.tries * self.config.options.prompts
        following = RolloutState(position, kl_coef, sampled.moments)
        return Rollout(batch, metrics, sampling.records(sampled), following)

    def evaluate(
        self, held_out: Prompts, weights: Weights, moments: sampling.Moments
    ) -> tuple[dict[str, float], Iterator[Batch]]:
        """Sample the held-out prompts as training's are sampled, always with the same draws.

        A judge of pairs compares each prompt's samples, with those of another player that they
        meet.  Several processes take equal shares; what is left over of the prompts stays out.

        Returns:
            What ``describe`` says of a rollout but for its speed, and the samples in batches.
        """
        share, engine = len(held_out) // jax.process_count(), self.sampler.engine
        first, options = jax.process_index() * share, self.sampler.options
        count = options.eval_responses_per_prompt or options.responses_per_prompt
        sampler = dataclasses.replace(
            self.sampler, options=dataclasses.replace(options, responses_per_prompt=count)
        )
        opponent = sampler.opponent if self.config.judged and not sampler.mixed else None
        with jax.set_mesh(self.mesh):
            engine.update(weights.policy)
            if opponent is not None:
                opponent.update(weights.policy, weights.reference)
            found, moments, seconds = sampler.sample(
                held_out, range(first, first + share), moments, alone=True
            )
            engine.release()
            if opponent is not None:
                opponent.engine.release()
        values = sampling.describe(SampledRollout(found, 1, moments, seconds, tokens=0))
        values = {name: x for name, x in values.items() if not name.startswith("rollout/")}
        return values, self._as_batches(found)

    def _as_batches(self, samples: Sequence[PromptSamples]) -> Iterator[Batch]:
        """Write samples that no rollout is made of, a microbatch's groups at a time: advantages of
        0, and the policy that drew them as the old one."""
        size = self.config.batch_size // self.config.microbatches // jax.process_count()
        for first in range(0, len(samples), size):
            some = samples[first : first + size]
            filled = [*some, *some[-1:] * (size - len(some))]
            scores = np.stack([one.scores for one in filled])
            batch, groups, completions = self._lay_out(filled, scores, scores)
            real = np.arange(size) < len(some)
            logps = batches.token_field(batch, groups, completions, "token_logps")
            yield batch._replace(
                weight=np.where(real, batch.weight, np.float32(0)),
                old_token_logps=logps,
                sampler_token_logps=logps,
                advantages=np.zeros_like(logps),
            )

    def _lay_out(
        self,
        samples: Sequence[PromptSamples],
        scores: Float[np.ndarray, "Q n"],
        by: Float[np.ndarray, "Q n"],
    ) -> tuple[Batch, Groups, list[list[Completion]]]:
        """Write samples into rows, in groups that are chosen ``by`` what they are worth."""
        groups = SELECTIONS[self.config.kind].fn(
            by, sampling.gather(by.reshape(-1)), self.config.options
        )
        completions = [[*one.completions, *one.others] for one in samples]
        batch = batches.write(
            groups,
            [one.prompt for one in samples],
            completions,
            scores,
            self.shape,
            layout=self.config.layout,
            pad=self.pad,
            keep_unfinished=self.config.options.keep_unfinished,
        )
        return batches.weigh_learned(batch, self.config.kind), groups, completions

    def divergence(self, params: Params, batch: Batch) -> float:
        """Estimate how far the policy has moved since the rollout: mean of (log π - log π_old)² /
        2 over a microbatch, nats a token."""
        share = self.config.batch_size // self.config.microbatches // jax.process_count()
        part = batches.take(batch, np.arange(share))
        with jax.set_mesh(self.mesh):
            now, _ = self._rescore(self.policy, params, part)
        gap = np.square(now.token_logps - part.old_token_logps)[part.loss_mask]
        sums = sampling.gather(np.array([gap.sum() / 2, gap.size], np.float32)).reshape(-1, 2)
        total, count = sums.sum(axis=0)
        return float(total / max(count, 1.0))

    def _write(
        self, samples: Sequence[PromptSamples], weights: Weights, kl_coef: float
    ) -> tuple[Batch, dict[str, float], float]:
        """Write scored samples into rows, and fill in what the objective needs of them."""
        config = self.config
        scores = np.stack([np.append(one.scores, one.other_scores) for one in samples])
        scores, by = judge(scores, config.options, wins=config.wins, judged=config.judged)
        batch, groups, completions = self._lay_out(samples, scores, by)
        indices = [self.prompts.index(samples[p].position) for p in groups.prompts]
        batch = batch._replace(example_index=np.array(indices, np.int32))
        if config.mismatched:
            prompts = [one.prompt for one in samples]
            mismatched = batches.mismatched(groups, prompts, completions, self.shape, pad=self.pad)
            batch = batch._replace(mismatched=mismatched)
        if config.targets is None:
            return batch, {}, kl_coef
        old, extras = None, batches.extras_of(config.method, groups, samples)
        if config.steps_rewarded:
            extras = extras._replace(steps=batches.steps_of(batch, groups, samples))
        if not config.options.rescore:
            old = batches.token_field(batch, groups, completions, "token_logps")
        if config.options.rescore or config.value_head or config.token_fields:
            outputs, values = self._rescore(
                self.policy, weights.policy, batch, config.value_head, config.token_fields
            )
            old = outputs.token_logps if old is None else old
            extras = extras._replace(log_sum_sq=outputs.log_sum_sq)
            if values is not None:
                cut_off = batches.cut_off(groups, completions)
                final = np.where(cut_off, values.after, 0.0)
                batch = batch._replace(old_values=values.tokens, final_values=final)
        reference = None
        if config.needs_reference:
            assert weights.reference is not None  # the run loads it where the rollout needs it
            reference = self._rescore(self.reference, weights.reference, batch)[0].token_logps
        batch = batch._replace(old_token_logps=old)
        batch, metrics, kl_coef = self._with_targets(batch, reference, kl_coef, extras)
        if config.keeps_drawn:
            drawn = batches.token_field(batch, groups, completions, "drawn_logps")
            batch = batch._replace(sampler_token_logps=drawn)
        if config.correction is not None:
            batch, corrected = self._corrected(batch)
            metrics |= corrected
        return batch, metrics, kl_coef

    def _corrected(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """Fill in what corrects for the sampler, and say how far it is from the trainer."""
        placed = put_batch(self.mesh, batch._replace(mismatched=None))
        ratio, sums = _correct(placed, self.config.correction)
        return batch._replace(sampler_ratio=local_rows(ratio)), means(sums)

    def _rescore(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        value_head: str = "",
        needs: tuple[str, ...] = (),
    ) -> tuple[Outputs, Values | None]:
        """Run forwards over rows in parts of a microbatch's size; fetch this process's rows."""
        config = self.config
        size = config.batch_size // config.microbatches // jax.process_count()
        found: list[tuple[Outputs, Values | None]] = []
        for begin in range(0, len(batch.weight), size):
            part = batches.take(batch._replace(mismatched=None), np.arange(begin, begin + size))
            said = outputs_of(
                model,
                params,
                put_batch(self.mesh, part),
                needs=needs,
                value_head=value_head,
                temperature=config.temperature,
            )
            found.append(jax.tree.map(local_rows, said))
        return jax.tree.map(lambda *x: np.concatenate(x), *found)

    def _with_targets(
        self,
        batch: Batch,
        reference: Float[np.ndarray, "N T"] | None,
        kl_coef: float,
        extras: Extras,
    ) -> tuple[Batch, dict[str, float], float]:
        """Fill in advantages and returns, whose statistics are over the whole rollout, and move the
        KL coefficient."""
        config = self.config
        assert config.targets is not None  # the caller has looked
        placed = put_batch(self.mesh, batch._replace(mismatched=None))
        held = None if reference is None else put_batch(self.mesh, reference)
        options = dict(config.targets)
        if extras.each_score is not None:
            options["reward_weights"] = tuple(term[1] for term in self.sampler.rewards.terms)
        beside = put_batch(self.mesh, extras)
        advantages, returns, sums = _targets(
            placed, held, jnp.float32(kl_coef), beside, tuple(sorted(options.items()))
        )
        batch = batch._replace(
            advantages=local_rows(advantages),
            returns=None if returns is None else local_rows(returns),
            final_values=None,
        )
        metrics = {
            name: float(top) / max(float(bottom), 1e-8) for name, (top, bottom) in sums.items()
        }
        if not config.needs_reference:
            return batch, metrics, kl_coef
        metrics["objective/kl_coef"] = kl_coef
        if config.kl_target is not None:
            moved = estimators.adaptive_kl_coef(
                jnp.float32(kl_coef),
                jnp.float32(metrics["objective/kl"]),
                config.samples,
                target=config.kl_target,
                horizon=config.kl_horizon,
            )
            kl_coef = float(moved)
        return batch, metrics, kl_coef


class Rollouts:
    """Batches from the policy itself.

    Args:
        maker: makes the rollouts.
        held_out: prompts that are never trained on, for ``evaluate``.
        text: batches of text, of which each step gets one beside its rollout.

    Attributes:
        shape: a step's sizes on the whole mesh.
        layout: of its rows.
    """

    def __init__(
        self, maker: RolloutMaker, held_out: Prompts | None = None, text: Pipeline | None = None
    ) -> None:
        self._text, self._texts_taken = text, 0
        self._texts: Iterator[Batch] | None = None  # opened at the first step, or after resuming
        self._maker, self._config, self._held_out = maker, maker.config, held_out
        self.shape, self.layout = maker.shape, maker.config.layout
        kl_coef = float((maker.config.targets or {}).get("kl_coef", 0.0))
        self._next = RolloutState(0, kl_coef, dict(estimators.FIRST_MOMENTS))
        self._now: Rollout | None = None
        self._log: JsonLines | None = None  # of samples; opened when the first ones are logged
        self._slice = 0  # the next one of the rollout now
        # when the rollout now was asked for, on the monotonic clock
        self._renewed: float | None = None
        self._ahead: concurrent.futures.Future[Rollout] | None = None
        self._pool = (
            concurrent.futures.ThreadPoolExecutor(1) if maker.config.options.overlap else None
        )

    def abstract(self) -> Batch:
        """Return the whole mesh's batch as arrays of the right shape and dtype that take no
        memory."""
        batch = batches.abstract_batch(self._config, self.shape)
        return batch if self._text is None else batch._replace(text=self._text.abstract())

    @property
    def prompts(self) -> Prompts:
        """The stream of prompts that the first rollout begins."""
        return self._maker.prompts

    @property
    def text(self) -> Pipeline | None:
        """Batches of text beside the rollouts."""
        return self._text

    @property
    def num_examples(self) -> int:
        """Prompts."""
        return len(self._maker.prompts)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps after which every prompt was drawn once (rounded down, at least 1)."""
        return max(1, self.num_examples * self._config.steps // self._config.options.prompts)

    @property
    def report(self) -> dict[str, Any]:
        """Counts of what was read and truncated."""
        return dict(self._maker.prompts.report)

    @property
    def metrics(self) -> dict[str, float]:
        """The newest rollout's metrics."""
        return {} if self._now is None else self._now.metrics

    def next(self, weights: Callable[[], Weights]) -> Batch:
        """Return this process's rows of the next optimizer step.

        Args:
            weights: gives the current weights; called where a new rollout is due.
        """
        now, stop_kl = self._now, self._config.options.stop_kl
        if now is not None and 0 < self._slice < self._config.steps and stop_kl:
            if self._slice % self._config.slices == 0:
                if self._maker.divergence(weights().policy, now.batch) > stop_kl:
                    self._slice = self._config.steps
        if now is None or self._slice >= self._config.steps:
            now = self._renew(weights)
        epoch, index = divmod(self._slice, self._config.slices)
        self._slice += 1
        chosen = self._chosen(len(now.batch.weight), epoch, index)
        return batches.take(now.batch, chosen)._replace(text=self._next_text())

    def _next_text(self) -> Batch | None:
        """Return this process's rows of text for a step."""
        if self._text is None:
            return None
        if self._texts is None:
            self._texts = self._text.iterator(self._texts_taken)
        self._texts_taken += 1
        return next(self._texts)

    def _chosen(self, groups: int, epoch: int, index: int) -> np.ndarray:
        """Return which groups a slice has, in this process: the first epoch in order, the others
        shuffled."""
        share = self._config.batch_size // jax.process_count()
        order = np.arange(groups)
        if epoch:
            seed = (self._config.seed, self._next.position, epoch)
            order = np.random.default_rng(seed).permutation(groups)
        return order[index * share : (index + 1) * share]

    def _renew(self, weights: Callable[[], Weights]) -> Rollout:
        newest = jax.block_until_ready(weights())  # the last step's time is not the generation's
        before, began, self._renewed = self._now, self._renewed, time.monotonic()
        if self._ahead is None:
            now = self._maker.make(newest, self._next)
        else:
            now = self._ahead.result()
        share = math.nan  # of the first rollout, or the first after resuming
        if before is not None and began is not None:
            share = before.metrics["rollout/generation_seconds"] / (self._renewed - began)
        now.metrics["rollout/share"] = share
        self._now, self._next, self._slice = now, now.state, 0
        if self._pool is not None:
            copy = jax.tree.map(jnp.copy, newest)  # the train step donates what it is given
            self._ahead = self._pool.submit(self._maker.make, copy, self._next)
        return now

    def evaluate(self, weights: Weights) -> tuple[dict[str, float], Iterator[Batch]]:
        """Sample the held-out prompts; see ``RolloutMaker.evaluate``.

        Returns:
            ``reward``, ``rewards/...``, ``completions/...``; and the samples in batches.

        Raises:
            ValueError: nothing is held out.
        """
        if self._held_out is None:
            raise ValueError("no prompts are held out to evaluate on")
        if self._ahead is not None:
            concurrent.futures.wait([self._ahead])  # the engine holds one set of weights
        return self._maker.evaluate(self._held_out, weights, self._next.moments)

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
        if self._log is not None:
            self._log.flush()
        state = {
            "position": self._next.position,
            "kl_coef": self._next.kl_coef,
            "moments": dict(self._next.moments),
            "slice": self._slice,
            "texts": self._texts_taken,
            "metrics": self.metrics,
            "processes": jax.process_count(),
            "file": "",
        }
        folder = epath.Path(workdir) / FOLDER
        if self._now is None or self._slice >= self._config.steps:
            return state
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        fields: dict[str, Any] = _flatten_batch(self._now.batch)
        np.savez(buffer, **fields)
        path = folder / f"{step}-{jax.process_index()}.npz"
        with writing(path):
            path.write_bytes(buffer.getvalue())
        if jax.process_index() == 0:
            for old in folder.iterdir():
                made = re.fullmatch(r"(\d+)-\d+\.npz", old.name)  # what else lies there stays
                if made and int(made[1]) not in (*kept, step):
                    old.unlink()
        return state | {"file": f"{FOLDER}/{step}", "samples": self._now.samples}

    def restore(self, workdir: str | epath.PathLike, state: Mapping[str, Any]) -> None:
        """Go on where `save` stood.

        Raises:
            FileNotFoundError, ValueError: the rollout beside the checkpoint is gone, or damaged.
        """
        self._next = RolloutState(state["position"], state["kl_coef"], state["moments"])
        self._slice, self._now = state["slice"], None
        self._texts_taken, self._texts = state["texts"], None
        if not state["file"]:
            return
        fields = read_saved(workdir, state)
        share = len(fields["weight"]) // jax.process_count()
        own = np.arange(jax.process_index() * share, (jax.process_index() + 1) * share)
        batch = batches.take(_unflatten_batch(fields), own)
        samples = list(state.get("samples", ()))  # a later step of the rollout may log them
        self._now = Rollout(batch, dict(state["metrics"]), samples, self._next)

    def log_samples(self, workdir: str | epath.PathLike, step: int) -> Sequence[Mapping[str, Any]]:
        """Append the newest rollout's samples, with their rewards, to ``samples.jsonl``, and return
        them; for process 0."""
        if self._now is not None:
            if self._log is None:  # what an earlier start has logged from here on is logged again
                path = epath.Path(workdir) / "samples.jsonl"
                self._log = JsonLines(path, start_step=step - 1)
            for one in self._now.samples:
                self._log.append({"step": step, **one})
        return [] if self._now is None else self._now.samples

    def close(self) -> None:
        """Write what is still buffered of the samples."""
        if self._log is not None:
            self._log.close()


def read_saved(workdir: str | epath.PathLike, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read the rollout that ``save`` wrote beside a checkpoint, of all processes; {} if none was
    due.

    Raises:
        FileNotFoundError, ValueError: a file of it is gone, or damaged.
    """
    if not state["file"]:
        return {}
    files = [
        epath.Path(workdir) / f"{state['file']}-{process}.npz"
        for process in range(state["processes"])
    ]
    parts = [read_arrays(file) for file in files]
    for file, part in zip(files, parts):
        if "weight" not in part or part.keys() != parts[0].keys():
            raise ValueError(f"{file} is not a rollout's: it holds {sorted(part)}")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _flatten_batch(batch: Batch, prefix: str = "") -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in batch._asdict().items():
        if isinstance(value, Batch):
            found |= _flatten_batch(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = np.asarray(value)
    return found


def _unflatten_batch(fields: Mapping[str, np.ndarray]) -> Batch:
    inner: dict[str, Any] = {
        name.partition(".")[2]: value for name, value in fields.items() if "." in name
    }
    outer: dict[str, Any] = {name: value for name, value in fields.items() if "." not in name}
    return Batch(**outer, mismatched=Batch(**inner) if inner else None)


def make_rollouts(
    rollouts: RolloutConfig,
    config: Config,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    policy: Model,
    reference: Model,
    mesh: Mesh,
    load_model: rewards.LoadModel,
    export: Export,
    held_out: Sequence[Example] = (),
    text: Pipeline | None = None,
) -> Rollouts:
    """Make the source of an online run.

    Args:
        rollouts: from ``make_rollout_config``.
        config: the run's.
        examples: prompts, with what the rewards compare with in their extras.
        tokenizer: the policy's.
        policy, reference: models of the weights that will be given.
        mesh: where generation and training run.
        load_model: loads reward models.
        export: writes the policy's weights for a server.
        held_out: prompts to evaluate on; none: no evaluation.
        text: batches of text beside the rollouts.

    Raises:
        ValueError: no prompts are left, or fewer held-out ones than processes, or rows without what
            a reward reads.
    """
    if config.rewards:
        rewards.check(config.rewards, (*examples, *held_out))
    read = functools.partial(
        Prompts,
        tokenizer=tokenizer,
        max_length=config.max_length,
        max_new_tokens=rollouts.options.max_new_tokens,
        truncation=config.data.truncation,
        seed=config.seed,
    )
    prompts = read(examples, shuffle=config.data.shuffle, answers=rollouts.answers)
    others = read(held_out, shuffle=False, answers=rollouts.answers) if held_out else None
    if others is not None and len(others) < jax.process_count():
        raise ValueError(
            f"{len(others)} held-out prompts for {jax.process_count()} processes: each needs one "
            "at least"
        )
    longest = max(prompts.longest, 0 if others is None else others.longest)
    paid = attention_cost(policy.config, policy.options.attention)
    rollouts = batches.with_layout(rollouts, longest, paid)
    player = make_player(
        rollouts.options,
        tokenizer,
        (*examples, *held_out),
        longest=longest,
        max_length=config.max_length,
        rewarded="environment" in _kinds(config),
        end_tokens=policy.config.end_tokens,
    )
    lengths = config.max_length, longest
    engine = _make_engine(rollouts, policy, tokenizer, mesh, *lengths, export)
    opponent = make_opponent(rollouts, policy, reference, tokenizer, mesh, *lengths)
    sampler = PromptSampler(
        rollouts.options,
        engine,
        _scored(config, tokenizer, mesh, load_model),
        player,
        own_share=rollouts.own_share,
        taught=rollouts.taught,
        greedy=rollouts.greedy,
        opponent=opponent,
        facing=rollouts.facing,
        mixed=rollouts.reference_share > 0,
    )
    maker = RolloutMaker(rollouts, prompts, sampler, pad_id(tokenizer), policy, reference, mesh)
    return Rollouts(maker, others, text)


def _make_engine(
    rollouts: RolloutConfig,
    policy: Model,
    tokenizer: PreTrainedTokenizerBase,
    mesh: Mesh,
    max_length: int,
    longest: int,
    export: Export,
) -> Engine:
    """Make what samples the policy: a server, or this run's own devices."""
    if (server := rollouts.options.server).url:
        model = policy.config
        return Server(
            server,
            tokenizer,
            export=export,
            vocabulary=model.vocab_size,
            end_tokens=model.end_tokens,
        )
    where = generation_mesh(rollouts, policy, mesh)
    generator = make_generator(rollouts, policy, tokenizer, where, max_length, longest)
    reshard = make_resharder(policy, where) if rollouts.options.tensor else None
    return Local(generator, reshard=reshard)


def _kinds(config: Config) -> set[str]:
    """Return the kinds of the rewards that the config names."""
    return {term.kind for term in rewards.read(config.rewards)} if config.rewards else set()


def _scored(
    config: Config, tokenizer: PreTrainedTokenizerBase, mesh: Mesh, load_model: rewards.LoadModel
) -> rewards.WeightedRewards:
    """Load what samples are worth; nothing is, where the config names no reward.

    Raises:
        ValueError: as ``rewards.resolve``, or steps that the policy cannot end.
    """
    if not config.rewards:
        return rewards.WeightedRewards(())
    found = rewards.resolve(config.rewards, mesh=mesh, load_model=load_model, online=True)
    for name, _, term in found.step_terms:
        try:
            check_separator(term.separator, tokenizer)
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from None
    return found

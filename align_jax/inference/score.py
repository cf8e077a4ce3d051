# SPDX-License-Identifier: Apache-2.0
"""Scores by models: log-probabilities and values of a batch that exists, rewards of texts by a
reward model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from align_jax.core.schema import Batch, Example, Outputs
from align_jax.data import chat
from align_jax.inference.generate import bucket, context_mesh, local_rows
from align_jax.losses.logprobs import at_last, at_sources, token_outputs
from align_jax.models.model import LoadedModel, Model, Params
from align_jax.parallel.mesh import row_shards
from align_jax.parallel.sharding import put_batch


class Values(NamedTuple):
    """What a value head says of a batch; units of reward."""

    tokens: Float[Array, "N T"]  # of the state before each loss token
    after: Float[Array, "B R"]  # of the state behind each response's last token


@functools.partial(
    jax.jit, static_argnames=("model", "needs", "value_head", "chunk", "temperature")
)
def outputs_of(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    needs: tuple[str, ...] = (),
    value_head: str = "",
    chunk: int = 128,
    temperature: float | int = 1.0,
) -> tuple[Outputs, Values | None]:
    """Return what a model says of a batch, and its values, by one forward over whole rows.

    Args:
        model: static.
        params: its parameters.
        batch: the rows.
        needs: of ``losses.logprobs.TOKEN_FIELDS``, those that need no reference.
        value_head: the head that gives values; "" = none.
        chunk: loss positions of every row whose logits are alive at once.
        temperature: the logits are divided by it, as in sampling.

    Returns:
        The outputs, float32, and values or None; zero where ``loss_mask`` is false.
    """
    hidden, _ = model.hidden(
        params, batch.tokens, batch.segment_ids, batch.positions, batch.prefix_ids
    )

    def logits(chunk_hidden: Float[Array, "N c D"]) -> Float[Array, "N c V"]:
        return model.unembed(params, chunk_hidden) / temperature

    outputs = token_outputs(hidden, logits, batch, needs=needs, chunk=chunk)
    if not value_head:
        return outputs, None
    values = model.head(params, value_head, hidden)
    return outputs, Values(at_sources(values, batch), at_last(values, batch))


def rescore(
    model: Model, params: Params, batch: Batch, **options: Any
) -> tuple[Float[Array, "N T"], Values | None]:
    """Return a model's log-probability of each loss token in nats, and its values: see
    ``outputs_of``."""
    outputs, values = outputs_of(model, params, batch, **options)
    return outputs.token_logps, values


@functools.partial(jax.jit, static_argnames="model")
def scores(
    model: Model,
    params: Params,
    tokens: Int[Array, "N T"],
    lengths: Int[Array, "N"],
    places: Int[Array, "N P"],
) -> Float[Array, "N P"]:
    """Return what a score head says of some of each row's tokens.

    Args:
        model: static; with a score head.
        params: its parameters.
        tokens: padded on the right.
        lengths: real tokens of each row, at least 1.
        places: indices of the tokens.
    """
    index = jnp.arange(tokens.shape[1])[None, :]
    real: Bool[Array, "N T"] = index < lengths[:, None]
    hidden, _ = model.hidden(params, tokens, real.astype(jnp.int32), jnp.where(real, index, 0))
    # [N, T, D] -> [N, P, D]
    return model.head(params, "score", jnp.take_along_axis(hidden, places[:, :, None], axis=1))


class RewardModel:
    """Rewards by a model with a score head: ours, or a Hugging Face sequence classifier with one
    label.

    Of a whole completion the score is read at its last token, the end-of-turn token that the
    tokenizer's template or the end-of-sequence rule puts there; where that is the token that fills
    rows (``pad_token_id`` of config.json), at the one before it, as transformers reads it.

    Args:
        loaded: the model and its parameters, on the mesh.
        tokenizer: its tokenizer.
        rows: texts scored at once (a multiple of the mesh's row shards).
        max_length: tokens of prompt and completion, longer ones lose the prompt's beginning;
            default: the model's positions.
        mesh: where to run; None: the default device.

    Raises:
        ValueError: rows that the mesh does not divide.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rows: int = 16,
        max_length: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        shards = 1 if mesh is None else row_shards(mesh)
        if rows < 1 or rows % shards:
            raise ValueError(
                f"reward model rows = {rows} must be a positive multiple of the {shards} row shards"
            )
        self._model, self._params = loaded
        self._tokenizer, self._rows, self._mesh = tokenizer, rows, mesh
        limit = loaded.config.longest
        self._max_length = min(max_length or limit, limit)

    @property
    def chat(self) -> bool:
        """Whether its tokenizer has a chat template, so that it takes messages."""
        return bool(self._tokenizer.chat_template)

    def __call__(
        self, examples: Sequence[Example], finished: Sequence[bool] | None = None
    ) -> Float[np.ndarray, "n"]:
        """Return the reward of each example's first response, float32 [n].

        Args:
            examples: prompts with their completions.
            finished: whether each completion ended by itself; one that was cut off gets no end
                token.  None: all did.
        """
        texts: list[list[int]] = []
        places: list[list[int]] = []
        ends = set(self._tokenizer.all_special_ids)
        for number, example in enumerate(examples):
            encoded = chat.encode(example, self._tokenizer)
            response = encoded.responses[0]
            while finished is not None and not finished[number] and response:
                if response[-1] not in ends:
                    break
                response = response[:-1]
            text = [*encoded.prompt, *response][-self._max_length :]
            while len(text) > 1 and text[-1] == self._model.config.pad_token:
                text = text[:-1]
            texts.append(text)
            places.append([len(text) - 1])
        found = self._scores(texts, places, most=1)
        return np.array([one[0] for one in found], np.float32)

    def steps(self, examples: Sequence[Example], separator: str) -> list[Float[np.ndarray, "s"]]:
        """Return what a process reward model says of each step, at the last token of the separator
        behind it.

        Args:
            examples: prompts with one response of ``steps``; one without steps gets none.
            separator: as in training (``data.step_separator``).

        Returns:
            For each example its steps' scores; none of a response that is so long that its first
            step does not end within ``max_length`` tokens from its end.
        """
        texts: list[list[int]] = [[0]] * len(examples)
        places: list[list[int]] = [[]] * len(examples)
        there = [i for i, one in enumerate(examples) if one.steps]
        encoded = chat.encode_many(
            [examples[i] for i in there], self._tokenizer, separator=separator
        )
        for i, tokens in zip(there, encoded):
            whole = [*tokens.prompt, *tokens.responses[0]]
            cut = max(0, len(whole) - self._max_length)
            ends = len(tokens.prompt) + np.flatnonzero(tokens.masks[0]) - cut
            texts[i] = whole[cut:]
            places[i] = ends.tolist() if ends[0] >= 0 else []
        return self._scores(texts, places, most=0)

    def _scores(
        self, texts: Sequence[Sequence[int]], places: Sequence[Sequence[int]], *, most: int
    ) -> list[Float[np.ndarray, "s"]]:
        """Run the model over token ids, the short ones first; return what its head says at the
        places of each, which are at most so many (0: as many as there are)."""
        found = [np.zeros(0, np.float32)] * len(texts)
        # processes must run the same programs
        fixed = self._max_length if jax.process_count() > 1 else 0
        longest = max(map(len, places), default=0)
        order = np.argsort([len(text) for text in texts], kind="stable").tolist()
        rows = self._rows // jax.process_count()
        for begin in range(0, len(order), rows):
            chosen = order[begin : begin + rows]
            size = fixed or bucket(len(texts[chosen[-1]]), self._max_length)
            width = most or fixed or bucket(longest, size)
            tokens, lengths = np.zeros((rows, size), np.int32), np.ones(rows, np.int32)
            index = np.zeros((rows, width), np.int32)
            for row, i in enumerate(chosen):
                tokens[row, : len(texts[i])], lengths[row] = texts[i], len(texts[i])
                index[row, : len(places[i])] = places[i]
            arrays = (tokens, lengths, index)
            if self._mesh is not None:
                arrays = put_batch(self._mesh, arrays)
            with context_mesh(self._mesh):  # attention kernels and mixtures of experts look at it
                own = local_rows(scores(self._model, self._params, *arrays))
            for row, i in enumerate(chosen):
                found[i] = own[row, : len(places[i])]
        return found

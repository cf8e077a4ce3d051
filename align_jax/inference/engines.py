# SPDX-License-Identifier: Apache-2.0
"""Where completions come from: this mesh, or a server that speaks OpenAI's protocol (vLLM, SGLang),
behind one call.

An engine is called with requests and gives each one's completions; ``update`` brings it the newest
weights.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase

from align_jax.core.choose import choose
from align_jax.core.fields import is_number
from align_jax.core.options import ServerOptions
from align_jax.inference.client import RETRY_SECONDS, Client
from align_jax.inference.generate import (
    Completion,
    Generator,
    Request,
    before_stop,
    completion_text,
    stop_tokens,
)
from align_jax.models.model import Params

_TOKEN_PREFIX = "token_id:"  # how vLLM writes tokens under return_tokens_as_token_ids
_POSITIVE = 1e-3  # nats: a log-probability of 0, rounded
_LEAST = -3e38  # float32 holds no less
_BASE_BYTES, _TOKEN_BYTES = 1 << 20, 1 << 10  # of an answer: at all, and for each token


def _push_vllm(folder: str) -> tuple[str, dict[str, Any]]:
    return "/collective_rpc", {"method": "reload_weights"}  # VLLM_SERVER_DEV_MODE=1


def _push_sglang(folder: str) -> tuple[str, dict[str, Any]]:
    return "/update_weights_from_disk", {"model_path": folder}


# kind of server -> the POST (its path and body) after which it reads the weights of a folder anew
PUSHES: Mapping[str, Callable[[str], tuple[str, dict[str, Any]]]] = {
    "vllm": _push_vllm,
    "sglang": _push_sglang,
}
Report = Callable[[int], None]  # is told how many completions are done


@runtime_checkable
class Engine(Protocol):
    """What generates."""

    def __call__(
        self, requests: Sequence[Request], report: Report | None = ...
    ) -> list[list[Completion]]:
        """Return each request's completions."""

    def stream(self, request: Request) -> Iterator[Completion]:
        """Give one completion each time that it has grown, at last the whole."""

    def update(self, params: Params) -> None:
        """Take the newest parameters."""

    def release(self) -> None:
        """Let go of them until the next update: training wants the memory."""


class Local:
    """Generation in this program, on this mesh.

    Args:
        generator: the compiled generation.
        params: the model's parameters.
        reshard: brings newer ones to where generation wants them
            (``resharding.make_resharder``); None: they stay where they lie.
    """

    def __init__(
        self,
        generator: Generator,
        params: Params | None = None,
        reshard: Callable[[Params], Params] | None = None,
    ) -> None:
        self._generator, self._params, self._reshard = generator, params, reshard

    def __call__(
        self, requests: Sequence[Request], report: Report | None = None
    ) -> list[list[Completion]]:
        """Return each request's completions.

        Raises:
            ValueError: there are no parameters: none were given, or they were let go of.
        """
        if self._params is None:
            raise ValueError("the engine has no parameters: update it first")
        return self._generator(self._params, requests, report)

    def stream(self, request: Request) -> Iterator[Completion]:
        """Give one completion token by token, as `Generator.stream`.

        Raises:
            ValueError: there are no parameters.
        """
        if self._params is None:
            raise ValueError("the engine has no parameters: update it first")
        return self._generator.stream(self._params, request)

    def update(self, params: Params) -> None:
        """Take the newest parameters."""
        self._generator.forget()
        self._params = params if self._reshard is None else self._reshard(params)

    def release(self) -> None:
        """Let go of them, of the copy that they may be, and of the cache."""
        self._generator.forget()
        self._params = None


def ordered_choices(request: Request, answer: Any) -> list[Mapping[str, Any]]:
    """Return the choices of an answer by their index.

    Raises:
        ValueError: not as many as were asked for, each once, or for another prompt.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        raise ValueError("expected an object with choices, a list of objects")
    if len(choices) != request.samples:
        raise ValueError(f"gave {len(choices)} completions for a request of {request.samples}")
    indices = [one.get("index") for one in choices]
    if any(type(index) is not int for index in indices) or set(indices) != set(range(len(choices))):
        raise ValueError(f"expected choices with index 0 to {len(choices) - 1}, got {indices}")
    usage = answer.get("usage")
    taken = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if taken is not None and taken != len(request.prompt):
        raise ValueError(f"took a prompt of {len(request.prompt)} tokens for one of {taken}")
    return sorted(choices, key=lambda one: one["index"])


def read_choice(
    request: Request, choice: Mapping[str, Any], vocabulary: int
) -> tuple[list[int], list[float], str]:
    """Return a completion's token ids, their log-probabilities (nats) and how it finished.

    Args:
        request: what was asked.
        choice: what a server that knows ``return_tokens_as_token_ids`` gave.
        vocabulary: token ids are below it.

    Raises:
        ValueError: a completion that cannot be one of the request's.
    """
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and echoed != list(request.prompt):
        raise ValueError("its prompt_token_ids are not the prompt that was sent")
    logprobs = choice.get("logprobs")
    logprobs = logprobs if isinstance(logprobs, dict) else {}
    tokens, logps = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(logps, list) or not tokens:
        raise ValueError(
            "expected logprobs with tokens and token_logprobs of at least one token; expected a "
            "server that knows logprobs and return_tokens_as_token_ids, such as vLLM"
        )
    ids = [_token_id(token, vocabulary) for token in tokens]
    if len(ids) > request.max_new_tokens:
        raise ValueError(f"gave {len(ids)} tokens for max_tokens = {request.max_new_tokens}")
    if len(logps) != len(ids):
        raise ValueError(f"gave {len(logps)} log-probabilities for {len(ids)} tokens")
    for i, logp in enumerate(logps):
        if not is_number(logp) or not _LEAST <= logp <= _POSITIVE:
            raise ValueError(f"token_logprobs[{i}]: expected a number below 0, got {logp!r:.60}")
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length"):
        raise ValueError(f"finish_reason: expected 'stop' or 'length', got {finish!r}")
    return ids, [float(logp) for logp in logps], finish


def _token_id(token: Any, vocabulary: int) -> int:
    found = re.fullmatch(rf"{_TOKEN_PREFIX}([0-9]{{1,9}})", token) if type(token) is str else None
    if found is None:
        raise ValueError(
            f"gave {token!r}, no token id; expected a server that knows "
            "return_tokens_as_token_ids, such as vLLM"
        )
    if int(found[1]) >= vocabulary:
        raise ValueError(f"gave token id {found[1]}; the model has {vocabulary}: another model?")
    return int(found[1])


class Server:
    """Generation by an OpenAI-compatible server that takes and gives token ids (vLLM on TPU or
    GPU).

    Every setting of the sampling is sent, neutral ones too: what is absent a server fills from the
    model's ``generation_config.json``.  The log-probabilities are the server's, of the model's own
    distribution or of that after temperature and filters (``options.logprobs``); the others are not
    told and come as NaN, where the sampling makes them differ.

    Args:
        options: where it is and what it serves.
        tokenizer: the model's.
        export: writes parameters to a folder as a Hugging Face checkpoint, for `update`.
        vocabulary: the model's token ids; 0 = the tokenizer's.
        end_tokens: those of the model's checkpoint.
        retry_seconds: as `Client` takes them.

    Raises:
        ValueError: an unknown kind of server, or as `Client`.
    """

    def __init__(
        self,
        options: ServerOptions,
        tokenizer: PreTrainedTokenizerBase,
        *,
        export: Callable[[str, Params], None] | None = None,
        vocabulary: int = 0,
        end_tokens: Sequence[int] = (),
        retry_seconds: Sequence[float] = RETRY_SECONDS,
    ) -> None:
        self._push = choose(PUSHES, options.push, "config.rollout.server.push")
        self._client = Client(
            options.url,
            key_variable=options.key_variable,
            timeout_seconds=options.timeout_seconds,
            retry_seconds=retry_seconds,
            allow_http=options.allow_http,
        )
        self._options, self._tokenizer, self._export = options, tokenizer, export
        self._vocabulary = vocabulary or len(tokenizer)
        self._stop_ids = stop_tokens(tokenizer, end_tokens)

    def __call__(
        self, requests: Sequence[Request], report: Report | None = None
    ) -> list[list[Completion]]:
        """Return each request's completions.

        Raises:
            ConnectionError: as `Client.post`.
            ValueError: an answer that is not what was asked for.
        """
        found = []
        with concurrent.futures.ThreadPoolExecutor(self._options.concurrency) as pool:
            for completions in pool.map(self._complete, requests):
                if report is not None:
                    report(len(completions))
                found.append(completions)
        return found

    def stream(self, request: Request) -> Iterator[Completion]:
        """Give one completion, whole: the server is asked once."""
        yield from self._complete(dataclasses.replace(request, samples=1))

    def _complete(self, request: Request) -> list[Completion]:
        sampling = request.sampling
        body = {
            "model": self._options.model,
            "prompt": list(request.prompt),
            "n": request.samples,
            "max_tokens": request.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,  # SGLang and older vLLM refuse 0
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(request.stop),
            "stop_token_ids": list(self._stop_ids),
            "seed": request.seed,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
        }
        most = _BASE_BYTES + _TOKEN_BYTES * request.samples * request.max_new_tokens
        answer = self._client.post("/v1/completions", body, most=most)
        try:
            read = [
                read_choice(request, choice, self._vocabulary)
                for choice in ordered_choices(request, answer)
            ]
        except ValueError as error:
            raise ValueError(
                f"{self._client.url}: {error}; the answer begins {self._client.excerpt(answer)}"
            ) from None
        return [self._completion(request, *one) for one in read]

    def _completion(
        self, request: Request, ids: list[int], logps: list[float], finish: str
    ) -> Completion:
        text = completion_text(self._tokenizer, request.prompt, ids, self._stop_ids)
        stopped = before_stop(text, request.stop)
        told, untold = np.array(logps, np.float32), np.full(len(ids), np.nan, np.float32)
        same, raw = not request.sampling.filters, self._options.logprobs == "raw"
        return Completion(
            np.array(ids, np.int32),
            told if same or raw else untold,
            told if same or not raw else untold,
            text if stopped is None else stopped,
            finish,
        )

    def update(self, params: Params) -> None:
        """Write the parameters as a Hugging Face checkpoint and have the server read it.

        Raises:
            ValueError: no folder for them, or no ``export`` was given.
            ConnectionError: as `Client.post`.
        """
        if not self._options.weights or self._export is None:
            raise ValueError(
                "config.rollout.server.weights is empty: pushing weights to a server needs a "
                "folder that it sees"
            )
        folder = str(pathlib.Path(self._options.weights).absolute())
        self._export(folder, params)
        route, body = self._push(folder)
        answer = self._client.post(route, body)
        if isinstance(answer, dict) and answer.get("success") is False:  # SGLang's
            raise ConnectionError(
                f"{self._client.url}{route} did not take the weights: "
                f"{self._client.excerpt(answer)}"
            )

    def release(self) -> None:
        """Do nothing: the server's weights are its own."""

# SPDX-License-Identifier: Apache-2.0
"""Where completions come from: this mesh, or a server that speaks OpenAI's protocol (vLLM, SGLang),
behind one call.

An engine is called with requests and gives each one's completions; ``update`` brings it the newest
weights.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase

from align_jax.core.choose import choose
from align_jax.core.options import ServerOptions
from align_jax.inference.generate import (
    Completion,
    Generator,
    Request,
    before_stop,
    completion_text,
)
from align_jax.models.model import Params

_TOKEN_PREFIX = "token_id:"  # how vLLM writes tokens under return_tokens_as_token_ids
_RETRY_SECONDS = (1.0, 5.0, 20.0)


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

    def update(self, params: Params) -> None:
        """Take the newest parameters."""
        self._params = params if self._reshard is None else self._reshard(params)

    def release(self) -> None:
        """Let go of them, and of the copy that they may be."""
        self._params = None


class Client:
    """A small client of an OpenAI-compatible server.

    Args:
        url: of the server, up to and without ``/v1``.
        key_variable: environment variable with the API key; "" or unset: none is sent.
        timeout_seconds: for one answer.
        retry_seconds: waits before each new try after a network error or a status of 429 or 5xx.
    """

    def __init__(
        self,
        url: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        timeout_seconds: float = 600.0,
        retry_seconds: Sequence[float] = _RETRY_SECONDS,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout, self._retries = timeout_seconds, tuple(retry_seconds)
        key = os.environ.get(key_variable, "") if key_variable else ""
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def post(self, route: str, body: Mapping[str, Any]) -> Any:
        """Post JSON and return the JSON of the answer (None for an empty one).

        Raises:
            ConnectionError: no answer, or an error that retrying did not mend; the server's words
                are quoted.
        """
        request = urllib.request.Request(self.url + route, json.dumps(body).encode(), self._headers)
        for wait in (*self._retries, None):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    text = answer.read()
                    return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.read()[:300].decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    break
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                problem = str(error)
            if wait is not None:
                time.sleep(wait)
        raise ConnectionError(f"POST {self.url}{route}: {problem}")

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """Return the text of one chat completion."""
        body = {"model": model, "messages": list(messages), **options}
        return self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]


class Server:
    """Generation by an OpenAI-compatible server that takes and gives token ids (vLLM on TPU or
    GPU).

    The log-probabilities are the server's, of the model's own distribution (vLLM's
    ``raw_logprobs``); those of the distribution after temperature and filters are not told and come
    as NaN.

    Args:
        options: where it is and what it serves.
        tokenizer: the model's.
        export: writes parameters to a folder as a Hugging Face checkpoint, for `update`.
        retry_seconds: as `Client` takes them.

    Raises:
        ValueError: an unknown kind of server.
    """

    def __init__(
        self,
        options: ServerOptions,
        tokenizer: PreTrainedTokenizerBase,
        *,
        export: Callable[[str, Params], None] | None = None,
        retry_seconds: Sequence[float] = _RETRY_SECONDS,
    ) -> None:
        self._push = choose(PUSHES, options.push, "config.rollout.server.push")
        self._client = Client(
            options.url,
            key_variable=options.key_variable,
            timeout_seconds=options.timeout_seconds,
            retry_seconds=retry_seconds,
        )
        self._options, self._tokenizer, self._export = options, tokenizer, export

    def __call__(
        self, requests: Sequence[Request], report: Report | None = None
    ) -> list[list[Completion]]:
        """Return each request's completions.

        Raises:
            ConnectionError: as `Client.post`.
            ValueError: an answer without token ids, or with fewer completions than asked for.
        """
        found = []
        with concurrent.futures.ThreadPoolExecutor(self._options.concurrency) as pool:
            for completions in pool.map(self._complete, requests):
                if report is not None:
                    report(len(completions))
                found.append(completions)
        return found

    def _complete(self, request: Request) -> list[Completion]:
        sampling = request.sampling
        body = {
            "model": self._options.model,
            "prompt": list(request.prompt),
            "n": request.samples,
            "max_tokens": request.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
        }
        optional = {"top_k": sampling.top_k, "min_p": sampling.min_p, "stop": list(request.stop)}
        body |= {name: value for name, value in optional.items() if value}
        if sampling.repetition_penalty != 1.0:
            body["repetition_penalty"] = sampling.repetition_penalty
        choices = sorted(
            self._client.post("/v1/completions", body)["choices"], key=lambda one: one["index"]
        )
        if len(choices) != request.samples:
            raise ValueError(
                f"{self._client.url} gave {len(choices)} completions for a request of "
                f"{request.samples}"
            )
        return [self._read(request, choice) for choice in choices]

    def _read(self, request: Request, choice: Mapping[str, Any]) -> Completion:
        logprobs = choice.get("logprobs") or {}
        tokens = logprobs.get("tokens") or []
        if not tokens or not all(token.startswith(_TOKEN_PREFIX) for token in tokens):
            raise ValueError(
                f"{self._client.url} gave no token ids ({tokens[:3]}); expected a server that "
                "knows return_tokens_as_token_ids, such as vLLM"
            )
        ids = np.array([int(token.removeprefix(_TOKEN_PREFIX)) for token in tokens], np.int32)
        text = completion_text(self._tokenizer, request.prompt, ids.tolist())
        stopped = before_stop(text, request.stop)
        return Completion(
            ids,
            np.array(logprobs["token_logprobs"], np.float32),
            np.full(len(ids), np.nan, np.float32),
            text if stopped is None else stopped,
            "stop" if choice["finish_reason"] == "stop" else "length",
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
        self._client.post(*self._push(folder))

    def release(self) -> None:
        """Do nothing: the server's weights are its own."""

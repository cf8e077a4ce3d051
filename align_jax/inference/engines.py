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

from align_jax.inference.generate import Completion, Generator, Request, completion_text

_TOKEN_PREFIX = "token_id:"  # how vLLM writes tokens under return_tokens_as_token_ids
_RETRY_SECONDS = (1.0, 5.0, 20.0)

# Server -> how it reads weights anew after they were written to a folder: path of a POST, and its
# body.
PUSHES: Mapping[str, Callable[[str], tuple[str, dict[str, Any]]]] = {
    # VLLM_SERVER_DEV_MODE=1
    "vllm": lambda folder: ("/collective_rpc", {"method": "reload_weights"}),
    "sglang": lambda folder: ("/update_weights_from_disk", {"model_path": folder}),
}


@runtime_checkable
class Engine(Protocol):
    """What generates."""

    def __call__(
        self, requests: Sequence[Request], report: Callable[[int], None] = ...
    ) -> list[list[Completion]]:
        """Return each request's completions."""

    def update(self, params: Any) -> None:
        """Take the newest parameters."""

    def release(self) -> None:
        """Let go of them until the next update: training wants the memory."""


class Local:
    """Generation in this program, on this mesh.

    Args:
        generator: the compiled generation.
        params: the model's parameters.
        place: brings newer ones to where generation wants them (``layout.placer``); default: they
            stay where they lie.
    """

    def __init__(
        self, generator: Generator, params: Any, place: Callable[[Any], Any] = lambda params: params
    ) -> None:
        self._generator, self._params, self._place = generator, params, place

    def __call__(
        self, requests: Sequence[Request], report: Callable[[int], None] = lambda done: None
    ) -> list[list[Completion]]:
        """Return each request's completions."""
        return self._generator(self._params, requests, report)

    def update(self, params: Any) -> None:
        """Take the newest parameters."""
        self._params = self._place(params)

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
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )

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
        url: of the server.
        model: the name that it serves.
        tokenizer: the model's.
        concurrency: requests under way at once.
        weights: folder, seen by both, into which `update` writes a Hugging Face checkpoint.
        export: writes parameters to a folder as a Hugging Face checkpoint.
        push: the kind of server, a key of ``PUSHES``: how it is told to read the weights.
        client: options of `Client`.

    Raises:
        ValueError: an unknown kind of server.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        concurrency: int = 32,
        weights: str = "",
        export: Callable[[str, Any], None] | None = None,
        push: str = "vllm",
        **client: Any,
    ) -> None:
        if push not in PUSHES:
            raise ValueError(f"unknown kind of server {push!r}; known: {sorted(PUSHES)}")
        self._client, self._model, self._tokenizer = Client(url, **client), model, tokenizer
        self._concurrency, self._weights, self._export, self._push = (
            concurrency,
            weights,
            export,
            push,
        )

    def __call__(
        self, requests: Sequence[Request], report: Callable[[int], None] = lambda done: None
    ) -> list[list[Completion]]:
        """Return each request's completions.

        Raises:
            ConnectionError: as `Client.post`.
            ValueError: an answer without token ids, or with fewer completions than asked for.
        """
        found = []
        with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
            for completions in pool.map(self._complete, requests):
                report(len(completions))
                found.append(completions)
        return found

    def _complete(self, request: Request) -> list[Completion]:
        sampling = request.sampling
        body = {
            "model": self._model,
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
                f"{self._client.url} gave {len(choices)} completions for a request "
                f"of {request.samples}"
            )
        return [self._read(request, choice) for choice in choices]

    def _read(self, request: Request, choice: Mapping[str, Any]) -> Completion:
        logprobs = choice.get("logprobs") or {}
        tokens = logprobs.get("tokens") or []
        if not tokens or not all(token.startswith(_TOKEN_PREFIX) for token in tokens):
            raise ValueError(
                f"{self._client.url} gave no token ids ({tokens[:3]}); expected a "
                "server that knows "
                "return_tokens_as_token_ids, such as vLLM"
            )
        ids = np.array([int(token.removeprefix(_TOKEN_PREFIX)) for token in tokens], np.int32)
        text = completion_text(self._tokenizer, request.prompt, ids.tolist())
        places = [place for place in map(text.find, request.stop) if place >= 0]
        return Completion(
            ids,
            np.array(logprobs["token_logprobs"], np.float32),
            np.full(len(ids), np.nan, np.float32),
            text[: min(places)] if places else text,
            "stop" if choice["finish_reason"] == "stop" else "length",
        )

    def update(self, params: Any) -> None:
        """Write the parameters as a Hugging Face checkpoint and have the server read it.

        Raises:
            ValueError: no ``weights`` folder or no ``export`` was given.
            ConnectionError: as `Client.post`.
        """
        if not self._weights or self._export is None:
            raise ValueError(
                "pushing weights to a server needs `weights`, a folder that it sees, and `export`"
            )
        folder = str(pathlib.Path(self._weights).absolute())
        self._export(folder, params)
        self._client.post(*PUSHES[self._push](folder))

    def release(self) -> None:
        """Do nothing: the server's weights are its own."""

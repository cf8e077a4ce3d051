# SPDX-License-Identifier: Apache-2.0
"""Engines: the OpenAI-compatible one against a small server on this machine."""

import json
import math

import numpy as np
import pytest
from serving import Quiet, serving

from align_jax.core import config as configs
from align_jax.core.options import ServerOptions
from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.client import Client
from align_jax.inference.engines import Server
from align_jax.inference.generate import Request
from align_jax.inference.samplers import Sampling


class Stub(Quiet):
    """Answers a completion by the prompt's tokens plus one; fails the first call with 503."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        status, answer = 200, {}
        if self.path == "/v1/completions" and len(self.server.seen) == 1:
            status, answer = 503, {"error": "warming up"}
        elif self.path == "/v1/completions":
            tokens = [token + 1 for token in body["prompt"]]
            names = [str(t) if body["model"] == "words" else f"token_id:{t}" for t in tokens]
            answer = {
                "choices": [
                    {
                        "index": i,
                        "text": "?",
                        "finish_reason": "stop" if i else "length",
                        "logprobs": {
                            "tokens": names,
                            "token_logprobs": [-0.5 * (i + 1)] * len(tokens),
                        },
                    }
                    for i in reversed(range(body["n"]))
                ]
            }
        elif self.path == "/v1/chat/completions":
            answer = {
                "choices": [{"message": {"content": body["messages"][-1]["content"].upper()}}]
            }
        elif self.path == "/missing":
            status, answer = 404, {"error": "no such route"}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


@pytest.fixture()
def server():
    with serving(Stub) as server:
        server.seen = []
        yield server


def make(server, export=None, **options):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    given = ServerOptions(url=url, **{"model": "m", **options})
    ends = dict(end_tokens=(7,), retry_seconds=(0.01,))
    return Server(given, load_tokenizer("byte"), export=export, **ends)


def test_completions_come_back_as_tokens_with_log_probabilities(server):
    request = Request(
        (65, 66),
        samples=2,
        max_new_tokens=7,
        sampling=Sampling(temperature=0.5, top_k=3),
        seed=9,
        stop=("C",),
    )
    done = []
    ((first, second),) = make(server)([request], done.append)
    assert done == [2]
    assert first.tokens.tolist() == [66, 67] and first.text == "B" and first.finish == "length"
    np.testing.assert_array_equal(first.token_logps, np.float32([-0.5, -0.5]))
    np.testing.assert_array_equal(second.token_logps, np.float32([-1.0, -1.0]))
    assert second.finish == "stop" and np.isnan(second.drawn_logps).all()
    assert make(server)([Request((65, 6))])[0][0].text == "B"  # 7 is an end, and no text
    assert len(server.seen) == 3  # the first try met a 503
    assert server.seen[1][1] == {
        "model": "m",
        "prompt": [65, 66],
        "n": 2,
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 1.0,
        "seed": 9,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
        "top_k": 3,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": ["C"],
        "stop_token_ids": [7, load_tokenizer("byte").eos_token_id],
    }


@pytest.mark.parametrize(
    "temperature,logprobs,known",
    [(1.0, "raw", "both"), (1.0, "processed", "both"), (0.5, "processed", "drawn_logps")],
)
def test_log_probabilities_are_of_what_the_server_says(server, temperature, logprobs, known):
    server.seen.append(None)
    request = Request((65,), sampling=Sampling(temperature=temperature))
    (((one,)),) = make(server, logprobs=logprobs)([request])
    for name in ("token_logps", "drawn_logps"):
        expected = np.float32([-0.5]) if known in (name, "both") else np.float32([np.nan])
        np.testing.assert_array_equal(getattr(one, name), expected)


def test_neutral_settings_are_sent_too_since_a_server_fills_what_is_absent(server):
    server.seen.append(None)
    make(server)([Request((65,), sampling=Sampling())])
    sent = server.seen[-1][1]
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "stop": []}
    assert sent | neutral | {"repetition_penalty": 1.0, "max_tokens": 256} == sent


def good(i=0, **logprobs):
    told = {"tokens": ["token_id:66", "token_id:67"], "token_logprobs": [-0.5, -0.0], **logprobs}
    return {"index": i, "text": "?", "finish_reason": "stop", "logprobs": told}


# what the server answers to a request of two completions, and what is said of it
ANSWERS = {
    "no object": ([], "an object with choices"),
    "choices of texts": ({"choices": ["a", "b"]}, "a list of objects"),
    "one too few": ({"choices": [good()]}, "1 completions for a request of 2"),
    "one too many": ({"choices": [good(i) for i in range(3)]}, "3 completions for a request of 2"),
    "twice the same": ({"choices": [good(), good()]}, r"index 0 to 1, got \[0, 0\]"),
    "no index": ({"choices": [good(), good(None)]}, r"index 0 to 1, got \[0, None\]"),
    "another prompt": (
        {"choices": [good(0) | {"prompt_token_ids": [1, 65]}, good(1)]},
        "not the prompt that was sent",
    ),
    "a longer prompt": (
        {"choices": [good(0), good(1)], "usage": {"prompt_tokens": 2}},
        "a prompt of 1 tokens for one of 2",
    ),
    "no logprobs": ({"choices": [good(0) | {"logprobs": None}, good(1)]}, "at least one token"),
    "no tokens": ({"choices": [good(0, tokens=[], token_logprobs=[]), good(1)]}, "at least one"),
    "text": ({"choices": [good(0, tokens=["a", "b"]), good(1)]}, "'a', no token id"),
    "negative id": ({"choices": [good(0, tokens=["token_id:-1"] * 2), good(1)]}, "no token id"),
    "another vocabulary": (
        {"choices": [good(0, tokens=["token_id:66", "token_id:5000"]), good(1)]},
        "token id 5000; the model has",
    ),
    "too long": (
        {"choices": [good(0, tokens=["token_id:1"] * 9, token_logprobs=[-1.0] * 9), good(1)]},
        "9 tokens for max_tokens = 4",
    ),
    "too few logprobs": ({"choices": [good(0, token_logprobs=[-1.0]), good(1)]}, "1 log-prob"),
    "logprob null": ({"choices": [good(0, token_logprobs=[None, -1.0]), good(1)]}, "got None"),
    "logprob nan": ({"choices": [good(0, token_logprobs=[math.nan, -1.0]), good(1)]}, "got nan"),
    "logprob -inf": ({"choices": [good(0, token_logprobs=[-math.inf, 0]), good(1)]}, "got -inf"),
    "logprob above 0": ({"choices": [good(0, token_logprobs=[-1.0, 0.5]), good(1)]}, r"\[1\].*0.5"),
    "logprob text": ({"choices": [good(0, token_logprobs=["-1", -1.0]), good(1)]}, "got '-1'"),
    "aborted": ({"choices": [good(0) | {"finish_reason": "abort"}, good(1)]}, "got 'abort'"),
    "unfinished": ({"choices": [good(0) | {"finish_reason": None}, good(1)]}, "got None"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_was_not_asked_for_is_refused(server, monkeypatch, name):
    answer, message = ANSWERS[name]
    engine = make(server)
    monkeypatch.setattr(Client, "post", lambda self, route, body, most: answer)
    with pytest.raises(ValueError, match=rf"http://127.0.0.1:\d*: .*{message}.*; the answer beg"):
        engine([Request((65,), samples=2, max_new_tokens=4)])


def test_an_answer_with_all_that_servers_add_is_taken(server, monkeypatch):
    answer = {
        "choices": [good(i) | {"prompt_token_ids": [65]} for i in (1, 0)],
        "usage": {"prompt_tokens": 1},
    }
    engine = make(server)
    monkeypatch.setattr(Client, "post", lambda self, route, body, most: answer)
    ((first, second),) = engine([Request((65,), samples=2, max_new_tokens=2)])
    assert first.tokens.tolist() == second.tokens.tolist() == [66, 67]


def test_a_server_that_did_not_take_the_weights_is_named(server, monkeypatch, tmp_path):
    engine = make(server, weights=str(tmp_path), export=lambda *args: None, push="sglang")
    answer = {"success": False, "message": "no such folder"}
    monkeypatch.setattr(Client, "post", lambda self, route, body: answer)
    with pytest.raises(ConnectionError, match="did not take the weights.*no such folder"):
        engine.update({})


@pytest.mark.parametrize(
    "given,message",
    [
        ({"url": "http://gpu7:8000/v1"}, "server.url: 'http://gpu7:8000/v1' is plain http.*allow_"),
        ({"url": "https://a:hunter2@b.c"}, "server.url: expected an address without user"),
        ({"key_variable": "sk-hunter2"}, "server.key_variable: .* not the key itself"),
    ],
)
def test_the_config_names_an_address_or_a_key_that_may_not_be(given, message):
    config = configs.defaults()
    config.rollout.server.update({"model": "m", **given})
    with pytest.raises(ValueError, match=message) as caught:
        configs.read(config)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "push,route", [("vllm", "/collective_rpc"), ("sglang", "/update_weights_from_disk")]
)
def test_update_exports_the_weights_and_tells_the_server(server, tmp_path, push, route):
    written = []
    make(
        server, weights=str(tmp_path), export=lambda *args: written.append(args), push=push
    ).update({"w": 1})
    assert written == [(str(tmp_path), {"w": 1})] and server.seen[0][0] == route


def test_a_server_without_token_ids_is_refused(server):
    server.seen.append(None)
    with pytest.raises(ValueError, match="return_tokens_as_token_ids"):
        make(server, model="words")([Request((1,))])


def test_errors_quote_the_server_and_name_what_is_missing(server):
    with pytest.raises(ConnectionError, match="404.*no such route"):
        Client(f"http://127.0.0.1:{server.server_port}", retry_seconds=()).post("/missing", {})
    with pytest.raises(ValueError, match="weights"):
        make(server).update({})
    with pytest.raises(ValueError, match="did you mean 'vllm'"):
        make(server, push="vlm")


def test_chat_sends_the_key_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    client = Client(f"http://127.0.0.1:{server.server_port}", key_variable="MY_KEY")
    assert client.chat("judge", [{"role": "user", "content": "hello"}], max_tokens=3) == "HELLO"
    assert server.seen[0][1]["max_tokens"] == 3 and server.seen[0][2] == "Bearer secret"

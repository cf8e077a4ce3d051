# SPDX-License-Identifier: Apache-2.0
"""Engines: the OpenAI-compatible one against a small server on this machine."""

import http.server
import json
import threading

import numpy as np
import pytest

from align_jax.core.options import ServerOptions
from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.engines import Client, Server
from align_jax.inference.generate import Request
from align_jax.inference.samplers import Sampling


class Stub(http.server.BaseHTTPRequestHandler):
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

    def log_message(self, *args):
        pass


@pytest.fixture()
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def make(server, export=None, **options):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    given = ServerOptions(url=url, **{"model": "m", **options})
    return Server(given, load_tokenizer("byte"), export=export, retry_seconds=(0.01,))


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
    assert len(server.seen) == 2  # the first try met a 503
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
        "stop": ["C"],
    }


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

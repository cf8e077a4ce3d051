# SPDX-License-Identifier: Apache-2.0
"""Servers whose answers are damaged, as JSON or as bytes: what they say is checked, or they are
named."""

import functools
import json
import math

import hypothesis
import junk
import pytest
from hypothesis import strategies as st
from oracle import Wrong, fuzzed, judge, same
from serving import Quiet, serving

from align_jax.core.options import ServerOptions
from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.client import Client
from align_jax.inference.engines import Server
from align_jax.inference.generate import Request
from align_jax.online import judges, rewards

TOKENIZER = load_tokenizer("byte")
REQUEST = Request((65, 66), samples=2, max_new_tokens=4)
CHAT = {
    "id": "x",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Score: 7"},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 2},
}
TOKENS = {
    "choices": [
        {
            "index": i,
            "text": "?",
            "finish_reason": "stop",
            "logprobs": {"tokens": ["token_id:67", "token_id:68"], "token_logprobs": [-0.5, -1]},
        }
        for i in range(2)
    ],
    "usage": {"prompt_tokens": 2},
}  # fmt: skip
SCORES = ("7", "Score: 7/10", "Rating = 11", "-1", "1e400", "9" * 500, "٣", "7,5", "nan", "", "no")


class Handler(Quiet):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status, headers, body = self.server.says
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def server():
    with serving(Handler) as server:
        yield server


@st.composite
def answers(draw, good):
    """(status, headers, body)."""
    status = draw(st.sampled_from((200,) * 8 + (201, 204, 302, 400, 500)))
    headers = draw(
        st.sampled_from(
            ({}, {}, {}, {"Content-Length": "-1"}, {"Content-Length": "x"}, {"Location": "/a"})
            + ({"Content-Encoding": "gzip"}, {"Content-Type": "text/html; charset=utf-16"})
            + ({"Transfer-Encoding": "chunked"}, {"Retry-After": "1e9"})
        )
    )
    value = draw(junk.mutated(good, least=0))
    if draw(st.booleans()) and "choices" in value:
        score = draw(st.sampled_from(SCORES))
        value = json.loads(json.dumps(value).replace("Score: 7", score))
    body = json.dumps(value).encode()
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=6)) + body[at + draw(st.integers(0, 4)) :]
    return status, headers, body


def url_of(server):
    return f"http://127.0.0.1:{server.server_port}"


@fuzzed(short=40, share=1)
@hypothesis.given(says=answers(CHAT))
def test_a_chat_s_answer_is_the_one_that_was_given_or_the_server_is_named(server, says):
    server.says = says

    def check(found):
        same(found, json.loads(says[2])["choices"][0]["message"]["content"], "text")

    client = Client(url_of(server), timeout_seconds=1.0, retry_seconds=())
    judge("chats", says, lambda: client.chat("m", []), names=[url_of(server)], check=check)


@fuzzed(short=40, share=1)
@hypothesis.given(says=answers(CHAT))
def test_a_judge_s_score_is_on_its_scale_or_the_server_is_named(server, says, monkeypatch):
    monkeypatch.setattr(judges, "Client", functools.partial(Client, retry_seconds=()))
    server.says = says
    score = judges.judge(url=url_of(server), model="m", timeout_seconds=1.0)
    weighted = rewards.WeightedRewards((("j", 1.0, score),))

    def check(found):
        content = json.loads(says[2])["choices"][0]["message"]["content"]
        if not 0 <= found <= 1 or (content == "Score: 7" and found != pytest.approx(0.7)):
            raise Wrong(f"{content!r} became {found}")

    judge(
        "judges",
        says,
        lambda: float(weighted(["p"], ["a"])[0][0]),
        names=[url_of(server)],
        check=check,
    )


@fuzzed(short=25, share=1)
@hypothesis.given(says=answers(CHAT), abstain=st.booleans())
def test_a_verdict_is_the_letter_that_was_given_or_the_server_is_named(
    server, says, abstain, monkeypatch
):
    monkeypatch.setattr(judges, "Client", functools.partial(Client, retry_seconds=()))
    status, headers, body = says
    server.says = status, headers, body.replace(b"Score: 7", b"Verdict: A")
    asked = judges.pair_judge(url_of(server), "m", timeout_seconds=1.0, abstain=abstain)
    weighted = rewards.WeightedRewards((), pairs=("j", asked))

    def check(found):
        [one] = found
        same(one.wins.tolist(), [0.5, 0.5], "wins")  # the same answer in both orders
        if one.ties + one.disagreements + one.silent != 1 or (one.silent and not abstain):
            raise Wrong(f"it became {one}")

    judge(
        "pairs",
        says,
        lambda: weighted.compared(["p"], [["a", "b"]], 2, False),
        names=[url_of(server)],
        check=check,
    )


@fuzzed(short=40, share=1)
@hypothesis.given(says=answers(TOKENS))
def test_a_server_s_tokens_are_as_asked_or_the_server_is_named(server, says):
    server.says = says
    options = ServerOptions(url=url_of(server), model="m", timeout_seconds=1.0)
    engine = Server(options, TOKENIZER, retry_seconds=())

    def check(found):
        choices = sorted(json.loads(says[2])["choices"], key=lambda one: one["index"])
        same(len(found), REQUEST.samples, "completions")
        for one, choice in zip(found, choices):
            named = [f"token_id:{token}" for token in one.tokens]
            same(named, choice["logprobs"]["tokens"], "tokens")
            if len(one.tokens) > REQUEST.max_new_tokens or max(one.tokens) >= len(TOKENIZER):
                raise Wrong(f"tokens {one.tokens}")
            if not all(-math.inf < logp <= 1e-3 for logp in one.token_logps):
                raise Wrong(f"log-probabilities {one.token_logps}")

    judge("servers", says, lambda: engine([REQUEST])[0], names=[url_of(server)], check=check)

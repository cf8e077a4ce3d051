# SPDX-License-Identifier: Apache-2.0
"""The client against a server that misbehaves in each way: one message, soon, without the key."""

import email.utils
import json
import logging
import threading
import time

import pytest
from serving import Quiet, serving

from align_jax.core.address import server_address
from align_jax.inference.client import Client, retry_after

KEY = "sk-very-secret"
GOOD = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}
LIMIT = 0.3  # seconds for an answer


def plain(handler, status=200, body=b"{}", **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def chat(handler, answer):
    plain(handler, body=json.dumps(answer).encode())


def dribble(handler):  # a byte every now and then: no single read takes long
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b" ")


def dribble_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b"X-A: b\r\n")


def continue_forever(handler):
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def silence(handler):
    handler.server.over.wait(5)


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.over.is_set():
        handler.wfile.write(b'{"a": "' + b"x" * 65536)


def promised(handler):  # gigabytes, of which some bytes come
    handler.send_response(200)
    handler.send_header("Content-Length", str(8 << 30))
    handler.end_headers()
    handler.wfile.write(b'{"a": 1}')


def chunks_cut(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{")


def hang_up(handler):
    pass


def noise(handler):
    handler.wfile.write(b"\x00\x01 this is not HTTP\r\n\r\n")


def redirect(status):
    def answer(handler):
        if handler.path == "/elsewhere":
            return chat(handler, GOOD)
        plain(handler, status, Location="/elsewhere?token=abc")

    return answer


def fails(status, body=b'{"error": "no \x1b[31msuch thing"}'):
    return lambda handler: plain(handler, status, body)


def echo_key(handler):
    plain(handler, 401, f"wrong key: {handler.headers['Authorization']}".encode())


def body(text):
    return lambda handler: plain(handler, body=text)


# name: what the server does, the error, its message, the requests that it sees (2 = all tries)
MISDEEDS = {
    "dribbled body": (dribble, ConnectionError, "no whole answer within 0.3 s", 2),
    "dribbled headers": (dribble_headers, ConnectionError, "no whole answer within 0.3 s", 2),
    "only 100 Continue": (continue_forever, ConnectionError, "no whole answer within 0.3 s", 2),
    "silence": (silence, ConnectionError, "no whole answer within 0.3 s", 2),
    "endless body": (endless, ValueError, "longer than 4194304 bytes", 1),
    "body of gigabytes": (promised, ConnectionError, "in the middle of the answer", 2),
    "chunks cut off": (chunks_cut, ConnectionError, "in the middle of the answer", 2),
    "hangs up": (hang_up, ConnectionError, "RemoteDisconnected", 2),
    "not HTTP": (noise, ConnectionError, "BadStatusLine", 2),
    "301": (redirect(301), ConnectionError, "301, a redirect to /elsewhere: it is not followed", 1),
    "307": (redirect(307), ConnectionError, "307, a redirect to /elsewhere: it is not followed", 1),
    "308": (redirect(308), ConnectionError, "308, a redirect to /elsewhere: it is not followed", 1),
    "400": (fails(400), ConnectionError, r'400 \{"error": "no \[31msuch thing"\}$', 1),
    "404": (fails(404), ConnectionError, "404", 1),
    "408": (fails(408), ConnectionError, r"408.*\(after 2 tries\)", 2),
    "429": (fails(429), ConnectionError, r"429.*\(after 2 tries\)", 2),
    "500": (fails(500), ConnectionError, r"500.*\(after 2 tries\)", 2),
    "503, much to say": (fails(503, b"x" * 100000), ConnectionError, r"503 x{300} \.\.\.", 2),
    "its words hold the key": (echo_key, ConnectionError, r"401 wrong key: Bearer \*\*\*$", 1),
    "HTML": (body(b"<html>log in</html>"), ValueError, "not JSON: <html>log in", 1),
    "half of JSON": (body(b'{"choices": ['), ValueError, "not JSON", 1),
    "deep JSON": (body(b"[" * 100000), ValueError, "not JSON", 1),
    "not UTF-8": (body(b'{"a": "\xff"}'), ValueError, "not JSON", 1),
    "empty": (body(b""), ValueError, "content, a text; got null", 1),
    "a list": (body(b"[]"), ValueError, r"content, a text; got \[\]", 1),
    "no choices": (body(b'{"choices": []}'), ValueError, "content, a text", 1),
    "choices of numbers": (body(b'{"choices": [3]}'), ValueError, "content, a text", 1),
    "content null": (
        body(b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}'),
        ValueError,
        "content, a text",
        1,
    ),
    "cut off": (
        body(b'{"choices": [{"message": {"content": "ye"}, "finish_reason": "length"}]}'),
        ValueError,
        "cut off: allow more max_tokens",
        1,
    ),
}


class Handler(Quiet):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        try:
            self.server.does(self)
        except OSError:  # the client has hung up
            pass
        self.close_connection = True

    def do_GET(self):  # where a redirect would be followed to
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        chat(self, GOOD)


@pytest.fixture(scope="module")
def server():
    with serving(Handler) as server:
        yield server


@pytest.fixture()
def client(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    server.seen, server.over = [], threading.Event()
    yield Client(
        f"http://127.0.0.1:{server.server_port}/v1",
        key_variable="MY_KEY",
        timeout_seconds=LIMIT,
        retry_seconds=(0.01,),
    )
    server.over.set()


@pytest.mark.parametrize("name", MISDEEDS)
def test_a_server_that_misbehaves_is_named_in_time_and_its_error_holds_no_key(
    server, client, name, caplog
):
    server.does, kind, message, requests = MISDEEDS[name]
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(kind, match=message) as caught:
        client.chat("m", [{"role": "user", "content": "hello"}])
    assert time.monotonic() - began < 3 * LIMIT + 2
    assert client.url in str(caught.value) and len(str(caught.value)) < 600
    assert KEY not in str(caught.value) + caplog.text
    assert [path for path, _ in server.seen] == ["/v1/chat/completions"] * requests
    assert len(caplog.records) == requests - 1  # each new try is told


def test_a_server_that_recovers_is_asked_again_and_what_it_asks_for_is_waited(server, client):
    def recovers(handler):
        first = len(server.seen) == 1
        plain(handler, 429, Retry_After="1") if first else chat(handler, GOOD)

    server.does, began = recovers, time.monotonic()
    assert client.chat("m", []) == "yes" and 1 <= time.monotonic() - began < 3
    assert server.seen == [("/v1/chat/completions", f"Bearer {KEY}")] * 2


def test_retry_after_is_read_as_seconds_or_as_a_date():
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    assert 17 < retry_after(date) <= 20 and retry_after("3") == 3
    for nonsense in (None, "", "-1", "nan", "1e9", "²", "99999999999", "Thu, 99 Foo 2026"):
        assert retry_after(nonsense) is None


@pytest.mark.parametrize(
    "url,message",
    [
        ("http://example.com/v1", "plain http to another host.*https://example.com.*allow_http"),
        ("http://localhost.example.com", "plain http"),
        ("http://127.0.0.1.example.com", "plain http"),
        ("http://2130706433", "plain http"),
        ("http://10.0.0.5:8000", "plain http"),
        ("https://user:hunter2@example.com", "without user, password or query.*key_variable"),
        ("http://localhost@example.com", "without user, password"),
        ("https://example.com/v1?api_key=hunter2", "without user, password or query"),
        ("ftp://localhost", "no address of a server"),
        ("file:///etc/passwd", "no address of a server"),
        ("localhost:8000", "no address of a server; expected https"),
        ("", "no address of a server"),
        ("https://exa mple.com", "without spaces"),
        ("https://example.com\nX: y", "without spaces"),
        ("https://example.com:port", "Port could not be cast"),
        ("http://[::1", "Invalid IPv6"),
    ],
)
def test_an_address_where_a_key_may_not_go_is_refused(url, message):
    with pytest.raises(ValueError, match=message) as caught:
        Client(url)
    assert "hunter2" not in str(caught.value)


def test_addresses_that_are_taken():
    for url in ("http://localhost:8000", "http://127.0.0.9", "http://[::1]:80", "https://a.b/c"):
        assert server_address(f"{url}/v1/") == url
    assert server_address("http://vllm:8000", allow_http=True) == "http://vllm:8000"


def test_a_key_in_place_of_its_variable_and_a_key_that_no_header_carries(monkeypatch):
    with pytest.raises(ValueError, match="not the key itself") as caught:
        Client("https://a.b", key_variable=KEY)
    assert KEY not in str(caught.value)
    monkeypatch.setenv("MY_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ValueError, match="MY_KEY holds no API key") as caught:
        Client("https://a.b", key_variable="MY_KEY")
    assert KEY not in str(caught.value)


def test_a_host_that_does_not_exist_is_said_at_once():
    client = Client("https://no-such-host.invalid", timeout_seconds=5.0, retry_seconds=(0.0,))
    with pytest.raises(ConnectionError, match="POST https://no-such-host.invalid/x: no such host"):
        client.post("/x", {})


@pytest.mark.parametrize("does", [fails(503), dribble], ids=["503", "dribbled body"])
def test_tries_and_waits_end_with_their_time_in_all(server, client, does):
    server.does = does
    address = f"http://127.0.0.1:{server.server_port}"
    patient = Client(address, timeout_seconds=0.5, retry_seconds=(0.2,) * 50, total_seconds=1.0)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="the limit of 1 s in all .after [2-9] tries"):
        patient.chat("m", [{"role": "user", "content": "hello"}])
    assert time.monotonic() - began < 1.5
    with pytest.raises(ValueError, match="total_seconds = 1: expected at least timeout_seconds"):
        Client(address, timeout_seconds=2.0, total_seconds=1.0)


def test_a_wait_that_ends_late_is_no_other_error(server, client, monkeypatch):
    server.does, sleep = fails(503), time.sleep
    late = Client(
        f"http://127.0.0.1:{server.server_port}",
        timeout_seconds=0.2,
        retry_seconds=(0.1,),
        total_seconds=0.2,
    )
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds + 0.3))
    with pytest.raises(ConnectionError, match="POST .*after 2 tries"):
        late.post("/x", {})

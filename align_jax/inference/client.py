# SPDX-License-Identifier: Apache-2.0
"""A client of servers that are not trusted to answer: limits, retries, and errors that name them.

The standard library's timeout begins anew with each byte, its client follows redirects (and takes
the API key along) and reads as much as it is sent; what stands here is the difference.
"""

from __future__ import annotations

import contextlib
import email.message
import email.utils
import http.client
import json
import logging
import math
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from align_jax.core.address import server_address

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_LONGEST_WAIT = 60.0  # seconds, whatever a server's Retry-After asks for
_CHAT_BYTES = 4 << 20  # of an answer, where nothing else is said
_ERROR_BYTES = 4096  # read of an error's body; quoted is less
_QUOTED = 300  # characters

_log = logging.getLogger(__name__)


class _Answer(NamedTuple):
    status: int
    headers: email.message.Message
    body: bytes


class _Deadline:
    """Ends an exchange that lasts too long, whatever it waits for."""

    def __init__(self, seconds: float) -> None:
        self._lock, self._sock = threading.Lock(), None
        self.passed = False
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        with self._lock:
            self.passed = True
            if self._sock is not None:
                with contextlib.suppress(OSError):  # of the plain socket, under TLS too
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def watch(self, sock: Any) -> None:
        """Shut this socket when the time is over."""
        with self._lock:
            self._sock = sock
        if self.passed:
            raise TimeoutError

    def cancel(self) -> None:
        self._timer.cancel()


def _watched(kind: Callable[..., Any], deadline: _Deadline) -> Callable[..., Any]:
    """Make connections of a kind that the deadline ends."""

    def connection(host: str, **options: Any) -> Any:
        made = kind(host, **options)
        connect = made.connect

        def connect_watched() -> None:
            connect()
            deadline.watch(made.sock)

        made.connect = connect_watched
        return made

    return connection


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        return super().do_open(_watched(http_class, self._deadline), req, **options)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._deadline = deadline

    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        return super().do_open(_watched(http_class, self._deadline), req, **options)


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Leaves each answer as it is, a redirect too: the API key would follow it."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


def api_key(variable: str) -> str:
    """Return the API key that an environment variable holds; "" where there is none.

    Raises:
        ValueError: not the name of a variable (a key itself?), or a key that no header can carry;
            neither is repeated.
    """
    if variable and not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII):
        raise ValueError(
            "key_variable: expected the name of an environment variable, such as OPENAI_API_KEY, "
            "not the key itself"
        )
    key = os.environ.get(variable, "").strip() if variable else ""
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(
            f"the environment variable {variable} holds no API key: it has spaces or characters "
            "that are not ASCII"
        )
    return key


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for; None where it says nothing.

    >>> retry_after("7"), retry_after("soon"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
    (7.0, None, 0.0)
    """
    if value is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


class Client:
    """A client of an OpenAI-compatible server.

    Args:
        url: of the server, up to and without ``/v1``: https, or http on this host.
        key_variable: environment variable with the API key; "" or unset: none is sent.
        timeout_seconds: for one whole answer, from connecting to its last byte.
        retry_seconds: waits before each new try after a timeout, a connection that broke, or a
            status of 408, 429 or 5xx; each wait is shortened at random by up to half, so that many
            clients do not return at once, and lengthened to what the server asks for, a minute at
            most.
        total_seconds: for an answer with all its tries and waits; 0 = whatever these take.
        allow_http: take plain http to another host too.

    Raises:
        ValueError: as ``core.address.server_address`` and `api_key`; less time in all than for one
            answer.
    """

    def __init__(
        self,
        url: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        timeout_seconds: float = 600.0,
        retry_seconds: Sequence[float] = RETRY_SECONDS,
        total_seconds: float = 0.0,
        allow_http: bool = False,
    ) -> None:
        self.url = server_address(url, allow_http=allow_http)
        self._timeout, self._retries = timeout_seconds, tuple(retry_seconds)
        self._total = total_seconds or math.inf
        if self._total < self._timeout:
            raise ValueError(
                f"total_seconds = {total_seconds:g}: expected at least timeout_seconds = "
                f"{timeout_seconds:g}, or 0 for no limit"
            )
        self._key = api_key(key_variable)
        self._context = ssl.create_default_context() if self.url.startswith("https:") else None

    def post(self, route: str, body: Mapping[str, Any], *, most: int = _CHAT_BYTES) -> Any:
        """Post JSON and return the JSON of the answer (None for an empty one).

        Args:
            route: the path behind the server's address.
            body: what is sent.
            most: bytes of an answer; a longer one is refused.

        Raises:
            ConnectionError: no answer, a redirect, or an error that retrying did not mend; the
                server's words are quoted.
            ValueError: an answer that is too long, or not JSON.
        """
        where, data = f"POST {self.url}{route}", json.dumps(body).encode()
        end = time.monotonic() + self._total
        for number, wait in enumerate((*self._retries, None), 1):
            asked = None
            try:
                # a wait may end a little late, and a socket takes no limit below zero
                left = min(self._timeout, max(end - time.monotonic(), 0.001))
                answer = self._exchange(route, data, most, left)
                if 200 <= answer.status < 300:
                    return self._parsed(where, answer.body, most)
                problem = self._refusal(answer)
                again = answer.status in (408, 429) or answer.status >= 500
                asked = retry_after(answer.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                problem, again = self._failure(error, left)
            if wait is None or not again:
                break
            pause = max(wait * random.uniform(0.5, 1.0), min(asked or 0.0, _LONGEST_WAIT))
            if time.monotonic() + pause >= end:
                problem = f"{problem}; another try would pass the limit of {self._total:g} s in all"
                break
            tries = f"try {number} of {len(self._retries) + 1}"
            _log.warning("%s: %s; %s, again in %.1f s", where, problem, tries, pause)
            time.sleep(pause)
        tried = f" (after {number} tries)" if number > 1 else ""
        raise ConnectionError(f"{where}: {problem}{tried}")

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """Return the text of one chat completion.

        Args:
            model: its name on the server.
            messages: the turns.
            options: further fields of the request.

        Raises:
            ConnectionError: as `post`.
            ValueError: an answer without a text, or one that was cut off.
        """
        body = {"model": model, "messages": list(messages), **options}
        answer = self.post("/v1/chat/completions", body)
        try:
            choice = answer["choices"][0]
            text, finish = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            text, finish = None, None
        if finish == "length":
            raise ValueError(
                f"{self.url}: the answer of {model!r} was cut off: allow more max_tokens"
            )
        if not isinstance(text, str):
            raise ValueError(
                f"{self.url}: expected an answer with choices[0].message.content, a text; got "
                f"{self.excerpt(answer)}"
            )
        return text

    def excerpt(self, answer: Any) -> str:
        """Return the beginning of an answer for a message, without the API key."""
        text = answer if isinstance(answer, str) else json.dumps(answer, default=str)
        if self._key:
            text = text.replace(self._key, "***")
        text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()
        return text if len(text) <= _QUOTED else text[:_QUOTED] + " ..."

    def _exchange(self, route: str, data: bytes, most: int, seconds: float) -> _Answer:
        """Send one request and read its answer, or as much of it as is allowed and one byte."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url + route, data, headers)
        deadline = _Deadline(seconds)
        # what is http goes to this host or stays within a trusted network: to no proxy
        if self._context is None:
            handlers = [_Http(deadline), urllib.request.ProxyHandler({})]
        else:
            handlers = [_Https(deadline, self._context)]
        opener = urllib.request.build_opener(_AsItIs, *handlers)
        try:
            with opener.open(request, timeout=seconds) as found:
                most = most if 200 <= found.status < 300 else _ERROR_BYTES
                body = found.read(most + 1)
            # bytes that were announced and did not come: a limited read is silent about them
            if deadline.passed or (found.length and len(body) <= most):
                raise http.client.IncompleteRead(body, found.length)
            return _Answer(found.status, found.headers, body)
        except (OSError, http.client.HTTPException):
            if deadline.passed:
                raise TimeoutError from None
            raise
        finally:
            deadline.cancel()

    def _parsed(self, where: str, body: bytes, most: int) -> Any:
        if len(body) > most:
            raise ValueError(f"{where}: the answer is longer than {most} bytes")
        if not body.strip():
            return None
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            quoted = self.excerpt(body[:_ERROR_BYTES].decode(errors="replace"))
            raise ValueError(f"{where}: the answer is not JSON: {quoted}") from None

    def _refusal(self, answer: _Answer) -> str:
        if 300 <= answer.status < 400:
            to = self.excerpt(str(answer.headers.get("Location", "nowhere")).partition("?")[0])
            return (
                f"{answer.status}, a redirect to {to}: it is not followed, because the API key "
                "would follow; give the server's own address"
            )
        return f"{answer.status} {self.excerpt(answer.body.decode(errors='replace'))}"

    def _failure(self, error: Exception, seconds: float) -> tuple[str, bool]:
        """Return what happened in words, and whether to try again."""
        reason: Any = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return f"no whole answer within {round(seconds, 1):g} s", True
        if isinstance(reason, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted: {reason.verify_message}", False
        if isinstance(reason, socket.gaierror):
            return f"no such host ({reason.strerror})", reason.errno == socket.EAI_AGAIN
        if isinstance(reason, http.client.IncompleteRead):
            return "the connection broke in the middle of the answer", True
        words = self.excerpt(str(reason)) or "the connection broke"
        return f"{type(reason).__name__}: {words}", True

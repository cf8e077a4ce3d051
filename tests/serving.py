# SPDX-License-Identifier: Apache-2.0
"""A server on this host, for tests of what asks one."""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from typing import Any


class Quiet(http.server.BaseHTTPRequestHandler):
    """A handler that prints nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(handler: type[Quiet]) -> Iterator[Any]:
    """Serve by a handler in a thread; gives the server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()

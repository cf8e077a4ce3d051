# SPDX-License-Identifier: Apache-2.0
"""Where a server may be: https, or http on this host, because an API key goes there."""

from __future__ import annotations

import ipaddress
import re
import urllib.parse


def is_this_host(host: str) -> bool:
    """Return whether a host's name or address is this host's own.

    >>> [is_this_host(host) for host in ("localhost", "127.0.0.1", "::1", "localhost.example.com")]
    [True, True, True, False]
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def server_address(url: str, *, allow_http: bool = False) -> str:
    """Return a server's address up to and without ``/v1``.

    Args:
        url: what the user gave.
        allow_http: take plain http to another host too.

    Raises:
        ValueError: no address of a server, a secret in it (which the message does not repeat), or
            plain http to another host.

    >>> server_address("http://localhost:8000/v1/")
    'http://localhost:8000'
    """
    if not isinstance(url, str) or re.search(r"[\s\x00-\x1f\\]", url):
        raise ValueError("expected an address such as https://host/v1, without spaces")
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"expected an address such as https://host:8000/v1: {error}") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"expected an address without user, password or query, such as "
            f"{parts.scheme}://{host}; a key belongs in the environment variable key_variable"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(
            f"{url!r} is no address of a server; expected https://host/v1 or "
            "http://localhost:8000/v1"
        )
    if parts.scheme == "http" and not allow_http and not is_this_host(host):
        raise ValueError(
            f"{url!r} is plain http to another host: anyone between could read and change what is "
            f"sent; use https://{parts.netloc}, or allow_http where that network is trusted"
        )
    return url.rstrip("/").removesuffix("/v1")

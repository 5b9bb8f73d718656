"""The proxies of the environment: this machine is reached without one, and one that no client can use is one line.

requests, httpx and urllib read HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in either case, when a
client is created.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from urllib.request import getproxies_environment

from dsd.errors import DsdError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
SOCKS = {"socksio": "socksio", "socks": "PySocks"}  # module → package, of httpx and of requests


def exclude_loopback() -> None:
    """Add the addresses of this machine to NO_PROXY, which child processes inherit."""
    listed = [host.strip() for host in getproxies_environment().get("no", "").split(",") if host.strip()]
    hosts = ",".join(dict.fromkeys([*listed, *LOOPBACK]))
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = hosts


def proxies() -> dict[str, str]:
    """The address of each proxy by its variable, without the user and password in it."""
    configured = getproxies_environment()
    return {
        _variable(scheme): re.sub("//.*@", "//***@", configured[scheme])
        for scheme in ("http", "https", "all")
        if scheme in configured
    }


def check_proxies() -> None:
    """Check that the clients can use the proxies of the environment, and exclude this machine from them.

    Raises:
        DsdError: an address is malformed, its scheme is unknown, or the packages for a SOCKS proxy are not installed.
    """
    import httpx

    exclude_loopback()
    for variable, address in proxies().items():
        scheme = re.match("(.*)://", address)
        if scheme is not None and scheme[1] not in ("http", "https", "socks5", "socks5h"):
            line = f"{scheme[1]} is not the scheme of a proxy (http, https, socks5, socks5h)"
            raise DsdError(f"{variable}: {line}; correct or unset it")
        try:
            host = httpx.URL(address if scheme else f"http://{address}").host
        except (httpx.InvalidURL, ValueError):
            host = ""
        if not host:
            raise DsdError(f"{variable}: not the address of a proxy, e.g. http://host:port; correct or unset it")
        missing = [package for module, package in SOCKS.items() if find_spec(module) is None]
        if scheme is not None and scheme[1].startswith("socks") and missing:
            packages = " and ".join(missing)
            raise DsdError(f"{variable}: {address}: {packages} not installed; install it, or unset {variable}")


def _variable(scheme: str) -> str:
    """The variable that names the proxy of a scheme; the lower case one has precedence."""
    lower = f"{scheme}_proxy"
    return lower if os.environ.get(lower) else lower.upper()

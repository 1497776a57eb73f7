"""The proxies that the environment names, checked before a library makes a client for them."""

import os
from urllib.request import getproxies_environment

import httpx

LOOPBACK = ("localhost", "127.0.0.1", "::1")
USED = ("http", "https", "all")  # the schemes whose proxy httpx reads


def check_proxies(*own: str) -> None:
    """Keep loopback, and the `own` addresses of this program, out of the proxies.

    Raises ValueError where a proxy cannot be used; its address may hold a password, so it is not quoted. An
    environment without proxies stays as it is: no_proxy alone in it would hide those that macOS and Windows set.
    """
    proxies = getproxies_environment()
    apart = proxies.pop("no", "")
    if not proxies:
        return
    for scheme, address in proxies.items():
        try:
            if scheme in USED:
                httpx.HTTPTransport(proxy=address if "://" in address else f"http://{address}", verify=False)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            name = f"{scheme.upper()}_PROXY (or {scheme}_proxy)"
            if isinstance(error, ImportError):
                advice = "is a SOCKS proxy, which needs one more package: pip install socksio. Or unset it"
            else:
                advice = "is not the address of a proxy. Set it to http://HOST:PORT, or unset it"
            raise ValueError(f"{name} {advice}, and start again.") from None
    names = [name for name in (*apart.split(","), *LOOPBACK, *own) if name.strip()]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(dict.fromkeys(names))

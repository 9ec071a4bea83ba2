"""Ports: free, or held by parts of this program that answer."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.request import ProxyHandler, build_opener

from recsys.cli.doctor.finding import Finding
from recsys.client import Client
from recsys.errors import RecsysError
from recsys.settings import Settings, bracketed

ANSWER_SECONDS = 2.0
MAX_METRICS_BYTES = 4 << 20
ROLES = {
    "metrics_port": ("recsys_build_info", "a server"),
    "trainer_metrics_port": ("recsys_trainer_info", "a trainer"),
}


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at every port of the settings."""
    numbers = {name: getattr(settings, name) for name in ("port", "metrics_port", "trainer_metrics_port")}
    for name, number in numbers.items():
        same = [other for other, given in numbers.items() if number and given == number and other != name]
        if same:
            yield Finding("ports", "problem", f"{name} = {number} is {same[0]} too", "give each its own")
        else:
            yield _port(settings, name, number)


def _port(settings: Settings, name: str, number: int) -> Finding:
    if not number:
        return Finding("ports", "ok", f"{name} = 0 takes a free one")
    where = f"{bracketed(settings.host)}:{number} ({name})"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            # Another may be bound to all addresses without listening on this one.
            tried.listen()
    except socket.gaierror as error:
        return Finding("ports", "problem", f"host {settings.host}: {error.strerror}", "give an address of this machine")
    except OSError as error:
        holder = _holder(settings, name, number)
        if holder:
            return Finding("ports", "ok", f"{holder} answers at {where}")
        found = f"{where}: {error.strerror}, and what holds it does not answer as ours does"
        return Finding("ports", "problem", found, f"stop it (`ss -ltnp` names it), or set another {name}")
    return Finding("ports", "ok", f"{where} is free: nothing of ours runs there")


def _holder(settings: Settings, name: str, number: int) -> str:
    """Name what of ours listens on a port; "" when it is none of ours."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    if name == "port":
        if settings.tls_certificate:
            # Its certificate need not name this address, nor let us in.
            return "something that may be a server with TLS"
        try:
            with Client(f"{bracketed(host)}:{number}") as client:
                return "a server" if client.serving(timeout=ANSWER_SECONDS) else "a server that is not ready yet"
        except RecsysError:
            return ""
    wanted, holder = ROLES[name]
    try:
        url = f"http://{bracketed(host)}:{number}/metrics"
        with build_opener(ProxyHandler({})).open(url, timeout=ANSWER_SECONDS) as answer:
            return holder if wanted.encode() in answer.read(MAX_METRICS_BYTES) else ""
    except (OSError, ValueError):
        return ""

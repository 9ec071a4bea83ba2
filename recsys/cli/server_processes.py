"""ServerProcesses: several server processes on one port, with one copy of the weights and one target for Prometheus.

A process that ends by itself is started again; the others go on meanwhile.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from types import TracebackType

from recsys.cli.system import STOP_SECONDS, Part, PartStopped
from recsys.errors import AddressInUse
from recsys.merged_metrics import MergedMetrics
from recsys.page import Application, Forwarded, HttpServer, Overview
from recsys.service.auth import Guard
from recsys.settings import Settings, bracketed
from recsys.weights.shared import create

# Before a process that ended by itself is started again: one that cannot run must not take the machine with it.
RESTART_SECONDS = 1.0


class ServerProcesses:
    """Run `server_processes` servers; use as a context manager, from the main thread.

    Inside, all of them serve at `address`; `metrics_address` has the metrics of all.
    """

    def __init__(self, settings: Settings) -> None:
        self._wanted = settings
        self._parts: list[Part] = []
        # Where each process has its own metrics, by its number.
        self._metrics: dict[str, str] = {}

    def __enter__(self) -> ServerProcesses:
        wanted = self._wanted
        self._descriptors = create()
        self._port = _reserve(wanted.host, wanted.port)
        port = self._port.getsockname()[1]
        self._settings = wanted.model_copy(update={"port": port, "metrics_port": 0})
        merged = MergedMetrics(lambda: dict(self._metrics))
        overview = Overview(wanted, merged.collect)
        questions = Forwarded(lambda: dict(self._metrics))
        self._page = Application(wanted, merged, overview, questions, Guard(wanted.tokens_file))
        self._http = HttpServer(wanted.host, wanted.metrics_port, self._page)
        host = bracketed(wanted.host)
        self.address, self.metrics_address = f"{host}:{port}", f"{host}:{self._http.port}"
        try:
            for number in range(wanted.server_processes):
                self._parts.append(self._run(number))
            for number in range(wanted.server_processes):
                self._begin(number)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def pids(self) -> list[int]:
        """Return the processes' ids."""
        return [part.pid for part in self._parts]

    def wait(self) -> None:
        """Start again what ends by itself, until interrupted."""
        while True:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            for number, part in enumerate(self._parts):
                try:
                    part.check()
                except PartStopped as stopped:
                    self._metrics.pop(str(number), None)
                    print(f"{stopped}; it is started again", file=sys.stderr, flush=True)
                    time.sleep(RESTART_SECONDS)
                    self._restart(number)

    def _restart(self, number: int) -> None:
        self._parts[number] = self._run(number)
        try:
            self._begin(number)
        except PartStopped:
            # Found out by the next look, and tried again.
            return

    def _run(self, number: int) -> Part:
        return Part(f"server process {number}", "serve-shared", self._settings, self._descriptors)

    def _begin(self, number: int) -> None:
        """Wait until a process serves."""
        part = self._parts[number]
        _, metrics = part.ready(r"serving on (\S+), metrics on (\S+)")
        self._metrics[str(number)] = f"http://{metrics}"
        part.pass_on()

    def _stop(self) -> None:
        # All at once, so that they drain together.
        for part in self._parts:
            if part.running:
                os.kill(part.pid, signal.SIGTERM)
        while self._parts:
            self._parts.pop().stop(self._wanted.drain_seconds + STOP_SECONDS)
        self._http.close()
        self._page.close()
        self._port.close()
        for descriptor in self._descriptors:
            os.close(descriptor)


def _reserve(host: str, port: int) -> socket.socket:
    """Keep a port for this program's processes, which share it; nothing listens on it yet.

    Raises:
        AddressInUse: when something else has it.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    where = f"{bracketed(host)}:{port} (host, port)"
    taken = AddressInUse(f"cannot listen on {where}: the port is taken or the address is not this machine's")
    try:
        # Alone first: whoever shares it already would share our calls too.
        with socket.socket(family, kind, protocol) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
        shared = socket.socket(family, kind, protocol)
    except OSError as error:
        raise taken from error
    try:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind(address)
    except OSError as error:
        shared.close()
        raise taken from error
    return shared

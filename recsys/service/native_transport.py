"""NativeTransport: calls over pygrpc-native, whose HTTP/2 runs in Rust outside the interpreter.

It hands over many calls at a time and takes their endings from any thread. The thread that scores looks for them
itself, between two batches: a refusal costs little that way, and an answer goes out from the thread that made it.
Health, reflection and unknown methods go to a grpcio server behind it, on a Unix socket. It knows no TLS, and hardly
bounds what a peer takes: where that is asked for, it listens on a Unix socket itself, behind a Front.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
from google.rpc import code_pb2
from pygrpc_native import EVENT_CANCEL, NativeGrpcFront

from recsys.batcher import Batcher
from recsys.errors import RecsysError, SettingsError
from recsys.service.edge import Call, Edge, Ending, Metadata
from recsys.service.errors import Refusal
from recsys.service.front import Front, needed
from recsys.service.gathering import GatheringLoop
from recsys.service.grpcio_transport import KEEPALIVE_SECONDS, KEEPALIVE_TIMEOUT_SECONDS, limits, taken
from recsys.settings import Settings, bracketed

# Threads of the transport itself: what they do for a call is little beside an answer.
IO_THREADS = 1
# Calls handed over at a time.
EVENTS_AT_ONCE = 256
# The last answers are written by threads of the transport, and its `close` does not wait for them.
FLUSH_SECONDS = 0.2
# Calls that were sent before their clients had heard that they are to leave come within this time.
LEAVE_SECONDS = 0.2
# The longest path of a socket that systems take, in bytes.
SOCKET_PATH = 100
# A batch that takes longer than this does not keep new calls waiting: they are looked for beside it, as often.
PATIENCE_SECONDS = 0.025

_log = logging.getLogger(__name__)


class NativeTransport:
    """Serve in the thread of the batcher that scores; beside it while a batch takes long.

    Enforces max_metadata_bytes and max_concurrent_streams; max_message_bytes when a message has arrived; and behind a
    Front what that does.
    """

    def __init__(
        self,
        settings: Settings,
        edge: Edge,
        receiver: Batcher[Any, Any],
        add_services: Callable[[Any], None],
        *,
        share_port: bool = False,
    ) -> None:
        """Listen.

        Raises:
            SettingsError: when the settings name TLS files that cannot be used, or TMPDIR a folder that cannot be
                written to or is too far down.
            AddressInUse: when the port is taken.
        """
        self._folder = _folder()
        self._behind_front = str(self._folder / "behind-front")
        self._front: Front | None = None
        address = f"{bracketed(settings.host)}:{settings.port}"
        self._edge, self._receiver = edge, receiver
        self._max_message_bytes = settings.max_message_bytes
        self._paths = list(edge.methods)
        try:
            if len(os.fsencode(self._behind_front)) > SOCKET_PATH:
                raise SettingsError(f"TMPDIR: {tempfile.gettempdir()} is too long a path for a socket in it")
            if needed(settings):
                self._front = Front(settings, share_port=share_port)
                address = f"unix:{self._behind_front}"
            others = _threads()
            self._native = NativeGrpcFront(
                address,
                [(path, False) for path in self._paths],
                io_threads=IO_THREADS,
                call_details=True,
                keepalive_time_ms=KEEPALIVE_SECONDS * 1000,
                keepalive_timeout_ms=KEEPALIVE_TIMEOUT_SECONDS * 1000,
                keepalive_permit_without_calls=False,
                max_concurrent_streams=settings.max_concurrent_streams,
                max_metadata_size=settings.max_metadata_bytes,
                reuse_port=share_port and not self._front,
            )
            self._io_threads = _threads() - others
        except (OSError, RecsysError) as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            if self._front:
                self._front.refuse()
            if isinstance(error, OSError):
                raise taken(address) from error
            raise
        self.port = self._front.port if self._front else self._native.bound_port
        self._behind = grpc.aio.server(options=limits(settings))
        add_services(self._behind)
        self._calls: dict[int, Call] = {}
        self._loop: GatheringLoop | None = None
        self._stopping = False
        self._idle = threading.Event()
        self._closed = threading.Event()
        self._receiving = threading.Lock()
        self._thread = threading.Thread(target=self._receive_beside, name="recsys-calls", daemon=True)

    async def start(self) -> None:
        """Begin to bring calls."""
        loop = asyncio.get_running_loop()
        self._loop = loop if isinstance(loop, GatheringLoop) else None
        socket = str(self._folder / "behind")
        self._behind.add_insecure_port(f"unix:{socket}")
        await self._behind.start()
        self._native.set_fallback(socket)
        self._native.start()
        self._receiver.receive_from(self._receive)
        self._thread.start()
        if self._front:
            self._front.start(self._behind_front)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, give those in flight `grace` seconds, and close every connection."""
        until = time.monotonic() + grace
        if self._front:
            self._front.refuse()
            await asyncio.sleep(min(grace, LEAVE_SECONDS))
        self._stopping = True
        behind = asyncio.ensure_future(self._behind.stop(grace))
        if self._calls:
            await asyncio.to_thread(self._idle.wait, grace)
        await asyncio.sleep(FLUSH_SECONDS)
        await behind
        if self._front:
            await self._front.close(max(0.0, until - time.monotonic()))
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._closed.set()
        # Their numbers may soon be those of other threads.
        self._io_threads = set()
        self._native.close()
        if self._thread.is_alive():
            self._thread.join()
        for call in list(self._calls.values()):
            call.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _receive_beside(self) -> None:
        """Look for calls beside a batch that takes long, as when the store hangs."""
        while not self._closed.wait(PATIENCE_SECONDS):
            if self._receiver.busy_seconds() >= PATIENCE_SECONDS:
                self._receive(lambda: 0.0)

    def _receive(self, patience: Callable[[], float]) -> float | None:
        """Begin the calls that have come, and wait for one if none has.

        Returns the seconds that this took, the waiting apart; None when no more calls will come.
        """
        with self._receiving:
            self._let_packets_interrupt(True)
            events = self._native.recv_batch_details(EVENTS_AT_ONCE, round(patience() * 1000))
            self._let_packets_interrupt(False)
            started = time.perf_counter()
            while events is not None:
                for kind, call_id, method, payload, _, details in events:
                    if kind == EVENT_CANCEL:
                        self._cancel(call_id)
                    elif payload is not None and details is not None:
                        metadata, _peer, remaining = details
                        self._begin(call_id, self._paths[method], payload, metadata, remaining)
                if len(events) < EVENTS_AT_ONCE:
                    return time.perf_counter() - started
                events = self._native.recv_batch_details(EVENTS_AT_ONCE, 0)
            return None

    def _let_packets_interrupt(self, may: bool) -> None:
        """Let packets interrupt whoever has the core that brings them, or wait until it is free or has had its turn.

        Who waits for a call wants it at once. What comes while a batch is scored can only wait for its end: many calls
        at a time then cost less than each by itself, and the answers of a batch leave together.
        """
        for thread in self._io_threads:
            # Of a transport that was closed the thread has ended; some sandboxes do not allow it.
            with suppress(OSError):
                os.sched_setscheduler(thread, os.SCHED_OTHER if may else os.SCHED_BATCH, os.sched_param(0))

    def _cancel(self, call_id: int) -> None:
        call = self._calls.get(call_id)
        if call is not None:
            call.cancel()

    def _begin(self, call_id: int, path: str, payload: bytes, metadata: Metadata, remaining: float | None) -> None:
        if self._stopping:
            self._native.fail(call_id, code_pb2.UNAVAILABLE, "the server is stopping")
            return
        if len(payload) > self._max_message_bytes:
            given = f"received a message of {len(payload)} bytes; at most {self._max_message_bytes} are allowed"
            self._native.fail(call_id, code_pb2.RESOURCE_EXHAUSTED, given)
            return
        call = self._edge.call(path, metadata, remaining, partial(self._end, call_id))
        self._calls[call_id] = call
        try:
            call.begin(payload)
        except Exception:
            # A thread that ends in silence would leave a server that hears nobody.
            _log.exception("%s could not begin", path)
            self._end(call_id, Refusal(code_pb2.INTERNAL, "internal error; the server's log has the details", b""))

    def _end(self, call_id: int, ending: Ending) -> None:
        """Send what a call ends with; called from any thread. A caller that has gone meanwhile gets nothing."""
        if isinstance(ending, bytes):
            self._native.respond(call_id, ending)
        elif ending is not None:
            if ending.code == code_pb2.RESOURCE_EXHAUSTED and self._loop is not None:
                self._loop.crowded()
            self._native.fail(call_id, ending.code, ending.message, ending.trailers)
        self._calls.pop(call_id, None)
        if self._stopping and not self._calls:
            self._idle.set()


def _folder() -> Path:
    """Make a folder for sockets: others can enter none that is made so, and reach no socket in it."""
    try:
        return Path(tempfile.mkdtemp(prefix="recsys-"))
    except OSError as error:
        raise SettingsError(f"TMPDIR: no folder for sockets can be made: {error}") from error


def _threads() -> set[int]:
    """Return the ids of this process's threads; none where the system does not tell or somebody chose how they run."""
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return set()
    try:
        return {int(each) for each in os.listdir("/proc/self/task")}
    except OSError:
        return set()

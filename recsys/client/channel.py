"""What both clients' channels share: TLS and tokens, how calls are repeated, their methods, and errors read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from recsys import errors
from recsys.settings import is_loopback
from recsys.tls import Named, read_pem
from recsys.v1 import catalog_pb2, model_pb2, recommender_pb2

DETAILS_HEADER = "grpc-status-details-bin"
DOMAIN = "recsys"

# gRFC A6. Only UNAVAILABLE: whatever else fails may have been done, or would fail again.
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
OPTIONS = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    # Else all clients of a process share one connection, and with it one of a server's processes.
    ("grpc.use_local_subchannel_pool", 1),
    # The library waits a second before it connects again, as long as a call may take.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """Hold paths of PEM files: the authorities that the server's certificate must come from (default: the system's),
    and, for a server that asks for one, the client's certificate and key.
    """

    ca: str = ""
    certificate: str = ""
    key: str = ""


class CallFailed(errors.RecsysError):
    """Tell that a call failed on its way: nobody listens, or its deadline passed; `code` is the gRPC status's name.

    A call that writes may have been done all the same when `code` is not "UNAVAILABLE".
    """

    reason = "CALL_FAILED"

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(f"{code}: {message}")


def open_channel(kind: Any, target: str, tls: TlsOptions | None, token: str | None) -> Any:
    """Make a channel with `kind`, which is grpc or grpc.aio; nothing is sent yet.

    Raises:
        SettingsError: when a file cannot be used, or the token would cross a network in the clear.
    """
    if tls is None:
        if token is not None and not is_local(target):
            raise errors.SettingsError(
                f"token: it would travel to {target} in the clear; give tls=TlsOptions(...), or call a server on this "
                "machine"
            )
        return kind.insecure_channel(target, options=OPTIONS)
    pem = read_pem(Named("tls.ca", tls.ca), Named("tls.certificate", tls.certificate), Named("tls.key", tls.key))
    credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)
    if token is not None:
        credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))
    return kind.secure_channel(target, credentials, options=OPTIONS)


def metadata_of(tls: TlsOptions | None, token: str | None) -> tuple[tuple[str, str], ...]:
    """Return what goes with every call: the token where the channel itself cannot send it, as it does over TLS."""
    return (("authorization", f"Bearer {token}"),) if token is not None and tls is None else ()


def is_local(target: str) -> bool:
    """Tell whether a gRPC target is on this machine: loopback by address or as localhost, or a Unix socket."""
    scheme, _, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    address = rest.lstrip("/") if scheme in ("dns", "ipv4", "ipv6") else target
    if address.startswith("["):
        return is_loopback(address[1:].partition("]")[0])
    # More than one colon: IPv6 without a port. More than one address: all must be here.
    return all(is_loopback(each if each.count(":") > 1 else each.partition(":")[0]) for each in address.split(","))


def multicallables(channel: Any) -> dict[str, Any]:
    """Make what sends each method's requests, by the method's full name; for both kinds of channel."""
    return {
        f"/{service.full_name}/{method.name}": channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            request_serializer=method.input_type._concrete_class.SerializeToString,
            response_deserializer=method.output_type._concrete_class.FromString,
        )
        for file in (recommender_pb2, catalog_pb2, model_pb2, health_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def to_error(failure: grpc.RpcError) -> errors.RecsysError:
    """Read the error back that the server raised; CallFailed for what did not come from there."""
    call: Any = failure
    text = str(call.details())
    status = _status(call)
    if status is not None:
        info = error_details_pb2.ErrorInfo()
        bad_request = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        for detail in status.details:
            # Unpack fills the message only when the types agree.
            detail.Unpack(info)
            detail.Unpack(bad_request)
            detail.Unpack(retry)
        kind = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
        if kind is errors.InvalidInput:
            return errors.InvalidInput([errors.Violation(v.field, v.description) for v in bad_request.field_violations])
        if kind is errors.Overloaded:
            return errors.Overloaded(text, retry.retry_delay.ToMilliseconds() / 1000)
        if kind is not None:
            return kind(text)
    return CallFailed(call.code().name, text)


def _status(call: Any) -> status_pb2.Status | None:
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_HEADER:
            return status_pb2.Status.FromString(value)
    return None


def _tree(kind: type[errors.RecsysError]) -> Iterator[type[errors.RecsysError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


_BY_REASON = {kind.reason: kind for kind in _tree(errors.RecsysError) if kind is not CallFailed}

"""Certificates and keys: PEM files, read and checked before anything listens or connects; faults name the setting."""

from __future__ import annotations

import base64
import re
import ssl
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from recsys.errors import SettingsError

# The settings that name certificates which we show to others: who forgets to renew one is cut off.
CERTIFICATES = ("tls_certificate", "redis_tls_certificate")
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
# Of DER: the tags of a certificate's version and of a time with two digits for its year; the bit of a length that says
# how many bytes the length takes.
_VERSION, _UTC_TIME, _LONG = 0xA0, 0x17, 0x80


class Named(NamedTuple):
    """Hold a file's path, "" for none, and the name under which its user gave it."""

    name: str
    path: str


class Pem(NamedTuple):
    """Hold the contents of PEM files, None where there is none."""

    ca: bytes | None
    certificate: bytes | None
    key: bytes | None


def read_pem(ca: Named, certificate: Named, key: Named) -> Pem:
    """Read what is given: authorities to trust, and a certificate chain with its private key.

    Raises:
        SettingsError: when a file cannot be read, holds something else, or the key is not that certificate's.
    """
    contents = Pem(*map(_read, (ca, certificate, key)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca.path:
        try:
            context.load_verify_locations(cafile=ca.path)
        except ssl.SSLError:
            raise SettingsError(f"{ca.name}: {ca.path} holds no PEM certificate") from None
    if bool(certificate.path) != bool(key.path):
        raise SettingsError(f"{certificate.name}, {key.name}: give both or neither")
    if certificate.path:
        try:
            # Without a password of ours the library would ask for one at the terminal.
            context.load_cert_chain(certificate.path, key.path, password="")
        except (ssl.SSLError, ValueError):
            raise SettingsError(
                f"{certificate.name}, {key.name}: {certificate.path} and {key.path} are not a PEM certificate "
                "and its private key without a passphrase"
            ) from None
    return contents


def _read(file: Named) -> bytes | None:
    if not file.path:
        return None
    try:
        return Path(file.path).read_bytes()
    except OSError as error:
        raise SettingsError(f"{file.name}: cannot read {file.path}: {error.strerror}") from None


def expiries(files: Iterable[Named]) -> dict[str, float]:
    """Return when the certificates in those files that are given expire, in seconds since 1970, by the files' names.

    Raises:
        SettingsError: when a file cannot be read, or holds something else.
    """
    found = {}
    for file in files:
        if (contents := _read(file)) is not None:
            try:
                found[file.name] = expiry(contents)
            except (ValueError, IndexError):
                raise SettingsError(f"{file.name}: {file.path} holds no PEM certificate") from None
    return found


def expiry(contents: bytes) -> float:
    """Return when the first of the certificates in a PEM file expires, in seconds since 1970.

    Raises:
        ValueError: when there is none, or one that cannot be read.
    """
    return min(_not_after(base64.b64decode(text)) for text in _CERTIFICATE.findall(contents))


def _not_after(certificate: bytes) -> float:
    """Read the end of a certificate's validity from its DER encoding (RFC 5280, section 4.1)."""
    (_, body), *_ = _elements(_elements(certificate)[0][1])
    fields = _elements(body)
    # The version is left out of the oldest; then serial number, algorithm, issuer, validity.
    _, validity = fields[4 if fields[0][0] == _VERSION else 3]
    _, (tag, until) = _elements(validity)
    text = until.decode("ascii")
    if tag == _UTC_TIME:
        text = ("20" if text < "50" else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _elements(data: bytes) -> list[tuple[int, bytes]]:
    """Take DER apart: the tag and content of each element."""
    found = []
    while data:
        tag, size, start = data[0], data[1], 2
        if size & _LONG:
            start += size & ~_LONG
            size = int.from_bytes(data[2:start])
        found.append((tag, data[start : start + size]))
        data = data[start + size :]
    return found

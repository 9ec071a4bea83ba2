"""Certificates and keys: PEM files, read and checked before anything listens or connects; faults name the setting."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

from recsys.errors import SettingsError


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

"""When certificates expire: read as openssl reads it, exported by the server, and told by doctor in time."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
from pathlib import Path
from urllib.request import urlopen

import pytest
from serving import serve

from recsys.cli.doctor import chosen
from recsys.errors import SettingsError
from recsys.settings import Settings
from recsys.tls import Named, expiries, expiry

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@pytest.fixture(autouse=True)
def _openssl() -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make certificates with")


def made(folder: Path, days: int) -> dict[str, str]:
    """Make a certificate that is valid for so many days from now, below 0: until before."""
    names = {"tls_certificate": str(folder / f"{days}.pem"), "tls_key": str(folder / "key.pem")}
    request = ("openssl", "req", *KEY, "-subj", "/CN=server", "-keyout", names["tls_key"], "-out", str(folder / "csr"))
    signed = ("openssl", "x509", "-req", "-in", str(folder / "csr"), "-signkey", names["tls_key"])
    for command in (request, (*signed, "-days", str(days), "-out", names["tls_certificate"])):
        subprocess.run(command, capture_output=True, check=True)
    return names


def said_by_openssl(path: str) -> float:
    command = ("openssl", "x509", "-in", path, "-noout", "-enddate")
    said = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return float(ssl.cert_time_to_seconds(said.strip().removeprefix("notAfter=")))


# From 2050 on a year is written with four digits.
@pytest.mark.parametrize("days", [-1, 1, 400, 20_000])
def test_a_certificate_expires_when_openssl_says(tmp_path: Path, days: int) -> None:
    path = made(tmp_path, days)["tls_certificate"]
    assert expiry(Path(path).read_bytes()) == said_by_openssl(path)


def test_of_a_chain_the_first_to_expire_counts(tmp_path: Path) -> None:
    paths = [made(tmp_path, days)["tls_certificate"] for days in (400, 30, 800)]
    chain = tmp_path / "chain.pem"
    chain.write_bytes(b"\n".join(Path(path).read_bytes() for path in paths))
    assert expiries([Named("chain", str(chain)), Named("none", "")]) == {"chain": said_by_openssl(paths[1])}


@pytest.mark.parametrize(
    "contents", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nMAMCAQE=\n-----END CERTIFICATE-----"]
)
def test_what_is_no_certificate_is_refused_by_name(tmp_path: Path, contents: str) -> None:
    (tmp_path / "file").write_text(contents)
    with pytest.raises(SettingsError, match=r"the_setting: .* holds no PEM certificate"):
        expiries([Named("the_setting", str(tmp_path / "file"))])


def test_a_server_exports_when_its_certificate_expires(settings: Settings, tmp_path: Path) -> None:
    tls = made(tmp_path, 1)
    with serve(settings.model_copy(update=tls)) as running:
        shown = urlopen(f"http://127.0.0.1:{running.server.metrics_port}/metrics").read().decode()
    found = re.findall(r'recsys_certificate_expiry_timestamp_seconds{setting="(\w+)"} (\S+)', shown)
    assert {name: float(value) for name, value in found} == {
        "tls_certificate": said_by_openssl(tls["tls_certificate"]),
        "redis_tls_certificate": 0.0,
    }


@pytest.mark.parametrize(
    ("days", "level", "text"),
    [(-1, "problem", "expired at 20"), (5, "warning", "expires in 5 days, at 20"), (30, "ok", "expires in 30 days")],
)
def test_doctor_tells_in_time(settings: Settings, tmp_path: Path, days: int, level: str, text: str) -> None:
    tls = made(tmp_path, days)
    (found,) = (f for f in chosen.examine(settings.model_copy(update=tls)) if f.check == "certificates")
    assert (found.level, text in found.found, bool(found.advice)) == (level, True, level != "ok")

"""Fixtures: a real Valkey per test session, emptied for each test that asks for it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch
from hypothesis import settings as hypothesis_settings

from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore

torch.set_num_threads(1)
# Shells have what they start in the background ignore it, which every process that a test starts would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes depends on the machine, and on whether a loop has to be compiled.
hypothesis_settings.register_profile("recsys", deadline=None)
hypothesis_settings.load_profile("recsys")

# Real feedback streams, as their licences do not let them into the repository: see CONTRIBUTING.md.
SHARED_DATA = Path(os.environ.get("RECSYS_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def embedded_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """A Valkey server for the whole session."""
    with EmbeddedStore(tmp_path_factory.mktemp("valkey")) as store:
        yield store


@pytest.fixture
def settings(embedded_store: EmbeddedStore) -> Settings:
    """Default settings against an empty store, on free ports."""
    with connect(load({"redis_url": embedded_store.url}, environment={})) as client:
        client.flushall()
    return load(
        {"redis_url": embedded_store.url, "port": 0, "metrics_port": 0, "trainer_metrics_port": 0}, environment={}
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[redis.Redis]:
    """A client of the empty store."""
    with connect(settings) as client:
        yield client


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real feedback streams; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real feedback streams at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, `ca` and `other`; certificates of the first for a server and a client."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make certificates with")
    directory = tmp_path_factory.mktemp("pki")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other"):
        openssl(
            "req", "-x509", *key, "-days", "1", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"
        )
    for name in ("server", "client"):
        (directory / "ext").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
        openssl("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed_by = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1", "-extfile", "ext")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed_by, "-out", f"{name}.pem")
    openssl("ec", "-aes128", "-passout", "pass:x", "-in", "server.key", "-out", "locked.key")
    (directory / "garbage.pem").write_text("no certificate")
    return directory

"""Fixtures: a real Valkey per test session, emptied for each test that asks for it."""

from __future__ import annotations

import os
import signal
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

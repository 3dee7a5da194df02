"""Servers that tests talk to, one of each for a run: a real S3 with a proxy that makes faults."""

from collections.abc import Iterator

import pytest

from bench.s3 import CREDENTIALS, FaultProxy, S3Server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS with an empty bucket. Fails, and says how to get it, where it is not installed."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def _s3_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.port) as proxy:
        yield proxy


@pytest.fixture
def s3_proxy(_s3_proxy: FaultProxy, s3_keys: None) -> FaultProxy:
    """The proxy before the server, without faults and with nothing counted."""
    _s3_proxy.reset()
    return _s3_proxy


@pytest.fixture
def s3_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's credentials in the environment."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)

"""What every test may use: how to reproduce a failure, and seeds that do not wander."""

import os

import pytest
from hypothesis import HealthCheck, settings
from servers import _s3_proxy, s3_keys, s3_proxy, s3_server  # noqa: F401

# Two cores and slow disks: a property test is judged by its examples, never by its time.
settings.register_profile("him", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("him"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "him")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Print the command that reproduces a failing test."""
    report = yield
    if report.failed:
        report.sections.append(("reproduce", f".venv/bin/python -m pytest '{item.nodeid}'"))
    return report


@pytest.fixture(autouse=True)
def _own_world(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees the caller's repository, daemon, keys or terminal settings."""
    secrets = ("HIM_KEYS", "HIM_PASSPHRASE", "HIM_PASSPHRASE_FILE")
    for name in ("HIM_REPO", "HIM_DEBUG", "COLUMNS", "NO_COLOR", "FORCE_COLOR", *secrets):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    runtime = tmp_path_factory.getbasetemp() / "run"
    runtime.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))

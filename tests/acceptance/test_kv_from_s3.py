"""The issue's fifth proof: a KV cache outlives its process and its disk, and the model goes on from it bit for bit."""

from pathlib import Path

import pytest

from bench import kv_cold
from bench.s3 import S3Server
from him.app import open as open_repository


@pytest.mark.slow
def test_a_model_goes_on_from_a_cache_that_lay_only_in_s3(s3_server: S3Server, s3_keys: None, tmp_path: Path) -> None:
    """Three processes save, evict and continue; the network has random weights (`python -m bench kv` takes SmolLM2)."""
    folder = tmp_path / "memory"
    with open_repository(folder, create=True) as repo:
        repo.set_tier(s3_server.url("kv"), kv_cold.BUDGET)
    saved = kv_cold.process("save", folder, small=True)
    assert saved["tokens"] >= 512 and saved["both"] - saved["one"] <= saved["own"] + 2**17
    evicted = kv_cold.process("evict", folder, small=True)
    assert evicted["warm"] == 0 and evicted["pushed"] >= saved["both"]
    # Of a pack that does not end with a block of the file system that block stays, as zeros.
    assert all(512 * pack.stat().st_blocks <= pack.stat().st_blksize for pack in (folder / "packs").iterdir())
    found = kv_cold.process("continue", folder, small=True)
    assert found["fetched"] > found["bytes"]
    assert found["alike"] == found["of"] == 2 * kv_cold.GREEDY
    assert found["equal"] >= found["of"] // 2 and found["nats"] < 0.01

"""The bucket alone is enough: everything else is deleted, and every tile comes back from a real S3, verified."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import him
from bench.s3 import FaultProxy, S3Server
from him.adapters import objects
from him.errors import UnavailableError

TILES = 60


def tile(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (256, 512), dtype=np.uint8)


def test_the_bucket_alone_gives_every_tile_back(
    s3_server: S3Server, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "COLD_RETRIES_MAX", 2)
    url = s3_server.url("restore", port=s3_proxy.port)
    with him.open(tmp_path / "memory", create=True) as repo:
        repo.set_tier(url, 32 * 2**20)
    with him.open(tmp_path / "memory") as repo:
        for number in range(TILES):
            repo.writable("main").put("kv_cache", tile(number), frame="f", x=number)
        repo.tag("done", "main")
        repo.tier.push(all=True)
        commits = next(repo.log(1))["seq"]
    shutil.rmtree(tmp_path / "memory")
    s3_proxy.refuse()
    with pytest.raises(UnavailableError):
        him.restore(url, tmp_path / "again")
    s3_proxy.listen()
    s3_proxy.faults.refused_share = 0.2
    found = him.restore(url, tmp_path / "again", budget_bytes=32 * 2**20)
    assert (found.commits, found.left_out) == (commits, 0)
    assert sum(512 * pack.stat().st_blocks for pack in (tmp_path / "again" / "packs").glob("*")) == 0
    with him.open(tmp_path / "again") as repo:
        for number in range(TILES):
            assert np.array_equal(repo.snapshot("done").get("kv_cache", frame="f", x=number), tile(number))
        assert repo.fsck().ok
        assert repo.tier.status().fetched_bytes >= TILES * tile(0).nbytes


def test_in_a_storm_of_503_nothing_is_fetched_ahead(
    s3_server: S3Server, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "COLD_RETRY_SECONDS", 0.5)
    with him.open(tmp_path / "memory", create=True) as repo:
        repo.set_tier(s3_server.url("storm", port=s3_proxy.port), 32 * 2**20, storage_class="STANDARD_IA")
    with him.open(tmp_path / "memory") as repo:
        for number in range(8):
            repo.writable("main").put("kv_cache", tile(number), frame="f", x=number)
        repo.tier.push(all=True)
        assert set(s3_proxy.counts.storage_classes) == {"STANDARD_IA"}
        repo.tier.demote()
        main = repo.snapshot("main")
        assert np.array_equal(main.get("kv_cache", frame="f", x=0), tile(0))
        repo.tier.demote()
        s3_proxy.faults.refused_share = 1
        with pytest.raises(UnavailableError):
            main.get("kv_cache", frame="f", x=1)
        assert "503" in repo.tier.status().fault
        asked = s3_proxy.counts.requests
        with pytest.raises(UnavailableError, match="ahead"):
            repo.tier.admit("main", "kv_cache", "f")
        assert s3_proxy.counts.requests == asked
        s3_proxy.faults.refused_share = 0
        assert np.array_equal(main.get("kv_cache", frame="f", x=1), tile(1))
        assert repo.tier.status().fault == "" and repo.tier.admit("main", "kv_cache", "f")

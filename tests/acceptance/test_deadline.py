"""Deadlines (spec §0, §1.1): what is learned of slow stages must not bar a repository from answering for ever."""

from pathlib import Path

import numpy as np
import pytest

import him


def test_s0_a_slow_hour_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with him.open(tmp_path / "memory", create=True) as repo:
        repo.writable("main").put_image(np.full((600, 600, 3), 255, dtype=np.uint8), "blank")
        assert repo.query("find button 'Submit'", "main", budget_ms=2000).status == "absent"
        slow = {name: [9_000.0] * 64 for name in ("parse", "embed", "fuse_scores", "plan", "fetch", "locate", "accept")}
        monkeypatch.setattr(repo, "_took_ms", slow)
        statuses = [repo.query("find button 'Submit'", "main", budget_ms=150).status for _ in range(30)]
        assert statuses == ["absent"] * 30
        assert max(len(samples) for samples in slow.values()) <= 64
        assert repo.query("find button 'Submit'", "main", budget_ms=1).status == "deadline"

"""The check of a GPU, run on the CPU at its smallest: what it writes, and that a broken part does not end it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def check(folder: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """(exit code, what it printed, what it wrote)."""
    command = [sys.executable, str(FOLDER / "gpu_check.py"), "--device", "cpu", "--json", str(folder / "found.json")]
    done = subprocess.run(
        [*command, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert (folder / "found.json").exists(), done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads((folder / "found.json").read_text())


def test_everything_holds_on_the_cpu(tmp_path: Path) -> None:
    code, printed, found = check(tmp_path, "--size", "tiny")
    assert code == 0, printed
    assert not found["failed"]
    # Three checks in each of two precisions with and without a window, and the draws.
    assert len(found["parity"]) == 13
    assert all(one["holds"] for one in found["parity"])
    (row,) = found["sizes"]
    assert row["size"] == "tiny"
    assert min(row["sampled"], row["generated"], row["packed_s"], row["padded_s"]) > 0
    assert found["limits"].keys() == {"gemm_fp32_gflops", "gemm_bf16_gflops", "copy_gb_per_s"}
    assert "tiny: packed update" in printed


def test_what_the_time_does_not_suffice_for_is_named(tmp_path: Path) -> None:
    code, printed, found = check(tmp_path, "--size", "7B", "--minutes", "0")
    assert code == 0
    assert found["skipped"][0] == "limits"
    assert found["skipped"][-1] == "7B"
    assert "7B: skipped, 0 minutes do not suffice" in printed


def test_a_part_that_fails_is_reported_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    gpu_check: Any = importlib.import_module("gpu_check")  # a script, found by the line above

    def broken(*_: Any) -> None:
        raise ValueError("no such kernel")

    ran: list[str] = []
    monkeypatch.setattr(gpu_check, "limits", broken)
    monkeypatch.setattr(gpu_check, "check_parity", lambda report, *_: report.parity("a gap", float("nan"), 1.0))
    monkeypatch.setattr(gpu_check, "check_draws", lambda *_: ran.append("draws"))
    monkeypatch.setattr(gpu_check, "measure", broken)
    monkeypatch.setattr(
        sys, "argv", ["gpu_check.py", "--device", "cpu", "--size", "tiny", "--json", str(tmp_path / "found")]
    )
    with pytest.raises(SystemExit) as exit_:
        gpu_check.main()
    assert exit_.value.code == 1
    assert ran == ["draws"]
    assert json.loads((tmp_path / "found").read_text())["failed"] == {
        "limits": "ValueError: no such kernel",
        "tiny": "ValueError: no such kernel",
        "a gap": "nan > 1",
    }
    assert "failed: limits: ValueError: no such kernel" in capsys.readouterr().out

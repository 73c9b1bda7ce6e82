"""What trackers are told, read back from their own files: the numbers of metrics.jsonl, and the completions."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from dar.assembly.loop import build_loop
from dar.config.recipe import load_recipe
from dar.errors import ConfigError
from dar.trainer import run_loop

SECRET = "sk-a-secret-of-the-test"
NAME = "odd (name) & x"
Lines = list[dict[str, Any]]


@pytest.fixture
def train(write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two steps with a tracker: metrics.jsonl's lines and the run folder."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)

    def run(tracker: str) -> tuple[Lines, Path]:
        prompts = str(tmp_path / "prompts.jsonl")
        recipe = write_recipe(
            steps=2,
            data={"train": prompts, "heldout": prompts},
            rewards=[{"type": "length", "target": 4, "name": NAME}],
            output_dir=str(tmp_path / SECRET),
            logging={"completions_every": 1, "trackers": [tracker]},
        )
        result = run_loop(build_loop(load_recipe(recipe), quiet=True), resume=False, command="")
        return result.metrics, Path(result.output_dir)

    return run


def numbers_of(lines: Lines) -> dict[tuple[int, str], float]:
    return {(line["step"], key): value for line in lines for key, value in line.items() if key != "step"}


def tables_of(folder: Path) -> dict[tuple[int, str], list[str]]:
    """The texts of each table of completions."""
    found = {}
    for file in (folder / "completions").iterdir():
        name = "eval/completions" if "heldout" in file.stem else "completions"
        found[int(file.stem.rpartition("-")[2]), name] = pyarrow.parquet.read_table(file)["completion"].to_pylist()
    assert len(found) == 4
    return found


def test_tensorboard(train: Callable[[str], tuple[Lines, Path]]):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines, folder = train("tensorboard")
    found = accumulator.EventAccumulator(str(folder / "dar"))
    found.Reload()
    told = {(one.step, key): one.value for key in found.Tags()["scalars"] for one in found.Scalars(key)}
    # It keeps numbers as fp32.
    assert told == {key: np.float32(value) for key, value in numbers_of(lines).items()}
    assert SECRET not in "".join(file.read_text() for file in folder.rglob("hparams.yml"))


@pytest.mark.integrations
def test_trackio(train: Callable[[str], tuple[Lines, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed: make test-integrations")
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")
    lines, folder = train("trackio")
    (run,) = trackio.Api().runs("dar")
    told = [
        (log["step"], key, value)
        for log in storage.SQLiteStorage.get_logs("dar", run.name)
        for key, value in log.items()
    ]
    tables = {(step, key): value["_value"] for step, key, value in told if isinstance(value, dict)}
    others = {
        (step, key): value
        for step, key, value in told
        if key not in ("step", "timestamp") and (step, key) not in tables
    }
    assert others == numbers_of(lines)
    assert {key: [row["completion"] for row in rows] for key, rows in tables.items()} == tables_of(folder)
    assert run.config["algorithm.alpha"] == "0.1"
    assert SECRET not in str(run.config)


@pytest.mark.integrations
def test_wandb_offline(train: Callable[[str], tuple[Lines, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = pytest.importorskip(
        "wandb.proto.wandb_internal_pb2", reason="wandb is not installed: make test-integrations"
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    lines, folder = train("wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    told: dict[tuple[Any, ...], Any] = {}
    config = ""
    for each in wandb_records(file.read_bytes()):
        record = records.Record.FromString(each)
        for item in record.history.item:
            told[(record.history.step.num, *(item.nested_key or [item.key]))] = json.loads(item.value_json)
        config += "".join(item.value_json for item in [*record.run.config.update, *record.config.update])
    files = {key[:2]: value for key, value in told.items() if key[2:] == ("path",)}
    numbers = {key: value for key, value in told.items() if len(key) == 2 and not key[1].startswith("_")}
    assert numbers == numbers_of(lines)
    texts = {}
    for key, path in files.items():
        table = json.loads((file.parent / "files" / path).read_text())
        texts[key] = [row[table["columns"].index("completion")] for row in table["data"]]
    assert texts == tables_of(folder)
    assert "0.05" in config
    assert SECRET not in config


def wandb_records(data: bytes) -> list[bytes]:
    """LevelDB's log format, behind a header of 7 bytes: blocks of 32 KiB, records whole or in parts."""
    place, found, parts = 7, [], b""
    while place + 7 <= len(data):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found.append(parts)
            parts = b""
    return found


@pytest.mark.integrations
def test_mlflow_in_files(train: Callable[[str], tuple[Lines, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: make test-integrations")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    lines, _ = train("mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("dar").experiment_id])
    told = {
        (one.step, key): one.value
        for key in run.data.metrics
        for one in client.get_metric_history(run.info.run_id, key)
    }
    odd = {NAME: "odd .name. . x"}
    expected = {
        (step, key.replace(NAME, odd[NAME]).replace(" ", ".").replace("/", ".")): value
        for (step, key), value in numbers_of(lines).items()
    }
    assert told == expected
    assert run.data.params["algorithm.alpha"] == "0.1"
    assert SECRET not in str(run.data.params)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trackoi", "trackoi cannot be used here; known: .*trackio"),
        ("clearml", "clearml cannot be used here; pip install clearml"),
    ],
)
def test_tracker_that_is_not_there_is_named_before_anything_is_loaded(
    write_recipe: Callable[..., Path], name: str, message: str
):
    recipe = write_recipe(logging={"trackers": [name]}, model="no/such-model")
    with pytest.raises(ConfigError, match=f"logging.trackers: {message}"):
        build_loop(load_recipe(recipe), quiet=True)

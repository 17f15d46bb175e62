"""Writes are complete or absent; folders move; devices, types and runs are checked."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import paths, runtime
from lib.runs import ClaimError, Run


def test_folders_move(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENT_BENCH_ROOT", str(tmp_path))
    assert paths.data_dir() == tmp_path / "data"
    assert paths.resolve("data/x") == tmp_path / "data" / "x"
    assert paths.resolve("/x") == Path("/x")
    monkeypatch.setenv("LATENT_BENCH_DATA", str(tmp_path / "big"))
    assert paths.data_dir() == tmp_path / "big"
    assert paths.runs_dir() == tmp_path / "papermill_runs"


def test_atomic_file(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with runtime.atomic_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    with pytest.raises(RuntimeError), runtime.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "whole"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_atomic_folder(tmp_path, monkeypatch):
    path, real = tmp_path / "checkpoint", Path.replace
    for content in ("one", "two"):
        with runtime.atomic_folder(path) as new:
            (new / content).write_text(content)

    def no_space(self, target):
        if self.name == "new":
            raise OSError("no space")
        return real(self, target)

    for patched in (False, True):
        with pytest.raises(OSError, match="no space"), runtime.atomic_folder(path) as new:
            (new / "three").write_text("half")
            if not patched:
                raise OSError("no space")
            monkeypatch.setattr(Path, "replace", no_space)
        assert [file.name for file in path.iterdir()] == ["two"]  # replaced as a whole, or kept
        assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_what_atomic_writes_leave_is_readable(tmp_path):
    with runtime.atomic_folder(tmp_path / "folder") as new:
        (new / "private").write_text("a")
        (new / "private").chmod(0o600)
    with runtime.atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("a")
    (tmp_path / "usual").write_text("a")
    usual = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "folder" / "private").stat().st_mode == usual
    assert (tmp_path / "file").stat().st_mode == usual


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write in .*file"):
        runtime.require_writable(tmp_path / "file" / "below")


def test_devices_and_types():
    assert runtime.resolve_device("cpu") == torch.device("cpu")
    assert runtime.resolve_dtype("bfloat16") == torch.bfloat16
    for resolve, name, match in (
        (runtime.resolve_device, "gpu", "need device auto"),
        (runtime.resolve_device, "cuda:99", "this machine has"),
        (runtime.resolve_dtype, "float8", "need dtype in"),
    ):
        with pytest.raises(ValueError, match=match):
            resolve(name)


def test_seeding():
    draws = set()
    for _ in range(2):
        runtime.seed_everything(7)
        draws.add((torch.rand(1).item(), np.random.rand(), random.random()))
    assert len(draws) == 1


PARAMETERS = {"seed": 3, "run_name": "small", "lr": 3e-4, "names": ["a"]}


@pytest.fixture
def namespace(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENT_BENCH_RUNS", str(tmp_path))
    return {"In": ["x"], "Out": {}, "_": 1, "json": json, "CONCEPTS": ("a",), **PARAMETERS}


def test_run_writes_metrics(namespace, tmp_path):
    run = Run("00_x", namespace)
    run.number("loss", np.float32(0.5))
    run.number("nothing", math.nan)
    run.claim("r2", 0.95, 0.9, 1.0)
    path = run.finish()
    assert path == tmp_path / "00_x" / "small" / "metrics.json"
    record = json.loads(path.read_text())
    keys = "notebook parameters seed commit versions seconds numbers claims".split()
    assert list(record) == keys
    assert record["parameters"] == PARAMETERS
    assert record["numbers"] == {"loss": 0.5, "nothing": None, "r2": 0.95}
    claim = {"name": "r2", "value": 0.95, "low": 0.9, "high": 1.0, "holds": True}
    assert record["claims"] == [claim]
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("value", [0.89, 1.01, math.nan])
def test_a_claim_that_fails_is_written_and_raised(namespace, tmp_path, value):
    run = Run("00_x", namespace)
    run.claim("r2", value, 0.9, 1.0)
    with pytest.raises(ClaimError, match="r2 = "):
        run.finish()
    record = json.loads((tmp_path / "00_x" / "small" / "metrics.json").read_text())
    assert not record["claims"][0]["holds"]


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_run_names_stay_in_their_folder(namespace, name):
    with pytest.raises(ValueError, match="plain folder name"):
        Run("00_x", {**namespace, "run_name": name})
    with pytest.raises(ValueError, match="need a parameter 'seed'"):
        Run("00_x", {"run_name": "x"})

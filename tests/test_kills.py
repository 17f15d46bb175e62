"""Trainings killed again and again, with SIGKILL, end as one that nothing interrupted."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lib.training import checkpoint
from tests import fit_worker, sae_lora_worker, spalf_worker
from tests.small_fits import same

pytestmark = pytest.mark.slow
N_KILLS = 20
RUNS = {
    "dictionaries": (fit_worker.run, "gated"),
    "SPALF": (spalf_worker.run, "dictionary"),
    "SAE-LoRA": (sae_lora_worker.run, "params.safetensors"),
}
"""What trains in a folder, going on where it can, and a name that only a finished run leaves."""


def finish(forkserver, run: Callable[[Path], None], folder: Path) -> None:
    """Run to the end in a process of its own."""
    process = forkserver.Process(target=run, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0


def left(folder: Path) -> dict:
    """Every tensor of a finished run, and its history but for the time it took."""
    tensors = {str(f.relative_to(folder)): load_file(f) for f in folder.rglob("*.safetensors")}
    tensors = {name: t for name, t in tensors.items() if "checkpoint-" not in name}
    about = folder / "metadata.json"
    history = json.loads(about.read_text())["history"] if about.exists() else []
    return tensors, [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_kills_changes_no_bit(name, tmp_path, forkserver):
    """At moments spread over a whole run's duration; each checkpoint found is whole."""
    (run, finished), rng = RUNS[name], random.Random(0)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    began = time.monotonic()
    finish(forkserver, run, whole)
    duration, killed, seen = time.monotonic() - began, 0, set()
    for _ in range(20 * N_KILLS):
        if killed == N_KILLS:
            break
        if (cut / finished).exists():
            shutil.rmtree(cut)
        afresh, began = not cut.exists(), time.monotonic()
        process = forkserver.Process(target=run, args=(cut,))
        process.start()
        process.join(rng.uniform(0.1, 0.9) * duration)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        elif afresh:  # what goes on from a checkpoint has less to do
            duration = min(duration, time.monotonic() - began)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if found := checkpoint.read(cut):  # which compares every file with its checksum
            seen.add(found[0]["step"])
    assert killed == N_KILLS and len(seen) >= 2, seen
    finish(forkserver, run, cut)
    (ours, history), (expected, uncut) = left(cut), left(whole)
    same(ours, expected)
    assert history == uncut and ours
    assert not list(cut.glob(".*"))  # nothing half there is left

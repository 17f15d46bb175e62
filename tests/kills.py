"""Kill a training again and again, with SIGKILL, and let it go on each time."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


def finish(forkserver, run: Callable[[Path], None], folder: Path) -> None:
    """Run to the end in a process of its own."""
    process = forkserver.Process(target=run, args=(folder,))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def killed_and_resumed(
    forkserver,
    run: Callable[[Path], None],
    folder: Path,
    *,
    n_kills: int,
    finished: str,
    complete: Callable[[Path], None],
    earliest: float = 0.1,
    n_checkpoints: int = 3,
) -> tuple[Path, Path]:
    """Folders of a run that nothing interrupted, and of one killed `n_kills` times and resumed.

    Args:
        finished: name of what a finished run leaves; a run that got so far starts again.
        complete: asserts that a checkpoint, found after a kill, is whole.
        earliest: of a kill, as a share of a whole run's duration; the latest is 0.9.
        n_checkpoints: different ones that must be seen, or the kills came too early.
    """
    whole, cut, rng = folder / "whole", folder / "cut", random.Random(0)
    began = time.monotonic()
    finish(forkserver, run, whole)
    duration = time.monotonic() - began
    killed, progressed = 0, set()
    for _ in range(10 * n_kills + 40):
        if killed == n_kills:
            break
        if (cut / finished).exists():
            shutil.rmtree(cut)
        afresh, began = not cut.exists(), time.monotonic()
        process = forkserver.Process(target=run, args=(cut,))
        process.start()
        process.join(rng.uniform(earliest, 0.9) * duration)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        elif afresh:  # what goes on from a checkpoint has less to do
            duration = min(duration, time.monotonic() - began)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        for path in cut.glob("checkpoint-*"):  # complete or absent
            progressed.add(path.name)
            complete(path)
    assert killed == n_kills and len(progressed) >= n_checkpoints, progressed
    finish(forkserver, run, cut)
    return whole, cut


def kill(process: multiprocessing.Process) -> None:
    """SIGKILL to a fork of this process, but never while it draws a bar.

    Forks share the lock of tqdm's bars; one that died with it would leave it taken for ever.
    """
    with tqdm.get_lock():
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL

"""Kill a child process with SIGKILL."""

import multiprocessing
import signal

from tqdm import tqdm


def kill(process: multiprocessing.Process) -> None:
    """SIGKILL to a fork of this process, but never while it draws a bar.

    Forks share the lock of tqdm's bars; one that died with it would leave it taken for ever.
    """
    with tqdm.get_lock():
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL

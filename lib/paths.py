"""Where the project keeps its files.

The root is the folder above `lib`; `LATENT_BENCH_ROOT` moves all of it, and `LATENT_BENCH_DATA`,
`LATENT_BENCH_LORAS`, `LATENT_BENCH_FIGURES`, `LATENT_BENCH_RUNS` move one folder each. Notebooks
find everything through here, because papermill starts in the caller's folder and nbmake in the
notebook's. Variables are read at every call, so a test or a notebook may set them late.
"""

import os
from pathlib import Path


def root() -> Path:
    """The project's top folder."""
    return Path(os.environ.get("LATENT_BENCH_ROOT") or Path(__file__).resolve().parents[1])


def _folder(variable: str, name: str) -> Path:
    return Path(os.environ.get(variable) or root() / name)


def data_dir() -> Path:
    """What runs make: generated datasets, caches."""
    return _folder("LATENT_BENCH_DATA", "data")


def shipped_dir() -> Path:
    """What comes with the code, wherever the other folders were moved: word lists, tiny models."""
    return Path(__file__).resolve().parents[1] / "data"


def loras_dir() -> Path:
    """Trained adapters, one folder each."""
    return _folder("LATENT_BENCH_LORAS", "loras")


def figures_dir() -> Path:
    """What notebooks save as HTML or PNG."""
    return _folder("LATENT_BENCH_FIGURES", "figures")


def runs_dir() -> Path:
    """`<notebook>/<run name>/`: executed notebooks and their `metrics.json`."""
    return _folder("LATENT_BENCH_RUNS", "papermill_runs")


def resolve(path: str | Path) -> Path:
    """An absolute path as it is; a relative one below the project's root."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else root() / path

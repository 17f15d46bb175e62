"""`metrics.json`: parameters, seed, commit, versions, numbers and claims of one notebook run."""

import json
import math
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import SupportsFloat

from lib import paths
from lib.runtime import atomic_file, require_writable

PACKAGES = (
    "torch", "triton", "transformers", "peft", "trl", "transformer-lens", "sae-lens", "nnsight",
    "datasets", "safetensors", "openai", "plotly", "papermill",
)  # fmt: skip


class ClaimError(AssertionError):
    """A number of the run lies outside the range that its notebook claims."""


@dataclass(frozen=True)
class Claim:
    """`value` is claimed to lie in `[low, high]`; an end that is None is open."""

    name: str
    value: float
    low: float | None
    high: float | None
    holds: bool


def literals(namespace: dict) -> dict:
    """The JSON literals a notebook has defined under lower-case names: its parameters."""
    kinds = (str, int, float, bool, list, tuple, dict, type(None))
    return {
        name: value
        for name, value in namespace.items()
        if isinstance(value, kinds) and name[0] != "_" and name == name.lower()
    }


class Run:
    """Collects what one run of a notebook measures and writes `metrics.json`.

    Call it right after the imports, while `globals()` holds nothing but the parameters.

    Raises:
        ValueError: `run_name` or `seed` is no parameter, or the name is no plain folder name.
        OSError: the run's folder cannot be written.
    """

    def __init__(self, notebook: str, namespace: dict) -> None:
        self.notebook = notebook
        self.parameters = literals(namespace)
        for needed in ("run_name", "seed"):
            if needed not in self.parameters:
                raise ValueError(f"need a parameter {needed!r}, got {sorted(self.parameters)}")
        name = str(self.parameters["run_name"])
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"need run_name to be a plain folder name, got {name!r}")
        self.folder = require_writable(paths.runs_dir() / notebook / name)
        self.numbers: dict[str, float] = {}
        self.claims: list[Claim] = []
        self._began = time.monotonic()

    def number(self, name: str, value: SupportsFloat) -> float:
        """Record a number and hand it back."""
        self.numbers[name] = float(value)
        return self.numbers[name]

    def claim(
        self,
        name: str,
        value: SupportsFloat,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        """Record a number and the range in which the notebook's **Answer** says it lies."""
        value = self.number(name, value)
        above = low is None or value >= low
        below = high is None or value <= high
        holds = above and below and not math.isnan(value)
        self.claims.append(Claim(name, value, low, high, holds))

    def finish(self) -> Path:
        """Write `metrics.json`, then raise if a claim does not hold.

        Raises:
            ClaimError: names every claim that fails; the file is written all the same.
        """
        record = {
            "notebook": self.notebook,
            "parameters": self.parameters,
            "seed": self.parameters["seed"],
            "commit": _commit(),
            "versions": _versions(),
            "seconds": round(time.monotonic() - self._began, 1),
            "numbers": self.numbers,
            "claims": [asdict(claim) for claim in self.claims],
        }
        path = self.folder / "metrics.json"
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")
        failed = [claim for claim in self.claims if not claim.holds]
        if failed:
            lines = (f"{c.name} = {c.value:.4g}, claimed in [{c.low}, {c.high}]" for c in failed)
            raise ClaimError("; ".join(lines))
        return path


def _finite(value):
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _commit() -> str | None:
    """The checkout's commit, with `+` where the tree has changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

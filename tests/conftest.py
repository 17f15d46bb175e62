"""Shapes and types of `lib` are checked under pytest only, by jaxtyping and beartype."""

import multiprocessing
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

from beartype import BeartypeConf
from beartype.claw import beartype_package
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in (ROOT / "lib").rglob("*.py")
}
DATA = {name for name in MODULES if name.startswith("lib.data")}
# Few tensors there, inner loops that run a million times, and `datasets` hashes functions: plain
# beartype does, at a tenth of the cost.
beartype_package("lib.data", conf=BeartypeConf(is_pep484_tower=True))
install_import_hook(sorted(MODULES - DATA - {"lib"}), "beartype.beartype")

import pytest

from lib.world import Reader, Rewriter, World


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def reader(world) -> Reader:
    return Reader(world)


@pytest.fixture(scope="session")
def rewriter(world) -> Rewriter:
    return Rewriter(world)


@pytest.fixture(scope="session")
def forkserver():
    """Starts processes in milliseconds, to be killed: the server has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    workers = ["tests.fit_worker", "tests.spalf_worker", "tests.sae_lora_worker"]
    context.set_forkserver_preload([*workers, "tests.test_cache"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the server does not look in pytest's path
        started = context.Process(target=int)
        started.start()
        started.join()
    return context

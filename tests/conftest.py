"""Shapes and types of `lib` are checked under pytest only, by jaxtyping and beartype.

The check takes 45 % of a test's time. `LATENT_BENCH_TYPES=0` leaves it out; `make test` does so for
the tests marked `slow`. Fixtures import `lib` when they are asked for: the process that only hands
tests to others then starts at once.
"""

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
PLAIN = {name for name in MODULES if name.startswith(("lib.data", "lib.world"))}
if os.environ.get("LATENT_BENCH_TYPES") != "0":
    # Few tensors there, inner loops that run a million times, and `datasets` hashes functions:
    # plain beartype does, at a tenth of the cost.
    for package in ("lib.data", "lib.world"):
        beartype_package(package, conf=BeartypeConf(is_pep484_tower=True))
    install_import_hook(sorted(MODULES - PLAIN - {"lib"}), "beartype.beartype")

import pytest

MODELS, SAES = (ROOT / "data" / name for name in ("models", "saes"))


@pytest.fixture(scope="session")
def world():
    from lib.world import World

    return World()


@pytest.fixture(scope="session")
def reader(world):
    from lib.world import Reader

    return Reader(world)


@pytest.fixture(scope="session")
def rewriter(world):
    from lib.world import Rewriter

    return Rewriter(world)


@pytest.fixture(scope="session")
def gemma():
    """The shipped `tiny-gemma2` and its tokenizer; leave them as they are."""
    from lib.models import load_model

    return load_model(MODELS / "tiny-gemma2", device="cpu")


@pytest.fixture(scope="session")
def llama():
    """The shipped `tiny-llama` and its tokenizer; leave them as they are."""
    from lib.models import load_model

    return load_model(MODELS / "tiny-llama", device="cpu")


@pytest.fixture(scope="session")
def shipped_sae():
    """The shipped TopK dictionary of `tiny-gemma2`; leave it as it is."""
    from lib.dictionaries import Dictionary

    return Dictionary.load(SAES / "tiny-gemma2" / "topk")


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

"""Shapes and types of `lib` are checked under pytest only, by jaxtyping and beartype."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook("lib", "beartype.beartype")

import pytest

from lib.data.world import Reader, Rewriter, World


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def reader(world) -> Reader:
    return Reader(world)


@pytest.fixture(scope="session")
def rewriter(world) -> Rewriter:
    return Rewriter(world)

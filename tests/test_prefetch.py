"""Batches made ahead: the bare buffer's, resumable at any of them, and no thread left behind."""

import gc
import itertools
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load, save

from lib import paths
from lib.activations.buffer import Buffer
from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.prefetch import Prefetch
from lib.data.corpus import load_corpus
from lib.training import Resumable
from tests.test_activations import Numbered

OPTIONS = {"batch_size": 7, "n_tokens": 30, "seed": 3}
N = 40  # batches: nearly three epochs


def failing(*failures):
    """Reads fail whose numbers are in `failures`."""
    tried = itertools.count(1)

    def fail(i, acts):
        if next(tried) in failures:
            raise OSError("the disk is gone")
        return acts

    return Numbered(change=fail)


def ahead(source=None, depth=3, **options):
    return Prefetch(bare(source, **options), device="cpu", depth=depth)


def bare(source=None, **options):
    return Buffer(source or Numbered(), **OPTIONS | options)


def take(batches, n):
    return [next(batches) for _ in range(n)]


def truth(n=N):
    return take(bare(), n)


def same(got, wanted):
    return torch.equal(torch.stack(got), torch.stack(wanted))


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited for two minutes"
        time.sleep(0.002)


def no_thread():
    return all(thread.name != "prefetch" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    wait_for(no_thread)


@pytest.mark.parametrize("depth", [None, 1, 3, 100])
def test_batches_are_the_buffers(depth):
    with ahead(depth=depth) as batches:
        assert isinstance(batches, Resumable)
        assert iter(batches) is batches
        assert same(take(batches, N), truth())


def test_a_model_in_the_thread_gives_the_same_bits(llama):
    model, tokenizer = llama
    corpus = load_corpus("world", tokenizer, n_tokens=600, seq_len=64)
    config = HarvestConfig(hook_names=("blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"))
    source = Harvester([model], corpus, config)
    sizes = {"batch_size": 64, "n_tokens": 256}
    with Prefetch(Buffer(source, **sizes), device="cpu") as batches:
        got = take(batches, 12)
    assert same(got, take(Buffer(source, **sizes), 12))
    assert not any(batch.requires_grad for batch in got)


def test_as_many_are_made_ahead_as_asked():
    batches = ahead(depth=5)
    assert not batches.buffer.source.read  # lazy
    next(batches)
    wait_for(lambda: batches.buffer.n_served == 6 * 7)
    time.sleep(0.05)
    assert batches.buffer.n_served == 6 * 7
    batches.close()
    assert batches.buffer.n_served == 7
    assert ahead(depth=None, batch_size=8, n_tokens=64).depth == 4
    assert ahead(depth=None, batch_size=8, n_tokens=8).depth == 1
    with pytest.raises(ValueError, match="need depth >= 1, got 0"):
        ahead(depth=0)


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 13, 14, 15, 22])
def test_resume_continues_after_the_last_batch_handed_out(stop):
    with ahead() as first:
        take(first, stop)
        if stop:
            wait_for(lambda: first.buffer.n_served == (stop + 3) * 7)  # three wait to be taken
        state = load(save(first.state_dict()))
        assert same(take(first, N - stop), truth()[stop:])  # the state is a copy
    plain = bare()
    take(plain, stop)
    for one in (state, plain.state_dict()):
        with ahead(seed=99) as resumed:
            next(resumed)  # and has made others
            resumed.load_state_dict(one)
            assert same(take(resumed, N - stop), truth()[stop:])
    buffer = bare(seed=99)
    buffer.load_state_dict(state)
    assert buffer.n_served == stop * 7
    assert same(take(buffer, N - stop), truth()[stop:])


def test_what_is_put_back_twice_keeps_its_order():
    buffer = bare()
    for n in (5, 2):
        buffer.put_back(take(buffer, n))
    assert (buffer.n_served, buffer.state_dict()["again"].shape) == (0, (35, 3))
    assert same(take(buffer, N), truth())


def until_error(batches):
    """Batches before the one that cannot be made."""
    got = []
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in range(N):
            got.append(next(batches))
    return got


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("read", range(1, 20))
def test_an_error_comes_at_its_batch_and_loses_no_token(read, plain):
    """Whichever read fails, and again: at an epoch's end, half a batch is drawn already."""
    n = len(until_error(bare(failing(read))))
    source = failing(read, read + 1)
    batches = bare(source) if plain else ahead(source, depth=20)
    got = until_error(batches)
    assert len(got) == n
    state = load(save(batches.state_dict()))
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert same(got + take(batches, N - n), truth())
    resumed = bare()
    resumed.load_state_dict(state)
    assert same(got + take(resumed, N - n), truth())


def test_an_error_that_nobody_came_to_does_not_count():
    batches = ahead(failing(6), depth=20)
    got = [next(batches)]
    wait_for(no_thread)  # it has failed, some batches on
    state = load(save(batches.state_dict()))
    assert same(got + take(batches, N - 1), truth())
    resumed = bare()
    resumed.load_state_dict(state)
    assert same(got + take(resumed, N - 1), truth())
    batches.close()


def test_the_end_passes_on():
    class Finite(Buffer):
        def __next__(self):
            if self.n_served >= 5 * 7:
                raise StopIteration
            return super().__next__()

    batches = Prefetch(Finite(Numbered(), **OPTIONS), device="cpu", depth=3)
    assert same(list(batches), truth(5))
    assert list(batches) == []


def test_close_ends_the_thread_and_the_buffer_goes_on():
    batches = ahead()
    got = take(batches, 4)
    assert not no_thread()
    for _ in range(2):
        batches.close()
        assert no_thread()
    got += take(batches.buffer, 4)
    with batches:
        got += take(batches, 4)
    assert no_thread()
    assert same(got, truth(12))


def test_the_thread_ends_with_the_object():
    batches = ahead()
    next(batches)
    batches.cycle = batches
    del batches
    assert not no_thread()
    gc.collect()
    assert no_thread()


ENDLESS = """
from types import SimpleNamespace
import torch
from lib.activations.buffer import Buffer
from lib.activations.prefetch import Prefetch
from lib.activations.source import Block

n = torch.zeros(5, dtype=torch.int)
block = lambda i: Block(torch.ones(5, 3), n, n, n)
source = SimpleNamespace(site_dims=(3,), n_blocks=2, fingerprint="", block=block)
waiting, busy = (
    Prefetch(Buffer(source, batch_size=1, n_tokens=8), device="cpu", depth=depth)
    for depth in (1, 10**9)
)
next(waiting), next(busy)
"""


def test_an_interpreter_ends_though_threads_wait_or_work():
    ended = subprocess.run(
        [sys.executable, "-c", ENDLESS], cwd=paths.root(), timeout=300, capture_output=True
    )
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_batches_on_a_gpu_are_there_when_they_are_read(home):
    """The source is late on its stream, the trainer on its own: neither is overtaken."""

    def late(i, acts):
        torch.cuda._sleep(1_000_000)
        return acts.to(home)

    buffer = bare(Numbered(change=late))
    with Prefetch(buffer, device="cuda", depth=3) as batches:
        got = []
        for _ in range(N // 2):
            batch = next(batches)
            assert batch.device.type == "cuda"
            torch.cuda._sleep(3_000_000)
            got.append(batch.clone())
            del batch
        state = load(save({name: x.cpu() for name, x in batches.state_dict().items()}))
        got += [batch.clone() for batch in take(batches, N - N // 2)]
    assert same([batch.cpu() for batch in got], truth())
    resumed = bare()
    resumed.load_state_dict(state)
    assert same(take(resumed, N - N // 2), truth()[N // 2 :])

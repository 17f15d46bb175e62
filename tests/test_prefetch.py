"""Batches made ahead: the bare buffer's, resumable at any of them, and no thread left behind."""

import gc
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
from lib.models import load_model
from lib.training import Resumable
from tests.test_activations import SIZES, Numbered

OPTIONS = {"batch_size": 7, "n_tokens": 30, "seed": 3}
N = 40  # batches: nearly three epochs


class Failing(Numbered):
    """Reads fail whose numbers are in `failures`."""

    def __init__(self, failures):
        super().__init__(SIZES)
        self.failures, self.n_tried = failures, 0

    def block(self, i):
        self.n_tried += 1
        if self.n_tried in self.failures:
            raise OSError("the disk is gone")
        return super().block(i)


def ahead(source=None, depth=3, **options):
    buffer = Buffer(source or Numbered(SIZES), **OPTIONS | options)
    return Prefetch(buffer, device="cpu", depth=depth)


def truth(n=N):
    buffer = Buffer(Numbered(SIZES), **OPTIONS)
    return [next(buffer) for _ in range(n)]


def same(got, wanted):
    return torch.equal(torch.stack(got), torch.stack(wanted))


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited for ten seconds"
        time.sleep(0.002)


def no_thread():
    return all(thread.name != "prefetch" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    wait_for(no_thread)


# ---- the same batches


@pytest.mark.parametrize("depth", [None, 1, 3, 100])
def test_batches_are_the_buffers(depth):
    with ahead(depth=depth) as batches:
        assert isinstance(batches, Resumable)
        assert iter(batches) is batches
        assert same([next(batches) for _ in range(N)], truth())


def test_a_model_in_the_thread_gives_the_same_bits():
    model, tokenizer = load_model(paths.shipped_dir() / "models" / "tiny-llama", device="cpu")
    corpus = load_corpus("world", tokenizer, n_tokens=600, seq_len=64)
    config = HarvestConfig(hook_names=("blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"))
    source = Harvester([model], corpus, config)
    buffer = Buffer(source, batch_size=64, n_tokens=256)
    wanted = [next(buffer) for _ in range(12)]
    with Prefetch(Buffer(source, batch_size=64, n_tokens=256), device="cpu") as batches:
        got = [next(batches) for _ in range(12)]
    assert same(got, wanted)
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
    assert Prefetch(Buffer(Numbered(SIZES), batch_size=8, n_tokens=64), device="cpu").depth == 4
    assert Prefetch(Buffer(Numbered(SIZES), batch_size=8, n_tokens=8), device="cpu").depth == 1
    with pytest.raises(ValueError, match="need depth >= 1, got 0"):
        ahead(depth=0)


# ---- resuming


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 13, 14, 15, 22])
def test_resume_continues_after_the_last_batch_handed_out(stop):
    with ahead() as first:
        for _ in range(stop):
            next(first)
        if stop:
            wait_for(lambda: first.buffer.n_served == (stop + 3) * 7)  # three wait to be taken
        state = load(save(first.state_dict()))
        assert same([next(first) for _ in range(N - stop)], truth()[stop:])  # the state is a copy
    with ahead(seed=99) as resumed:
        next(resumed)  # and has made others
        resumed.load_state_dict(state)
        assert same([next(resumed) for _ in range(N - stop)], truth()[stop:])
    bare = Buffer(Numbered(SIZES), **OPTIONS | {"seed": 99})
    bare.load_state_dict(state)
    assert bare.n_served == stop * 7
    assert same([next(bare) for _ in range(N - stop)], truth()[stop:])


def test_a_state_of_the_bare_buffer_resumes_it():
    bare = Buffer(Numbered(SIZES), **OPTIONS)
    for _ in range(13):
        next(bare)
    with ahead(seed=99) as resumed:
        resumed.load_state_dict(bare.state_dict())
        assert same([next(resumed) for _ in range(N - 13)], truth()[13:])


def test_what_is_put_back_twice_keeps_its_order():
    buffer = Buffer(Numbered(SIZES), **OPTIONS)
    buffer.put_back([next(buffer) for _ in range(5)])
    buffer.put_back([next(buffer) for _ in range(2)])
    assert (buffer.n_served, buffer.state_dict()["again"].shape) == (0, (35, 3))
    assert same([next(buffer) for _ in range(N)], truth())


# ---- errors


def until_error(batches):
    """Batches before the one that cannot be made."""
    got = []
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in range(N):
            got.append(next(batches))
    return got


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("read", range(1, 20))
def test_an_error_comes_at_its_batch_and_loses_no_token(read, bare):
    """Whichever read fails, and again: at an epoch's end, half a batch is drawn already."""
    buffer = Buffer(Failing({read}), **OPTIONS)
    n = len(until_error(buffer))
    batches = ahead(Failing({read, read + 1}), depth=20)
    batches = batches.buffer if bare else batches
    got = until_error(batches)
    assert len(got) == n
    state = load(save(batches.state_dict()))
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert same([*got, *(next(batches) for _ in range(N - n))], truth())
    resumed = Buffer(Numbered(SIZES), **OPTIONS)
    resumed.load_state_dict(state)
    assert same([*got, *(next(resumed) for _ in range(N - n))], truth())


def test_an_error_that_nobody_came_to_does_not_count():
    batches = ahead(Failing({6}), depth=20)
    got = [next(batches)]
    wait_for(no_thread)  # it has failed, some batches on
    state = load(save(batches.state_dict()))
    assert same(got + [next(batches) for _ in range(N - 1)], truth())
    resumed = Buffer(Numbered(SIZES), **OPTIONS)
    resumed.load_state_dict(state)
    assert same(got + [next(resumed) for _ in range(N - 1)], truth())
    batches.close()


def test_the_end_passes_on():
    class Finite(Buffer):
        def __next__(self):
            if self.n_served >= 5 * 7:
                raise StopIteration
            return super().__next__()

    batches = Prefetch(Finite(Numbered(SIZES), **OPTIONS), device="cpu", depth=3)
    assert same(list(batches), truth(5))
    assert list(batches) == []


# ---- the thread's end


def test_close_ends_the_thread_and_the_buffer_goes_on():
    batches = ahead()
    got = [next(batches) for _ in range(4)]
    assert not no_thread()
    batches.close()
    assert no_thread()
    batches.close()
    got += [next(batches.buffer) for _ in range(4)]
    with batches:
        got += [next(batches) for _ in range(4)]
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
        [sys.executable, "-c", ENDLESS], cwd=paths.root(), timeout=60, capture_output=True
    )
    assert (ended.returncode, ended.stderr) == (0, b"")


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_batches_on_a_gpu_are_there_when_they_are_read(home):
    """The source is late on its stream, the trainer on its own: neither is overtaken."""

    class Late(Numbered):
        def block(self, i):
            block = super().block(i)
            torch.cuda._sleep(1_000_000)
            block.acts = block.acts.to(home)
            return block

    with Prefetch(Buffer(Late(SIZES), **OPTIONS), device="cuda", depth=3) as batches:
        got = []
        for _ in range(N // 2):
            batch = next(batches)
            assert batch.device.type == "cuda"
            torch.cuda._sleep(3_000_000)
            got.append(batch.clone())
            del batch
        state = load(save({name: x.cpu() for name, x in batches.state_dict().items()}))
        got += [next(batches).clone() for _ in range(N - N // 2)]
    assert same([batch.cpu() for batch in got], truth())
    resumed = Buffer(Numbered(SIZES), **OPTIONS)
    resumed.load_state_dict(state)
    assert same([next(resumed) for _ in range(N - N // 2)], truth()[N // 2 :])

"""What the training benchmark measures with: setups, planted activations, the floor, memory."""

import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.sparse.ops import BLOCK
from lib.sparse.screen import TOKENS, has_amx, worth_a_screen

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3
"""First steps of every library, which are not timed."""
HELD_OUT = 4
"""Batches that nobody trains on."""
COPIED = {"cpu": 2**28, "cuda": 2**30}
"""Bytes of the copy that gives the bandwidth: far more than caches hold."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One race: shape, rule and the settings that all libraries share."""

    name: str
    rule: str
    """`topk`, `batchtopk` or `jumprelu`."""
    site_dims: tuple[int, ...]
    d_sae: int
    k: int
    batch: int
    """Tokens a step."""
    steps: int
    """Timed ones; `WARM_UP` more are trained."""
    lr: float = 1e-3
    """Constant. JumpReLU races at a tenth of it, so that l0 stays near k from start to end."""
    dead_after: int = 1_000_000
    """Tokens."""
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def d(self) -> int:
        return sum(self.site_dims)

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def n_parameters(self) -> int:
        """Two matrices and two biases."""
        return 2 * self.d * self.d_sae + self.d_sae + self.d


def cpu_setups(steps: int) -> list[Setup]:
    small = {"d_sae": 8192, "k": 32, "batch": 1024, "steps": steps, "site_dims": (512,)}
    big = {"d_sae": 24576, "k": 32, "batch": 2048, "steps": max(2, steps // 7), "site_dims": (768,)}
    cross = {"d_sae": 8192, "k": 64, "batch": 512, "steps": steps, "site_dims": (512, 512)}
    dead = 1500  # AuxK has work after two batches, whether a library compares by > or by >=
    return [
        Setup(name="TopK 512", rule="topk", **small),
        Setup(name="TopK 512 dead", rule="topk", dead_after=dead, **small),
        Setup(name="BatchTopK 512", rule="batchtopk", **small),
        Setup(name="JumpReLU 512", rule="jumprelu", lr=1e-4, **small),
        Setup(name="crosscoder 2×512", rule="batchtopk", **cross),
        Setup(name="TopK 768", rule="topk", **big),
        Setup(name="BatchTopK 768", rule="batchtopk", **big),
    ]


def gpu_setups(steps: int) -> list[Setup]:
    shared = {"steps": steps, "device": "cuda", "dtype": "bfloat16"}
    gemma = {"site_dims": (2304,), "d_sae": 65536, "k": 64, "batch": 8192, **shared}
    large = {"site_dims": (3584,), "d_sae": 131072, "k": 64, "batch": 4096, **shared}
    cross = {"site_dims": (2304, 2304), "d_sae": 131072, "k": 200, "batch": 2048, **shared}
    return [
        Setup(name="TopK 2304", rule="topk", **gemma),
        Setup(name="BatchTopK 2304", rule="batchtopk", **gemma),
        Setup(name="TopK 3584", rule="topk", **large),
        Setup(name="crosscoder 2×2304", rule="batchtopk", **cross),
    ]


def planted(setup: Setup, n_batches: int) -> list[Tensor]:
    """Batches [batch d] of sums of `k` of `d_sae / 2` planted directions, with noise.

    Directions are frequent as one over the root of their rank; centred, and each site scaled to
    mean norm sqrt(d), by the first batch.
    """
    generator = torch.Generator(setup.device).manual_seed(setup.seed)
    random = {"generator": generator, "device": setup.device}
    directions = F.normalize(torch.randn(setup.d_sae // 2, setup.d, **random))
    rates = torch.arange(1, len(directions) + 1, device=setup.device) ** -0.5
    batches = []
    for _ in range(n_batches):
        drawn = rates.multinomial(setup.batch * setup.k, replacement=True, generator=generator)
        sizes = torch.empty(setup.batch, setup.k, device=setup.device)
        sizes.exponential_(generator=generator)
        indices = drawn.view(setup.batch, setup.k)
        x = F.embedding_bag(indices, directions, mode="sum", per_sample_weights=sizes)
        batches.append(x + 0.02 * torch.randn(x.shape, **random))
    mean = batches[0].mean(0)
    sites = (batches[0] - mean).split(setup.site_dims, dim=1)
    sizes = torch.stack([site.shape[1] ** 0.5 / site.norm(dim=1).mean() for site in sites])
    scale = sizes.repeat_interleave(torch.tensor(setup.site_dims, device=setup.device))
    return [x.sub_(mean).mul_(scale) for x in batches]


@dataclass(frozen=True)
class Start:
    """Where every library begins: biases 0, but for `b_dec`."""

    rows: Tensor
    """[d_sae d] of norm 1: decoder rows."""
    encoder: Tensor
    """[d_sae d]: the same, scaled so that the n·k largest latents of the first batch reconstruct it
    best; else the first steps would only shrink activations, and under JumpReLU l0 with them."""
    mean: Tensor
    """[d], the first batch's: `b_dec`."""
    threshold: float
    """JumpReLU's, at which these weights have an l0 of k on the first batch."""

    @staticmethod
    def of(setup: Setup, x: Tensor) -> "Start":
        generator = torch.Generator(setup.device).manual_seed(setup.seed + 1)
        random = torch.randn(setup.d_sae, setup.d, generator=generator, device=setup.device)
        rows, mean = F.normalize(random), x.mean(0)
        pre = (x - mean) @ rows.T
        threshold = pre.flatten().topk(len(x) * setup.k, sorted=False).values.min()
        x_hat = torch.where(pre > threshold, pre, 0) @ rows
        scale = ((x - mean) * x_hat).sum() / x_hat.square().sum()
        return Start(rows, rows * scale, mean, (threshold * scale).item())


def seconds(function: Callable[[], object], cuda: bool) -> float:
    """Of one call, until the device has done it."""
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Floor:
    """The least that a step can take: the encoder's product, and memory traffic.

    Adam reads weight, gradient and two moments and writes all but the gradient: 7 float32 for
    each parameter of both matrices. On a GPU, whose product is fast, also three gathers of n·k
    rows in bfloat16: decoder rows for the reconstruction and again for the gradient of the
    activations, and one for the gradients of both matrices. On a CPU that multiplies bfloat16 fast
    a second floor has the product in bfloat16, as a screen takes it.
    """

    def __init__(self, setup: Setup, x: Tensor, rows: Tensor) -> None:
        dtype = torch.bfloat16 if setup.dtype == "bfloat16" else torch.float32
        out = torch.empty(len(x), setup.d_sae, dtype=dtype, device=setup.device)
        self.setup, self.factors = setup, (x.to(dtype), rows.to(dtype).T, out)
        size = COPIED["cuda" if setup.cuda else "cpu"]
        self.source = torch.zeros(size, dtype=torch.uint8, device=setup.device)
        self.copy = torch.empty_like(self.source)
        self.seconds: dict[str, list[float]] = {"gemm": [], "copy": []}
        if not setup.cuda and has_amx():
            self.seconds["low_gemm"] = []

    def sample(self) -> None:
        """Time the products and a large copy once."""
        x, rows, out = self.factors
        timed = {"gemm": partial(torch.mm, x, rows, out=out)}
        timed["copy"] = partial(self.copy.copy_, self.source)
        if "low_gemm" in self.seconds:
            x, rows, out = (matrix.bfloat16() for matrix in self.factors)
            timed["low_gemm"] = partial(torch.mm, x, rows, out=out)
        for name, function in timed.items():
            self.seconds[name].append(seconds(function, self.setup.cuda))

    def result(self) -> dict[str, float]:
        median = {name: statistics.median(s[WARM_UP:]) for name, s in self.seconds.items()}
        bandwidth = 2 * self.source.numel() / median.pop("copy")
        found = {"bandwidth_gb_s": bandwidth / 1e9}
        for name, spent in median.items():
            found[f"{name}_ms"] = 1000 * spent
            found[name.replace("gemm", "ms")] = 1000 * (spent + traffic(self.setup) / bandwidth)
        return found


def traffic(setup: Setup) -> int:
    """Bytes that Adam and the gathers move."""
    gathered = 3 * 2 * setup.batch * setup.k * setup.d if setup.cuda else 0
    return 28 * 2 * setup.d * setup.d_sae + gathered


def predicted_mb(setup: Setup) -> float:
    """Ours: weights, gradients and two moments in float32, and one block of pre-activations. In
    bfloat16, or with a screen, also the encoder in bfloat16; the decoder follows when it is gone.
    """
    screen = not setup.cuda and worth_a_screen(setup.batch, setup.d, setup.d_sae)
    low = setup.dtype == "bfloat16" or screen
    tokens = min(setup.batch, max(TOKENS, BLOCK[setup.cuda] // setup.d_sae))
    block = (2 if setup.dtype == "bfloat16" else 4) * tokens * setup.d_sae
    return (16 * setup.n_parameters + block + 2 * low * setup.d * setup.d_sae) / 1e6


def watch_memory(cuda: bool) -> Callable[[], float]:
    """A function that says how many MB more than now were taken at the peak since.

    Without a GPU needs Linux and glibc.
    """
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator kept would come for free
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status_kb("VmRSS")
    return lambda: (_status_kb("VmHWM") - before) * 1024 / 1e6


def _status_kb(field: str) -> int:
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index(f"{field}:") + 1])


class Racer:
    """`bench_training.turns` in a fresh process, which starts at once and waits for each turn.

    In a shared process all would have the allocator that the first of them tuned. Threads sleep
    between turns, or they would take the cores of the next library. Memory holds all at once.
    """

    def __init__(self, library: str, setup: Setup, threads: int) -> None:
        request = json.dumps([library, asdict(setup), threads])
        self.begun = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench_training", "--child", request],
            cwd=ROOT, env=os.environ | {"OMP_WAIT_POLICY": "passive"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def turn(self) -> dict:
        """The next answer; if there is none, an error."""
        if self.begun:
            with contextlib.suppress(BrokenPipeError):  # it is dead, as the missing line will say
                self.process.stdin.write("\n")
                self.process.stdin.flush()
        self.begun = True
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"exit code {self.process.wait()}"}

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

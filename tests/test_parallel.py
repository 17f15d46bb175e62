"""Data parallelism: two ranks take the steps that one process takes on the whole batches.

`torchrun` starts both once; they go through everything in `tests.parallel_worker`.
"""

import re
import subprocess
import sys
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from lib.activations.buffer import Buffer
from lib.training import distributed
from tests import parallel_worker
from tests.fit_worker import Planted, stream
from tests.parallel_worker import RECIPES, score_sets, screened, trained

pytestmark = pytest.mark.slow

WORKER = parallel_worker.__file__


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """After the run; a rank that waits for another that is gone would never end it."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "file").write_text("")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(parallel_worker.Path(WORKER).parents[1]))
        patch.setenv("OMP_NUM_THREADS", "1")
        launched = subprocess.Popen(
            [*command, "--nproc-per-node", "2", WORKER, folder], stderr=subprocess.PIPE, text=True
        )
    try:
        _, errors = launched.communicate(timeout=150)
    finally:
        launched.terminate()  # which ends the ranks, too
        launched.wait()
    assert launched.returncode == 0, errors[-3000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def one():
    """The same in one process."""
    per_dim = {"changes": {"normalize": "per_dim"}}
    return {
        "recipes": trained(stream()),
        "per_dim": trained(stream(), ["topk"], **per_dim),
        "screened": screened(stream()),
    }


def require_equal(one: dict, ranks: list[dict], name: str) -> None:
    """Losses and metrics of every step, and final weights, to 1e-5; the ranks', bit for bit."""
    names = list(one["history"])
    losses = torch.tensor([run["losses"] for run in (one, *ranks)]).view(3, -1, len(names))
    alone, first, second = losses[:, :, names.index(name)]
    torch.testing.assert_close(first + second, alone, rtol=1e-5, atol=0)
    for key, expected in one["weights"][name].items():
        torch.testing.assert_close(ranks[0]["weights"][name][key], expected, rtol=0, atol=1e-5)
        assert torch.equal(ranks[0]["weights"][name][key], ranks[1]["weights"][name][key]), key
    assert ranks[0]["history"] == ranks[1]["history"]
    for expected, got in zip(one["history"][name], ranks[0]["history"][name], strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_are_one_process(one, ranks, name):
    assert [rank["world"] for rank in ranks] == [(0, 2), (1, 2)]
    require_equal(one["recipes"], [rank["recipes"] for rank in ranks], name)


def test_the_normaliser_is_of_the_whole_batch(one, ranks):
    require_equal(one["per_dim"], [rank["per_dim"] for rank in ranks], "topk")


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_two_ranks_with_screens_are_one_process(one, ranks, name):
    runs = [rank["screened"] for rank in ranks]
    assert all(run["scans"] == {True} for run in (one["screened"], *runs))
    require_equal(one["screened"], runs, name)


def test_dead_latents_took_part(one):
    """Or their losses and resampling would have been compared with nothing."""
    dead = {n: [e["dead"] for e in history] for n, history in one["recipes"]["history"].items()}
    for name in ("topk", "batchtopk", "matryoshka", "ghost", "resample"):
        assert max(dead[name]) > 0.1, (name, dead[name])


@pytest.mark.parametrize("case", score_sets(2))
def test_quotas_add_up_to_the_largest_of_all(ranks, case):
    scores = score_sets(2)[case]
    got = [rank["quotas"][case] for rank in ranks]
    assert sum(got) == min(50, sum(map(len, scores)))
    for own, count in zip(scores, got, strict=True):
        edge = torch.cat(scores).topk(sum(got)).values[-1]
        assert (own > edge).sum() <= count <= (own >= edge).sum()
    if case == "ties":
        assert got[0] == min(len(scores[0]), int((scores[0] >= edge).sum()))  # lower ranks first


@pytest.mark.parametrize(
    ("scenario", "kind", "message"),
    [
        ("sizes", "ValueError", r"same size on every rank, got \[32, 31\]"),
        ("uncut", "ValueError", "need batches that 2 ranks can share, got 63"),
        ("nan", "FloatingPointError", "^2 of 64 activations at step 5 are NaN .* the batch is in"),
        ("loss", "FloatingPointError", "topk: loss is .* at step 6"),
        ("gradient", "FloatingPointError", "topk: the gradient's norm is .* at step 6"),
        ("ended", "ValueError", "the stream ended at step 4"),
        ("folder", "NotADirectoryError", "cannot write in"),
    ],
)
def test_all_ranks_raise_what_one_meets(ranks, scenario, kind, message):
    for rank in ranks:
        got_kind, got_message = rank["errors"][scenario]
        assert got_kind == kind and re.search(message, got_message), (got_kind, got_message)


def test_an_error_that_cannot_be_sent_is_described(ranks):
    assert ranks[1]["errors"]["broken"] == ("Broken", "no power at 5")
    described = ("RuntimeError", "rank 1 stopped with Broken: no power at 5")
    assert ranks[0]["errors"]["broken"] == described


def test_the_first_rank_alone_writes(folder, ranks):
    written = {path.name for path in (folder / "of-rank-0").iterdir()}
    assert {"topk", "tracking", "bad_batch.safetensors"} <= written
    assert not (folder / "of-rank-1").exists()


def test_a_bad_batch_is_kept_whole(folder):
    own = folder / "of-rank-0"
    bad = load_file(own / "bad_batch.safetensors")["batch"]
    assert bad.shape == (64, 16) and bad.isnan().nonzero().tolist() == [[32, 3], [33, 3]]
    bad = load_file(own / "loss" / "bad_batch.safetensors")["batch"]
    assert (bad.abs().amax(1) > 1e20).nonzero().flatten().tolist() == list(range(32, 64))


def test_resume_goes_on_where_all_ranks_were(folder):
    """Each rank's own stream too: they read different blocks."""
    for name in ("batchtopk", "resample"):
        whole, cut = (
            load_file(folder / run / name / "sae_weights.safetensors") for run in ("whole", "cut")
        )
        assert whole.keys() == cut.keys()
        for key in whole:
            assert torch.equal(whole[key], cut[key]), (name, key)
    newest = folder / "cut" / f"checkpoint-{parallel_worker.N_STEPS}"
    first, second = (load_file(newest / f"stream{which}.safetensors") for which in ("", "-1"))
    assert first["source"].tolist() != second["source"].tolist()
    with pytest.raises(ValueError, match="ranks: then 2, now None"):
        changes = {"checkpoint_every": 3}
        batches = Buffer(Planted(), batch_size=64)
        trained(batches, ["batchtopk"], changes=changes, folder=folder / "cut", resume=True)


def test_shares_and_shards_are_the_whole(monkeypatch):
    blocks, rows = [], []
    whole = list(islice(stream(), 3))
    for name, value in (("WORLD_SIZE", 5), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    for rank in range(5):
        monkeypatch.setenv("RANK", str(rank))
        share = distributed.Share(Planted())
        blocks += [share.block(i).acts for i in range(share.n_blocks)]
        rows.append(list(distributed.shard(batch[:60] for batch in whole)))
    assert len(blocks) == Planted.n_blocks
    expected = {Planted().block(i).acts.sum().item() for i in range(Planted.n_blocks)}
    assert {acts.sum().item() for acts in blocks} == expected
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([parts[step] for parts in rows]), batch[:60])

"""Training with SPALF: it meets its target, says what it missed, resumes bit for bit."""

import json
import math
import shutil
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib import training
from lib.activations.buffer import Buffer
from lib.activations.moments import Moments
from lib.activations.source import Block
from lib.dictionaries import FitConfig, recipes
from lib.dictionaries.trainer import DictionaryTrainer
from lib.spalf import SpalfConfig, SpalfFit, descent
from lib.spalf.constraints import orthogonality
from lib.spalf.control import ADRC, PI, Ascent
from lib.spalf.trainer import SpalfTrainer
from lib.spalf.whitening import Whitener
from lib.sparse import SparseActs
from lib.training import checkpoint
from tests.fit_worker import Planted
from tests.spalf_worker import D_IN, N_STEPS, anchors, config, patched_kl, stream, train

pytestmark = pytest.mark.filterwarnings("ignore:r2_target", "ignore:constraint 'kl'")
CPU = torch.device("cpu")
STORED = Path(__file__).parent / "spalf_trajectory.json"
same = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[SpalfFit, Path]:
    """A run that nothing interrupted, and its folder; leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    names = {"hook_name": "blocks.0.hook_resid_post", "model_name": "tiny"}
    return train(folder=folder, **names), folder


def plain_stream():
    """Cannot be put back to where it was."""
    yield from stream()


def quick(**changes) -> SpalfConfig:
    """Without checkpoints, every step in the history."""
    return config(**{"checkpoint_every": 0, "log_every": 1} | changes)


def fresh(settings: SpalfConfig | None = None) -> SpalfTrainer:
    return SpalfTrainer(settings or quick(), D_IN, anchors(), patched_kl, CPU)


@cache
def calibration() -> tuple[SpalfTrainer, int]:
    """And how many batches it took."""
    trainer, feed = fresh(), training.Feed(stream(), CPU)
    trainer.start(feed)
    return trainer, feed.drawn


def calibrated(settings: SpalfConfig | None = None) -> SpalfTrainer:
    trainer, (done, _) = fresh(settings), calibration()
    trainer.dictionary.load_state_dict(done.dictionary.state_dict())
    trainer.whitener, trainer.encoder_unit = done.whitener, done.encoder_unit
    return trainer


def weights(trainer: SpalfTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.dictionary.named_parameters()}


class Many(Planted):
    """Tokens enough that none is met often."""

    n_blocks = 100


@pytest.mark.slow
def test_meets_its_target_on_fresh_tokens_with_as_few_latents_as_it_takes():
    x, l0 = torch.cat([Planted().block(i).acts for i in range(200, 220)]), []
    for target in (0.8, 0.9):
        settings = config(n_steps=400, r2_target=target, checkpoint_every=0)
        source = Buffer(Many(), batch_size=256, n_tokens=2048, seed=5)
        fit = train(source, settings, anchors=None, patched_kl=None)
        acts = fit.dictionary.encode(x)
        error = x - fit.dictionary.decode(acts)
        r2 = 1 - error.square().sum() / (x - x.mean(0)).square().sum()
        assert r2.item() == pytest.approx(target, abs=0.02)
        assert fit.reached and fit.phase_2_at is None and not fit.dictionary.training
        assert fit.history[-1]["violations"]["orthogonality"] < 0
        l0.append((acts > 0).sum(1).double().mean().item())
    assert l0[0] < l0[1] - 0.2 and l0[1] < 3.5, l0


def heavy(rebuild, step):
    return 1 + 1e-3 * rebuild(torch.zeros(2, D_IN)).square().mean()  # cannot fall by a tenth


@pytest.mark.parametrize(
    ("changes", "kl", "said"),
    [
        (
            {"d_sae": 6, "l0_target": 2.0, "r2_target": 0.99, "n_steps": 20},
            None,
            r"r2_target 0\.99 was not reached: training ended at r2 0\.\d+; it needs more steps",
        ),
        ({"r2_target": 0.3}, None, r"r2_target 0\.3 was not held: .* or a lower lr"),
        ({}, heavy, "constraint 'kl' is violated at the end, by 1[01]%"),
        ({"n_steps": 20}, patched_kl, "phase 2 was never entered"),
    ],
)
def test_what_did_not_come_about_is_said(changes, kl, said):
    with pytest.warns(UserWarning, match=said):
        assert not train(settings=quick(**changes), patched_kl=kl).reached


def trajectory() -> dict[str, list[float]]:
    """Its 20 steps hold every constraint but KL."""
    history = train(settings=quick(n_steps=20), patched_kl=None).history
    return {name: [entry[name] for entry in history] for name in ("l0", "r2")}


def test_twenty_steps_as_stored():
    """`python -c "from tests.test_spalf_train import *; store()"` writes them anew."""
    before = torch.get_rng_state()
    stored, found = json.loads(STORED.read_text()), trajectory()
    assert stored.keys() == found.keys()
    for name, values in stored.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name
    assert torch.equal(before, torch.get_rng_state())  # of torch's own random numbers


def store() -> None:
    torch.set_num_threads(1)
    STORED.write_text(json.dumps(trajectory(), indent=1) + "\n")


@pytest.mark.slow
def test_phase_2_holds_the_kl_below_a_share_of_its_value_at_entry():
    """By itself r2 would fall to its target, and the KL rise."""
    n, measured = 200, []

    def watched(rebuild, step):
        measured.append(patched_kl(rebuild, step))
        return measured[-1]

    fit, free = (
        train(settings=quick(n_steps=n, phase_2=on), patched_kl=watched) for on in (True, False)
    )
    at, history = fit.phase_2_at, fit.history
    assert 0 < at < quick(n_steps=n).decay_starts
    assert [e["phase"] for e in history] == [1] * at + [2] * (n - at)
    assert all(e["kl"] is None and "kl" not in e["violations"] for e in history[: at - 1])
    entry = history[at - 1]  # of the step that found everything still
    assert entry["kl"] == pytest.approx(torch.stack(measured[:32]).mean().item())
    assert entry["multipliers"]["kl"] == 0
    for e in history[at - 1 :]:
        assert e["kl"] == pytest.approx((1 + e["violations"]["kl"]) * 0.9 * entry["kl"])
        assert "kl" in e["penalties"] and "kl" in e["multipliers"]
    assert free.phase_2_at is None and {e["phase"] for e in free.history} == {1}
    assert not any("kl" in e["violations"] for e in free.history)
    with torch.no_grad():
        final, freed = (
            sum(patched_kl(it.dictionary, i).item() for i in range(3)) / 3 for it in (fit, free)
        )
    assert final < entry["kl"] and final < 0.85 * freed


def stepped(trainer: SpalfTrainer, n: int = N_STEPS, before=lambda step: None) -> list[dict]:
    """What it reports of each step."""
    entries = []
    for step, batch in enumerate(islice(stream(), n)):
        before(step)
        trainer.step(step, batch)
        entries.append(trainer.report(step + 1))
    return entries


def test_phase_2_is_not_entered_once_the_learning_rate_falls():
    """The target is met early, but a violation keeps phase 1 from settling until then."""
    free, held = calibrated(), calibrated()

    def hold(step):
        held.control.calm = 0 if step + 1 < held.config.decay_starts else 1000

    stepped(free)
    stepped(held, before=hold)
    assert free.phase_2_at is not None and held.phase_2_at is None


def test_every_constraint_is_live_and_every_parameter_moves(monkeypatch):
    every = {"W_enc", "b_enc", "W_dec", "b_dec", "log_threshold"}
    reach = {"faithfulness": every, "drift": {"W_dec"}, "orthogonality": {"W_dec"}, "kl": every}
    trainer, grads, reached = calibrated(), {}, {}
    d = trainer.dictionary
    trainer.numbers |= {"kl_bound": 0.01, "phase_2_at": 0.0}
    trainer.control.add("kl")
    trainer.latest["kl"] = 0.0
    with torch.no_grad():
        d.W_dec[:4] *= 1.1  # drift is 0 at its minimum, where it has no slope
    names, parameters = zip(*d.named_parameters(), strict=True)
    lagrangian, descend, before = descent.lagrangian, trainer.optimizer.step, weights(trainer)

    def watched(objective, violations, *rest):
        for name, g in violations.items():
            found = torch.autograd.grad(g, parameters, retain_graph=True, allow_unused=True)
            assert all((grad != 0).any() for grad in found if grad is not None), name
            pairs = zip(names, found, strict=True)
            reached[name] = {n for n, grad in pairs if grad is not None}
        return lagrangian(objective, violations, *rest)

    def kept():
        grads.update({rows.parameter: rows.grad.clone() for rows in trainer.parameters.values()})
        descend()

    monkeypatch.setattr(descent, "lagrangian", watched)
    trainer.optimizer.step = kept
    assert trainer.step(0, next(stream())).keys() == {"l0", "r2"}
    assert {*names} == every and reached == reach and trainer.latest.keys() == reach.keys()
    for name, parameter in d.named_parameters():
        assert (grads[parameter] != 0).any() and grads[parameter].isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    norms = d.W_dec.norm(dim=1)
    torch.testing.assert_close(norms[4:], torch.ones(44))
    assert (norms[:4] != 1).any()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_changes_no_weight(what):
    trainer, x = calibrated(), next(stream())
    trainer.step(0, x)
    before = weights(trainer)
    if what == "gradient":
        trainer.dictionary.b_dec.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(FloatingPointError, match=f"{what}.* is .* at step 1"):
        trainer.step(1, x * 1e25 if what == "loss" else x)
    same(before, weights(trainer))


def test_correction_changes_only_the_last_fifth():
    with_it, without = (
        stepped(calibrated(quick(correction=on, phase_2=False))) for on in (True, False)
    )
    # an entry is of a step's loss before its move; the correction is 0 at 4/5 itself
    late = 4 * N_STEPS // 5 + 2
    assert with_it[:late] == without[:late]
    assert all(a["r2"] != b["r2"] for a, b in zip(with_it[late:], without[late:], strict=True))


def test_whiten_off_only_centres():
    trainer, feed = fresh(quick(whiten=False)), training.Feed(stream(), CPU)
    trainer.start(feed)
    on, off, moments = calibrated().whitener, trainer.whitener, Moments(D_IN)
    moments.update(torch.cat(list(islice(stream(), off.n_tokens // 128))))
    centring = Whitener.centring(moments).state_dict()
    torch.testing.assert_close(off.state_dict(), centring, rtol=1e-6, atol=0)
    assert (off.values == off.values[0]).all()
    assert on.values[0] > 2 * on.values[-1]


def test_switches_do_what_they_say():
    def last(**changes):
        return stepped(calibrated(quick(**changes)), n=20)[-1]

    default = last()
    assert list(default["violations"]) == ["faithfulness", "drift", "orthogonality"]
    assert list(last(orthogonality=False)["violations"]) == ["faithfulness", "drift"]
    assert set(last(capu=False)["penalties"].values()) == {1.0}
    assert set(default["penalties"].values()) != {1.0}
    first, again, other = (weights(fresh(quick(seed=seed)))["W_dec"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    for law, kind in (("pi", PI), ("adrc", ADRC), ("ascent", Ascent)):
        assert type(fresh(quick(law=law)).control.law) is kind


@pytest.mark.slow
def test_only_revival_brings_a_dead_latent_back():
    """Latent 7 has a threshold that it just never reaches, and is long known to be dead."""
    fired, moved, x = {}, {}, torch.cat([Planted().block(i).acts for i in range(12)])
    for revive in (True, False):
        trainer = calibrated(quick(revive=revive, n_steps=1000, lr=1e-4))
        d = trainer.dictionary
        with torch.no_grad():
            largest = d.pre_acts(trainer.whitener(x))[:, 7].max()
            d.bandwidth[7] = 1e-3  # too far below for the relaxed jump
            d.log_threshold[7] = (1.05 * largest).log()
        trainer.since_fired[7] = 10**7
        before = weights(trainer)["W_enc"]
        stepped(trainer, n=150)
        columns = (d.W_enc != before).any(0)
        fired[revive], moved[revive] = trainer.since_fired[7].item() < 10**7, columns[7].item()
        assert columns.sum() > 30
    assert fired == moved == {True: True, False: False}


def test_deadness_is_counted_in_tokens():
    trainer, x = calibrated(quick(n_steps=1000)), next(stream())
    with torch.no_grad():
        trainer.dictionary.log_threshold[:5] += 9
        fires = (trainer.dictionary.encode(trainer.whitener(x)) > 0).any(0)
    trainer.since_fired += 50
    trainer.step(0, x)
    assert fires.sum() > 30 and not fires[:5].any()
    assert (trainer.since_fired[fires] == 0).all()
    assert (trainer.since_fired[~fires] == 50 + len(x)).all()
    assert trainer.dead_after(64) * 2 == trainer.dead_after(128)


def test_orthogonality_looks_at_the_largest_of_a_token():
    trainer, x = calibrated(), next(stream())
    d, bound = trainer.dictionary, trainer.orthogonality_bound
    with torch.no_grad():
        d.log_threshold -= 9
        acts = d.encode(trainer.whitener(x[:100]))
        values, places = acts.topk(16, dim=1)  # four times l0_target
        few = SparseActs.of(torch.zeros_like(acts).scatter(1, places, values))
        expected = orthogonality(few, d.W_dec, bound).item()
        assert orthogonality(SparseActs.of(acts), d.W_dec, bound).item() < 0.99 * expected
    trainer.step(0, x)
    assert trainer.latest["orthogonality"] == pytest.approx(expected, rel=1e-5)


def test_a_state_holds_all_that_a_trainer_does():
    trainer, other = calibrated(), fresh()
    stepped(trainer, n=6)
    trainer.since_fired += torch.arange(48)
    other.load_state(trainer.state())
    same(other.state(), trainer.state())


class Enough(Exception):
    pass


def until(step: int):
    """For `on_log`: stops the run there."""

    def stop(history, phase_2_at):
        if history[-1]["step"] >= step:
            raise Enough

    return stop


@pytest.mark.slow
@pytest.mark.parametrize("source", [stream, plain_stream])
def test_resume_is_bit_exact_in_both_phases(source, tmp_path, finished):
    whole, folder = finished
    entry, phases = whole.phase_2_at // 5 * 5, set()
    for at in (5, entry, min(N_STEPS, entry + 15)):
        with pytest.raises(Enough):
            train(source(), folder=tmp_path, resume=True, on_log=until(at))
        about = checkpoint.metadata(tmp_path)
        phases.add(about["facts"]["dictionary"]["phase_2_at"])
        assert at - 5 <= about["step"] <= at
    assert phases == {None, whole.phase_2_at}
    cut = train(source(), folder=tmp_path, resume=True)
    a, b = (checkpoint.read(path)[1] for path in (folder, tmp_path))
    same({name: a[name] for name in a if name != "stream" or name in b}, b)
    assert cut.history == whole.history and cut.phase_2_at == whole.phase_2_at
    again = train(source(), folder=tmp_path, resume=True)  # nothing is left to do
    for fit in (cut, again):
        same(fit.dictionary.state_dict(), whole.dictionary.state_dict())


@pytest.mark.slow
def test_trains_beside_a_recipe_as_alone_and_both_resume_bit_for_bit(tmp_path, finished):
    recipe = recipes.topk(k=3)
    shape = recipe.dictionary(site_dims=(D_IN,), d_sae=32)
    settings = FitConfig(n_steps=N_STEPS, lr=3e-3, dead_after=150, log_every=10)

    def go(at=math.inf, **options):
        pair = {"spalf": fresh(config()), "topk": DictionaryTrainer(shape, recipe, settings)}
        stop = until(at)
        history, _ = training.fit(
            pair, stream(), progress=False, on_log=lambda h: stop(h["spalf"], None), **options
        )
        return pair, history

    whole, history = go()
    for at in (10, N_STEPS - 5):
        with pytest.raises(Enough):
            go(at, folder=tmp_path, resume=True, checkpoint_every=4)
    cut, resumed = go(folder=tmp_path, resume=True, checkpoint_every=4)
    assert resumed == history
    assert history["topk"][-1]["fvu"] < 0.9 * history["topk"][0]["fvu"]
    for name, trainer in whole.items():
        same(cut[name].state(), trainer.state())
    assert history["spalf"] == finished[0].history
    same(whole["spalf"].finished().state_dict(), finished[0].dictionary.state_dict())


def test_what_a_run_leaves_in_its_folder(finished, tmp_path, capsys):
    fit, folder = finished
    newest = folder / f"checkpoint-{N_STEPS}"
    assert {*folder.iterdir()} == {newest, folder / "dictionary"}
    parts = {f"dictionary/{part}" for part in ("model", "whitener", "control", "optimizer")}
    assert checkpoint.metadata(folder)["sha256"].keys() == parts | {"stream"}
    loaded = SpalfFit.load(folder)
    same(loaded.dictionary.state_dict(), fit.dictionary.state_dict())
    assert loaded.dictionary.config.hook_names == ("blocks.0.hook_resid_post",)
    assert loaded.dictionary.config.model_name == "tiny"
    for name in ("history", "phase_2_at", "reached", "anchor_ids"):
        assert getattr(loaded, name) == getattr(fit, name), name
    assert fit.anchor_ids == [100, 101, 102, 103]
    shutil.copytree(folder, tmp_path / "again")
    with pytest.raises(Enough):  # without resume it starts again
        train(settings=quick(n_steps=8), folder=tmp_path / "again", on_log=until(5))
    assert not list((tmp_path / "again").iterdir())
    assert "l0" not in capsys.readouterr().err


def test_loading_what_is_not_there_or_not_done(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match="need a checkpoint of SPALF"):
        SpalfFit.load(tmp_path)
    newest = shutil.copytree(finished[1], tmp_path / "copy") / f"checkpoint-{N_STEPS}"
    shutil.rmtree(newest.with_name("dictionary"))
    with pytest.raises(FileNotFoundError, match="dictionary"):
        SpalfFit.load(newest.parent)
    (newest / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="damaged: metadata.json"):
        SpalfFit.load(newest.parent)


def test_resume_with_another_config_lists_what_differs(finished, tmp_path):
    fit, folder = finished
    shutil.copytree(folder, tmp_path / "copy")
    go = partial(train, folder=tmp_path / "copy", resume=True)
    for changes, options, named in (
        ({"lr": 1e-3}, {}, "config.lr: then 2e-05, now 0.001"),
        ({"d_sae": 64, "seed": 3}, {}, "d_sae: then 48, now 64; .*config.seed: then 0, now 3"),
        ({}, {"patched_kl": None}, "patched_kl: then True, now False"),
        ({}, {"anchors": anchors(2)}, r"anchor_ids: then \[100.*now \[100, 101\]"),
    ):
        with pytest.raises(ValueError, match=named):
            go(settings=replace(config(), **changes), **options)
    after = go(settings=replace(config(), checkpoint_every=2))  # no weight depends on it
    same(after.dictionary.state_dict(), fit.dictionary.state_dict())


@pytest.mark.parametrize(
    ("step", "value", "said", "left"),
    [
        (None, math.inf, "^2 of 128 activations at calibration are", []),
        (6, 1e30, "^dictionary: loss is .* at step 6", ["checkpoint-4"]),
    ],
)
def test_a_batch_that_ends_the_run_is_named_and_kept(step, value, said, left, tmp_path):
    batches = list(islice(stream(), calibration()[1] + 7))
    batches[3 if step is None else calibration()[1] + step][:2, 3] = value
    with pytest.raises(FloatingPointError, match=f"{said}.*; the batch is in .*bad_batch"):
        train(batches, folder=tmp_path)
    bad = load_file(tmp_path / "bad_batch.safetensors")["batch"]
    torch.testing.assert_close(bad[:2, 3], torch.full((2,), value))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == left


class Small(Planted):
    n_blocks = 1

    def block(self, i: int) -> Block:
        whole = super().block(i)
        return Block(*(x[:100] for x in (whole.acts, whole.ids, whole.rows, whole.positions)))


def test_streams_that_cannot_be_trained_on():
    batches, wrong = list(islice(stream(), calibration()[1] - 1)), torch.randn(8, D_IN - 1)
    few, width = "too few tokens to calibrate", r"need batches \[n 16\], n >= 1, got"
    for source, said in (
        ([wrong], width),
        ([torch.randn(0, D_IN)], width),
        (batches[:1], few),
        (batches, f"{few}: need 4096 for thresholds"),
        ([torch.ones(64, D_IN)] * 9, "need activations that vary"),
        (Buffer(Small(), batch_size=64, n_tokens=128), f"{few}: need 128 different.*got"),
    ):
        with pytest.raises(ValueError, match=said):
            train(source, quick())
    with pytest.raises(ValueError, match=width):
        calibrated().step(0, wrong)


def test_the_bar_shows_each_constraint(capsys):
    seen = []
    fit = train(
        settings=config(checkpoint_every=0),
        progress=True,
        on_log=lambda history, at: seen.append((len(history), at)),
    )
    shown, last = capsys.readouterr().err, fit.history[-1]
    assert seen[0] == (1, None) and seen[-1] == (N_STEPS // 5, fit.phase_2_at)
    assert f"l0 {last['l0']:.1f} r2 {last['r2']:.3f}" in shown and f"{N_STEPS}/{N_STEPS}" in shown
    for name, g in last["violations"].items():
        lam, rho = last["multipliers"][name], last["penalties"][name]
        assert f"{name[0]} {g:+.2f} λ {lam:.1f} ρ {rho:.1f}" in shown, name

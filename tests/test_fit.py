"""Dictionaries in the training loop: recipes learn, resume bit for bit, refuse bad input."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from lib.activations.buffer import Buffer
from lib.dictionaries import Dictionary, FitConfig, fit, recipes
from lib.dictionaries.trainer import DictionaryTrainer
from lib.training import Feed, checkpoint
from tests import fit_worker
from tests.fit_worker import Planted, config, plans, stream
from tests.small_fits import same

pytestmark = pytest.mark.slow

RECIPES = {
    "standard": recipes.standard(l1=0.3),
    "standard_resample": recipes.standard_resample(l1=0.3),
    "ghost": recipes.ghost(l1=0.3),
    "p_anneal": recipes.p_anneal(l1=0.3),
    "entropy": recipes.entropy(l1=0.1, weight=0.3),
    "gated": recipes.gated(l1=0.3),
    "gated_anneal": recipes.gated_anneal(l1=0.3),
    "jumprelu": recipes.jumprelu(l0=0.05),
    "jumprelu_target": recipes.jumprelu(l0=1.0, target_l0=3.0),
    "topk": recipes.topk(k=3),
    "batchtopk": recipes.batchtopk(k=3),
    "matryoshka": recipes.matryoshka(k=3),
}
STORED = json.loads((fit_worker.Path(__file__).parent / "fit_fvu.json").read_text())


def plan(recipe, **options):
    shape = {"site_dims": (16,), "d_sae": 32} | options
    return recipe.dictionary(**shape), recipe


def quick(recipe, n_steps=20, **changes):
    settings = FitConfig(**{"n_steps": n_steps, "lr": 3e-3, "log_every": 1, **changes})
    return fit({"it": plan(recipe)}, stream(), settings, progress=False)["it"]


def weights(folder):
    files = {name: load_file(folder / name / "sae_weights.safetensors") for name in plans()}
    return {f"{n}.{k}": v for n, tensors in files.items() for k, v in tensors.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_twenty_steps_as_stored(name):
    """Trajectory: the fvu of steps 1, 10 and 20; and longer training gets further."""
    history = quick(RECIPES[name]).history
    assert [history[i]["fvu"] for i in (0, 9, 19)] == pytest.approx(STORED[name], rel=2e-3)
    longer = quick(RECIPES[name], n_steps=200, lr=1e-2, dead_after=2000).history[-1]
    assert longer["fvu"] < 0.35, longer
    assert longer["l0"] < 16, longer


def test_topk_finds_planted_directions():
    found = quick(recipes.topk(k=3), n_steps=600, lr=1e-2, dead_after=2000).dictionary
    generator = torch.Generator().manual_seed(99)
    planted = torch.randn(24, 16, generator=generator)
    planted /= planted.norm(dim=1, keepdim=True)
    assert (planted @ found.W_dec.T).max(dim=1).values.mean() > 0.9
    untrained = Dictionary(found.config)
    assert (planted @ untrained.W_dec.T).max(dim=1).values.mean() < 0.75


def test_decoder_stays_on_the_sphere_and_state_leaves_no_trace():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    result = quick(recipes.batchtopk(k=3))
    torch.testing.assert_close(result.dictionary.W_dec.norm(dim=1), torch.ones(32))
    assert torch.equal(before, torch.get_rng_state())
    assert not result.dictionary.training and result.seconds > 0


def test_a_sweep_shares_one_stream_and_equals_training_alone():
    """Neighbours on the stream change nothing, and every batch is asked for once."""
    served = []

    def counted():
        for batch in stream():
            served.append(len(batch))
            yield batch

    recipe = recipes.topk(k=3)
    sweep = {f"lr{lr}": plan(replace(recipe, lr=lr)) for lr in (1e-3, 1e-2)}
    sweep["wide"] = plan(recipe, d_sae=64)
    together = fit(sweep, counted(), config(checkpoint_every=0), progress=False)
    assert len(served) == fit_worker.N_STEPS
    settings = config(checkpoint_every=0)
    alone = fit({"lr0.01": sweep["lr0.01"]}, stream(), settings, progress=False)
    same(together["lr0.01"].dictionary.state_dict(), alone["lr0.01"].dictionary.state_dict())
    a, b = (together[name].dictionary.W_dec for name in ("lr0.001", "lr0.01"))
    assert not torch.allclose(a, b)


def test_each_dictionary_reads_its_own_sites():
    """Two sites in one stream: one dictionary each, and one over both."""
    batches = [
        torch.cat([b, 2 * b[:, :8]], dim=1) for b, _ in zip(stream(), range(5), strict=False)
    ]
    recipe, sites = recipes.topk(k=3), {"a": 16, "b": 8}
    chosen = {
        "a": plan(recipe, hook_names=("a",)),
        "b": plan(recipe, site_dims=(8,), hook_names=("b",)),
        "both": plan(recipe, site_dims=(16, 8), hook_names=("a", "b")),
    }
    together = fit(chosen, batches, FitConfig(n_steps=5), sites=sites, progress=False)
    alone = fit({"a": chosen["a"]}, [b[:, :16] for b in batches], FitConfig(n_steps=5))
    same(together["a"].dictionary.state_dict(), alone["a"].dictionary.state_dict())
    assert together["both"].dictionary.W_dec.shape == (32, 24)
    for wrong, message in (
        ({"a": 16}, "need batches of width 16, got 24"),
        ({"a": 15, "b": 9}, "site_dims .15,. of these sites, got .16,."),
    ):
        with pytest.raises(ValueError, match=message):
            fit({"a": chosen["a"]}, batches, FitConfig(n_steps=5), sites=wrong, progress=False)
    twice = plan(recipe, site_dims=(16, 16), hook_names=("a", "a"))
    with pytest.raises(ValueError, match="each hook name once"):
        fit({"a": twice}, batches, FitConfig(n_steps=5), sites=sites, progress=False)
    with pytest.raises(ValueError, match="need hook names among"):
        fit({"c": plan(recipe, hook_names=("c",))}, batches, FitConfig(n_steps=5), sites=sites)


def test_transcoder_learns_a_linear_map():
    matrix = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    pairs = (torch.cat([b, b @ matrix], dim=1) for b in stream())
    chosen = plan(
        recipes.topk(k=4), out_dims=(6,), apply_b_dec_to_input=False, unit_norm_decoder=False
    )
    settings = FitConfig(n_steps=400, lr=1e-2, normalize="none", log_every=1)
    result = fit({"it": chosen}, pairs, settings, progress=False)["it"]
    assert result.history[-1]["fvu"] < 0.2 < result.history[0]["fvu"]
    with pytest.raises(ValueError, match="normalize 'none' for a transcoder"):
        fit({"it": chosen}, pairs, FitConfig(n_steps=4))


def test_resampling_revives_dead_latents():
    dead = plan(recipes.standard_resample(l1=0.3))
    trainer = DictionaryTrainer(*dead, config(dead_after=100, n_steps=10))
    trainer.start(Feed(stream(), torch.device("cpu")))
    trainer.step(0, next(stream()))
    with torch.no_grad():
        trainer.dictionary.b_enc[:10] = -100
    trainer.tokens_since_fired[:10] = 100
    trainer.step(1, next(stream()))
    d = trainer.dictionary
    assert (d.b_enc[:10] == 0).all() and (d.b_enc[10:] != 0).all()
    norms = d.W_enc.norm(dim=0)
    torch.testing.assert_close(norms[:10], (0.2 * norms[10:].mean()).expand(10))
    state = trainer.state()["optimizer"]["W_enc.exp_avg_sq"]
    assert (state[:10] == 0).all() and (state[10:] != 0).any()
    assert (trainer.tokens_since_fired[:10] == 0).all()


def test_resume_is_bit_exact_and_complete(tmp_path):
    """Stopped at every checkpoint and resumed: the same weights, history and thresholds."""
    whole = fit(plans(), stream(), config(), folder=tmp_path / "whole", progress=False)

    class Enough(Exception):
        pass

    def until(n):
        source = stream()

        class Limited(Buffer):
            def __next__(self):
                if self.n_served >= n * 64:
                    raise Enough
                return super().__next__()

        source.__class__ = Limited
        return source

    for n in (3, 10, 31, 59):
        with pytest.raises(Enough):
            fit(plans(), until(n), config(), folder=tmp_path / "cut", resume=True, progress=False)
    cut = fit(plans(), stream(), config(), folder=tmp_path / "cut", resume=True, progress=False)
    same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    for name in plans():
        assert cut[name].history == whole[name].history
    again = fit(plans(), stream(), config(), folder=tmp_path / "cut", resume=True, progress=False)
    assert again["gated"].history == whole["gated"].history


def test_resume_without_a_state_skips_what_was_served(tmp_path):
    batches = list(islice(stream(), fit_worker.N_STEPS))
    fit(plans(), batches, config(), folder=tmp_path / "whole", progress=False)
    with pytest.raises(ValueError, match="ended at step 30"):
        fit(plans(), batches[:30], config(), folder=tmp_path / "cut", progress=False)
    with pytest.raises(ValueError, match="ended before batch 28"):
        fit(plans(), batches[:9], config(), folder=tmp_path / "cut", resume=True, progress=False)
    fit(plans(), batches, config(), folder=tmp_path / "cut", resume=True, progress=False)
    same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_resume_takes_plans_in_any_order_and_removes_what_kills_left(tmp_path):
    whole = fit(plans(), stream(), config(), folder=tmp_path, progress=False)
    (tmp_path / ".checkpoint-40.abc").mkdir()
    (tmp_path / ".gated.xyz").mkdir()
    backwards = dict(reversed(plans().items()))
    again = fit(backwards, stream(), config(), folder=tmp_path, resume=True, progress=False)
    for name, result in again.items():
        same(result.dictionary.state_dict(), whole[name].dictionary.state_dict())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["cut", "one bit", "gone", "no JSON"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    chosen, settings = {"it": plan(recipes.topk(k=3))}, config(n_steps=4)
    fit(chosen, stream(), settings, folder=tmp_path, progress=False)
    file = tmp_path / "checkpoint-4" / "it" / "optimizer.safetensors"
    if damage == "no JSON":
        file = tmp_path / "checkpoint-4" / "metadata.json"
    content = file.read_bytes()
    file.write_bytes(
        content[:-1] + bytes([content[-1] ^ 1]) if damage == "one bit" else content[:9]
    )
    if damage == "gone":
        file.unlink()
    with pytest.raises(ValueError, match="checkpoint-4 is damaged"):
        fit(chosen, stream(), settings, folder=tmp_path, resume=True, progress=False)


def test_a_loss_that_is_not_finite_stops_with_the_batch(tmp_path):
    def exploding():
        for i, batch in enumerate(stream()):
            yield batch * (1e30 if i == 6 else 1.0)

    with pytest.raises(FloatingPointError, match=r"topk: loss is .* at step 6; the batch is in"):
        fit(
            {"topk": plan(recipes.topk(k=3))},
            exploding(),
            config(),
            folder=tmp_path,
            progress=False,
        )
    bad = load_file(tmp_path / "bad_batch.safetensors")["batch"]
    assert bad.shape == (64, 16) and bad.abs().max() > 1e29
    assert checkpoint.metadata(tmp_path)["step"] == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {"lr": 1e-3}}, "it.fit.lr: then 0.003, now 0.001"),
        ({"settings": {"n_steps": 61}}, "it.fit.n_steps: then 60, now 61"),
        ({"d_sae": 64}, "it.dictionary.d_sae: then 32, now 64"),
        ({"recipe": recipes.topk(k=4)}, "k: then 3, now 4"),
        ({"buffer": {"batch_size": 32}}, "batch_size"),
    ],
)
def test_resume_with_another_config_is_refused(tmp_path, change, named):
    def go(recipe=None, d_sae=32, settings=None, buffer=None):
        options = {"batch_size": 64, "n_tokens": 512, "seed": 5} | (buffer or {})
        source = Buffer(Planted(), **options)
        chosen = {"it": plan(recipe or recipes.topk(k=3), d_sae=d_sae)}
        return fit(
            chosen, source, config(**(settings or {})), folder=tmp_path, resume=True, progress=False
        )

    go()
    before = (tmp_path / "it" / "sae_weights.safetensors").read_bytes()
    with pytest.raises(ValueError, match=named):
        go(**change)
    assert (tmp_path / "it" / "sae_weights.safetensors").read_bytes() == before


def test_bad_input_is_refused_before_any_step(tmp_path):
    chosen, settings = {"it": plan(recipes.topk(k=3))}, config(checkpoint_every=0)
    for bad in ({}, {"a/b": chosen["it"]}, {"": chosen["it"]}, {"checkpoint-1": chosen["it"]}):
        with pytest.raises(ValueError, match="need"):
            fit(bad, stream(), settings)
    with pytest.raises(ValueError, match="need the recipe's rule"):
        fit({"it": (chosen["it"][0], recipes.topk(k=4))}, stream(), settings)
    with pytest.raises(ValueError, match="need a folder"):
        fit(chosen, stream(), config())
    with pytest.raises(ValueError, match="width 16, got 15"):
        fit(chosen, [torch.randn(8, 15)], settings, progress=False)
    with pytest.raises(FloatingPointError, match="2 of 8 activations at step 0 are NaN .* is in"):
        spoilt = torch.randn(8, 16)
        spoilt[:2, 3] = torch.nan
        fit(chosen, [spoilt], settings, folder=tmp_path, progress=False)
    assert torch.equal(
        load_file(tmp_path / "bad_batch.safetensors")["batch"].isnan(), spoilt.isnan()
    )
    with pytest.raises(ValueError, match="need batches"):
        fit(chosen, [torch.randn(0, 16)], settings, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write in"):
        fit(chosen, stream(), settings, folder=tmp_path / "file" / "folder")
    with pytest.raises(ValueError, match="tracking in"):
        fit(chosen, stream(), settings, folder=tmp_path, tracking="paper")


@pytest.mark.parametrize(
    "bad",
    [
        {"n_steps": 0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr_schedule": "steps"},
        {"lr_warmup": 1.5},
        {"normalize": "layer_norm"},
        {"dead_after": 0},
        {"betas": (0.9, 1.0)},
        {"checkpoint_every": -1},
    ],
)
def test_impossible_fit_configs_are_refused(bad):
    with pytest.raises(ValueError, match=f"need {next(iter(bad))}"):
        FitConfig(**{"n_steps": 10} | bad)


def test_learning_rate_rises_stays_and_falls():
    rates = [FitConfig(n_steps=100, lr_warmup=0.1, lr_decay=0.2).lr_factor(i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[80] == 1
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)
    constant = FitConfig(n_steps=100, lr_schedule="constant")
    assert constant.lr_factor(99) == 1
    assert FitConfig(n_steps=100, lr_schedule="cosine").lr_factor(99) < 0.01


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_tracking_writes_its_files(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    chosen = {"topk": plan(recipes.topk(k=3))}
    fit(chosen, stream(), config(n_steps=20), folder=tmp_path, tracking=kind, progress=False)
    files = [path for path in (tmp_path / "tracking").rglob("*") if path.is_file()]
    assert files
    if kind == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder = next(p.parent for p in files if "tfevents" in p.name)
        events = EventAccumulator(str(tmp_path / "tracking"))
        events.Reload()
        assert [e.step for e in events.Scalars("topk/fvu")] == [10, 20], folder
    else:
        assert any(path.suffix == ".wandb" and path.stat().st_size > 0 for path in files)

"""Reconstruction, and what patching it into a model costs."""

import copy
import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from lib import paths
from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.source import Block
from lib.analysis.metrics import ReconstructionSums, patched_losses, reconstruction
from lib.data.corpus import load_corpus
from lib.dictionaries import Dictionary, DictionaryConfig, SparseActs, load_dictionaries
from lib.dictionaries.rules import ReLU, TopK
from lib.models import replace, site_dim
from lib.models.tiny import TinyConfig, build_model

SITE, HEADS = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def score(x, x_hat, acts=None, split=1000):
    acts = torch.ones(len(x), 2) if acts is None else acts
    sums = ReconstructionSums(acts.shape[1])
    for parts in zip(x.split(split), x_hat.split(split), acts.split(split), strict=True):
        sums.update(parts[0], parts[1], SparseActs.of(parts[2]))
    return sums.result()


def test_perfect_and_mean_predictors():
    x = noise(300, 5) * torch.arange(1, 6) + 3
    perfect = score(x, x)
    assert perfect.fvu == 0 and perfect.r2 == 1
    for value in (perfect.cosine, perfect.relative_norm, perfect.slope):
        assert value == pytest.approx(1)
    mean = score(x, x.double().mean(0).expand(300, 5).float())
    assert mean.fvu == pytest.approx(1, abs=1e-6)
    assert mean.slope != mean.slope  # NaN: nothing varies
    assert score(x, torch.zeros_like(x)).fvu > 1


def test_sums_are_pooled_whatever_the_batches():
    x, x_hat = noise(301, 5) * noise(301, 1, seed=3).abs() ** 3, noise(301, 5, seed=1)
    acts = (noise(301, 9, seed=2) - 1).relu()
    whole = dataclasses.asdict(score(x, x_hat, acts))
    density = whole.pop("density")
    for split in (1, 7, 150):
        parts = dataclasses.asdict(score(x, x_hat, acts, split))
        assert torch.equal(parts.pop("density"), density)
        assert parts == pytest.approx(whole, rel=1e-9)


def test_against_the_definitions():
    x, x_hat = (noise(200, 4) + 2).double(), (noise(200, 4, seed=1) * 0.1).double()
    x_hat += 0.5 * x
    acts = (noise(200, 6, seed=2) - 0.5).relu()
    acts[:, 4] = 0
    found = score(x, x_hat, acts)
    assert found.fvu == pytest.approx(
        float((x - x_hat).var(0, correction=0).sum() + (x - x_hat).mean(0).square().sum())
        / float(x.var(0, correction=0).sum())
    )
    cosine = (x * x_hat).sum(1) / x.norm(dim=1) / x_hat.norm(dim=1)
    assert found.cosine == pytest.approx(float(cosine.mean()))
    assert found.relative_norm == pytest.approx(float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()))
    a, b = x - x.mean(0), x_hat - x_hat.mean(0)
    assert found.slope == pytest.approx(float((a * b).sum() / b.square().sum()))
    assert found.l0 == pytest.approx(float((acts != 0).sum(1).double().mean()))
    assert torch.allclose(found.density, (acts != 0).float().mean(0))
    assert found.dead == pytest.approx(1 / 6)


def test_slope_undoes_shrinkage_and_offsets_cost_no_digits():
    x = noise(400, 6)
    shrunk = score(x, 0.5 * x)
    assert shrunk.slope == pytest.approx(2)
    assert shrunk.relative_norm == pytest.approx(0.5)
    assert shrunk.fvu == pytest.approx(0.25, rel=0.01)
    far = score(x.double() + 1e6, 0.5 * x.double() + 1e6, split=37)
    assert far.fvu == pytest.approx(score(x.double(), 0.5 * x.double()).fvu, rel=1e-6)
    assert far.slope == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_no_variance(n):
    with pytest.raises(ValueError, match=f"need activations that vary, got {n} tokens"):
        score(torch.ones(n, 3), torch.ones(n, 3))


def test_reconstruction_of_a_dictionary():
    torch.manual_seed(0)
    dictionary = Dictionary(DictionaryConfig(site_dims=(8,), d_sae=30, rule=TopK(k=4)))
    x, index = noise(50, 8), torch.arange(50)
    blocks = [Block(x[p], index[p], index[p], index[p]) for p in index.split(20)]
    found = reconstruction(dictionary, iter(blocks))
    with torch.no_grad():
        acts = dictionary.encode(x)
        expected = score(x, dictionary(x), acts)
    assert found.n_tokens == 50
    assert found.fvu == pytest.approx(expected.fvu, rel=1e-5)
    assert found.l0 == expected.l0 <= 4
    assert torch.equal(found.density, expected.density)
    transcoder = DictionaryConfig(
        site_dims=(8,), out_dims=(8,), d_sae=30, rule=ReLU(), apply_b_dec_to_input=False
    )
    with pytest.raises(ValueError, match=r"got a transcoder with out_dims \(8,\)"):
        reconstruction(Dictionary(transcoder), blocks)


@pytest.fixture(scope="module")
def corpus(gemma):
    return load_corpus("world", gemma[1], n_tokens=300, seq_len=64)


@pytest.fixture(scope="module")
def model(gemma):
    torch.manual_seed(0)
    model = build_model(TinyConfig(d_model=32, n_layers=3, d_mlp=48), gemma[1]).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 3  # far from uniform predictions, so that patches matter
    return model


def dictionary_of(rows: torch.Tensor) -> Dictionary:
    """ReLU on ± each row: the projection on orthonormal rows, exactly."""
    config = DictionaryConfig(site_dims=(rows.shape[1],), d_sae=2 * len(rows), rule=ReLU())
    dictionary = Dictionary(config)
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.cat([rows, -rows]))
        dictionary.W_enc.copy_(dictionary.W_dec.T)
    return dictionary.eval()


def identity(model, site=SITE) -> Dictionary:
    return dictionary_of(torch.eye(site_dim(model, site)))


def half() -> Dictionary:
    return dictionary_of(torch.linalg.qr(noise(32, 16)).Q.T)


def by_hand(model, corpus, edit=None, hook_name=SITE):
    """Log-probabilities and losses of real next tokens, one row at a time, without padding."""
    log_p, losses = [], []
    for ids, mask, special in zip(corpus.ids, corpus.mask, corpus.special, strict=True):
        ids, special = ids[mask].long(), special[mask]

        def patch(x, special=special):
            return x if edit is None else edit(x, special)

        with torch.no_grad(), replace(model, hook_name, patch):
            logits = model(ids[None]).logits[0]
        log_p.append(logits[:-1].log_softmax(-1))
        losses.append(cross_entropy(logits[:-1], ids[1:], reduction="none"))
    return torch.cat(log_p), torch.cat(losses)


def test_losses_against_unbatched_rows(model, corpus):
    dictionary = half()
    found = patched_losses(model, dictionary, corpus, SITE)
    assert found.n_tokens == int(corpus.mask[:, 1:].sum())

    def project(x, special):
        return torch.where(special[None, :, None], x, dictionary(x))

    def zero(x, special):
        return x * special[None, :, None]

    clean, ce_clean = by_hand(model, corpus)
    assert found.ce_clean == pytest.approx(float(ce_clean.mean()), rel=1e-4)
    for edit, ce, kl in (
        (project, found.ce_patched, found.kl),
        (zero, found.ce_zero, found.kl_zero),
    ):
        log_p, losses = by_hand(model, corpus, edit)
        assert ce == pytest.approx(float(losses.mean()), rel=1e-4)
        expected = (clean.exp() * (clean - log_p)).sum(-1).mean()
        assert kl == pytest.approx(float(expected), rel=1e-3)
    assert found.kl > 0.01
    assert found.loss_recovered == pytest.approx(
        (found.ce_zero - found.ce_patched) / (found.ce_zero - found.ce_clean)
    )
    assert found.kl_recovered == pytest.approx(1 - found.kl / found.kl_zero)
    other = patched_losses(model, dictionary, corpus, SITE, batch_rows=3)
    assert dataclasses.astuple(other) == pytest.approx(dataclasses.astuple(found), rel=1e-4)


def test_patching_that_changes_nothing(model, corpus):
    for found in (
        patched_losses(model, identity(model), corpus, SITE),
        patched_losses(model, half(), corpus, SITE, error_term=True),
    ):
        assert found.ce_patched == pytest.approx(found.ce_clean, rel=1e-5)
        assert found.kl == pytest.approx(0, abs=1e-6)
        assert found.loss_recovered == pytest.approx(1, abs=1e-3)
        assert found.kl_recovered == pytest.approx(1, abs=1e-4)


def test_a_dictionary_of_zeros_recovers_nothing(model, corpus):
    nothing = identity(model)
    with torch.no_grad():
        nothing.W_dec.zero_()
    found = patched_losses(model, nothing, corpus, SITE)
    assert found.ce_patched == pytest.approx(found.ce_zero, rel=1e-6)
    assert found.loss_recovered == pytest.approx(0, abs=1e-6)
    assert found.kl_recovered == pytest.approx(0, abs=1e-6)


def test_special_tokens_are_left_alone_unless_asked(model, corpus):
    found, other = (
        patched_losses(model, half(), corpus, SITE, skip_special=skip) for skip in (False, True)
    )
    _, losses = by_hand(model, corpus, lambda x, special: torch.zeros_like(x))
    assert found.ce_zero == pytest.approx(float(losses.mean()), rel=1e-4)
    assert found.ce_zero != other.ce_zero


def test_all_heads_and_one_head(model, corpus):
    exact = patched_losses(model, identity(model, HEADS), corpus, HEADS)
    assert exact.kl == pytest.approx(0, abs=1e-6)
    found = patched_losses(model, dictionary_of(torch.eye(8)), corpus, f"{HEADS}.2")
    assert found.kl == pytest.approx(0, abs=1e-6)

    def without_head(x, special):
        y = x.clone()
        y[:, ~special, 2] = 0
        return y

    _, losses = by_hand(model, corpus, without_head, HEADS)
    assert found.ce_zero == pytest.approx(float(losses.mean()), rel=1e-4)
    assert found.ce_zero != exact.ce_zero


def test_half_precision_model(model, corpus):
    found = patched_losses(copy.deepcopy(model).bfloat16(), half(), corpus, SITE)
    expected = patched_losses(model, half(), corpus, SITE)
    assert found.ce_clean == pytest.approx(expected.ce_clean, rel=0.05)
    assert found.loss_recovered == pytest.approx(expected.loss_recovered, abs=0.15)


def test_patching_refuses(model, corpus):
    def refuse(match, dictionary, hook_name=SITE, corpus=corpus, model=model):
        with pytest.raises(ValueError, match=match):
            patched_losses(model, dictionary, corpus, hook_name)

    two = Dictionary(DictionaryConfig(site_dims=(16, 16), d_sae=64, rule=ReLU()))
    refuse("need a dictionary of one site to patch, got one of 2", two)
    refuse(f"need a dictionary of width 32 at {SITE}, got 8", dictionary_of(torch.eye(8)))
    refuse(f"need a dictionary of width 8 at {HEADS}.0, got 32", identity(model), f"{HEADS}.0")
    refuse("near ones: .*blocks.1.hook_resid_post", identity(model), "blocks.1.resid_post")
    refuse("need a head in 0 to 3, got 4", dictionary_of(torch.eye(8)), f"{HEADS}.4")
    shape = {"site_dims": (32,), "out_dims": (32,), "d_sae": 64, "rule": ReLU()}
    refuse("got a transcoder", Dictionary(DictionaryConfig(**shape, apply_b_dec_to_input=False)))
    columns = {name: getattr(corpus, name)[:, :1] for name in ("ids", "mask", "special")}
    short = dataclasses.replace(corpus, concepts=None, **columns)
    refuse("need a corpus with a token to predict", identity(model), corpus=short)
    refuse("need a model in eval mode", identity(model), model=copy.deepcopy(model).train())


def test_shipped_dictionaries_reconstruct_their_model(gemma):
    """Small samples of what `make saes` measured, with room for their sampling error."""
    model, tokenizer = gemma
    corpus = load_corpus("world", tokenizer, n_tokens=2000, seq_len=64, split="test", seed=9)
    found = load_dictionaries(paths.shipped_dir() / "saes" / "tiny-gemma2")
    assert list(found) == ["matryoshka", "topk"]
    for (name, dictionary), fvu in zip(found.items(), (0.100, 0.077), strict=True):
        (hook,) = dictionary.config.hook_names
        source = Harvester([model], corpus, HarvestConfig(hook_names=(hook,)))
        quality = reconstruction(dictionary, (source.block(i) for i in range(source.n_blocks)))
        assert quality.fvu == pytest.approx(fvu, rel=0.1), name
        assert quality.l0 == pytest.approx(16, rel=0.05), name
        assert patched_losses(model, dictionary, corpus, hook).loss_recovered > 0.997, name

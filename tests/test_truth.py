"""Known concepts and planted features are found, and nothing else is."""

import pytest
import torch

from lib.activations.source import Block
from lib.analysis import probes
from lib.analysis.logistic import greedy, linear_probe, newton
from lib.analysis.probes import DenseFeatures, SparseFeatures, best_cuts, best_thresholds, f1_score
from lib.analysis.truth import baselines, random_codes, score_record, score_sparse
from lib.data.corpus import Corpus
from lib.dictionaries import Dictionary, DictionaryConfig, FitConfig, SparseActs, fit, recipes
from lib.dictionaries.rules import TopK
from lib.latents import collect
from lib.world import CONCEPTS
from tests.recovery import SyntheticStream, recovery_scores

N = 3000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sparse(n: int, m: int, share: float = 0.2, seed: int = 0, steps: int = 1000) -> torch.Tensor:
    """Non-negative values in so many steps, most of them 0."""
    x = (torch.rand(n, m, generator=generator(seed)) * steps).ceil() / steps
    return x * (torch.rand(n, m, generator=generator(seed + 1)) < share)


def flags(n: int, c: int, share: float = 0.3, seed: int = 7) -> torch.Tensor:
    return torch.rand(n, c, generator=generator(seed)) < share


def rows_of(n: int, length: int = 10) -> torch.Tensor:
    return torch.arange(n) // length


def names(c: int) -> list[str]:
    return [f"concept {i}" for i in range(c)]


def scored(x, labels, rows=None):
    rows = rows_of(len(x)) if rows is None else rows
    return score_sparse(SparseActs.of(x), labels, rows, names(labels.shape[1]))


def brute_force(x, labels, signs, above=-torch.inf):
    """The best F1 of any threshold over `above` on any feature, for each concept."""
    best = torch.zeros(labels.shape[1])
    for sign in signs:
        for column in (sign * x).T:
            for value in column[column > above].unique():
                f1 = f1_score((column >= value)[:, None].expand_as(labels), labels)
                best = torch.maximum(best, f1)
    return best


@pytest.mark.parametrize("chunk", [1, 50, 2**21])
@pytest.mark.parametrize("steps", [3, 1000])
def test_cuts_are_the_best_there_are(steps, chunk, monkeypatch):
    """Few steps: many ties, which a cut must not part."""
    monkeypatch.setattr(probes, "CHUNK", chunk)
    x, labels = sparse(60, 7, steps=steps), flags(60, 5)
    x[:, [3, 6]] = 0
    feature, sign, threshold = best_cuts(SparseFeatures(SparseActs.of(x)), labels)
    got = f1_score(x[:, feature] * sign > threshold, labels)
    torch.testing.assert_close(got, brute_force(x, labels, [1], above=0))
    assert (threshold >= 0).all() and (sign == 1).all()

    dense = (torch.randn(60, 4, generator=generator()) * steps / 10).round()
    feature, sign, threshold = best_cuts(DenseFeatures(dense), labels)
    got = f1_score(dense[:, feature] * sign > threshold, labels)
    torch.testing.assert_close(got, brute_force(dense, labels, [1, -1]))


def test_thresholds_of_scores_are_the_best_there_are():
    scores = (torch.randn(80, 6, generator=generator()) * 2).round()
    labels = flags(80, 6)
    got = f1_score(scores > best_thresholds(scores, labels), labels)
    for c in range(6):
        expected = brute_force(scores[:, [c]], labels[:, [c]], [1])
        torch.testing.assert_close(got[[c]], expected)


def test_thresholds_lie_between_values():
    x = torch.tensor([[0.0], [1], [3], [5], [0], [0]])
    labels = torch.tensor([[False], [False], [True], [True], [False], [False]])
    for features in (SparseFeatures(SparseActs.of(x)), DenseFeatures(x)):
        assert best_cuts(features, labels)[2].item() == 2
    assert best_cuts(DenseFeatures(x), ~labels)[1].item() == -1


def test_sparse_and_dense_features_are_one_thing():
    x, r = sparse(90, 8), torch.randn(90, 3, generator=generator())
    a, b = SparseFeatures(SparseActs.of(x)), DenseFeatures(x)
    tokens, index = flags(90, 1)[:, 0], torch.tensor([5, 0, 5])
    for left, right in ((a, b), (a.take(tokens), b.take(tokens))):
        assert left.n == right.n
        assert torch.equal(left.columns(index), right.columns(index))
        for power in (1, 2):
            torch.testing.assert_close(
                left.against(r[: left.n], power), right.against(r[: left.n], power)
            )


def test_newton_finds_the_optimum():
    table = torch.randn(4, 3, 300, generator=generator())
    table[:, 0] = 1
    y = flags(300, 4).T.float()
    y[3] = (table[3, 1] > 0).float()  # separable: only the ridge keeps it finite
    weights = newton(table, y, torch.zeros(4, 3)).requires_grad_()
    z = torch.einsum("cpn,cp->cn", table, weights)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)
    ridge = torch.tensor([1e-3, 1.0, 1.0])
    (loss + 0.5 * (ridge * weights.square()).sum(1)).sum().backward()
    assert weights.isfinite().all()
    assert weights.grad.abs().max() < 0.05  # of 300 tokens


def test_linear_probe_finds_a_direction():
    x = torch.randn(2000, 10, generator=generator()) @ torch.randn(10, 10, generator=generator(1))
    x[:, 9] = x[:, 0]  # rank-deficient
    direction = torch.randn(10, 2, generator=generator(2))
    labels = x @ direction > 1
    weights = linear_probe(x + 100, labels)
    scores = (x + 100) @ weights.T
    assert (f1_score(scores > best_thresholds(scores, labels), labels) > 0.98).all()


def test_greedy_finds_what_was_summed():
    x = sparse(4000, 40, share=0.1)
    planted = torch.tensor([[3, 8, 11], [20, 1, 39]])
    logits = torch.stack([x[:, p].sum(1) * 12 - 6 for p in planted], 1)
    labels = logits.sigmoid() > torch.rand(4000, 2, generator=generator(5))
    chosen, weights = greedy(SparseFeatures(SparseActs.of(x)), labels, 3)
    assert torch.equal(chosen.sort(1).values, planted.sort(1).values)
    torch.testing.assert_close(weights, torch.full((2, 3), 12.0), rtol=0.15, atol=0)
    same, _ = greedy(DenseFeatures(x), labels, 3)
    assert torch.equal(same, chosen)


def test_greedy_takes_each_feature_once_whatever_its_offset():
    x, labels = sparse(N, 6), flags(N, 3)
    x[:, 2:] = 0
    chosen, weights = greedy(SparseFeatures(SparseActs.of(x)), labels, 5)
    assert all(len(set(features)) == 5 for features in chosen.tolist())
    assert (weights[chosen >= 2] == 0).all()
    x = torch.randn(N, 5, generator=generator())
    labels = (x[:, [3]] + 0.5 * x[:, [1]]) > 0.5
    x[:, 3] += 100
    x[:, 0] = 5
    chosen, _ = greedy(DenseFeatures(x), labels, 2)
    assert chosen.tolist() == [[3, 1]]
    chosen, weights = greedy(DenseFeatures(x - x.mean(0)), labels, 5)
    assert chosen[0, -1] == 0 and weights[0, -1] == 0  # a constant comes last


def test_planted_concepts_are_found():
    x = sparse(N, 30, share=0.1)
    labels = torch.stack([x[:, 4] > 0.5, (x[:, [5, 6, 7, 8, 9]] > 0).any(1), x[:, 12] > 0], 1)
    scores = scored(x, labels)
    best, five = scores["best"], scores["five"]
    assert best.features[:, 0].tolist()[::2] == [4, 12]
    assert best.thresholds[0] == pytest.approx(0.5, abs=0.01)
    assert best.f1[0] > 0.97 and best.f1[1] < 0.6 and best.f1[2] == 1
    assert set(five.features[1].tolist()) == {5, 6, 7, 8, 9} and five.f1[1] > 0.98
    assert five.mean == pytest.approx(float(five.f1.mean()))
    assert best.by_concept()["concept 2"] == 1
    assert best.left_out == ()


def test_the_ceiling_and_the_baselines():
    x = torch.randn(N, 16, generator=generator()) + 5
    direction = torch.randn(16, 3, generator=generator(1))
    labels = torch.cat([(x - 5) @ direction > 2, (x[:, [0]] < 4)], 1)
    found = baselines(x, labels, rows_of(N), names(4), d_sae=64, k=8)
    assert {key: list(scores) for key, scores in found.items()} == {
        "neurons": ["best", "five"],
        "pca": ["best", "five"],
        "random": ["best", "five"],
        "linear": ["probe"],
        "none": ["always"],
    }
    probe = found["linear"]["probe"]
    assert (probe.f1 > 0.95).all()
    best = found["neurons"]["best"]  # of the last concept: the negative side of neuron 0
    assert best.f1[3] > 0.99 and (best.features[3], best.weights[3]) == (0, -1)
    for kind in ("neurons", "pca", "random"):
        assert found[kind]["best"].f1[:3].mean() < found[kind]["five"].f1[:3].mean()
        assert (found[kind]["five"].f1[:3] < probe.f1[:3]).all()
    always = found["none"]["always"].f1
    share = labels.float().mean(0)
    torch.testing.assert_close(always, 2 * share / (1 + share), atol=0.05, rtol=0)


def test_chance_scores_no_more_than_always():
    """Nothing leaks from the half that measures: random labels stay at the base rate."""
    x, labels = sparse(N, 200), flags(N, 10, share=0.1)
    assert all(scores.mean < 0.21 for scores in scored(x, labels).values())


def test_the_other_half_is_not_looked_at():
    x, labels, rows = sparse(N, 20), flags(N, 4), rows_of(N)
    before = scored(x, labels)
    shuffled = torch.randperm(int(rows.max()) + 1, generator=generator(0))
    held = (shuffled % 2 == 1)[rows]
    changed = labels.clone()
    changed[held] = flags(int(held.sum()), 4, seed=9)
    after = scored(x, changed)
    for kind in ("best", "five"):
        assert torch.equal(before[kind].features, after[kind].features)
        assert torch.equal(before[kind].thresholds, after[kind].thresholds)
        assert not torch.equal(before[kind].f1, after[kind].f1)
        assert len(before[kind].f1) == 4
    x_held = x.clone()
    x_held[held] = sparse(int(held.sum()), 20, seed=11)
    other = scored(x_held, labels)
    assert torch.equal(before["five"].weights, other["five"].weights)


def test_a_row_is_in_one_half():
    """A concept that marks single rows cannot be learned from their other tokens."""
    rows = rows_of(N, 30)
    code = torch.zeros(N, 100)
    code[torch.arange(N), rows] = 1  # each row has a latent of its own
    labels = (rows % 3 == 0)[:, None]
    assert scored(code, labels, rows)["best"].f1.max() == 0


def test_rare_concepts_are_left_out_and_named():
    x, labels = sparse(N, 20), flags(N, 4)
    labels[:, 1] = False
    labels[:30, 1] = True
    labels[:, 2] = ~labels[:, 1]
    scores = scored(x, labels)
    assert scores["five"].concepts == ("concept 0", "concept 3")
    assert scores["five"].left_out == ("concept 1", "concept 2")
    with pytest.raises(ValueError, match="need a concept on and off at least 20 tokens"):
        scored(x, labels[:, 1:3])


def test_a_record_is_scored_on_its_own_concepts():
    """Latents that are three of the world's concepts, recorded over a corpus that has them."""
    ids = torch.arange(N, dtype=torch.int32).view(-1, 10)
    mask = torch.ones_like(ids).bool()
    masks = torch.randint(8, ids.shape, generator=generator())  # three independent bits
    corpus = Corpus(ids, mask, ~mask, masks, "made up")
    rows, positions = mask.nonzero(as_tuple=True)
    bits = masks[rows, positions][:, None] >> torch.arange(3) & 1
    block = Block(bits.float(), ids.flatten(), rows, positions)
    scores = score_record(collect(SparseActs.of, [block], corpus))
    assert scores["best"].concepts == CONCEPTS[:3]
    assert scores["best"].features[:, 0].tolist() == [0, 1, 2]
    assert scores["best"].mean == scores["five"].mean == 1
    assert scores["best"].left_out == CONCEPTS[3:]
    with pytest.raises(ValueError, match="need a record with concepts"):
        bare = Corpus(ids, mask, ~mask, None, "bare")
        score_record(collect(SparseActs.of, [block], bare))


def test_latents_that_never_fire_find_nothing():
    labels, x = flags(N, 2, share=0.1), torch.zeros(N, 5)
    assert scored(x, labels)["best"].f1.tolist() == [0, 0]
    x[:, 2] = (~labels.any(1)).float()
    assert scored(x, labels)["best"].f1.tolist() == [0, 0]


def test_scores_refuse():
    x, labels, rows = sparse(N, 5), flags(N, 2), rows_of(N)
    with pytest.raises(ValueError, match="need finite features"):
        baselines(torch.full((N, 2), float("nan")), labels, rows, names(2))
    with pytest.raises(ValueError, match="need latents of at least 0, got -0.5"):
        scored(x - 0.5, labels)
    with pytest.raises(ValueError, match="a name for each of 2 concepts, got 3000 rows and 52"):
        score_sparse(SparseActs.of(x), labels, rows)


def test_random_codes():
    x = torch.randn(100, 6, generator=generator())
    acts = random_codes(x, 50, 4)
    assert acts.n_latents == 50 and acts.n == 100
    assert (acts.offsets.diff() == 4).all() and (acts.values > 0).all()
    assert torch.equal(random_codes(x, 50, 4).indices, acts.indices)
    assert not torch.equal(random_codes(x, 50, 4, seed=1).indices, acts.indices)
    with pytest.raises(ValueError, match="need k in 1..4, got 5"):
        random_codes(x, 4, 5)


def synthetic(n: int, d: int, **options):
    from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig  # slow to import

    return SyntheticModel(SyntheticModelConfig(num_features=n, hidden_dim=d, **options))


def dictionary_of(rows: torch.Tensor, k: int = 4) -> Dictionary:
    config = DictionaryConfig(site_dims=(rows.shape[1],), d_sae=len(rows), rule=TopK(k=k))
    dictionary = Dictionary(config)
    with torch.no_grad():
        dictionary.W_enc.copy_(rows.T)
        dictionary.W_dec.copy_(rows)
    return dictionary.eval()


def test_recovery_of_the_truth_and_of_nothing():
    model = synthetic(24, 16, seed=0)
    truth = model.feature_dict.feature_vectors.detach()
    exact = dictionary_of(truth)
    with torch.no_grad():
        exact.b_dec.copy_(model.feature_dict.bias)
    found = recovery_scores(exact, model, n_tokens=5000)
    assert found.mcc == pytest.approx(1, abs=1e-5)
    assert (found.uniqueness, found.dead) == (1, 0) and found.l0 <= 4
    assert found == recovery_scores(exact, model, n_tokens=5000)
    other = dictionary_of(torch.randn(24, 16, generator=generator(5)))
    random = recovery_scores(other, model, n_tokens=5000)
    assert random.mcc < 0.75 and random.f1 < found.f1 and random.r2 < found.r2
    twice = recovery_scores(dictionary_of(truth[:12].repeat(2, 1)), model, n_tokens=1000)
    assert twice.uniqueness == 0.5


def test_training_recovers_planted_features():
    from sae_lens.synthetic import ConstantFiringProbabilityConfig

    firing = ConstantFiringProbabilityConfig(probability=0.1)
    model, recipe = synthetic(16, 16, firing_probability=firing, seed=1), recipes.topk(k=2)
    plans = {"topk": (recipe.dictionary(site_dims=(16,), d_sae=16), recipe)}
    stream = SyntheticStream(model, batch_size=256)
    (fitted,) = fit(plans, stream, FitConfig(n_steps=60, lr=3e-2), progress=False).values()
    found = recovery_scores(fitted.dictionary, model, n_tokens=5000)
    untrained = recovery_scores(dictionary_of(torch.eye(16)), model, n_tokens=5000)
    assert found.mcc > 0.85 > untrained.mcc + 0.2
    assert found.f1 > untrained.f1 + 0.2
    assert not fitted.dictionary.training

"""Soft whitening: what it does to a covariance, its inverses, and how long it calibrates."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from lib.activations.moments import Moments
from lib.spalf import whitening
from lib.spalf.whitening import Whitener, calibrate

D = 12
RNG = torch.Generator()
SPREAD = torch.logspace(2, -3, D)
ISOTROPIC = torch.cat([torch.tensor([500.0, 300.0, 200.0]), torch.full((D - 3,), 0.5)])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG.manual_seed(seed))


def basis(d: int = D) -> torch.Tensor:
    """An orthogonal matrix, in float64."""
    return torch.linalg.qr(noise(d, d, seed=9).double())[0]


def planted(values: torch.Tensor, mean: float | torch.Tensor = 0.0) -> Moments:
    """Moments of exactly these covariance eigenvalues, in the directions of `basis`."""
    d, count = len(values), torch.tensor(1001)
    moments, mean = Moments(d), torch.zeros(d) + mean
    products = (basis(d) * values.double() @ basis(d).T) * (count - 1)
    moments.load_state_dict({"count": count, "mean": mean, "products": products})
    return moments


def moments_of(x: torch.Tensor) -> Moments:
    moments = Moments(x.shape[1])
    moments.update(x)
    return moments


def exact(moments: Moments, full_up_to: int = 4096) -> Whitener:
    """The whitener that `fit` gives, its eigenpairs in float64."""
    fitted = Whitener.fit(moments, full_up_to=full_up_to)
    values, vectors = torch.linalg.eigh(moments.covariance)
    kept = slice(0, len(fitted.values))
    return dataclasses.replace(
        fitted,
        mean=moments.mean,
        values=values.flip(0)[kept].clamp(min=0),
        vectors=vectors.flip(1)[:, kept],
    )


@pytest.fixture(params=["full", "low rank"])
def whitener(request) -> Whitener:
    full = request.param == "full"
    moments = planted(SPREAD if full else ISOTROPIC, mean=10 * noise(D, seed=4))
    whitener = Whitener.fit(moments, full_up_to=D if full else D - 1)
    assert len(whitener.values) == (D if full else 3)
    return whitener


def test_alpha_is_a_hundredth_of_the_eigenvalue_at_rank_99():
    for values, k in (
        ([98.0, 1.5, 0.4, 0.1], 2),
        ([25.0, 25.0, 25.0, 25.0], 4),
        ([99.5, 0.5, 0.0, 0.0], 1),
    ):
        moments = planted(torch.tensor(values))
        whitener = Whitener.fit(moments)
        assert whitener.alpha == pytest.approx(values[k - 1] / 100)
        assert torch.allclose(whitener.values, torch.tensor(values), atol=1e-5)
        assert whitener.rest == 0 and whitener.n_tokens == 1001
        assert torch.allclose(whitener.vectors.T @ whitener.vectors, torch.eye(4), atol=1e-6)
        low = Whitener.fit(moments, full_up_to=3)
        assert low.vectors.shape == (4, k) and low.alpha == pytest.approx(whitener.alpha)
        left = values[k:] or [0.0]
        assert low.rest == pytest.approx(sum(left) / len(left), abs=1e-6)


def test_whitened_covariance():
    x = noise(4000, D).double() * SPREAD.double().sqrt() @ basis().T + 7
    moments = moments_of(x)
    sigma, eye = moments.covariance, torch.eye(D).double()
    whitener = exact(moments)
    white = whitener(x)
    expected = sigma @ torch.linalg.inv(sigma + whitener.alpha * eye)
    assert torch.allclose(white.T.cov(), expected, atol=1e-10)
    assert white.mean(0).abs().max() < 1e-10
    fitted = Whitener.fit(moments)
    assert torch.allclose(fitted(x.float()).T.cov(), expected.float(), atol=1e-5)
    # of all square roots the symmetric one
    assert torch.allclose(whitener.fold(eye), whitener.fold(eye).T, atol=1e-12)


def test_low_rank_is_full_rank_where_the_rest_is_isotropic():
    moments = planted(ISOTROPIC, mean=noise(D, seed=4))
    full, low = exact(moments), exact(moments, full_up_to=D - 1)
    assert low.vectors.shape == (D, 3) and low.rest == pytest.approx(0.5)
    x = noise(5, 7, D, seed=1).double()
    assert torch.allclose(low(x), full(x), atol=1e-10)
    assert torch.allclose(low.fold(x[0]), full.fold(x[0]), atol=1e-10)
    assert (D, D) not in [getattr(held, "shape", ()) for held in vars(low).values()]


def test_centring_scales_all_directions_alike():
    moments = planted(SPREAD, mean=10 * noise(D, seed=4))
    centring, x = Whitener.centring(moments), noise(9, D)
    scale = float(SPREAD.mean()) ** -0.5
    assert torch.allclose(centring(x), (x - moments.mean.float()) * scale, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="that vary"):
        Whitener.centring(planted(torch.zeros(D), mean=1.0))


def test_total_variance_is_the_trace(whitener):
    trace = (SPREAD if whitener.rest == 0 else ISOTROPIC).sum().item()
    assert whitener.total_variance == pytest.approx(trace, rel=1e-5)
    assert Whitener.centring(planted(ISOTROPIC)).total_variance == pytest.approx(1004.5, rel=1e-5)


def test_a_folded_encoder_reads_raw_activations(whitener):
    x, rows = noise(50, D, seed=2) * 20, noise(8, D, seed=3)
    assert whitener.mean.abs().max() > 1  # so that forgetting it would show
    raw = (x - whitener.mean) @ whitener.fold(rows).T
    assert torch.allclose(raw, whitener(x) @ rows.T, rtol=1e-4, atol=1e-4)


def length(whitener, dx):
    """Squared, once whitened."""
    return whitener.fold(dx).square().sum(-1)


def test_lengths_have_the_gradient_of_the_inverse_covariance():
    whitener = exact(planted(SPREAD))
    dx = noise(4, D).double().requires_grad_()
    (grad,) = torch.autograd.grad(length(whitener, dx).sum(), dx)
    sigma = planted(SPREAD).covariance + whitener.alpha * torch.eye(D).double()
    assert torch.allclose(grad, 2 * dx @ torch.linalg.inv(sigma), rtol=1e-8)


@pytest.mark.parametrize("full_up_to", [4096, 3])
def test_lengths_survive_a_massive_direction(full_up_to):
    """In float32, `|dx|² - |Vᵀdx|²` would drown the small directions, or fall below 0."""
    moments = planted(torch.tensor([1e8] + [1.0] * (D - 1)))
    whitener = Whitener.fit(moments, full_up_to=full_up_to)
    whitener = dataclasses.replace(whitener, alpha=0.01)
    dx = 1e4 * basis()[:, 0] + basis()[:, 1]
    expected = 1e8 / (1e8 + 0.01) + 1 / 1.01
    assert float(length(whitener, dx.float())) == pytest.approx(expected, rel=0.03)


def test_precision(whitener):
    x = noise(9, D)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert whitener(x.to(dtype)).dtype == whitener.fold(x.to(dtype)).dtype == torch.float32
    assert torch.equal(whitener(x.bfloat16()), whitener(x.bfloat16().float()))
    assert whitener(x.double()).dtype == torch.float64
    for empty in (x[:0], x[:0].expand(3, 0, D)):
        assert whitener(empty).shape == empty.shape


def test_states(whitener):
    state = whitener.state_dict()
    loaded = Whitener.from_state(state)
    for field in dataclasses.fields(Whitener):
        before, after = getattr(whitener, field.name), getattr(loaded, field.name)
        assert torch.equal(torch.as_tensor(before), torch.as_tensor(after)), field.name
        assert type(before) is type(after)
    x = noise(9, D)
    for other in (loaded, whitener.to("cpu")):
        assert torch.equal(other(x), whitener(x))
    with pytest.raises(ValueError, match="need values >= 0, got -"):
        Whitener.from_state(state | {"values": -state["values"]})
    state.pop("alpha")
    with pytest.raises(KeyError, match="alpha"):
        Whitener.from_state(state)
    mean = whitener.mean.clone()
    whitener.state_dict()["mean"].zero_()
    assert torch.equal(whitener.mean, mean)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "need a finite alpha > 0, got 0.0"),
        ({"alpha": float("nan")}, "need a finite alpha > 0, got nan"),
        ({"rest": -1.0}, "need a finite rest >= 0, got -1.0"),
        ({"mean": torch.full((D,), torch.nan)}, "need finite mean"),
        ({"values": -torch.ones(D)}, "need values >= 0, got -1.0"),
        (
            {"values": torch.ones(D + 1), "vectors": torch.ones(D, D + 1)},
            r"\[12, 13\] .* got \[12, 13\]",
        ),
    ],
)
def test_impossible_values(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Whitener.fit(planted(SPREAD)), **changes)


def test_fit_needs_tokens_that_vary():
    with pytest.raises(ValueError, match="need at least two tokens"):
        Whitener.fit(Moments(D))
    for value in (0.0, 0.1, 1e4 / 3):
        x = torch.full((300, D), value)
        x[::2] *= 1 + 2**-23  # float32's last digit
        moments = moments_of(x)
        with pytest.raises(ValueError, match="that vary, got the same at each of 300 tokens"):
            Whitener.fit(moments)
    moments.update(torch.full((300, D), value) + noise(300, D) * 0.01)
    assert Whitener.fit(moments).alpha > 0  # little variance far from 0 is variance
    few = Whitener.fit(moments_of(noise(5, D)))  # most eigenvalues are 0, up to rounding
    assert (few.values >= 0).all()
    lonely = torch.zeros(300, D)
    lonely[:, 2] = noise(300)
    white = Whitener.fit(moments_of(lonely))(lonely)  # dimensions that are constant are no error
    assert white.isfinite().all()
    assert float(white.var(0)[2]) == pytest.approx(1 / 1.01, abs=1e-4)


def batches(n: int = 500, batch: int = 256, d: int = 4) -> Iterator[torch.Tensor]:
    """Independent tokens."""
    return (noise(batch, d, seed=i) + 3 for i in range(n))


def counted(**options) -> int:
    """Batches that calibration used; it drew no more."""
    stream = batches()
    moments = calibrate(stream, **options)
    drawn = 500 - sum(1 for _ in stream)
    assert moments.count == drawn * 256
    return drawn


def test_streaming_is_one_shot():
    moments = calibrate(batches(), tolerance=0.02)
    whole = moments_of(torch.cat(list(batches(moments.count // 256))))
    streamed, at_once = Whitener.fit(moments), Whitener.fit(whole)
    assert moments.count == whole.count
    assert torch.allclose(streamed.fold(torch.eye(4)), at_once.fold(torch.eye(4)), atol=1e-6)
    assert torch.allclose(streamed.mean, at_once.mean)


def change_at(n: int) -> float:
    """What batch `n`, counted from 1, changed, by the definition."""
    before, after = (torch.cat(list(batches(i))).double().T.cov() for i in (n - 1, n))
    return float((after - before).norm() / after.norm())


def test_stops_at_the_first_batch_that_changes_little():
    drawn = counted(tolerance=0.01)
    changes = [change_at(n) for n in range(2, drawn + 1)]
    assert changes[-1] < 0.01 <= min(changes[:-1])
    assert 5 < drawn < 20  # about √256 · √d / 256 / n, and chance
    assert counted(tolerance=0.001) > 2 * drawn


def test_bounds_on_the_number_of_tokens(monkeypatch):
    assert counted(tolerance=9.0) == 2  # a change takes two batches; 2 * d_in are 8 tokens
    for most, drawn in ((1024, 4), (1025, 5)):
        monkeypatch.setattr(whitening, "MAX_TOKENS", most)
        assert counted(tolerance=1e-9) == drawn
    assert calibrate(batches(batch=10, d=30), tolerance=9.0).count == 60


def test_small_batches_do_not_pass_for_settled():
    """They change next to nothing, or nothing at all."""
    x = noise(600, 4)
    parts = [x[:1], x[1:257], x[:0], x[257:513], x[513:514], x[:0]]
    with pytest.raises(ValueError, match="too few tokens to calibrate: after 514 the last batch"):
        calibrate(iter(parts), tolerance=0.003)
    assert calibrate(iter(parts), tolerance=9.0).count == 513
    # after a large one, as many tokens as it had are judged at once
    parts = [x[:300], *x[300:].split(100)]
    assert calibrate(iter(parts), tolerance=9.0).count == 600


def test_streams_that_are_too_short():
    with pytest.raises(ValueError, match="too few tokens to calibrate: need at least 2, got 0"):
        calibrate(iter([]))
    with pytest.raises(ValueError, match="too few tokens to calibrate: need at least 60, got 50"):
        calibrate(batches(n=5, batch=10, d=30))
    said = f"after 1536 .* {change_at(6):.1e} of its norm; need below 1.0e"
    with pytest.raises(ValueError, match=said):
        calibrate(batches(n=6))


def test_calibration_refuses_bad_activations():
    constant = (torch.full((256, 4), 0.1) for _ in range(9))
    with pytest.raises(ValueError, match="that vary, got the same at each of 256 tokens"):
        calibrate(constant)
    assert len(list(constant)) == 8
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="need finite activations"):
            calibrate(iter([noise(9, 4), torch.full((9, 4), bad)]))
    with pytest.raises(ValueError, match="need width 4, got 5"):
        calibrate(iter([noise(9, 4), noise(9, 5)]))

"""Multipliers and penalties that follow the violations of constraints."""

import itertools
import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.spalf.control import ADRC, LOG_RANGE, PI, RHO_RANGE, TOLERANCE, Ascent, Control, Law

LAWS = [PI(), ADRC(), Ascent()]
each_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
same = partial(torch.testing.assert_close, rtol=0, atol=0)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def violations(n: int, m: int, mean: float = 0.1) -> torch.Tensor:
    return (mean + 0.4 * noise(n, m)).expm1()


def feed(control: Control, series: torch.Tensor) -> Control:
    for g in series:
        control.observe(g)
    return control


def test_filters_are_averages_that_start_at_the_first_value():
    series = violations(40, 2)
    control = Control(["a", "b"], PI(), every=1000)
    fast = slow = series[0].log1p()
    for g in series:
        control.observe(g)
        fast = 0.9 * fast + 0.1 * g.log1p()
        slow = 0.99 * slow + 0.01 * g.log1p()
        assert torch.allclose(control.fast, fast, rtol=1e-12)
        assert torch.allclose(control.slow, slow, rtol=1e-12)


def test_violations_are_clipped_lose_their_graph_and_gain_digits():
    control = Control(["high", "low"], PI(), every=1)
    control.observe(torch.tensor([1e30, -1.0], requires_grad=True))
    assert control.fast.tolist() == control.slow.tolist() == [LOG_RANGE, -LOG_RANGE]
    for held in (control.multipliers, control.penalties, control.fast, control.slow):
        assert held.dtype == torch.float64 and not held.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.001])
@each_law
def test_a_bad_violation_is_named_and_changes_nothing(law, value):
    """Nor does it end the wait of a constraint that the same step would have met."""
    control = Control(["fit", "drift"], law, every=1, fast=0.0, unmet_at_limit=["fit"])
    before = feed(control, violations(15, 2).abs()).state_dict()
    assert control.unmet[0]
    with pytest.raises(ValueError, match=r"finite violations >= -1, got \{'drift': .*\}$"):
        control.observe(tensor(-0.9, value), 3.0)
    with pytest.raises(ValueError, match=r"need violations of \['fit', 'drift'\], got 3"):
        control.observe(tensor(0, 0, 0))
    same(control.state_dict(), before)


def test_laws_by_their_formulas():
    lam, v, dv = tensor(0, 3, 40), tensor(0.5, -0.2, 1), tensor(-0.1, 0.3, 0)
    new = PI(gain=0.2, damping=0.7).update(lam, v, dv, {})
    assert torch.allclose(new, lam + (1 + lam) * (0.2 * v + 0.7 * dv))
    assert torch.allclose(Ascent(rate=0.3).update(lam, v, dv, {}), lam + 0.3 * v)
    state, b = {"holding": tensor(1, 2, 30)}, 1 / (1 + lam)
    new = ADRC(gain=0.2, bandwidth=0.4).update(lam, v, dv, state)
    holding = 0.6 * tensor(1, 2, 30) + 0.4 * (dv / b + lam)
    assert torch.allclose(state["holding"], holding)
    assert torch.allclose(new, holding + 0.2 * v / b)


def test_a_law_sees_every_so_often_the_fast_average_and_how_far_it_moved():
    control = Control(["a"], PI(gain=0.2, damping=0.7), every=4)
    lam, last = tensor(0), None
    for step, g in enumerate(violations(13, 1, mean=0.6), start=1):
        control.observe(g)
        last = control.fast if last is None else last
        if step % 4 == 0:
            lam = (lam + (1 + lam) * (0.2 * control.fast + 0.7 * (control.fast - last))).clamp(0)
            last = control.fast
        assert torch.allclose(control.multipliers, lam, rtol=1e-12)
    assert lam > 0


def test_adrc_at_full_bandwidth_is_pi_with_unit_damping():
    series = (noise(600, 4) * 0.1).cumsum(0).sin().expm1()
    pi = feed(Control("abcd", PI(gain=0.15, damping=1.0)), series)
    adrc = feed(Control("abcd", ADRC(gain=0.15, bandwidth=1.0)), series)
    assert pi.multipliers.max() > 0.1
    assert torch.allclose(pi.multipliers, adrc.multipliers, rtol=1e-9)


@each_law
def test_a_law_rests_at_zero_violation_and_at_zero(law):
    lam, zero = tensor(0, 0.3, 20, 100), torch.zeros(4, dtype=torch.float64)
    assert torch.allclose(law.update(lam, zero, zero, law.start(lam)), lam, rtol=1e-12)
    assert (law.update(zero, zero - 0.5, zero, law.start(zero)) <= 0).all()


@each_law
def test_a_slack_constraint_loses_its_multiplier(law):
    control = feed(Control(["a", "b"], law), tensor(1.0).expand(100, 2))
    assert (control.multipliers > 1).all()
    feed(control, tensor(-0.4).expand(300, 2))
    assert control.multipliers.tolist() == [0, 0]


def test_adrc_does_not_wind_up():
    """The multiplier leaves either bound at the first update that pulls it away, however long it
    stood there."""
    control = feed(Control(["a"], ADRC(), limit=20.0), tensor(5.0).expand(400, 1))
    assert control.multipliers.item() == 20
    feed(control, tensor(-0.5).expand(20, 1))
    assert control.multipliers.item() < 20
    feed(control, tensor(-0.5).expand(600, 1))
    assert control.multipliers.item() == 0
    feed(control, tensor(5.0).expand(20, 1))
    assert control.multipliers.item() > 0


def bounded_series(n: int, seed: int) -> dict[str, torch.Tensor]:
    steps, white = torch.arange(n, dtype=torch.float64), noise(n, seed=seed)
    spikes = torch.zeros(n, dtype=torch.float64)
    spikes[::37], spikes[5::91] = 1e6, -1.0
    signs = noise(n // 50 + 1, seed=seed + 1).sign().repeat_interleave(50)[:n]
    constant = {"violated": 0.3, "slack": -0.3, "zero": 0.0, "floor": -1.0}
    constant |= {"huge": 1e6, "largest": 1e308}
    return {
        "white": (2 * white).expm1(),
        "steps": (2 * signs).expm1(),
        "alternating": (3 * (-1) ** (steps // 10)).expm1(),
        "slow wave": (2 * (steps / 60).sin()).expm1(),
        "quick wave": (2 * (steps / 3).sin()).expm1(),
        "walk": white.cumsum(0).clamp(-5, 5).expm1(),
        "spikes": spikes,
        **{name: tensor(value).expand(n) for name, value in constant.items()},
    }


WILD = [PI(gain=50.0, damping=50.0), ADRC(gain=50.0, bandwidth=0.01), Ascent(rate=1e6)]


@pytest.mark.parametrize("law", LAWS + WILD, ids=str)
def test_multipliers_and_penalties_stay_in_bounds(law):
    for seed in range(3):
        series = bounded_series(400, seed)
        control = Control(list(series), law, limit=50.0)
        for g in torch.stack(list(series.values()), dim=1):
            control.observe(g)
            assert ((control.multipliers >= 0) & (control.multipliers <= 50)).all()
            assert (control.penalties >= RHO_RANGE[0]).all()
            assert (control.penalties <= RHO_RANGE[1]).all()
        assert all(value.isfinite().all() for value in control.state_dict().values())
        at = dict(zip(control.names, control.multipliers.tolist(), strict=True))
        assert at["huge"] == at["largest"] == 50
        assert at["slack"] == at["floor"] == at["zero"] == 0


class Plants:
    """Constraints whose log(1 + g) follows its own multiplier late:
    `y ← a y + (1 - a) (c - s · log(1 + λ))`, with `a = exp(-1 / T)`; c steps from c0 to c1.
    """

    def __init__(self, plants: list[tuple[float, float, float, float]], law: Law) -> None:
        time, self.slope, self.c0, self.c1 = torch.tensor(plants, dtype=torch.float64).T
        self.a = (-1 / time).exp()
        self.y = self.c0.clone()
        self.control = Control([str(i) for i in range(len(plants))], law)

    def run(self, n: int, stepped: bool = False) -> torch.Tensor:
        c, seen = self.c1 if stepped else self.c0, []
        for _ in range(n):
            target = c - self.slope * self.control.multipliers.log1p()
            self.y = self.a * self.y + (1 - self.a) * target
            self.control.observe(self.y.expm1())
            seen.append(self.control.fast)
        return torch.stack(seen)


STEPS = [(0.2, 0.7), (0.5, 1.5), (1.5, 0.5)]
PLANTS = [
    (time, slope, *step)
    for time, slope, step in itertools.product([10, 20, 50, 100, 200], [0.5, 1.0, 2.0], STEPS)
]


def settles(law: Law) -> torch.Tensor:
    """For each plant: v, disturbed by the step, comes to within 0.05, stays, and swings no more."""
    plants = Plants(PLANTS, law)
    plants.run(800)
    v = plants.run(2500, stepped=True)
    early, late = v[:500], v[-500:]
    swing_early, swing_late = (part.max(0).values - part.min(0).values for part in (early, late))
    disturbed, calm = early.abs().max(0).values > 0.05, late.abs().max(0).values < 0.05
    return disturbed & calm & (swing_late < 0.3 * swing_early)


@pytest.mark.slow
@each_law
def test_a_step_settles_without_sustained_oscillation(law):
    assert settles(law).all()


@pytest.mark.slow
@pytest.mark.parametrize("law", [PI(gain=5.0), ADRC(gain=5.0), PI(damping=6.0), Ascent(rate=20.0)])
def test_too_large_a_gain_does_oscillate(law):
    assert not settles(law).all()


@each_law
def test_a_violation_is_held_at_zero_itself(law):
    assert abs(Plants([(10, 1.0, 1.0, 1.0)], law).run(800)[-1].item()) < 1e-3


def test_damping_prevents_overshoot():
    overshoot = []
    for damping in (0.0, 1.5):
        plants = Plants([(50, 2.0, 0.5, 1.5)], PI(damping=damping))
        plants.run(500)
        overshoot.append(-plants.run(300, stepped=True).min().item())
    assert overshoot[1] < 0.3 * overshoot[0]


def test_penalties_by_their_formula():
    """1 where the root mean square is 0.1; a spike is clipped before it is squared."""
    series = torch.cat([violations(250, 2), tensor(0.1).expand(250, 1)], dim=1)
    series[20, 1] = 1e12
    for rho in (1.0, 2.0):
        control = Control(["noise", "spike", "reference"], PI(), rho=rho)
        fixed = Control(["noise", "spike", "reference"], PI(), rho=rho, capu=False)
        square = series[0].square()
        for g in series:
            control.observe(g)
            fixed.observe(g)
            square = 0.99 * square + 0.01 * g.clamp(max=math.expm1(LOG_RANGE)).square()
            assert torch.allclose(control.penalties, (rho * 0.1 / square.sqrt()).clamp(0.1, 10))
            assert fixed.penalties.tolist() == [rho] * 3
        assert control.penalties[2].item() == pytest.approx(rho)
        assert 0.1 < control.penalties[1] < control.penalties[0] < rho


def test_calm_counts_steps_in_a_row():
    control, calm = Control(["a", "b"], PI(), fast=0.0), []
    assert not control.settled().any()
    below, above = (math.expm1(TOLERANCE + by) for by in (-0.001, 0.001))
    for g in (tensor(0, 0), tensor(below, -0.9), tensor(0, above), tensor(0, 0)):
        control.observe(g)
        calm.append(control.calm)
    assert calm == [1, 2, 0, 1]
    control.add("c")
    assert control.calm == 0
    control.observe(tensor(0.2, 0.3, -0.5))
    assert control.settled().tolist() == [False, False, True]
    assert control.settled(0.2).tolist() == [True, False, True]


@each_law
def test_a_constraint_that_joins_leaves_the_others_alone(law):
    series = violations(90, 3, mean=0.2)
    alone = feed(Control(["a", "b"], law), series[:, :2])
    joined = feed(Control(["a", "b"], law), series[:43, :2])
    joined.add("kl")
    assert joined.names == ("a", "b", "kl")
    assert joined.multipliers[2] == 0 and not joined.settled()[2]
    joined.observe(series[43])
    assert joined.fast[2] == joined.slow[2] == series[43, 2].log1p()
    feed(joined, series[44:])
    for name in ("multipliers", "penalties", "fast", "slow"):
        assert torch.equal(getattr(joined, name)[:2], getattr(alone, name))
    assert joined.multipliers[2] > 0
    with pytest.raises(ValueError, match="got 'a' twice"):
        joined.add("a")


def waiting(law: Law, **options) -> Control:
    settings = {"every": 4, "limit": 20.0, "fast": 0.5, "unmet_at_limit": ("b", "later")} | options
    return Control(["a", "b"], law, **settings)


@each_law
def test_an_unmet_constraint_waits_at_the_limit(law):
    """Through updates, and though the law would move it; others move as ever."""
    control, free = waiting(law), waiting(law, unmet_at_limit=())
    assert control.multipliers.tolist() == [0, 20] and control.unmet.tolist() == [False, True]
    assert free.multipliers.tolist() == [0, 0] and not free.unmet.any()
    for g in (0.1, 0.2, 0.2, 0.4, 0.4, 0.5, 0.5, 0.6, 0.5):
        feed(control, tensor(g).expand(3, 2))
        feed(free, tensor(g).expand(3, 2))
        assert control.multipliers[1] == 20 and control.unmet.tolist() == [False, True]
        assert control.multipliers[0] == free.multipliers[0]
    assert 0 < free.multipliers[1] < 20


@each_law
def test_it_starts_where_it_is_told_once_its_average_is_met(law):
    """Not at a first step below 0, but once the average is; at that step, not the next update."""
    control = feed(waiting(law), tensor(1.0).expand(5, 2))
    control.observe(tensor(1.0, -0.3), 3.0)
    assert control.unmet[1] and control.multipliers[1] == 20
    control.observe(tensor(1.0, -0.4), 3.5)
    assert control.fast[1] < 0 and control.steps % control.every
    assert not control.unmet.any() and control.multipliers[1] == 3.5
    before = control.multipliers[0].item()
    feed(control, tensor(1.0, 0.9).expand(1, 2))  # the update, step 8
    assert control.multipliers[0] > before
    assert control.multipliers[1] not in (3.5, 20)


@each_law
def test_the_start_defaults_to_one_and_is_used_once(law):
    control = waiting(law)
    control.observe(tensor(0.1, -0.1))
    assert control.multipliers.tolist() == [0, 1]
    for value in (0.5, -0.5):
        control.observe(tensor(0.1, value), 9.0)
        assert control.multipliers[1] == 1 and not control.unmet[1]


@each_law
def test_from_its_start_on_the_law_knows_nothing_of_the_wait(law):
    """A fresh control of the same multiplier, average and memory moves alike, bit for bit."""
    control = feed(waiting(law), tensor(2.0).expand(30, 2))
    while control.unmet.any():
        control.observe(tensor(2.0, -0.9), 5.0)
    assert control.steps % control.every
    fresh, state = waiting(law, unmet_at_limit=()), control.state_dict()
    for key, value in law.start(tensor(5.0)).items():
        state[f"law.{key}"][1] = value[0]
    state["previous"][1], state["multipliers"][1] = state["fast"][1], 5.0
    fresh.load_state_dict(state)
    same(fresh.state_dict(), control.state_dict())
    for g in violations(20, 2):
        control.observe(g)
        fresh.observe(g)
        same(fresh.state_dict(), control.state_dict())
    assert 0 < control.multipliers[1] < 20


def test_a_constraint_that_joins_may_wait_too():
    control = feed(waiting(PI()), tensor(-0.5).expand(2, 2))
    control.add("later")
    control.add("plain")
    assert control.multipliers.tolist() == [0, 1, 20, 0]
    assert control.unmet.tolist() == [False, False, True, False]
    control.observe(tensor(-0.5, -0.5, -0.5, 0.1), 7.0)
    assert control.multipliers[2] == 7 and not control.unmet.any()


@each_law
@pytest.mark.parametrize("cut", [7, 40, 41, 90])
def test_resumes_bit_for_bit(law, cut, tmp_path):
    """Saved while a constraint waits, at either side of the wait's end, and long after it, between
    two updates."""
    series = violations(120, 2, mean=1.5)
    series[40:50, 1] = -0.99
    series[85:95] = 0.0
    whole = feed(waiting(law), series[:cut])
    assert whole.unmet[1] == (cut <= 40) and (whole.calm > 0) == (cut == 90)
    save_file(whole.state_dict(), tmp_path / "control.safetensors")
    resumed = waiting(law)
    resumed.load_state_dict(load_file(tmp_path / "control.safetensors"))
    assert (resumed.steps, resumed.calm) == (whole.steps, whole.calm)
    same(resumed.state_dict(), whole.state_dict())
    for g in series[cut:]:
        whole.observe(g, 2.5)
        resumed.observe(g, 2.5)
        same(resumed.state_dict(), whole.state_dict())
    assert not whole.unmet.any() and whole.multipliers.max() > 0


def test_states_are_copies_and_another_is_refused():
    control = feed(Control("ab", ADRC()), violations(30, 2))
    state, before = control.state_dict(), control.state_dict()
    control.load_state_dict(state)
    for value in state.values():
        value.zero_()
    for other in (Control("ab", PI()), Control("abc", ADRC())):
        with pytest.raises(ValueError, match="need a state of"):
            control.load_state_dict(feed(other, violations(20, len(other.names))).state_dict())
    same(control.state_dict(), before)


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (PI, {"gain": 0.0}, "need a finite gain .*got 0.0"),
        (PI, {"gain": math.inf}, "need a finite gain .*got inf"),
        (PI, {"gain": math.nan}, "need a finite gain .*got nan"),
        (PI, {"damping": -0.1}, "need a finite damping .*got -0.1"),
        (PI, {"damping": math.inf}, "need a finite damping .*got inf"),
        (ADRC, {"gain": -1.0}, "need a finite gain .*got -1.0"),
        (ADRC, {"bandwidth": 0.0}, "need a finite bandwidth .*got 0.0"),
        (ADRC, {"bandwidth": 1.5}, "need a finite bandwidth .*got 1.5"),
        (Ascent, {"rate": 0.0}, "need a finite rate .*got 0.0"),
        (waiting, {"every": 0}, "need every >= 1, got 0"),
        (waiting, {"limit": 0.0}, "need a finite limit"),
        (waiting, {"limit": math.inf}, "need a finite limit"),
        (waiting, {"fast": -0.1}, "got fast -0.1"),
        (waiting, {"fast": 0.995}, "got fast 0.995, slow 0.99"),
        (waiting, {"slow": 1.0}, "slow 1.0"),
        (waiting, {"rho": 0.0}, r"need rho in \[0.1, 10.0\], got 0.0"),
        (waiting, {"rho": 11.0}, "got 11.0"),
        (Control, {"names": ["a", "a"]}, "got 'a' twice"),
    ],
)
def test_impossible_values_are_refused(make, values, message):
    with pytest.raises(ValueError, match=message):
        make(**values if make in (PI, ADRC, Ascent) else {"law": PI()} | values)

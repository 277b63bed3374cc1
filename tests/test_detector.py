# SPDX-License-Identifier: Apache-2.0
import math
import random

import pytest
import torch

from pss_param.detector import AnyOf, GradientNormRatio, Origin
from pss_param.errors import ArgumentError
from pss_param.floor import StableRankFloor


def reference_ratio_rule(norms, threshold, decay, settle, cap):
    """The documented recurrence, written again as plainly as possible."""
    average, count, out = 0.0, 0, []
    for norm in norms:
        if not math.isfinite(norm):
            out.append((False, None))
            continue
        ratio = norm / average if count else 1.0
        out.append((count >= settle and ratio >= threshold, ratio))
        entering = min(norm, cap * average) if count else norm
        average += max(1 - decay, 1 / (count + 1)) * (entering - average)
        count += 1
    return out


@pytest.mark.parametrize(("decay", "settle", "cap"), [(0.95, 10, None), (0.5, 1, 4.0), (0.0, 3, 1.0)])
def test_ratio_follows_the_documented_recurrence(decay, settle, cap):
    source = random.Random(0)
    norms = [source.lognormvariate(0, 0.8) for _ in range(300)]
    norms[50], norms[51], norms[120] = math.nan, math.inf, 1e30
    detector = GradientNormRatio(2.5, decay, settle, cap)
    expected = reference_ratio_rule(norms, 2.5, decay, settle, 2.5 if cap is None else cap)
    fired = 0
    for norm, (triggered, ratio) in zip(norms, expected, strict=True):
        verdict = detector.observe(norm)
        assert verdict.triggered == triggered
        if ratio is not None:
            assert verdict.ratio == pytest.approx(ratio, rel=1e-12)
        fired += triggered
    assert fired > 3


def test_nonfinite_norms_leave_no_trace():
    detector = GradientNormRatio(settle=2)
    for norm in (1.0, 2.0, 1.5):
        detector.observe(norm)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    for norm in (math.nan, math.inf, -math.inf, torch.tensor(math.nan)):
        assert not detector.observe(norm).triggered
    assert all(torch.equal(before[key], value) for key, value in detector.state_dict().items())


def test_one_spike_does_not_blind_and_a_lasting_level_is_accepted():
    detector = GradientNormRatio()
    for _ in range(50):
        detector.observe(1.0)
    assert detector.observe(1e6).triggered
    assert float(detector.average) < 1.1
    assert detector.observe(3.0).triggered  # still sees a small spike after a huge one
    verdicts = [detector.observe(10.0).triggered for _ in range(100)]
    assert verdicts[0]
    assert not any(verdicts[-50:])


def test_limit_is_the_norm_that_would_just_have_triggered():
    detector = GradientNormRatio(settle=1)
    detector.observe(2.0)
    verdict = detector.observe(8.0)
    assert verdict.limit == pytest.approx(5.0)
    assert verdict.names is None
    assert "4.00 x" in verdict.reason


def test_statistics_stay_float64_whatever_happens_to_the_model_around_them():
    detector = GradientNormRatio().to(torch.bfloat16).half()
    assert detector.average.dtype == torch.float64
    assert detector.count.dtype == torch.int64


def test_the_state_is_two_float64_exact_numbers_and_a_wrong_one_is_refused():
    detector, twin = AnyOf(GradientNormRatio()), AnyOf(GradientNormRatio())
    for norm in (0.1, 0.7, 1 / 3):
        detector.observe(norm)
    state = detector.state_dict()
    assert {key: value.dtype for key, value in state.items()} == {
        "members.0.average": torch.float64,
        "members.0.count": torch.int64,
    }
    twin.load_state_dict(state)
    assert twin.members[0].observe(2.0) == detector.members[0].observe(2.0)
    assert state["members.0.count"] != detector.members[0].count, "a saved state must not follow the detector"
    with pytest.raises(RuntimeError, match=r"Missing.*members\.0\.count"):
        twin.load_state_dict({"members.0.average": torch.tensor(1.0)})
    with pytest.raises(RuntimeError, match="Unexpected"):
        twin.load_state_dict({**state, "members.0.other": torch.tensor(1.0)})


def test_all_zero_norms_are_quiet_and_the_first_real_one_is_seen():
    detector = GradientNormRatio(settle=2)
    assert [detector.observe(0.0).ratio for _ in range(3)] == [1.0, 1.0, 1.0]
    assert detector.observe(1.0).triggered


@pytest.mark.parametrize(
    "build",
    [
        lambda: GradientNormRatio(threshold=1.0),
        lambda: GradientNormRatio(decay=1.0),
        lambda: GradientNormRatio(settle=0),
        lambda: GradientNormRatio(cap=0.5),
        lambda: StableRankFloor(fraction=1.0),
        lambda: StableRankFloor(period=0),
        AnyOf,
    ],
)
def test_arguments_out_of_range_are_refused_with_the_value(build):
    with pytest.raises(ArgumentError, match=r"got|needs"):
        build()


def exact_stable_rank(weight):
    values = torch.linalg.svdvals(weight.double())
    return (values.square().sum() / values[0] ** 2).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_floor_tracks_the_stable_rank_from_above(dtype):
    torch.manual_seed(0)
    weights = {"a": (torch.randn(48, 32).to(dtype),), "b": (torch.randn(3, 20, 40).to(dtype),)}
    detector = StableRankFloor(period=1)
    detector.bind(lambda: weights)
    run_floor(detector, weights, 1)
    direction = torch.outer(torch.randn(48), torch.randn(32)) / 40
    for _ in range(30):
        weights["a"][0].add_(direction.to(dtype))
        (measured,) = detector.look(lambda: weights)
    ranks, norms = measured.view(2, 4).tolist()
    every = [weights["a"][0], *weights["b"][0]]
    exact = [exact_stable_rank(one) for one in every]
    loose = 0.03 if dtype == torch.bfloat16 else 1e-4
    for estimate, truth in zip(ranks, exact, strict=True):
        assert truth * (1 - loose) <= estimate <= truth * 1.15
    for estimate, one in zip(norms, every, strict=True):
        truth = float(torch.linalg.matrix_norm(one.double(), 2))
        assert truth * 0.93 <= estimate <= truth * (1 + loose)
    assert measured[0].item() == pytest.approx(exact[0], rel=0.02)  # a separated value is found exactly


def run_floor(detector, weights, steps):
    verdicts = []
    for _ in range(steps):
        seen = [look.tolist() for look in detector.look(lambda: weights)]
        verdicts.append(detector.judge(1.0, seen))
    return verdicts


def test_floor_names_the_weights_that_fell_as_long_as_they_are_low():
    torch.manual_seed(0)
    weights = {name: (torch.randn(24, 24),) for name in ("a", "b", "c")}
    detector = StableRankFloor(fraction=0.5)
    detector.bind(lambda: weights)
    run_floor(detector, weights, 1)
    weights["b"][0].add_(torch.outer(torch.randn(24), torch.randn(24)))
    verdicts = run_floor(detector, weights, 24)
    assert all(verdict.triggered for verdict in verdicts[-10:])
    assert all(verdict.names == ("b",) for verdict in verdicts if verdict.triggered)


def looked_at(detector, weights, steps):
    return [step for step in range(1, steps + 1) if detector.look(lambda: weights)[0].numel()]


def test_floor_looks_often_at_first_and_after_a_trigger_and_at_its_period_at_last():
    weights = {"a": (torch.eye(8),)}
    detector = StableRankFloor(period=4)
    detector.bind(lambda: weights)
    first = looked_at(detector, weights, 80)
    assert first[:9] == list(range(1, 10))
    assert {later - sooner for sooner, later in zip(first[-6:], first[-5:], strict=False)} == {4}
    detector.fired = detector.step
    assert looked_at(detector, weights, 10) == list(range(1, 10))


def test_floor_follows_a_slow_fall_and_not_a_fast_one():
    torch.manual_seed(0)
    spread = torch.linspace(1, 0.5, 16)
    weights = {"a": (torch.diag(spread).contiguous(),)}
    detector = StableRankFloor(period=1, decay=0.99)
    detector.bind(lambda: weights)
    run_floor(detector, weights, 1)
    start = float(detector.baseline)
    for step in range(600):
        weights["a"][0][0, 0] = 1 + 2 * step / 600
        assert not run_floor(detector, weights, 1)[0].triggered
    assert float(detector.baseline) < 0.6 * start
    lowered = float(detector.baseline)
    weights["a"][0][0, 0] = 12.0
    assert all(verdict.triggered for verdict in run_floor(detector, weights, 50)[-40:])
    assert float(detector.baseline) == pytest.approx(lowered, rel=0.05)


def test_floor_waits_for_weights_without_values():
    detector = StableRankFloor(period=1)
    detector.bind(lambda: {"a": (torch.empty(8, 8, device="meta"),)})
    assert not run_floor(detector, {"a": (torch.eye(8),)}, 1)[0].triggered
    assert detector.baseline.tolist() == pytest.approx([2.0])


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_floor_survives_a_weight_that_was_zero_or_nan_for_a_while(bad):
    torch.manual_seed(0)
    weights = {"a": (torch.randn(16, 24),)}
    healthy = weights["a"][0].clone()
    detector = StableRankFloor(period=1)
    detector.bind(lambda: weights)
    run_floor(detector, weights, 1)
    weights["a"][0].fill_(bad)
    assert not any(verdict.triggered for verdict in run_floor(detector, weights, 3))
    weights["a"][0].copy_(healthy + torch.outer(torch.randn(16), torch.randn(24)))
    assert run_floor(detector, weights, 12)[-1].triggered


def test_floor_resumes_bit_exactly():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(16, 24),), "b": (torch.randn(2, 8, 8), torch.randn(8, 4))}
    detector, resumed = StableRankFloor(period=2), StableRankFloor(period=2)
    detector.bind(lambda: weights)
    run_floor(detector, weights, 5)
    weights["a"][0].mul_(1.1)
    resumed.bind(lambda: weights)
    state = dict(detector.state_dict())
    resumed.load_state_dict(state)
    for _ in range(4):
        weights["a"][0].add_(0.05)
        one, two = detector.look(lambda: weights)[0], resumed.look(lambda: weights)[0]
        assert torch.equal(one, two)
    assert torch.equal(detector.baseline, resumed.baseline)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_the_size_of_a_floors_state_depends_on_the_weights_alone(steps):
    weights = {"a": (torch.randn(16, 24),), "b": (torch.randn(2, 8, 4),)}
    fresh, used = StableRankFloor(period=1), StableRankFloor(period=1)
    for detector in (fresh, used):
        detector.bind(lambda: weights)
    run_floor(used, weights, steps)
    sizes = [
        {key: getattr(value, "shape", None) for key, value in flattened(detector.get_extra_state()).items()}
        for detector in (fresh, used)
    ]
    assert sizes[0] == sizes[1]


def flattened(state):
    return {**state, **{f"vectors.{key}": value for key, value in state["vectors"].items()}}


def test_a_floor_that_was_saved_before_its_first_step_measures_when_it_resumes():
    weights = {"a": (torch.eye(8),)}
    saved, resumed = StableRankFloor(period=1), StableRankFloor(period=1)
    saved.bind(lambda: weights)
    resumed.bind(lambda: weights)
    run_floor(resumed, weights, 3)
    resumed.load_state_dict(saved.state_dict())
    weights["a"][0][0, 0] = 9.0
    assert not any(verdict.triggered for verdict in run_floor(resumed, weights, 5))
    assert float(resumed.baseline) < 2.0


def test_a_floor_resumes_before_its_model_has_values():
    weights = {"a": (torch.eye(8),)}
    saved, resumed = StableRankFloor(period=1), StableRankFloor(period=1)
    saved.bind(lambda: weights)
    run_floor(saved, weights, 3)
    resumed.bind(lambda: {"a": (torch.empty(8, 8, device="meta"),)})
    resumed.load_state_dict(saved.state_dict())
    weights["a"][0][0, 0] = 12.0
    assert any(verdict.triggered for verdict in run_floor(resumed, weights, 10))


def test_a_floor_refuses_the_state_of_other_shapes():
    saved, other = StableRankFloor(period=1), StableRankFloor(period=1)
    saved.bind(lambda: {"a": (torch.eye(8),)})
    other.bind(lambda: {"a": (torch.eye(6),)})
    with pytest.raises(ArgumentError, match="attach with the same targets"):
        other.load_state_dict(saved.state_dict())


def test_weights_that_come_after_attach_are_no_collapse():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(64, 64),)}
    detector = StableRankFloor(period=1)
    detector.bind(lambda: weights)
    weights["a"][0].copy_(torch.randn(64, 64) + torch.outer(torch.randn(64), torch.randn(64)))
    assert not any(verdict.triggered for verdict in run_floor(detector, weights, 20))


def test_a_weight_of_zeros_is_watched_from_its_first_values_on():
    torch.manual_seed(0)
    weights = {"a": (torch.zeros(24, 24),)}
    detector = StableRankFloor(period=1)
    detector.bind(lambda: weights)
    assert not any(verdict.triggered for verdict in run_floor(detector, weights, 3))
    weights["a"][0].copy_(torch.randn(24, 24) / (3 * 24) ** 0.5)
    assert not any(verdict.triggered for verdict in run_floor(detector, weights, 12))
    weights["a"][0].add_(torch.outer(torch.randn(24), torch.randn(24)) / (3 * 24) ** 0.5)
    assert run_floor(detector, weights, 12)[-1].triggered


def test_statistics_live_on_the_host_whatever_the_default_device_is():
    weights = {"a": (torch.eye(8),)}
    detector = AnyOf(GradientNormRatio(), StableRankFloor(period=1))
    torch.set_default_device("meta")
    try:
        detector.bind(lambda: weights)
        detector.judge(1.0, [look.tolist() for look in detector.look(lambda: weights)])
        state = detector.state_dict()
    finally:
        torch.set_default_device(None)
    assert state["members.0.average"].item() == 1.0
    assert state["members.1._extra_state"]["baseline"].tolist() == pytest.approx([2.0])


def test_floor_refuses_other_weights_and_use_without_a_guard():
    detector = StableRankFloor(period=1)
    detector.bind(lambda: {"a": (torch.eye(4),)})
    with pytest.raises(ArgumentError, match="attach a new guard"):
        detector.look(lambda: {"b": (torch.eye(4),)})
    with pytest.raises(ArgumentError, match="attach"):
        detector.observe(1.0)


def test_any_of_joins_names_reasons_and_keeps_every_statistic_current():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),)}
    ratio, floor = GradientNormRatio(settle=1), StableRankFloor(period=1)
    detector = AnyOf(ratio, floor)
    detector.bind(lambda: weights)
    for _ in range(8):
        detector.judge(1.0, [look.tolist() for look in detector.look(lambda: weights)])
    weights["a"][0].add_(torch.outer(torch.randn(24), torch.randn(24)))
    for _ in range(8):
        verdict = detector.judge(1.0, [look.tolist() for look in detector.look(lambda: weights)])
    assert verdict.triggered
    assert verdict.names == ("a",)
    both = detector.judge(9.0, [look.tolist() for look in detector.look(lambda: weights)])
    assert both.names is None
    assert "gradient norm" in both.reason
    assert "stable rank" in both.reason
    assert both.ratio == pytest.approx(9.0)
    assert int(ratio.count) == 17


def test_floor_lets_an_orthogonal_matrix_become_an_ordinary_one():
    torch.manual_seed(0)
    square = torch.linalg.qr(torch.randn(64, 64)).Q.contiguous()
    weights = {"a": (square,)}
    detector = StableRankFloor(period=1)
    detector.bind(lambda: weights)
    run_floor(detector, weights, 1)
    assert detector.baseline.tolist() == pytest.approx([16.0])
    weights["a"][0].copy_(torch.randn(64, 64) / 8)
    assert not any(verdict.triggered for verdict in run_floor(detector, weights, 30))


def settled(weights, leap=StableRankFloor.leap, **options):
    detector = StableRankFloor(**options)
    detector.leap = leap
    detector.bind(lambda: weights)
    run_floor(detector, weights, 1)
    return detector


def norm_of(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2))


def test_the_level_of_a_weight_is_its_norm_and_follows_slow_growth():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),)}
    detector = settled(weights, period=1)
    assert float(detector.levels("a")[0]) == pytest.approx(norm_of(weights["a"][0]), rel=0.1)
    for _ in range(500):
        weights["a"][0].mul_(1.004)
        assert not run_floor(detector, weights, 1)[0].triggered
    now = norm_of(weights["a"][0])
    assert 0.6 * now < float(detector.levels("a")[0]) < now


def test_a_norm_that_leaps_fires_whatever_the_stable_rank_does():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),), "b": (torch.randn(24, 24),)}
    detector = settled(weights, period=1)
    weights["b"][0].mul_(2.5)
    (verdict,) = run_floor(detector, weights, 1)
    assert (verdict.triggered, verdict.names, verdict.held) == (True, ("b",), ("b",))
    assert "spectral norm of 1 weight(s) rose above 2 x its baseline" in verdict.reason
    calm = settled(weights, period=1, growth=math.inf)
    weights["b"][0].mul_(2.5)
    assert not run_floor(calm, weights, 1)[0].triggered


def paces_of(detector, weights, growths, smoothed_to=None):
    """Verdicts while weight "a" grows step by step; where it is smoothed, it is brought down first."""
    verdicts = []
    for growth in growths:
        if smoothed_to is not None and verdicts and "a" in (verdicts[-1].names or verdicts[-1].held):
            weights["a"][0].mul_(smoothed_to / norm_of(weights["a"][0]))
        weights["a"][0].mul_(growth)
        verdicts += run_floor(detector, weights, 1)
    return verdicts


def test_a_norm_that_grows_too_fast_fires_long_before_it_has_doubled():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),), "b": (torch.randn(24, 24),)}
    detector = settled(weights, period=1)
    run_floor(detector, weights, 20)
    verdicts = paces_of(detector, weights, [1.03, 1.03, 1.04, 1.1])
    assert [v.triggered for v in verdicts] == [False, False, False, True]
    assert verdicts[-1].names == ("a",)
    assert "spectral norm of 1 weight(s) above its baseline grew by more than 5% a step (most 10% in a)" in (
        verdicts[-1].reason
    )


def test_the_pace_is_the_growth_per_step_from_what_a_smoothing_left():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),), "b": (torch.randn(24, 24),)}
    detector = settled(weights, period=1)
    run_floor(detector, weights, 20)
    level = float(detector.levels("a")[0])
    first, second, third = paces_of(detector, weights, [1.2, 1.1, 1.1], smoothed_to=level)
    assert first.pace == {"a": pytest.approx(0.2, rel=0.05)}
    assert second.pace == {"a": pytest.approx(0.1, rel=0.05)}
    assert third.pace == {"a": pytest.approx(0.1, rel=0.05)}


def test_the_pace_of_several_steps_is_their_mean():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),)}
    detector = settled(weights)
    run_floor(detector, weights, 260)  # two measurements are 25 steps apart from here on
    for _ in range(25):
        weights["a"][0].mul_(1.01)
        (verdict,) = run_floor(detector, weights, 1)
    assert not verdict.triggered
    while not verdict.pace:
        weights["a"][0].mul_(1.01)
        (verdict,) = run_floor(detector, weights, 1)
    assert verdict.pace["a"] == pytest.approx(0.01, rel=0.15)


def test_only_weights_above_their_level_have_a_pace_and_only_where_they_are_held():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),), "b": (torch.randn(2, 24, 24),)}
    detector = settled(weights, period=1)
    weights["b"][0][1].mul_(1.5)
    (verdict,) = run_floor(detector, weights, 1)
    assert verdict.pace == {"b": pytest.approx(0.5, rel=0.1)}
    published = StableRankFloor(period=1)
    published.hold(None)
    published.bind(lambda: weights)
    weights["b"][0][1].mul_(1.5)
    assert [v.pace for v in run_floor(published, weights, 2)] == [None, None]


def test_any_of_passes_the_paces_on():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),)}
    both = AnyOf(GradientNormRatio(settle=1), StableRankFloor(period=1))
    both.bind(lambda: weights)
    for growth, norm in ((1.0, 1.0), (1.3, 1.0), (1.2, 9.0)):
        weights["a"][0].mul_(growth)
        verdict = both.judge(norm, [look.tolist() for look in both.look(lambda: weights)])
    assert verdict.names is None
    assert list(verdict.pace) == ["a"]
    assert AnyOf(GradientNormRatio()).judge(1.0, []).pace is None


def test_an_alert_looks_at_every_step_holds_what_rises_and_learns_nothing():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),), "b": (torch.randn(24, 24),)}
    detector = settled(weights, leap=math.inf, alert=4)
    run_floor(detector, weights, 300)
    level = detector.level.clone()
    detector.alarm()
    weights["b"][0].mul_(1.3)
    verdicts = run_floor(detector, weights, 4)
    assert [(v.triggered, v.names, v.held) for v in verdicts] == [(False, (), ("b",))] * 4
    assert torch.equal(detector.level, level)
    assert not any(verdict.held for verdict in run_floor(detector, weights, 100))
    assert float(detector.levels("b")[0]) > 1.1 * float(level[1])


def test_what_is_measured_together_with_a_spike_is_not_learnt():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),)}
    both = AnyOf(GradientNormRatio(settle=2), StableRankFloor(period=1))
    both.members[1].leap = math.inf
    both.bind(lambda: weights)
    for norm in (1.0, 1.0, 1.0):
        both.judge(norm, [look.tolist() for look in both.look(lambda: weights)])
    level = both.levels("a")[0].clone()
    weights["a"][0].mul_(1.5)
    verdict = both.judge(9.0, [look.tolist() for look in both.look(lambda: weights)])
    assert (verdict.triggered, verdict.names, verdict.held) == (True, None, ())
    assert torch.equal(both.levels("a")[0], level)
    verdict = both.judge(1.0, [look.tolist() for look in both.look(lambda: weights)])
    assert (verdict.triggered, verdict.names, verdict.held) == (False, (), ("a",))
    assert "on alert until step 54" in verdict.reason


def test_levels_come_in_the_shapes_of_the_matrices_and_not_below_fresh_ones():
    torch.manual_seed(0)
    weights = {"a": (torch.linalg.qr(torch.randn(16, 16)).Q,), "b": (torch.randn(2, 3, 8, 4), torch.zeros(8, 4))}
    detector = settled(weights, period=1)
    one, several, zeros = *detector.levels("a"), *detector.levels("b")
    assert (one.shape, several.shape, zeros.shape) == ((), (2, 3), ())
    assert float(one) == pytest.approx(2.0, rel=1e-3)  # of independent entries with that Frobenius norm
    assert float(zeros) == pytest.approx((8**0.5 + 4**0.5) / (3 * 4) ** 0.5)  # of torch's Linear
    assert detector.levels("of another detector") == ()


@pytest.mark.parametrize("std", [0.0, 1e-6, 1e-2])
def test_a_weight_that_starts_small_may_grow_to_a_usual_size(std):
    torch.manual_seed(0)
    weights = {"a": (std * torch.randn(32, 32),), "b": (torch.randn(32, 32),)}
    detector = settled(weights, period=1)
    target = torch.randn(32, 32) / (3 * 32) ** 0.5
    for step in range(1, 21):
        weights["a"][0].copy_(target * step / 20)
        (verdict,) = run_floor(detector, weights, 1)
        assert not verdict.triggered
        assert not verdict.held


def test_a_weight_of_a_smaller_initialiser_is_held_at_that_norm():
    torch.manual_seed(0)
    weights = {"small": (0.02 * torch.randn(32, 64),), "zeros": (torch.zeros(32, 64),)}
    detector = settled(weights, period=1)
    small, zeros = (float(detector.levels(name)[0]) for name in weights)
    assert small == pytest.approx(float(torch.linalg.matrix_norm(weights["small"][0], 2)), rel=0.05)
    assert zeros == pytest.approx((32**0.5 + 64**0.5) / (3 * 64) ** 0.5)
    for value in weights.values():
        value[0][0] += zeros / 64**0.5
    verdicts = run_floor(detector, weights, 3)
    assert verdicts[-1].names == ("small",)
    twin = StableRankFloor(period=1)
    twin.bind(lambda: weights)
    twin.load_state_dict(detector.state_dict())
    assert torch.equal(twin.healthy.usual, detector.healthy.usual)


def test_a_stable_rank_that_falls_while_the_norm_does_not_rise_is_followed_in_silence():
    torch.manual_seed(0)
    weights = {"a": (torch.diag(torch.linspace(3, 1, 16)).contiguous(),)}
    detector = settled(weights, period=1)
    weights["a"][0][1:] *= 0.3
    assert not any(verdict.triggered for verdict in run_floor(detector, weights, 30))
    published = StableRankFloor(period=1)
    published.hold(None)
    weights["a"][0][1:] /= 0.3
    published.bind(lambda: weights)
    run_floor(published, weights, 1)
    weights["a"][0][1:] *= 0.3
    verdicts = run_floor(published, weights, 30)
    assert verdicts[-1].triggered
    assert not any(verdict.held for verdict in verdicts)


def test_at_an_edge_that_holds_nothing_norms_fire_nothing_and_nothing_alerts():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),)}
    detector = StableRankFloor(period=1)
    detector.hold(None)
    detector.bind(lambda: weights)
    run_floor(detector, weights, 1)
    weights["a"][0].mul_(5)
    detector.alarm()
    assert not any(verdict.triggered or verdict.held for verdict in run_floor(detector, weights, 10))


def test_an_alert_of_no_steps_holds_nothing():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),), "b": (torch.randn(24, 24),)}
    detector = settled(weights, leap=math.inf, period=1, alert=0)
    weights["a"][0].mul_(2.5)
    weights["b"][0].mul_(1.3)
    assert [(v.names, v.held) for v in run_floor(detector, weights, 1)] == [(("a",), ())]


def test_a_measurement_of_nothing_teaches_nothing():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),)}
    detector = settled(weights, period=1)
    level = float(detector.level)
    for bad in (math.nan, math.inf, 0.0):
        healthy = weights["a"][0].clone()
        weights["a"][0].fill_(bad)
        run_floor(detector, weights, 1)
        weights["a"][0].copy_(healthy)
    assert float(detector.level) == pytest.approx(level)


def test_an_alarm_before_the_first_look_and_after_a_load_undoes_nothing():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),)}
    detector = StableRankFloor(period=1)
    detector.bind(lambda: weights)
    detector.alarm()
    assert detector.level.shape == (1,)
    run_floor(detector, weights, 3)
    state = detector.get_extra_state()
    weights["a"][0].mul_(1.01)
    run_floor(detector, weights, 1)
    detector.set_extra_state(state)
    detector.step += 1
    detector.alarm()
    assert torch.equal(detector.level, state["level"])


def test_a_resumed_alert_goes_on_to_the_same_step():
    torch.manual_seed(0)
    weights = {"a": (torch.randn(24, 24),)}
    saved, resumed = settled(weights, alert=6), StableRankFloor(alert=6)
    weights["a"][0].mul_(2.5)
    run_floor(saved, weights, 12)
    resumed.bind(lambda: weights)
    resumed.load_state_dict(saved.state_dict())
    weights["a"][0].mul_(0.5)
    assert run_floor(saved, weights, 40) == run_floor(resumed, weights, 40)
    assert torch.equal(saved.level, resumed.level)


@pytest.mark.parametrize(
    ("options", "message"), [({"alert": -1}, "alert must be"), ({"growth": 1.0}, "growth must be")]
)
def test_floor_refuses_values_out_of_range(options, message):
    with pytest.raises(ArgumentError, match=message):
        StableRankFloor(**options)


def test_a_state_without_norms_is_refused_in_words():
    weights = {"a": (torch.eye(8),)}
    detector = settled(weights)
    state = {key: value for key, value in detector.get_extra_state().items() if key != "level"}
    with pytest.raises(ArgumentError, match="older version"):
        detector.set_extra_state(state)


def test_a_weight_may_grow_to_what_its_initialiser_gives():
    torch.manual_seed(0)
    weights = {name: (std * torch.randn(32, 32),) for name, std in (("a", 0.015), ("b", 0.01), ("c", 0.015))}
    detector = StableRankFloor(period=1)
    detector.hold({"a": Origin(0.02), "b": Origin(), "c": Origin(0.02, room=8.0)})
    detector.bind(lambda: weights)
    run_floor(detector, weights, 1)
    assert float(detector.levels("a")[0]) == pytest.approx(2 * 32**0.5 * 0.02)
    assert float(detector.levels("b")[0]) == pytest.approx(2 * 32**0.5 / (3 * 32) ** 0.5)
    assert float(detector.levels("c")[0]) == pytest.approx(8 * 2 * 32**0.5 * 0.02)

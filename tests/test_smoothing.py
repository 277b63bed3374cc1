# SPDX-License-Identifier: Apache-2.0
"""Laws of the smoothings: every shape at every edge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import corpus, exact_bulk_level, exact_clip, gaussian, power, with_spectrum

from pss_param.edges import EDGES, bulk, dominant, init, init_level, mild, reference
from pss_param.errors import ArgumentError, NonFiniteError
from pss_param.shapes import SHAPES
from pss_param.smoothing import Smoothing, correction, smooth

pytestmark = pytest.mark.usefixtures("both_engines")
SHAPES_WITH_EDGE = [s for s in SHAPES if s != "second"]


def options(shape: str, edge: str, W: torch.Tensor) -> Smoothing:
    top = float(torch.linalg.matrix_norm(W.double(), 2)) or 1.0
    m, n = W.shape[-2:]
    return Smoothing(
        shape,
        edge,
        init_std=0.4 * top / (m**0.5 + n**0.5) if edge in {"init", "mild"} else None,
        reference=0.4 * top if edge == "reference" else None,
        tol=1e-5,
    )


@st.composite
def matrices(draw) -> torch.Tensor:
    m, n = draw(st.integers(2, 90)), draw(st.integers(2, 90))
    kind = draw(st.sampled_from(["gaussian", "power", "spike"]))
    seed = draw(st.integers(0, 10**6))
    if kind == "gaussian":
        return gaussian(m, n, seed)
    S = power(min(m, n), draw(st.floats(0.1, 1.5)))
    if kind == "spike":
        S[0] *= draw(st.floats(1, 50))
    return with_spectrum(m, n, S, seed)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("shape", SHAPES_WITH_EDGE)
@given(W=matrices())
@settings(max_examples=12, deadline=None)
def test_no_value_rises_above_the_top_and_the_tail_stays(shape, edge, W):
    chosen = options(shape, edge, W)
    c = correction(W, chosen)
    k, edge_value = int(c.k), float(c.edge)
    before, after = torch.linalg.svdvals(W), torch.linalg.svdvals(c.apply(W))
    tol = 1e-4 * float(before[0])
    assert after[0] <= before[0] + tol
    torch.testing.assert_close(after[k:], before[k:], rtol=0, atol=tol)  # also says that order is kept across the edge
    if edge_value > 0 and shape in ("clip", "softplus", "log"):
        assert (after[:k] >= min(edge_value, float(before[0])) - tol).all()
    if edge_value > 0 and shape in ("softmax", "convolution"):
        assert float(after.sum()) == pytest.approx(float(before.sum()), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@given(values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), fraction=st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_shapes_keep_order_and_never_raise_the_top(shape, values, fraction):
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    edge = fraction * S[-1]
    new = SHAPES[shape](S, edge)
    slack = 1e-9 * float(S[0])
    assert new[0] <= S[0] + slack
    assert (new[1:] <= new[:-1] + slack).all()
    assert (new >= edge - slack).all()


@pytest.mark.parametrize("shape", SHAPES)
@given(values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), scale=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_shapes_are_scale_equivariant(shape, values, scale):
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    edge = 0.7 * S[-1]
    torch.testing.assert_close(
        SHAPES[shape](scale * S, scale * edge), scale * SHAPES[shape](S, edge), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("edge", ["dominant", "bulk"])
@pytest.mark.parametrize("shape", [*SHAPES, "equal"])
@given(W=matrices(), exponent=st.integers(-60, 60))
@settings(max_examples=8, deadline=None)
def test_smoothing_is_equivariant_under_scaling(shape, edge, W, exponent):
    W = W.float()
    scaled = smooth(W * 2.0**exponent, shape, edge) * 2.0**-exponent
    torch.testing.assert_close(scaled, smooth(W, shape, edge), rtol=0, atol=3e-6 * float(W.norm()))


@pytest.mark.parametrize("edge", ["bulk", "init", "reference"])
@given(W=matrices())
@settings(max_examples=20, deadline=None)
def test_clip_is_idempotent_where_the_edge_does_not_move(edge, W):
    chosen = options("clip", edge, W)
    once = smooth(W, chosen)
    torch.testing.assert_close(smooth(once, chosen), once, rtol=0, atol=2e-4 * float(W.norm()))


def test_clip_at_the_dominant_edge_is_not_idempotent():
    W = with_spectrum(80, 80, power(80, 0.7))
    once = smooth(W)
    assert (smooth(once) - once).norm() > 1e-2 * W.norm()


@given(W=matrices())
@settings(max_examples=30, deadline=None)
def test_bulk_edge_is_a_fixed_point(W):
    c = correction(W, Smoothing(edge="bulk", tol=1e-5))
    assert float(c.edge) == pytest.approx(exact_bulk_level(W), rel=1e-3)


@pytest.mark.parametrize("name", corpus())
@pytest.mark.parametrize("edge", ["dominant", "bulk"])
def test_clip_agrees_with_its_slow_twin(name, edge):
    W = corpus()[name].float()
    c = correction(W, Smoothing(edge=edge))
    if float(c.edge) == 0:
        assert torch.equal(c.apply(W), W)
        return
    level = exact_bulk_level(W) if edge == "bulk" else float(torch.linalg.svdvals(W.double())[int(c.k)])
    error = (c.apply(W).double() - exact_clip(W, level=level)).norm()
    assert error <= 1.01e-3 * W.double().norm()


@pytest.mark.parametrize("std", [1e-4, 3e-2, 1e2], ids=["below", "among", "above"])
def test_mild_is_dominant_down_to_a_fresh_spectral_norm(std):
    W = torch.stack([with_spectrum(90, 60, power(60, p), seed=int(10 * p)) for p in (0.3, 1.0)]).float()
    c = correction(W, Smoothing(edge="mild", init_std=std, tol=1e-5))
    for i, one in enumerate(W.double()):
        S = torch.linalg.svdvals(one)
        level = max(float(S[int(S.square().sum() / S[0] ** 2)]), init_level(90, 60, std))
        assert float(c.edge[i]) == pytest.approx(level, rel=1e-4)
        assert int(c.k[i]) == int((S > level * (1 + 1e-4)).sum())
        torch.testing.assert_close(c.apply(W)[i].double(), exact_clip(one, level=level), rtol=0, atol=1e-4)


def test_mild_leaves_a_fresh_matrix_its_bits():
    W = torch.nn.init.normal_(torch.empty(300, 200), std=0.02, generator=torch.Generator().manual_seed(0))
    assert torch.equal(correction(W, Smoothing(edge="mild", init_std=0.0203)).apply(W), W)


def test_no_dominant_value_means_the_same_bits():
    W = gaussian(64, 48).float()
    c = correction(W, Smoothing(edge="bulk"))
    assert c.is_noop
    assert torch.equal(c.apply(W), W)


@pytest.mark.parametrize(
    "W", [torch.zeros(4, 6), torch.ones(5, 5), torch.randn(1, 8)], ids=["zero", "rank one", "1 x n"]
)
@pytest.mark.parametrize("edge", ["dominant", "bulk"])
def test_a_matrix_without_a_level_is_left_alone(W, edge):
    assert torch.equal(smooth(W, "clip", edge), W)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("edge", ["dominant", "bulk"])
def test_rounding_of_the_stored_dtype_is_no_bulk(dtype, edge):
    generator = torch.Generator().manual_seed(0)
    W = torch.outer(*torch.randn(2, 64, generator=generator)).to(dtype)
    assert torch.equal(smooth(W, "clip", edge), W)
    noisy = (W.float() + 0.1 * torch.randn(64, 64, generator=generator)).to(dtype)  # and a bulk above it is one
    assert float(torch.linalg.matrix_norm(smooth(noisy, "clip", "bulk").float(), 2)) == pytest.approx(1.6, rel=0.1)


def test_equal_makes_all_values_equal_at_the_same_norm():
    W = with_spectrum(40, 60, power(40, 1.0))
    S = torch.linalg.svdvals(smooth(W, "equal"))
    torch.testing.assert_close(S, S.mean().expand_as(S), rtol=1e-9, atol=0)
    assert float(S.norm()) == pytest.approx(float(W.norm()))


def test_noise_is_as_large_as_clip_and_smooths_nothing(global_random_state_untouched):
    W = with_spectrum(80, 100, power(80, 1.0))
    clipped, noisy = smooth(W), smooth(W, "noise")
    assert float((noisy - W).norm()) == pytest.approx(float((clipped - W).norm()), rel=1e-2)
    assert float(torch.linalg.matrix_norm(noisy, 2)) > 0.95 * float(torch.linalg.matrix_norm(W, 2))


def test_second_changes_one_value():
    W = with_spectrum(30, 30, torch.tensor([9.0, 4.0] + [1.0] * 28, dtype=torch.float64))
    assert torch.linalg.svdvals(smooth(W, "second"))[:3].tolist() == pytest.approx([4.0, 4.0, 1.0], abs=1e-4)


def test_a_callable_is_a_shape_of_the_users_own():
    W = with_spectrum(30, 30, torch.tensor([9.0, 4.0] + [1.0] * 28, dtype=torch.float64))
    halved = smooth(W, lambda S, edge: S / 2, rank=2)
    assert torch.linalg.svdvals(halved)[:2].tolist() == pytest.approx([4.5, 2.0], abs=1e-3)


def test_a_callable_is_an_edge_of_the_users_own():
    W = with_spectrum(30, 40, power(30, 1.0))
    assert float(torch.linalg.matrix_norm(smooth(W, "clip", lambda M: 0.5), 2)) == pytest.approx(0.5, rel=1e-3)
    good = with_spectrum(30, 40, 0.3 * power(30, 1.0), seed=1)
    assert float(torch.linalg.matrix_norm(smooth(W, "clip", reference(good)), 2)) == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("edge", [dominant, mild, bulk, init])
def test_edge_functions_are_the_named_edges(edge):
    W = torch.stack([with_spectrum(60, 80, power(60, p)) for p in (0.4, 0.8)])
    named, called = smooth(W, "clip", edge.__name__), smooth(W, "clip", edge)
    torch.testing.assert_close(called, named, rtol=0, atol=1e-3)


def test_a_callable_that_returns_nonsense_is_refused():
    W = with_spectrum(30, 30, power(30, 1.0))
    with pytest.raises(ArgumentError):
        smooth(W, lambda S, edge: S[:0], rank=2)
    with pytest.raises(NonFiniteError):
        smooth(W, lambda S, edge: S * float("nan"), rank=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_cast_once(dtype):
    W = with_spectrum(300, 200, power(200, 1.0)).to(dtype)
    c = correction(W, Smoothing())
    expected = (W.float() - (c.U * c.d) @ c.Vh).to(dtype)
    assert c.apply(W).dtype == dtype
    torch.testing.assert_close(c.apply(W), expected, rtol=0, atol=0)


def test_in_place_application_writes_through_a_view():
    W = torch.zeros(3, 60, 40)
    W[1] = with_spectrum(60, 40, power(40, 1.0)).float()
    view, untouched = W[1], W[[0, 2]].clone()
    correction(view, Smoothing()).apply_(view)
    assert torch.equal(W[[0, 2]], untouched)
    assert float(torch.linalg.matrix_norm(W[1], 2)) < 0.6


def test_autocast_does_not_lower_the_precision():
    W = with_spectrum(300, 200, power(200, 0.7)).float()
    plain = smooth(W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(smooth(W), plain)


@pytest.mark.parametrize(
    "call",
    [
        lambda W: smooth(W, "sharpen"),
        lambda W: smooth(W, "clip", "cliff"),
        lambda W: smooth(W, "clip", "bulk", 3),
        lambda W: smooth(W, "clip", "dominant", 0),
        lambda W: smooth(W, "clip", "reference"),
        lambda W: smooth(W, Smoothing(), "bulk"),
        lambda W: Smoothing(init_std=-1.0),
        lambda W: Smoothing(tol=2.0),
        lambda W: smooth(W[0]),
    ],
)
def test_wrong_arguments_raise_our_error(call):
    with pytest.raises(ArgumentError):
        call(torch.eye(5))

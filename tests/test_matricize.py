# SPDX-License-Identifier: Apache-2.0
import json
import pickle
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pss_param.errors import ArgumentError
from pss_param.matricize import LINEAR, TRANSPOSED, Matricization, by_heads, convolution, experts, interleaved, stacked


def number(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@st.composite
def packed(draw):
    """A matricization and a weight that it fits, of some dtype and, sometimes, unusual strides."""
    a, b, c, d, e = (draw(st.integers(1, 4)) for _ in range(5))
    transposed, per_head = draw(st.booleans()), draw(st.booleans())
    only = draw(st.sampled_from([(), ("q",), ("q", "v"), ("k",)]))
    rows = {"q": a * d, "k": b * d, "v": b * d}
    turn = (lambda m, n: (n, m)) if transposed else (lambda m, n: (m, n))
    how, shape = draw(
        st.sampled_from([
            (LINEAR, (a, b)),
            (TRANSPOSED, (a, b)),
            (
                stacked(rows, transposed=transposed, head_dim=d if per_head else None, only=only),
                turn(sum(rows.values()), c),
            ),
            (interleaved(a, per_head=per_head, only=only), (3 * a * d, c)),
            (interleaved(a, {"q": e, "k": 1, "v": 1}, per_head=per_head, only=only), (a * (e + 2) * d, c)),
            (by_heads(d, of_input=per_head, transposed=transposed), turn(a * d, c) if not per_head else turn(c, a * d)),
            (convolution(3, b, transposed=transposed), (a * b, c, d)),
            (convolution(4, transposed=transposed), (a, b, c, d)),
            (convolution(5, b, transposed=transposed), (a * b, c, d, e, 2)),
            (experts(transposed=transposed), (a, b, c)),
            (experts({"gate": b, "up": b}, transposed=transposed), (a, *turn(2 * b, c))),
            (experts({"gate": b, "up": b}, transposed=transposed, alternating=True), (a, *turn(2 * b, c))),
        ])
    )  # fmt: skip
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).to(dtype)
    return how, weight.transpose(0, 1).contiguous().transpose(0, 1) if draw(st.booleans()) else weight


@given(packed())
@settings(max_examples=300, deadline=None)
def test_join_inverts_split_bit_by_bit(case):
    how, weight = case
    before = weight.clone()
    parts = how.split(weight)
    assert len(parts) == len(how.part_names(weight.shape))
    assert all(part.ndim >= 2 for part in parts)
    back = how.join([part.clone() for part in parts], weight)
    assert back.dtype == weight.dtype
    assert torch.equal(back, before)
    assert torch.equal(weight, before)


@given(packed())
@settings(max_examples=200, deadline=None)
def test_join_in_place_writes_the_parts_and_nothing_else(case):
    how, weight = case
    expected = how.join([part * 2 + 1 for part in how.split(weight)], weight)
    written = how.join_([part * 2 + 1 for part in how.split(weight)], weight)
    assert written is weight
    assert torch.equal(weight, expected)
    if not how.only:
        assert sum(part.numel() for part in how.split(weight)) == weight.numel()


@given(packed())
@settings(max_examples=100, deadline=None)
def test_a_matricization_is_a_plain_value(case):
    how, _ = case
    assert pickle.loads(pickle.dumps(how)) == how
    assert hash(pickle.loads(pickle.dumps(how))) == hash(how)
    fields = json.loads(json.dumps(asdict(how)))
    as_tuples = {
        key: tuple(tuple(x) if isinstance(x, list) else x for x in v) if isinstance(v, list) else v
        for key, v in fields.items()
    }
    assert Matricization(**as_tuples) == how
    assert 3 <= len(str(how)) < 100


@pytest.mark.parametrize(
    ("how", "shape"),
    [
        (LINEAR, (4, 3)),
        (TRANSPOSED, (4, 3)),
        (stacked({"q": 4, "k": 2, "v": 2}), (8, 3)),
        (stacked({"q": 4, "k": 2, "v": 2}, transposed=True, head_dim=2), (3, 8)),
        (interleaved(2, per_head=True), (12, 3)),
        (by_heads(2, of_input=True), (3, 4)),
        (convolution(4, 2), (4, 3, 2, 2)),
        (experts({"gate": 2, "up": 2}, transposed=True), (3, 5, 4)),
        (experts({"gate": 2, "up": 2}, alternating=True), (3, 4, 5)),
    ],
)
def test_writing_into_a_view_writes_into_the_weight(how, shape):
    weight = number(*shape)
    for part in how.split(weight):
        assert part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        part.fill_(-1)
    assert torch.equal(weight, torch.full(shape, -1.0))


def test_layouts_against_slices_written_by_hand():
    weight = number(12, 5)
    q, k, v = interleaved(2).split(weight)
    by_hand = weight.reshape(2, 3, 2, 5)
    for part, at in zip((q, k, v), range(3), strict=True):
        assert torch.equal(part, by_hand[:, at].reshape(4, 5))
    falcon = interleaved(2, {"q": 2, "k": 1, "v": 1}).split(number(16, 5))
    groups = number(16, 5).reshape(2, 4, 2, 5)
    assert torch.equal(falcon[0], groups[:, :2].reshape(8, 5))
    assert torch.equal(falcon[2], groups[:, 3].reshape(4, 5))
    c_attn = number(4, 12)
    assert torch.equal(stacked({"q": 4, "k": 4, "v": 4}, transposed=True).split(c_attn)[1], c_attn[:, 4:8].T)
    assert torch.equal(by_heads(2, of_input=True).split(number(3, 4))[0][1], number(3, 4)[:, 2:])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernel_as_a_matrix_is_the_convolution(groups):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 6, 3, groups=groups, bias=False)
    x = torch.randn(2, 4, 3, 3)
    (matrices,) = convolution(4, groups).split(conv.weight)
    matrices = matrices.reshape(groups, 6 // groups, -1)
    y = torch.einsum("gon,bgn->bgo", matrices, x.reshape(2, groups, -1)).reshape(2, 6, 1, 1)
    torch.testing.assert_close(y, conv(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_kernel_as_a_matrix_is_the_transposed_convolution(groups):
    torch.manual_seed(0)
    conv = torch.nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    x = torch.randn(2, 4, 1, 1)
    (matrices,) = convolution(4, groups, transposed=True).split(conv.weight)
    matrices = matrices.reshape(groups, -1, 4 // groups)
    y = torch.einsum("gni,bgi->bgn", matrices, x.reshape(2, groups, -1)).reshape(2, 6, 3, 3)
    torch.testing.assert_close(y, conv(x))


def test_linear_is_the_weight_itself():
    weight = number(3, 4)
    assert LINEAR.linear
    assert not TRANSPOSED.linear
    assert not experts().linear
    assert LINEAR.split(weight)[0] is weight
    assert LINEAR.join((weight,), weight) is weight


def test_wrong_shapes_and_parts_are_refused_with_the_rule():
    with pytest.raises(ArgumentError, match="two axes"):
        LINEAR.split(number(2, 3, 4))
    with pytest.raises(ArgumentError, match="cannot have the shape"):
        interleaved(4).split(number(10, 3))
    with pytest.raises(ArgumentError, match="cannot have the shape"):
        stacked({"q": 4, "k": 2, "v": 2}).part_names((9, 3))
    with pytest.raises(ArgumentError, match="has 3 parts, got 1"):
        stacked({"q": 4, "k": 2, "v": 2}).join([number(4, 3)], number(8, 3))
    with pytest.raises(ArgumentError, match="cannot have the shape"):
        TRANSPOSED.join([number(3, 5)], number(4, 3))
    with pytest.raises(ArgumentError, match="only must name parts"):
        stacked({"q": 4, "k": 2, "v": 2}, only=("w",))
    with pytest.raises(ArgumentError, match="whole number of heads"):
        stacked({"q": 4, "k": 3}, head_dim=2)
    with pytest.raises(ArgumentError, match="3, 4 or 5"):
        convolution(2)

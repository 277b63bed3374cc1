# SPDX-License-Identifier: Apache-2.0
"""Counting agrees with `isfinite` for every bit pattern of the small types and at the edges of the large ones."""

import pytest
import torch

from pss_param.finite import count_nonfinite

SMALL = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


def oracle(value):
    return int((~value.double().isfinite()).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *SMALL])
def test_every_bit_pattern(dtype):
    patterns = torch.arange(1 << (8 * dtype.itemsize)).to(torch.uint16 if dtype.itemsize == 2 else torch.uint8)
    values = patterns.view(dtype)
    bad = ~values.double().isfinite()
    assert bad.any()
    assert count_nonfinite([values]) == int(bad.sum())
    # One at a time, among zeros: nothing is found by its neighbours.
    alone = [count_nonfinite([torch.stack([values[0], value, values[0]])]) for value in values[bad][:300]]
    assert alone == [1] * len(alone)
    assert count_nonfinite([values[~bad].clone()]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_edges_of_wide_types(dtype):
    info = torch.finfo(dtype)
    ends = [info.max, info.min, info.tiny, -info.tiny, 0.0, -0.0, info.smallest_normal / 8]
    fine = torch.tensor(ends, dtype=dtype)
    assert count_nonfinite([fine]) == 0
    for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        for at in range(len(fine) + 1):
            value = torch.cat([fine[:at], torch.tensor([bad], dtype=dtype), fine[at:]])
            assert count_nonfinite([value]) == oracle(value) == 1


def test_pieces_that_are_not_contiguous_or_empty():
    value = torch.ones(4, 6)
    value[1, 2], value[3, 5] = float("nan"), float("inf")
    assert count_nonfinite([value.t(), value[:, 1:3], value[:0], torch.tensor(float("nan"))]) == 4
    assert count_nonfinite([value.clone().requires_grad_()]) == 2

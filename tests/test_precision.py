# SPDX-License-Identifier: Apache-2.0
"""Products keep their precision, and a program keeps its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pss_param as pss
import pss_param.spectrum
from pss_param.precision import full_precision
from pss_param.view import SmoothingView

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="what is looked at is torch 2.9's")


@pytest.fixture(autouse=True)
def _settings_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def settings() -> tuple[Any, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("chosen", ["medium", "high", "highest"])
def test_inside_products_are_full_and_behind_them_as_chosen(chosen: str, device: str) -> None:
    torch.set_float32_matmul_precision(chosen)
    before = settings()
    backend: Any = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
    with full_precision(torch.device(device)):
        assert backend.fp32_precision in {"ieee", "none"}
    assert settings() == before


def test_a_setting_that_was_inherited_is_inherited_again() -> None:
    before = torch.backends.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    try:
        with full_precision(CPU):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


def test_an_error_inside_leaves_the_settings_as_chosen() -> None:
    torch.set_float32_matmul_precision("medium")
    before = settings()
    with pytest.raises(KeyError), full_precision(CPU):
        raise KeyError
    assert settings() == before


def test_autocast_is_off_inside() -> None:
    with torch.autocast("cpu", torch.bfloat16), full_precision(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda W: pss.dominant_directions(W),
        lambda W: pss.smooth(W),
        lambda W: pss.spectral_norm(W),
    ],
    ids=["dominant_directions", "smooth", "spectral_norm"],
)
def test_spectra_are_computed_in_full_precision_whatever_is_chosen(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("medium")
    seen = []
    solve = pss_param.spectrum.solve

    def watched(*args: Any) -> Any:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return solve(*args)

    monkeypatch.setattr("pss_param.spectrum.solve", watched)
    call(torch.randn(300, 280))
    assert seen == ["ieee"]


def test_what_is_taken_away_is_multiplied_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("medium")
    view, seen, addmm = SmoothingView(), [], torch.addmm

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return addmm(*args, **options)

    monkeypatch.setattr(torch, "addmm", watched)
    view.smoothed(torch.randn(24, 24))
    assert set(seen) == {"ieee"}

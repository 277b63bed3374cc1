# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the same answers as float64 gives, the same bits twice, few host reads; skipped where there is none."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from spectra import exact_clip, gaussian, power, with_spectrum
from torch import nn

import pss_param as pss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [(96, 64), (224, 224), (512, 512), (384, 1536)]


def spiked(m: int, n: int) -> torch.Tensor:
    """A Gaussian matrix with eight directions on top."""
    source = torch.Generator().manual_seed(m + n)
    left, right = torch.randn(m, 8, generator=source), torch.randn(8, n, generator=source)
    return torch.randn(m, n, generator=source) + (left * torch.arange(1, 9) ** -0.7) @ right


def falling(m: int, n: int) -> torch.Tensor:
    """``S ~ j^-0.5``."""
    return with_spectrum(m, n, power(min(m, n), 0.5))


KINDS = {"gaussian": gaussian, "spiked": spiked, "falling": falling}


@cache
def made(kind: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A float32 matrix, the same clipped at its dominant edge in float64, and how many values that lowers."""
    W = KINDS[kind](*shape).float()
    k = int(pss.dominant_directions(W).k)
    return W, exact_clip(W, k=k), k


@pytest.fixture(params=["highest", "high"], autouse=True)
def _precision(request: pytest.FixtureRequest):
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_certificate_holds_against_float64(kind: str, shape: tuple[int, int], tol: float) -> None:
    W, exact, k = made(kind, shape)
    found = pss.dominant_directions(W.cuda(), tol=tol)
    U, S, Vh = (part.cpu().double() for part in (found.U, found.S, found.Vh))
    smoothed = W.double() - (U * (S - float(found.edge)).clamp_min(0)) @ Vh
    assert int(found.k) == k
    assert bool(found.converged)
    assert float((smoothed - exact).norm() / W.double().norm()) <= float(found.error) <= tol


@pytest.mark.parametrize("shape", [(512, 512), (768, 3072)], ids=str)
def test_the_same_bits_twice_and_whatever_else_is_in_the_batch_to_the_tolerance(shape: tuple[int, int]) -> None:
    batch = torch.stack([spiked(*shape) * (i + 1) for i in range(5)]).cuda()
    first, again = (pss.dominant_directions(batch) for _ in range(2))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("U", "S", "Vh", "edge", "error"))
    alone = pss.dominant_directions(batch[3])
    assert int(alone.k) == int(first.k[3])
    torch.testing.assert_close(first.edge[3], alone.edge, rtol=2e-3, atol=0)


@pytest.mark.parametrize("options", [{}, {"rank": 12}, {"above": 40.0}], ids=str)
def test_matrices_of_several_shapes_are_found_together_within_the_tolerance(options: dict[str, float]) -> None:
    from pss_param.spectrum import directions_together

    shapes, rank, above = ((256, 384), (320, 256), (512, 512)), options.get("rank"), options.get("above")
    Ws = [torch.stack([KINDS[kind](*shape).float() for kind in KINDS]) for shape in shapes]
    for W, one in zip(Ws, directions_together([(W.cuda(), rank, above, 1e-3) for W in Ws]), strict=True):
        there, here = taken_away(one, above), taken_away(pss.dominant_directions(W, rank, above=above), above)
        assert bool(one.converged.all())
        assert (torch.linalg.matrix_norm(there - here) <= 2e-3 * torch.linalg.matrix_norm(W.double())).all()


def taken_away(found: pss.DominantDirections, above: float | None) -> torch.Tensor:
    """What a clip at the edge, or at a level, takes away from each matrix."""
    U, S, Vh, edge = (part.cpu().double() for part in (found.U, found.S, found.Vh, found.edge))
    return (U * (S - (edge[:, None] if above is None else above)).clamp_min(0)[:, None, :]) @ Vh


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(dtype: torch.dtype) -> None:
    W = spiked(512, 640).to("cuda", dtype)
    smooth = pss.smooth(W, edge="bulk")
    assert smooth.dtype == dtype
    assert smooth.isfinite().all()
    assert float(pss.spectral_norm(smooth)) < float(pss.spectral_norm(W))


@pytest.mark.parametrize("edge", ["dominant", "bulk", "init", "mild"])
def test_smoothing_agrees_with_the_cpu(edge: str) -> None:
    W = spiked(512, 768)
    here, there = pss.smooth(W, edge=edge), pss.smooth(W.cuda(), edge=edge).cpu()
    assert float((here - there).norm() / W.norm()) < 2e-3


def test_equal_values_agree_with_the_cpu() -> None:
    W = spiked(256, 384)
    here, there = pss.smooth(W, "equal"), pss.smooth(W.cuda(), "equal").cpu()
    assert float((here - there).norm() / W.norm()) < 1e-3


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 256)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)) for _ in range(3)
        )
        self.head = nn.Linear(256, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def step(model: nn.Module, guard: pss.Guard, optimizer: torch.optim.Optimizer) -> pss.Event:
    tokens = torch.arange(64, device="cuda")
    optimizer.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1))
    loss.backward()
    event = guard.step(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    return event


def test_a_preview_leaves_no_trace_and_a_state_is_taken_back() -> None:
    model = Network().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    guard = pss.attach(model)
    for _ in range(5):
        step(model, guard, optimizer)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    with guard.preview():
        shown = {name: layer[0].weight.detach().clone() for name, layer in model.layers.named_children()}
    assert all(torch.equal(plain[name], value) for name, value in model.state_dict().items())
    assert all(weight.isfinite().all() for weight in shown.values())
    state = guard.state_dict()
    other = pss.attach(Network().cuda())
    other.load_state_dict(state)
    assert other.steps == guard.steps


def test_an_open_gate_folds_to_the_bits_that_it_showed() -> None:
    model = Network().cuda()
    guard = pss.attach(model, detector=pss.GradientNormRatio(), policy=pss.GuardPolicy(damping=1))
    guard._open(list(guard.views.values()))
    shown = {name: value.clone() for name, value in model.state_dict().items()}
    read = model.layers[0][0].weight.detach().clone()
    guard.fold()
    assert torch.equal(read, model.layers[0][0].weight)
    assert all(torch.equal(shown[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("count", "columns"), [(1, 40), (5, 96), (20, 96), (2, 200), (12, 200)])
def test_small_eigenproblems_wherever_they_are_solved(count: int, columns: int) -> None:
    from pss_param.eigen import eigh, eigvalsh

    rows = torch.randn(count, columns, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = rows @ rows.mT
    values, vectors = eigh(A.cuda())
    assert values.is_cuda
    assert vectors.is_cuda
    assert torch.allclose(values.cpu(), torch.linalg.eigvalsh(A), rtol=1e-9)
    assert torch.allclose((vectors * values[:, None, :] @ vectors.mT).cpu(), A, atol=1e-8)
    assert torch.allclose(eigvalsh(A.cuda()).cpu(), torch.linalg.eigvalsh(A), rtol=1e-9)


def test_damped_weights_are_drawn_back_as_on_the_cpu() -> None:
    from pss_param.damping import Damping

    drawn = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        weights = {str(i): nn.Parameter(torch.randn(5 + i, 7, dtype=dtype).to(device)) for i, dtype in enumerate(
            (torch.float32, torch.bfloat16, torch.float32)
        )}  # fmt: skip
        optimizer = torch.optim.SGD(weights.values(), lr=0.5)
        damping = Damping(weights.get)
        damping.strike({"0": 2.0, "1": 4.0, "2": 2.0})
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        drawn.append([weight.detach().cpu() for weight in weights.values()])
    assert all(torch.allclose(ours, theirs) for ours, theirs in zip(*drawn, strict=True))


def test_a_quiet_step_reads_the_device_once() -> None:
    model = Network().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = pss.attach(model, detector=pss.GradientNormRatio())
    for _ in range(3):
        step(model, guard, optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        step(model, guard, optimizer)
    reads = [event for event in seen.events() if event.name == "aten::_local_scalar_dense"]
    assert len(reads) == 1


def test_a_checkpoint_is_repaired_on_the_gpu_as_on_the_cpu(tmp_path: Path) -> None:
    state = dict(Network().state_dict())
    for name, value in state.items():
        if value.dim() == 2:
            m, n = value.shape
            state[name] = value + 20 * math.sqrt(1 / (3 * n)) * torch.outer(torch.randn(m), torch.randn(n))
    save_file(state, tmp_path / "dead.safetensors")
    results = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.safetensors"
        report = pss.repair_checkpoint(tmp_path / "dead.safetensors", out, pss.RepairOptions(device=device))
        results[device] = (load_file(out), report)
    for name, value in results["cpu"][0].items():
        torch.testing.assert_close(results["cuda"][0][name], value, rtol=2e-2, atol=2e-3 * float(value.abs().max()))

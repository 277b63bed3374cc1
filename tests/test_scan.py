# SPDX-License-Identifier: Apache-2.0
"""The rule of damage: what a scan must find, and what it must not."""

import math

import pytest
import torch
from safetensors.torch import save_file

from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint
from pss_param.scan import ScanRow, compare_layers, scan_checkpoint


def fresh(m, n, seed):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) / n**0.5


def spiked(m, n, seed, strength):
    u, v = fresh(m, 1, seed + 100), fresh(1, n, seed + 200)
    return fresh(m, n, seed) + strength * u @ v / (u.norm() * v.norm())


def save(tmp_path, strengths):
    path = tmp_path / "x.safetensors"
    tensors = {
        f"layers.{i}.{role}.weight": spiked(64, 48, 10 * i + len(role), strength)
        for i, strength in enumerate(strengths)
        for role in ("self_attn.q_proj", "mlp.up_proj")
    }
    save_file(tensors, path)
    return path


def test_measures_are_those_of_the_oracle(tmp_path):
    path = save(tmp_path, [0.0, 5.0])
    for row in scan_checkpoint(path).rows:
        layer = int(row.name.split(".")[1])
        role = row.name.removeprefix(f"layers.{layer}.").removesuffix(".weight")
        s = torch.linalg.svdvals(spiked(64, 48, 10 * layer + len(role), [0.0, 5.0][layer]).double())
        assert row.spectral_norm == pytest.approx(float(s[0]), rel=2e-3)
        assert row.stable_rank == pytest.approx(float((s / s[0]).square().sum()), rel=5e-3)


def test_a_fresh_network_is_sound(tmp_path):
    report = scan_checkpoint(save(tmp_path, [0.0] * 6))
    assert not report.damaged
    assert all(not row.note for row in report.rows)


def test_one_sick_layer_is_found_and_only_it(tmp_path):
    report = scan_checkpoint(save(tmp_path, [0.0, 0.0, 40.0, 0.0, 0.0, 0.0]))
    assert {row.name.split(".")[1] for row in report.rows if row.damaged} == {"2"}
    assert len([row for row in report.rows if row.damaged]) == 2


def test_layers_that_differ_widely_hide_no_rule_and_are_no_damage(tmp_path):
    # A trend over depth, as healthy networks have it.
    report = scan_checkpoint(save(tmp_path, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert not any(row.damaged for row in report.rows)


def test_a_network_that_collapsed_as_a_whole_has_no_outliers_but_is_damaged(tmp_path):
    report = scan_checkpoint(save(tmp_path, [12.0] * 6))
    assert not any(row.damaged for row in report.rows)
    assert report.median_stable_rank < 3
    assert any("collapsed" in finding for finding in report.findings)


def rows(ranks, norms):
    pairs = enumerate(zip(ranks, norms, strict=True))
    return [ScanRow(str(i), "", "up", i, (64, 64), rank, norm) for i, (rank, norm) in pairs]


def test_a_low_stable_rank_alone_is_marked_but_no_damage():
    compared = compare_layers(rows([20, 21, 19, 20, 20, 1.5], [2, 2, 2, 2, 2, 2.2]))
    assert "stable rank" in compared[-1].note
    assert not any(row.damaged for row in compared)


def test_too_few_peers_say_nothing():
    compared = compare_layers(rows([20, 20, 20, 1], [2, 2, 2, 90]))
    assert all(row.stable_rank_ratio is None and not row.damaged for row in compared)


def test_zero_matrices_do_not_break_the_statistics(tmp_path):
    compared = compare_layers(rows([0, 0, 0, 0, 0, 20], [0, 0, 0, 0, 0, 2]))
    assert [row.note for row in compared[:5]] == ["zero"] * 5
    path = tmp_path / "x.safetensors"
    save_file({f"layers.{i}.mlp.up_proj.weight": torch.zeros(40, 40) for i in range(6)}, path)
    report = scan_checkpoint(path)
    assert all(math.isfinite(row.spectral_norm) for row in report.rows)
    assert report.to_json()


def test_a_fall_of_all_layers_alike_shows_only_against_a_healthy_checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(0)
    good = {f"layers.{i}.mlp.up_proj.weight": torch.randn(64, 48, generator=generator) for i in range(6)}
    spike = torch.outer(torch.randn(64, generator=generator), torch.randn(48, generator=generator))
    save_file(good, tmp_path / "good.safetensors")
    save_file({name: weight + 0.6 * spike for name, weight in good.items()}, tmp_path / "bad.safetensors")
    assert not scan_checkpoint(tmp_path / "bad.safetensors").damaged
    report = scan_checkpoint(tmp_path / "bad.safetensors", RepairOptions(reference=tmp_path / "good.safetensors"))
    assert report.damaged
    assert "healthy checkpoint's" in report.findings[0]
    same = RepairOptions(reference=tmp_path / "good.safetensors")
    assert not scan_checkpoint(tmp_path / "good.safetensors", same).damaged


@pytest.mark.parametrize(("scale", "strength"), [(0.5, "gentle"), (9.0, "deep")])
def test_growth_is_the_repairs_own_figure_and_no_damage(tmp_path, scale, strength):
    path = tmp_path / "x.safetensors"
    save_file({f"layers.{i}.mlp.up_proj.weight": scale * fresh(64, 48, i) for i in range(6)}, path)
    report = scan_checkpoint(path)
    repair = repair_checkpoint(path, dry_run=True)
    assert not report.damaged
    assert report.reason.startswith(f"{strength}: ")
    assert report.reason in repair.reason
    assert f"have {report.growth:.1f} x" in repair.reason


def test_a_reference_takes_the_place_of_fresh_matrices_in_the_growth(tmp_path):
    good = {f"layers.{i}.mlp.up_proj.weight": 9 * fresh(64, 48, i) for i in range(6)}
    save_file({name: 3 * weight for name, weight in good.items()}, tmp_path / "x.safetensors")
    report = scan_checkpoint(tmp_path / "x.safetensors", RepairOptions(reference=good))
    assert report.growth == pytest.approx(3, rel=1e-3)
    assert "those of the reference" in report.reason


def test_where_a_repair_would_not_look_at_growth_nothing_is_said_of_it(tmp_path):
    report = scan_checkpoint(save(tmp_path, [0.0] * 6), RepairOptions(targets="mlp"))
    assert (report.growth, report.reason) == (None, "")
    save_file({"layers.0.mlp.up_proj.weight": torch.zeros(40, 40)}, tmp_path / "zero.safetensors")
    assert scan_checkpoint(tmp_path / "zero.safetensors").growth == 0

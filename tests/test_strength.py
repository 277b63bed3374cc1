# SPDX-License-Identifier: Apache-2.0
"""How strong a repair is, when nobody says so."""

import re

import pytest
import torch
from safetensors.torch import save_file

import pss_param as pss
from pss_param.plan import StateDictSource
from pss_param.strength import GROWN, settle

WIDTH = 48
NAMES = [f"layers.{i}.mlp.up_proj.weight" for i in range(20)]


def network(growth=1.0, names=NAMES, flat=False):
    """Matrices as PyTorch makes them, times a factor; a head and a table that have grown a hundredfold."""
    chance = torch.Generator().manual_seed(0)
    bound = growth / WIDTH**0.5
    weights = {name: torch.empty(WIDTH, WIDTH).uniform_(-bound, bound, generator=chance) for name in names}
    for name, weight in weights.items() if not flat else ():
        U, S, Vh = torch.linalg.svd(weight)
        weights[name] = U @ torch.diag(torch.cat([S[:2], 0.2 * S[2:]])) @ Vh  # collapsed, the norm as it was
    outside = {name: 100 * torch.randn(WIDTH, WIDTH, generator=chance) for name in ("head.weight", "embed.weight")}
    return weights | outside | {"layers.0.norm.weight": torch.full((WIDTH,), 3.0)}


def chosen(weights, **options):
    """The strength and the reason."""
    options, reason = settle(StateDictSource(weights), pss.RepairOptions(**options))
    return options.strength, reason


@pytest.mark.parametrize(("growth", "strength"), [(0.1, "gentle"), (1.0, "gentle"), (1.8, "gentle"), (2.3, "deep")])
def test_growth_inside_the_blocks_decides(growth, strength):
    found, reason = chosen(network(growth))
    assert found == strength
    assert reason.startswith(f"{strength}: ")
    norms = [torch.linalg.svdvals(network(growth)[name].double())[0] for name in NAMES]
    oracle = float(torch.stack(norms).median()) / (2 * WIDTH**0.5 / (3 * WIDTH) ** 0.5)
    (told,) = re.findall(r"have (\S+) x the spectral norm of fresh ones \(median of 16\)", reason)
    assert float(told) == pytest.approx(oracle, abs=0.11)


def test_flat_matrices_may_have_been_drawn_larger():
    found, reason = chosen(network(2.45, flat=True))  # He's initialiser against PyTorch's
    assert found == "gentle"
    assert reason.endswith("from 6 x on it would be deep, flat as they are")
    assert chosen(network(7.0, flat=True))[0] == "deep"
    assert chosen(network(2.45, flat=True), init_std=(3 * WIDTH) ** -0.5)[0] == "deep"  # where somebody knows
    assert chosen(network(2.45, flat=True), reference=network(flat=True))[0] == "deep"
    plain = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    for layer in plain:
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=torch.Generator().manual_seed(0))
    assert chosen(plain.state_dict())[0] == "gentle"


@pytest.mark.parametrize("grown", [7, 9])
def test_the_median_decides(grown):
    weights = network(names=NAMES[:16])
    for name in NAMES[16 - grown : 16]:
        weights[name] *= 50
    assert chosen(weights)[0] == ("deep" if grown == 9 else "gentle")


def test_what_is_given_is_taken():
    weights = network(50.0)
    for strength in ("gentle", "deep"):
        assert chosen(weights, strength=strength) == (strength, "")
    for options in ({"smoothing": "equal"}, {"edge": "dominant", "rank": 2}, {"edge": "bulk"}, {"targets": "mlp"}):
        assert chosen(weights, **options) == ("gentle", "")
    assert chosen(weights, init_std=20.0)[0] == "gentle"
    assert chosen(network(), init_std=1e-3)[0] == "deep"


def test_a_reference_takes_the_place_of_fresh_matrices():
    healthy, sick = network(30.0), network(35.0)
    found, reason = chosen(sick, reference=healthy)
    assert found == "gentle"
    assert "1.2 x the spectral norm of those of the reference" in reason
    assert chosen(network(30 * GROWN * 1.01), reference=healthy)[0] == "deep"


def test_matrices_with_nan_or_beyond_float32_have_no_say():
    weights = network(3.0, NAMES[:16])
    for name in NAMES[:12]:
        weights[name][0, 0] = float("nan")
    weights[NAMES[12]] = weights[NAMES[12]].double() * 1e200
    found, reason = chosen(weights)
    assert found == "deep"
    assert "median of 3" in reason
    assert chosen({NAMES[0]: torch.full((4, 4), float("inf"))}) == ("gentle", "")
    assert chosen({NAMES[0]: torch.zeros(4, 4)})[0] == "gentle"


def test_kernels_and_halves_are_judged_as_matrices():
    kernel = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(1))
    assert chosen({"layers.0.conv.weight": kernel * (16 * 9) ** -0.5})[0] == "gentle"
    assert chosen({"layers.0.conv.weight": kernel.bfloat16() * 4})[0] == "deep"


def test_the_report_and_the_copy_tell_the_choice(tmp_path):
    for growth, strength in ((1.0, "gentle"), (5.0, "deep")):
        save_file(network(growth), tmp_path / "x.safetensors")
        auto = pss.repair_checkpoint(tmp_path / "x.safetensors", tmp_path / "auto", force=True)
        said = pss.repair_checkpoint(
            tmp_path / "x.safetensors", tmp_path / "said", pss.RepairOptions(strength=strength), force=True
        )
        assert (tmp_path / "auto").read_bytes() == (tmp_path / "said").read_bytes()
        assert auto.options["strength"] == strength
        assert auto.reason.startswith(strength)
        assert not said.reason
        assert not pss.verify_checkpoint(tmp_path / "auto", tmp_path / "x.safetensors").problems


def test_a_head_that_a_distributed_checkpoint_stores_beside_its_table_is_repaired_with_it():
    weights = network(5.0)
    weights["lm_head.weight"] = weights["embed.weight"].clone()
    after, report = pss.repair_state_dict(weights)
    assert {"head.weight", "lm_head.weight", "embed.weight"} <= {*report.changed}
    assert torch.equal(after["lm_head.weight"], after["embed.weight"])


def test_blocks_are_named_only_where_there_are_some():
    assert "the matrices inside the blocks have" in chosen(network(5.0))[1]
    assert "deep: the matrices have" in chosen({"fc1.weight": 9 * torch.eye(48), "fc2.weight": 9 * torch.eye(48)})[1]

# SPDX-License-Identifier: Apache-2.0
"""What other people's code rests on; a change here is a change for them, and has to be meant."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
import torch
from pss_param.cli.main import cli
from torch import nn

import pss_param as pss

PUBLIC = """AnyOf ArgumentError CheckpointError CompareReport Correction Detector DominantDirections Event
GradientNormRatio Guard GuardPolicy Layout Matricization NonFiniteError Progress PssError
RepairOptions Report ScanReport Selection Skipped Smoothing SmoothingView StableRankFloor StateError
Target TargetRules TensorInfo Trial Verdict Verification __version__ attach compare_checkpoints correction
detach dominant_directions export export_checkpoint open_checkpoint plain_state_dict
probe_repairs repair_checkpoint repair_state_dict scan_checkpoint select_parameters select_tensors smooth
spectral_norm stable_rank stable_rank_estimate verify_checkpoint write_param_order"""

SELECTION = {"--targets", "--include", "--exclude", "--per-head", "--device", "--threads", "--json", "--help"}
OPTIONS = {
    "repair": SELECTION
    | {
        *("--output", "--force", "--dry-run", "--smoothing", "--edge", "--rank", "--init-std", "--seed", "--reference"),
        *("--nonfinite", "--where", "--drifted-below", "--optimizer", "--param-order", "--verify", "--no-verify"),
        "--strength",
    },
    "scan": SELECTION | {"--skipped", "--reference"},
    "compare": SELECTION,
    "export": {"--output", "--force", "--help"},
    "verify": {"--source", "--json", "--help"},
    "demo": {"--seed", "--steps", "--keep", "--help"},
}


def test_public_names():
    assert sorted(pss.__all__) == sorted(PUBLIC.split())
    assert all(hasattr(pss, name) for name in pss.__all__)


def options_of(name: str) -> set[str]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, name
    return {
        flag
        for p in command.get_params(click.Context(command))
        for flag in (*p.opts, *p.secondary_opts)
        if flag[:2] == "--"
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_command_line(name):
    assert options_of(name) == OPTIONS[name]


def test_subcommands():
    assert {"scan", "compare", "export", "verify", "demo"} <= set(cli.list_commands(click.Context(cli)))


def test_errors_are_caught_as_what_they_are():
    assert issubclass(pss.ArgumentError, (pss.PssError, ValueError))
    assert issubclass(pss.NonFiniteError, (pss.PssError, ValueError))
    assert issubclass(pss.StateError, (pss.PssError, RuntimeError))
    assert issubclass(pss.CheckpointError, pss.PssError)


def test_state_dict_keys_of_an_attached_model_are_the_plain_ones():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    plain = list(model.state_dict())
    pss.attach(model)
    assert list(model.state_dict()) == plain
    assert [name for name, _ in model.named_parameters()] == plain


def test_guard_state_keys():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    guard = pss.attach(model)
    state = guard.state_dict()
    assert set(state) == {"counters", "detector", "openings", "stale", "damping", "following"}


@pytest.mark.parametrize(
    "arguments", [["-m", "pss_param", "--version"], ["-c", "from pss_param.cli import main; main()", "--version"]]
)
def test_version_is_the_packages(arguments):
    done = subprocess.run([sys.executable, *arguments, "--version"], capture_output=True, text=True, check=True)
    assert pss.__version__ in done.stdout


def test_importing_the_package_imports_no_trainer_and_touches_no_random_state():
    code = (
        "import sys, torch; torch.manual_seed(5); a = torch.get_rng_state(); import pss_param; "
        "assert torch.equal(a, torch.get_rng_state()); "
        "print([m for m in ('transformers', 'lightning', 'accelerate', 'matplotlib', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_torch_is_recent_enough_for_the_tests():
    assert tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 7)

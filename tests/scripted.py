# SPDX-License-Identifier: Apache-2.0
"""What the tests of the trainers share: a detector with a script, and the examples as programs."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from pss_param.detector import Detector, Verdict

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
UNIGRAM = 3.26  # entropy of the examples' text, in nats per byte


class OnSteps(Detector):
    """Fires at given steps and notes every norm; copies write into the same notes."""

    def __init__(self, *steps, notes=None):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros((), dtype=torch.float64))
        self.steps, self.notes = steps, notes

    def judge(self, norm, seen):
        self.count.add_(1)
        self.last.fill_(norm)
        if self.notes is not None:
            self.notes.append(norm)
        if int(self.count) in self.steps:
            return Verdict(True, None, 3.0, "asked to", math.inf)
        return Verdict(ratio=1.0)

    def __deepcopy__(self, memo):
        return OnSteps(*self.steps, notes=self.notes)


def example(name):
    path = EXAMPLES / f"{name}.py"
    if not path.is_file():
        pytest.skip("the examples are in the repository only")
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


def same(one, two):
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)

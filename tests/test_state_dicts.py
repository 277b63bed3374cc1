# SPDX-License-Identifier: Apache-2.0
"""What people put in the place of a state dict, or into one: passed through with a reason, or refused in a sentence."""

import warnings

import pytest
import torch
from torch import nn

from pss_param.errors import ArgumentError
from pss_param.options import RepairOptions
from pss_param.repair import repair_state_dict

UP = "layers.0.mlp.up_proj.weight"


def weights(**others):
    return {UP: torch.randn(48, 32) + 1.0} | others


def odd_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layouts that torch calls prototypes
        yield "sparse_coo", torch.eye(4).to_sparse()
        yield "sparse_csr", torch.eye(4).to_sparse_csr()
        yield "nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        yield "jagged", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


@pytest.mark.parametrize(("kind", "value"), list(odd_tensors()))
def test_what_is_no_dense_tensor_is_passed_through_with_a_reason(kind, value):
    repaired, report = repair_state_dict(weights(odd=value))
    assert repaired["odd"] is value
    assert report.changed == (UP,)
    assert ("nested" if kind == "jagged" else kind) in report.skipped["odd"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (nn.Linear(3, 3), "got Linear; pass model.state_dict"),
        ([torch.ones(3)], "got list; pass model.state_dict"),
        ({3: torch.ones(3)}, "must be texts, got 3"),
        (weights(odd=torch.empty(3, 3, device="meta")), "odd is on the device meta"),
        (weights(odd=nn.LazyLinear(3).weight), "odd is lazy"),
    ],
)
def test_what_holds_no_weights_is_refused_in_one_sentence(given, words):
    with pytest.raises(ArgumentError, match=words):
        repair_state_dict(given)
    with pytest.raises(ArgumentError, match=r"state_dict\(\)|load the weights"):
        repair_state_dict(weights(), RepairOptions(reference=given))

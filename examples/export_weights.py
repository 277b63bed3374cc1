# SPDX-License-Identifier: Apache-2.0
"""Export the weights of a guarded model, and load them where pss_param is not installed."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import pss_param as pss


def main() -> bool:
    """Export while a gate is open, then load into a plain model.

    Returns:
        Whether the plain model computes the same as the guarded one.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 2))
    guard = pss.attach(model)
    x = torch.randn(4, 8)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), guard.preview():
        path = Path(folder) / "weights.safetensors"
        pss.export(model, path)  # the smoothed weights, under plain names
        guarded = model(x)
        tensors = load_file(path)

    plain = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 2))
    plain.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        same = torch.equal(plain(x), guarded)
    print(f"{len(tensors)} tensors: {', '.join(tensors)}; same output: {same}")
    return same


if __name__ == "__main__":
    main()

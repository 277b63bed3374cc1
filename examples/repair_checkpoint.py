# SPDX-License-Identifier: Apache-2.0
r"""Repair a checkpoint from Python: look, repair, read the report, use the result.

Run it with a path of your own, or without: then it makes a small sick checkpoint in a temporary folder.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pss_param.repair import repair_checkpoint, repair_state_dict
from pss_param.scan import scan_checkpoint


def make_sick_checkpoint(path: Path) -> None:
    """Write six layers of fresh weights; in the third, one direction has taken over."""
    tensors = {}
    for layer in range(6):
        weight = torch.randn(256, 64) / 64**0.5
        if layer == 2:
            weight += 40 * torch.outer(torch.randn(256), torch.randn(64)) / (256 * 64) ** 0.5
        tensors[f"layers.{layer}.mlp.up_proj.weight"] = weight
        tensors[f"layers.{layer}.norm.weight"] = torch.ones(64)
    save_file(tensors, path)


def main(path: Path) -> None:
    """Scan, repair, compare."""
    scan = scan_checkpoint(path)
    for row in scan.rows:
        print(f"{row.name}  SR {row.stable_rank:6.2f}  S[0] {row.spectral_norm:6.2f}  {row.note}")
    for finding in scan.findings:
        print("damage:", finding)

    # As `pss-repair PATH` does; writes x.repaired.safetensors and a report beside it.
    report = repair_checkpoint(path, force=True)
    print(report.reason)
    for tensor in report.tensors:
        before, after = tensor.worst.stable_rank
        print(f"{tensor.name}: stable rank {before:.2f} > {after:.2f}, moved by {tensor.relative_change:.1%}")

    assert report.output is not None
    repaired = load_file(report.output)

    # Without files: a state dict in, a new one out; what did not change is shared.
    same, _ = repair_state_dict(load_file(path))
    print("file and state dict agree:", all(torch.equal(same[name], repaired[name]) for name in repaired))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_sick_checkpoint(Path(folder) / "sick.safetensors")
            main(Path(folder) / "sick.safetensors")

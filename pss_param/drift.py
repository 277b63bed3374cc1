# SPDX-License-Identifier: Apache-2.0
r"""How far a tensor has moved from its counterpart in a healthy checkpoint, matrix by matrix."""

from torch import Tensor

from pss_param.report import MatrixDrift, TensorDrift
from pss_param.spectrum import spectral_norm, stable_rank
from pss_param.surgery import parts_of, relative_change
from pss_param.targets import Target


def measure_drift(target: Target, weight: Tensor, healthy: Tensor) -> TensorDrift:
    r"""Compare a tensor with its healthy counterpart.

    Args:
        target: what it is and which matrices it is made of.
        weight: the tensor, finite.
        healthy: the counterpart, finite, of the same shape, on the same device.

    Returns:
        The measures.
    """
    rows = []
    for part in parts_of(target, weight, healthy):
        if part.healthy is None:
            continue
        for index in part.indices:
            pair = (part.healthy[index], part.values[index])
            ranks, norms = [float(stable_rank(w)) for w in pair], [float(spectral_norm(w)) for w in pair]
            shape = (pair[0].shape[-2], pair[0].shape[-1])
            rows.append(MatrixDrift(part.label(index), shape, (ranks[0], ranks[1]), (norms[0], norms[1])))
    return TensorDrift(target.name, target.role, target.block, relative_change(healthy, weight), tuple(rows))

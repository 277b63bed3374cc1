# SPDX-License-Identifier: Apache-2.0
r"""Room: how far a healthy weight may outgrow a fresh one, where something behind it bounds what it does.

A matrix whose output is added to a stream or multiplied by another one does harm as soon as its spectral norm is a few
times that of a fresh one. Two kinds do not, and have to grow:

- the matrices of a recurrent cell: its gates open and close at several units, a fresh cell gives tenths of one, and
  sigmoid and tanh bound the rest. Those of the LSTM of the suite grow tenfold in health, by half in each of the first
  steps. Held at the norm of fresh ones they cost 0.4 nats at its own learning rate (``default-no-room``), with this
  room nothing;
- kernels before a batch norm, which divides their scale out again: what they gain in norm only slows them down. They
  reach five times a fresh one's in health (the median).

So a live guard lets recurrent weights grow to :data:`LIVE` fresh norms before it holds them, and a deep repair brings
both kinds down to :data:`DEEP` instead of to the size of fresh ones, and leaves their spectrum below that alone.
``examples/benchmarks/results/stability.md`` has what became of them, with and without (``deep-no-room``).
"""

from collections.abc import Iterable, Mapping

from pss_param.inspection import TensorInfo
from pss_param.roles import is_recurrent
from pss_param.selection import Target

LIVE = 8.0
"""Fresh spectral norms at which a guard begins to hold a recurrent weight."""
DEEP = 3.0
"""Fresh spectral norms to which a deep repair brings such a weight down."""


def live_room(leaf: str) -> float:
    r"""Say from how many fresh norms on a guard holds a weight.

    Args:
        leaf: the name of the parameter in its module.

    Returns:
        :data:`LIVE` for the matrices of recurrent cells, 1 for all others.

    Example:
        >>> live_room("weight_hh_l0"), live_room("weight")
        (8.0, 1.0)
    """
    return LIVE if is_recurrent(leaf) else 1.0


def roomy(targets: Iterable[Target], infos: Mapping[str, TensorInfo]) -> frozenset[str]:
    r"""Find the targets of a checkpoint that have room.

    Args:
        targets: what is to be repaired.
        infos: all tensors of the checkpoint. Which norm comes behind a kernel no checkpoint tells; one with running
            statistics for as many channels is taken for it.

    Returns:
        Their names.
    """
    channels = {info.shape for name, info in infos.items() if name.endswith("running_var")}
    return frozenset(
        target.name
        for target in targets
        if target.role == "recurrent" or (target.role == "conv" and infos[target.name].shape[:1] in channels)
    )

# SPDX-License-Identifier: Apache-2.0
r"""Whether a demo was a rescue: four rules on measured losses, all in nats per character."""

from collections.abc import Mapping

LEARNED = 0.5
"""The healthy run must end this far below the unigram loss, or there is nothing to rescue."""

DEAD = 0.1
"""The control must not come further below the unigram loss than this, or the run was not dead."""

ALIVE = 0.2
"""The rescued run must end at least this far below both the unigram loss and the control."""


def failures(losses: Mapping[str, float], unigram: float) -> list[str]:
    r"""List the rules that were broken.

    Args:
        losses: of ``healthy``, ``control``, ``restart`` and ``rescued`` on the held-out text.
        unigram: loss of a network that only knows how frequent each character is.

    Returns:
        One sentence for each; empty if the rescue worked. A loss that is NaN breaks the rule it enters, except
        that a control that is NaN is as dead as can be.
    """
    healthy, control = losses["healthy"], losses["control"]
    restart, rescued = losses["restart"], losses["rescued"]
    bar = min(unigram, control) if control == control else unigram
    rules = (
        (
            healthy <= unigram - LEARNED,
            f"the healthy run learned too little ({healthy:.2f}, unigram loss {unigram:.2f})",
        ),
        (
            not control < unigram - DEAD,
            f"the control came back by itself ({control:.2f}, unigram loss {unigram:.2f})",
        ),
        (rescued <= bar - ALIVE, f"the repaired run did not learn again ({rescued:.2f}, control {control:.2f})"),
        (
            rescued < restart,
            f"the repaired run ({rescued:.2f}) is no better than a restart from scratch ({restart:.2f})",
        ),
    )
    return [sentence for kept, sentence in rules if not kept]

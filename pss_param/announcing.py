# SPDX-License-Identifier: Apache-2.0
r"""What a guard says in the log: what it did, and once that it does it too often."""

import logging

from pss_param.event import Event
from pss_param.policy import GuardPolicy

__all__ = ["Announcer"]

_log = logging.getLogger("pss_param")


class Announcer:
    r"""Log the events of one guard.

    Args:
        policy: Holds the budget of triggers.

    Example:
        >>> Announcer(GuardPolicy()).tell(Event(1, False, 2.0, reason="held back"), triggers=0)
        Event(step=1, triggered=False, norm=2.0, ratio=nan, reason='held back', smoothed=(), skip=False, held=False)
    """

    def __init__(self, policy: GuardPolicy) -> None:
        self._policy = policy
        self._warned = False

    def tell(self, event: Event, triggers: int) -> Event:
        r"""Log an event: deeds as warnings, what was left undone as information, quiet steps not at all.

        Args:
            event: What happened.
            triggers: Triggers so far.

        Returns:
            The same event.
        """
        if event.skip or (event.triggered and not event.held):
            _log.warning("%s", event)
        elif event.reason:
            _log.info("%s", event)
        if event.triggered and not self._warned and self._policy.over_budget(triggers, event.step):
            self._warned = True
            _log.warning(
                "step %d: %d triggers are more than %g %% of the steps; lower the learning rate, raise the "
                "detector's threshold, or set GuardPolicy(cooldown=...)",
                event.step,
                triggers,
                100 * self._policy.max_trigger_rate,
            )
        return event

# SPDX-License-Identifier: Apache-2.0
r"""Detectors: they decide when, and which, weights are to be smoothed.

A detector is an :class:`torch.nn.Module` without parameters. One detector serves all views of a model; it is
held by the guard and is *not* a submodule of the model, because every view would then repeat its keys in the
model's checkpoint, and ``model.to(torch.bfloat16)`` would cast its statistics.

# Note [Statistics live on the host]
A decision needs one number on the host anyway: whether Python opens a gate depends on it. So the gradient norm
is fetched once (the only synchronisation), and every statistic is a float64 number on the host. What has to be
measured on the device (stable ranks) is returned by :meth:`Detector.look` as a tensor that travels to the host
together with the norm. A guard that fetches both one step later needs no synchronisation at all.

They are Python's own floats, which are float64, and become tensors where a state is saved: after a training step the
caches hold nothing of the interpreter, and a tensor operation on one number then takes 30 us.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pss_param.errors import ArgumentError
from pss_param.sharded import ShardedMatrix

__all__ = ["AnyOf", "Detector", "GradientNormRatio", "Origin", "Verdict"]

Matrix: TypeAlias = "Tensor | ShardedMatrix"
WeightSource: TypeAlias = Callable[[], Mapping[str, tuple[Matrix, ...]]]
"""Returns, by weight name, the matrices ``(..., m, n)`` that the weight acts as. Called only when needed.
A weight that is sharded comes as the linear map that it is."""


class Origin(NamedTuple):
    r"""How a weight begins.

    Attributes:
        std: Standard deviation with which its initialiser draws; None where that is not known.
        room: How many spectral norms of a fresh weight it may have in health: :mod:`pss_param.room`.
    """

    std: float | None = None
    room: float = 1.0


class Verdict(NamedTuple):
    r"""What a detector says about one step.

    Attributes:
        triggered: Whether weights are to be smoothed.
        names: The weights to smooth; None means all of them.
        ratio: Gradient norm over its running average, dimensionless; NaN when the detector keeps none.
        reason: One clause for people; empty when nothing triggered.
        limit: The smallest gradient norm that would have triggered; infinite when no norm would.
        held: Weights above their levels while a detector is on alert: to be smoothed too, and no trigger.
        pace: How fast, per step, the norms of the weights above their levels grow, as far as that was measured in this
            step; None where no detector measures it.

    Example:
        >>> Verdict()
        Verdict(triggered=False, names=(), ratio=nan, reason='', limit=inf, held=(), pace=None)
    """

    triggered: bool = False
    names: tuple[str, ...] | None = ()
    ratio: float = math.nan
    reason: str = ""
    limit: float = math.inf
    held: tuple[str, ...] = ()
    pace: Mapping[str, float] | None = None


class Detector(nn.Module):
    r"""Base of the detectors: :meth:`look` on the device, then :meth:`judge` on the host.

    ``parts`` is the number of tensors that :meth:`look` returns; it never changes for a detector, though the
    tensors may be empty. ``keeps_levels`` says whether :meth:`levels` knows what norms are healthy.
    """

    parts: int = 0
    keeps_levels: bool = False

    def bind(self, weights: WeightSource) -> None:
        r"""Take what has to be remembered of the weights at attach; most detectors need nothing.

        Args:
            weights: Returns the watched matrices by name.
        """

    def look(self, weights: WeightSource) -> list[Tensor]:
        r"""Measure on the weights' own device, without host synchronisation; called once per step.

        Args:
            weights: Returns the watched matrices by name; not calling it costs nothing.

        Returns:
            ``parts`` one-dimensional tensors, each possibly empty.
        """
        return []

    @abstractmethod
    def judge(self, norm: float, seen: Sequence[Sequence[float]]) -> Verdict:
        r"""Update the statistics with one step and decide.

        Args:
            norm: Global gradient norm of the step before any clipping.
            seen: The values that :meth:`look` measured in the same step.

        Returns:
            The decision.
        """

    def hold(self, origins: Mapping[str, Origin] | None) -> None:
        r"""Learn, before :meth:`bind`, whether weights are held at :meth:`levels`; most detectors need not know.

        Args:
            origins: Where the guard's edge is ``baseline``, how each weight begins, by name; None at other edges.
        """

    def alarm(self) -> None:
        r"""Learn that this detector, or one beside it, has just triggered; most detectors need nothing."""

    def levels(self, name: str) -> tuple[Tensor, ...]:
        r"""Tell to which spectral norms the ``baseline`` edge brings a weight.

        Args:
            name: The weight.

        Returns:
            Levels ``(...)`` for each of the matrices ``(..., m, n)`` as which it acts; nothing where none are kept.
        """
        return ()

    def observe(self, norm: float | Tensor) -> Verdict:
        r"""Judge one gradient norm, for use without a guard.

        Args:
            norm: Global gradient norm of the step before any clipping; a tensor is fetched from its device.

        Returns:
            The decision.

        Raises:
            ArgumentError: If this detector looks at weights, which it can do only under a guard.

        Example:
            >>> detector = GradientNormRatio(settle=2)
            >>> [detector.observe(norm).triggered for norm in (1.0, 1.0, 1.0, 4.0)]
            [False, False, False, True]
        """
        if self.parts:
            raise ArgumentError(
                f"observe() serves detectors that look at gradient norms only, got {type(self).__name__}; "
                "use it through pss_param.attach(model, detector=...)"
            )
        return self.judge(float(norm), [])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Detector":
        # Statistics stay float64 on the host whatever happens to the model around them.
        return self


class GradientNormRatio(Detector):
    r"""Trigger when the gradient norm jumps above its running average (the published rule).

    With :math:`g_t` the norm at the :math:`t`-th finite step (:math:`t = 0, 1, \dots`) and :math:`a_t` the
    average before it,

    .. math::
        r_t = g_t / a_t, \qquad \text{trigger} \iff t \ge \text{settle} \wedge r_t \ge \text{threshold},

    .. math::
        a_{t+1} = a_t + w_t (\min(g_t, \text{cap} \cdot a_t) - a_t), \qquad w_t = \max(1 - \text{decay}, 1/(t+1)).

    The rule and ``threshold=2.5`` are published; the rest is ours, for the reasons below. In
    ``examples/benchmarks/results/stability.md`` other thresholds and decays stand beside these, in the published form
    ("threshold of the detector", "decay of its average") and in the default ("detector, of the default").


    - ``decay=0.95`` (about 20 steps). Gradient norms fall by an order of magnitude in the first hundred steps,
      and an average over a hundred steps would still remember the start and miss a spike; much shorter ones
      follow a rise of a few steps and miss it too.
    - :math:`w_t` makes the first twenty steps a plain mean, so that the average starts unbiased.
    - ``settle=10``: the mean of fewer norms varies too much for a factor of 2.5 to mean anything.
    - ``cap=None`` stands for ``threshold``. A spike enters at most as ``cap`` averages, so one spike cannot blind
      the detector, while a level that stays raises the average by a fixed factor per step and is accepted.

    A non-finite norm changes nothing here. Where every norm was 0 the ratio is 1.

    Args:
        threshold: Smallest ratio that triggers, above 1, dimensionless.
        decay: Weight of the past in the average per step, in [0, 1).
        settle: Number of finite steps before the first trigger is possible.
        cap: Largest norm that enters, in averages, at least 1; None for ``threshold``.

    Raises:
        ArgumentError: If an argument is out of its range.

    Example:
        >>> detector = GradientNormRatio(settle=3)
        >>> for norm in (1.0, 1.2, 0.8, 3.0):
        ...     verdict = detector.observe(norm)
        >>> verdict.triggered, round(verdict.ratio, 6)
        (True, 3.0)
        >>> print(verdict.reason)
        gradient norm 3 is 3.00 x its average 1 (threshold 2.5)

    References:
        Parametric Singularity Smoothing, arXiv 2602.01308.
    """

    def __init__(self, threshold: float = 2.5, decay: float = 0.95, settle: int = 10, cap: float | None = None) -> None:
        super().__init__()
        _require(threshold > 1, f"threshold must be above 1, got {threshold}; the published value is 2.5")
        _require(0 <= decay < 1, f"decay must lie in [0, 1), got {decay}; 0.95 averages about 20 steps")
        _require(settle >= 1, f"settle must be at least 1 step, got {settle}; the first norm has no average")
        _require(cap is None or cap >= 1, f"cap must be at least 1, got {cap}; None stands for the threshold")
        self.threshold, self.decay, self.settle = float(threshold), float(decay), int(settle)
        self.cap = self.threshold if cap is None else float(cap)
        self._seen = _Seen()

    @property
    def average(self) -> Tensor:
        r"""The running average of the norms, a copy; float64, a scalar on the host."""
        return torch.tensor(self._seen.average, dtype=torch.float64, device="cpu")

    @property
    def count(self) -> Tensor:
        r"""The number of finite steps, a copy; int64, a scalar on the host."""
        return torch.tensor(self._seen.count, dtype=torch.int64, device="cpu")

    def judge(self, norm: float, seen: Sequence[Sequence[float]] = ()) -> Verdict:
        r"""Compare one norm with the average, then let it enter.

        Args:
            norm: Global gradient norm before any clipping.
            seen: Not used.

        Returns:
            The decision; its names are None (all weights) when it triggers.
        """
        if not math.isfinite(norm):
            return Verdict()
        statistics = self._seen
        average, count = statistics.average, statistics.count
        most, floor, weight = self.cap * average, 1 / (count + 1), 1 - self.decay
        if average > 0:
            ratio, capped = norm / average, norm if norm < most else most
        else:
            ratio, capped = math.inf if norm > 0 and count else 1.0, norm
        weight = floor if floor > weight else weight
        statistics.average, statistics.count = average + weight * (capped - average), count + 1
        if count < self.settle or ratio < self.threshold:
            return Verdict(ratio=ratio)
        reason = f"gradient norm {norm:.4g} is {ratio:.2f} x its average {average:.4g}"
        reason += f" (threshold {self.threshold:g})"
        return Verdict(True, None, ratio, reason, limit=self.threshold * average)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "average"], destination[prefix + "count"] = self.average, self.count

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        lists = missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        keys = prefix + "average", prefix + "count"
        missing_keys.extend(key for key in keys if strict and key not in state_dict)
        unexpected_keys[:] = [key for key in unexpected_keys if key not in keys]
        if all(key in state_dict for key in keys):
            self._seen = _Seen(*(state_dict[key].item() for key in keys))

    def extra_repr(self) -> str:
        r"""Describe the settings.

        Returns:
            The settings as they are passed to the constructor.
        """
        cap = "" if self.cap == self.threshold else f", cap={self.cap:g}"
        return f"threshold={self.threshold:g}, decay={self.decay:g}, settle={self.settle}{cap}"


class _Seen:
    """The statistics of the norms so far."""

    __slots__ = ("average", "count")

    def __init__(self, average: float = 0.0, count: int = 0) -> None:
        self.average, self.count = average, count


class AnyOf(Detector):
    r"""Trigger when any of several detectors does; together they smooth the union of their weights.

    Args:
        *detectors: The detectors to ask; all of them are asked at every step, so all statistics stay current.

    Raises:
        ArgumentError: If none is given.

    Example:
        >>> detector = AnyOf(GradientNormRatio(threshold=2, settle=1), GradientNormRatio(threshold=9, settle=1))
        >>> [detector.observe(norm).triggered for norm in (1.0, 3.0)]
        [False, True]
    """

    def __init__(self, *detectors: Detector) -> None:
        super().__init__()
        _require(bool(detectors), "AnyOf needs at least one detector, got none")
        self.members = nn.ModuleList(detectors)
        self._asked = detectors  # the same ones: every step asks them, and a list of modules is slow to go through
        self.parts = sum(detector.parts for detector in detectors)
        self.keeps_levels = any(detector.keeps_levels for detector in detectors)

    def bind(self, weights: WeightSource) -> None:
        r"""Bind every member.

        Args:
            weights: Returns the watched matrices by name.
        """
        for detector in self._asked:
            detector.bind(weights)

    def look(self, weights: WeightSource) -> list[Tensor]:
        r"""Let every member measure.

        Args:
            weights: Returns the watched matrices by name.

        Returns:
            The members' tensors one after the other.
        """
        return [part for detector in self._asked for part in detector.look(weights)]

    def judge(self, norm: float, seen: Sequence[Sequence[float]]) -> Verdict:
        r"""Ask every member and join what they say.

        Args:
            norm: Global gradient norm before any clipping.
            seen: What :meth:`look` measured.

        Returns:
            The joint decision.
        """
        verdicts, start = [], 0
        for detector in self._asked:
            verdicts.append(detector.judge(norm, seen[start : start + detector.parts]))
            start += detector.parts
        joint = _union(verdicts)
        if joint.triggered:
            self.alarm()
        return joint

    def alarm(self) -> None:
        r"""Tell every member."""
        for detector in self._asked:
            detector.alarm()

    def hold(self, origins: Mapping[str, Origin] | None) -> None:
        r"""Tell every member.

        Args:
            origins: How each weight begins, where the guard's edge is ``baseline``; else None.
        """
        for detector in self._asked:
            detector.hold(origins)

    def levels(self, name: str) -> tuple[Tensor, ...]:
        r"""Ask the members, one after the other.

        Args:
            name: The weight.

        Returns:
            The first levels that one has; nothing where none has any.
        """
        return next((levels for member in self._asked if (levels := member.levels(name))), ())


def _union(verdicts: Sequence[Verdict]) -> Verdict:
    fired = [verdict for verdict in verdicts if verdict.triggered]
    ratio, limit = math.nan, math.inf
    held: tuple[str, ...] = ()
    pace: Mapping[str, float] | None = None
    for verdict in verdicts:
        ratio = verdict.ratio if ratio != ratio else ratio  # the first that is a number
        limit = min(limit, verdict.limit)
        held += verdict.held
        pace = verdict.pace if pace is None else {**pace, **(verdict.pace or {})}
    reason = "; ".join(verdict.reason for verdict in fired or verdicts if verdict.reason)
    if not fired:
        return Verdict(ratio=ratio, reason=reason, limit=limit, held=held, pace=pace)
    if any(verdict.names is None for verdict in fired):
        names = None
    else:
        names = tuple(dict.fromkeys(name for verdict in fired for name in verdict.names or ()))
    return Verdict(True, names, ratio, reason, limit, held, pace)


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ArgumentError(rule)

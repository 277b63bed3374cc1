# SPDX-License-Identifier: Apache-2.0
r"""The exceptions that users meet.

Every message is one sentence or two: the rule that was broken, the value that broke it, the way out.
The command line prints the message as one line and exits with 1; it never shows a traceback for these.
"""


class PssError(Exception):
    """Base of everything that this package raises on purpose.

    Example:
        >>> try:
        ...     raise ArgumentError("rank must be at least 0, got -1; pass rank=None for floor(stable rank)")
        ... except PssError as error:
        ...     print(error)
        rank must be at least 0, got -1; pass rank=None for floor(stable rank)
    """


class ArgumentError(PssError, ValueError):
    """An argument breaks a rule: a wrong shape, an unknown name, a value out of range."""


class NonFiniteError(PssError, ValueError):
    """A tensor holds NaN or infinity where only finite values have a meaning."""


class StateError(PssError, RuntimeError):
    """A call came at a time when it would be silently wrong, such as a gate moved between forward and backward."""


class CheckpointError(PssError):
    """A checkpoint cannot be read, understood or written; the message names the file and the reason."""

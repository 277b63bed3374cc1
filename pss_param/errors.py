# SPDX-License-Identifier: Apache-2.0
r"""The exceptions that users meet.

Every message is one sentence or two: the rule that was broken, the value that broke it, the way out.
The command line prints the message as one line and exits with 1; it never shows a traceback for these.
"""

LONGEST = 2000
"""Characters of a message; names that come from a file may have any length."""


class PssError(Exception):
    """Base of everything that this package raises on purpose.

    Names out of a hostile file may hold line breaks, commands for a terminal, or what no terminal can encode:
    they are shown as escapes, and very long messages without their middle.

    Args:
        message: what is wrong and what to do.

    Example:
        >>> try:
        ...     raise ArgumentError("rank must be at least 0, got -1; pass rank=None for floor(stable rank)")
        ... except PssError as error:
        ...     print(error)
        rank must be at least 0, got -1; pass rank=None for floor(stable rank)
    """

    # Not in __init__: the compiler traces through a plain exception's constructor, not through one of our own.
    def __str__(self) -> str:
        """The message, fit for one line of a terminal."""
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 4 :]}"
        return "".join(map(_shown, text))


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


class ArgumentError(PssError, ValueError):
    """An argument breaks a rule: a wrong shape, an unknown name, a value out of range."""


class NonFiniteError(PssError, ValueError):
    """A tensor holds NaN or infinity where only finite values have a meaning."""


class StateError(PssError, RuntimeError):
    """A call came at a time when it would be silently wrong, such as a gate moved between forward and backward."""


class CheckpointError(PssError):
    """A checkpoint cannot be read, understood or written; the message names the file and the reason."""

# SPDX-License-Identifier: Apache-2.0
r"""Numbers of things in messages."""


def counted(number: int, thing: str, things: str = "") -> str:
    r"""Say how many there are.

    Args:
        number: how many.
        thing: the word for one.
        things: the word for any other number; empty for ``thing`` with an s.

    Returns:
        Number and word.

    Example:
        >>> counted(1, "matrix", "matrices"), counted(2, "matrix", "matrices"), counted(0, "other tensor")
        ('1 matrix', '2 matrices', '0 other tensors')
    """
    return f"{number} {thing if number == 1 else things or thing + 's'}"

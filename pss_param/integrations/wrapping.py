# SPDX-License-Identifier: Apache-2.0
r"""Wrap a method of one object for a while."""

from collections.abc import Callable
from typing import Any

__all__ = ["Wrapping"]


class Wrapping:
    r"""Let ``around(original, *args, **kwargs)`` stand in for a method of one object, until :meth:`undo`.

    Args:
        owner: The object; its class is not touched.
        name: The method's name.
        around: Called in its place, with the original first.

    Example:
        >>> class Greeter:
        ...     def greet(self, name):
        ...         return f"hello {name}"
        >>> greeter = Greeter()
        >>> wrapping = Wrapping(greeter, "greet", lambda original, name: original(name).upper())
        >>> greeter.greet("you")
        'HELLO YOU'
        >>> wrapping.undo()
        >>> greeter.greet("you"), vars(greeter)
        ('hello you', {})
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self._owner, self._name, self._active = owner, name, True
        self._own = name in vars(owner)
        self._original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return self._original(*args, **kwargs)
            return around(self._original, *args, **kwargs)

        self._wrapped = wrapped
        setattr(owner, name, wrapped)

    def undo(self) -> None:
        r"""Put the original back; under another wrapping, which cannot be taken out, do nothing from now on."""
        self._active = False
        if vars(self._owner).get(self._name) is not self._wrapped:
            return
        if self._own:
            setattr(self._owner, self._name, self._original)
        else:
            delattr(self._owner, self._name)

# SPDX-License-Identifier: Apache-2.0
r"""Reading a pickle's structure without running it.

A pickle is a program for a small stack machine; ``pickle.load`` lets it import and call anything. This machine
has the same stack and the same opcodes, but a global stays a name and a call stays a note of who would have
been called with what. Nothing is imported, called, hashed or compared, so nothing that a file says can run.
"""

# Note [Why not pickle.Unpickler with a harmless find_class]
# The C machine still allocates what a file asks for: a memo slot numbered 2**31 takes 32 GB, a dictionary key of
# nested tuples takes exponential time to hash. Here the memo is a dictionary, dictionaries are lists of pairs,
# and the number of opcodes, hence of objects, is bounded. So is the size of everything when what is shared is
# counted as often as it is mentioned: one big table under a hundred thousand keys would keep its readers busy for
# hours.

import io
import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

MAX_PICKLE = 256 << 20
"""Bytes; a pickle beside weights holds names and numbers, about 300 bytes a tensor."""

MAX_OPCODES = 5_000_000
"""About 200,000 tensors; with :data:`MAX_CALLS` it bounds memory."""

MAX_CALLS = 1_000_000
"""Dictionaries, and objects that are no plain data; two or three a tensor."""

MAX_SHARED = 20_000_000
"""Elements and characters of what is mentioned again, each time counted; about a hundred a tensor."""

MAX_BITS = 8192
"""Of an integer; random states have 128."""


@dataclass(eq=False, slots=True)
class Global:
    r"""The name of something importable; never imported.

    Args:
        module: dotted.
        name: in that module, may be dotted.
    """

    module: str
    name: str

    @property
    def path(self) -> str:
        r"""The full dotted name."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Persistent:
    r"""A reference to something outside the pickle; in torch files, to a storage.

    Args:
        key: what the pickle says about it.
    """

    key: Any


@dataclass(eq=False, repr=False, slots=True)
class Table:
    r"""A dictionary as it was filled: pairs in order, nothing hashed.

    Args:
        pairs: keys and values.
    """

    pairs: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(eq=False, repr=False, slots=True)
class Made:
    r"""An object that the pickle would have made by a call.

    Args:
        callee: who would have been called; a :class:`Global` in honest files.
        args: with what.
        pairs: items that would have been set on the result.
        elements: elements that would have been appended to it.
        states: what ``__setstate__`` would have been given.
    """

    callee: Any
    args: Any
    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    elements: list[Any] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)

    @property
    def path(self) -> str:
        r"""Full dotted name of the callee; empty where it is no global."""
        return self.callee.path if isinstance(self.callee, Global) else ""


def read_pickle(data: bytes, allowed: Callable[[str], bool] | None = None) -> Any:
    r"""Read a pickle's structure.

    Args:
        data: the pickle; bytes after its end are an error.
        allowed: tells for each global's full name whether it may be mentioned at all; None for all of them.

    Returns:
        Plain numbers, texts, bytes, lists and tuples, with :class:`Table`, :class:`Made`, :class:`Global` and
        :class:`Persistent` for the rest. May be cyclic and deeply nested: go through it without recursion.

    Raises:
        ValueError: it is no pickle, is broken, mentions what is not allowed, or is larger than any honest one.

    Example:
        >>> import pickle
        >>> class Bomb:
        ...     def __reduce__(self):
        ...         return print, ("boom",)
        >>> made = read_pickle(pickle.dumps(Bomb()))
        >>> made.path, made.args
        ('builtins.print', ('boom',))
    """
    if len(data) > MAX_PICKLE:
        raise ValueError(f"its pickle has {len(data)} bytes, at most {MAX_PICKLE} are read")
    machine, stream = _Machine(allowed), io.BytesIO(data)
    try:
        result = machine.run(pickletools.genops(stream))
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"its pickle is broken: {_short(error)}") from None
    if stream.tell() != len(data):
        raise ValueError(f"its pickle ends at byte {stream.tell()} of {len(data)}")
    return result


def _short(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return " ".join(text.split())[:200]


class _Machine:
    # Stack and marks as in CPython's pickle.py; KeyError and IndexError of a broken program are caught outside.

    def __init__(self, allowed: Callable[[str], bool] | None) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.allowed = allowed
        self.calls = 0
        self.uses: dict[int, tuple[Any, int]] = {}

    def run(self, program: Iterable[tuple[Any, Any, Any]]) -> Any:
        count = 0
        for opcode, argument, _ in program:
            count += 1
            if count > MAX_OPCODES:
                raise ValueError(f"it has more than {MAX_OPCODES} opcodes")
            if opcode.name == "STOP":
                self.check_uses()
                return self.stack.pop()
            if opcode.name in _PUSHED:
                self.stack.append(_number(argument))
                continue
            step = _STEPS.get(opcode.name)
            if step is None:
                raise ValueError(f"opcode {opcode.name}, which checkpoints do not use")
            step(self, argument)
        raise ValueError("it has no end")

    def since_mark(self) -> list[Any]:
        found, self.stack = self.stack, self.below.pop()
        return found

    def push(self, value: Any) -> None:
        # A method, so that the stack is looked up after the value has been taken off it.
        self.stack.append(value)

    def put(self, slot: int) -> None:
        self.memo[slot] = self.stack[-1]

    def push_again(self, value: Any) -> None:
        self.stack.append(value)
        self.uses[id(value)] = (value, self.uses.get(id(value), (value, 0))[1] + 1)

    def check_uses(self) -> None:
        # At the end: a table may be filled after it was mentioned.
        size = sum(count * _size(value) for value, count in self.uses.values())
        if size > MAX_SHARED:
            raise ValueError(f"it mentions the same things so often that it has {size} elements")

    def push_table(self) -> None:
        self.count()
        self.stack.append(Table())

    def count(self) -> None:
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise ValueError(f"it has more than {MAX_CALLS} objects")

    def push_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global whose name is no text")
        if self.allowed is not None and not self.allowed(f"{module}.{name}"):
            raise ValueError(f"it mentions {f'{module}.{name}'[:100]!r}, which does not belong into such a file")
        self.stack.append(Global(module, name))

    def call(self, callee: Any, args: Any) -> None:
        self.count()
        self.stack.append(Made(callee, args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Made):
            raise ValueError("a state for something that is no object")
        target.states.append(state)

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, Table | Made) or len(flat) % 2:
            raise ValueError("items for something that is no dictionary")
        target.pairs.extend(zip(flat[::2], flat[1::2], strict=True))

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Made):
            target = target.elements
        if not isinstance(target, list):
            raise ValueError("elements for something that is no list")
        target.extend(values)

    def push_last(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("a tuple of more than the stack holds")
        self.stack[-count:] = [tuple(self.stack[-count:])]


def _size(value: Any) -> int:
    if isinstance(value, Made):
        # Readers look into the first level of what an object was made from.
        args = value.args if isinstance(value.args, tuple) else ()
        return len(value.pairs) + len(value.elements) + sum(map(_length, (*value.states, *args)))
    return _length(value)


def _length(value: Any) -> int:
    if isinstance(value, Table):
        return len(value.pairs)
    return len(value) if isinstance(value, list | tuple | str | bytes) else 0


def _number(value: Any) -> Any:
    if type(value) is int and value.bit_length() > MAX_BITS:
        raise ValueError(f"an integer of {value.bit_length()} bits")
    return value


_PUSHED = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip


def _mark(machine: _Machine, argument: Any) -> None:
    machine.below.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine, argument: Any) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.since_mark()


def _reduce(machine: _Machine, argument: Any) -> None:
    args = machine.stack.pop()
    machine.call(machine.stack.pop(), args)


def _new_with_keywords(machine: _Machine, argument: Any) -> None:
    keywords, args = machine.stack.pop(), machine.stack.pop()
    machine.call(machine.stack.pop(), (args, keywords))


def _object(machine: _Machine, argument: Any) -> None:
    callee, *args = machine.since_mark()
    machine.call(callee, tuple(args))


def _instance(machine: _Machine, argument: Any) -> None:
    args = machine.since_mark()
    _global(machine, argument)
    machine.call(machine.stack.pop(), tuple(args))


def _global(machine: _Machine, argument: Any) -> None:
    module, _, name = argument.partition(" ")
    machine.push_global(module, name)


def _stack_global(machine: _Machine, argument: Any) -> None:
    name = machine.stack.pop()
    machine.push_global(machine.stack.pop(), name)


def _set_item(machine: _Machine, argument: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _append(machine: _Machine, argument: Any) -> None:
    value = machine.stack.pop()
    machine.extend([value])


_SET, _FROZENSET = Global("builtins", "set"), Global("builtins", "frozenset")

_Step = Callable[[_Machine, Any], None]

_STEPS: dict[str, _Step] = {
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,
    "NONE": lambda machine, argument: machine.push(None),
    "NEWTRUE": lambda machine, argument: machine.push(True),
    "NEWFALSE": lambda machine, argument: machine.push(False),
    "EMPTY_LIST": lambda machine, argument: machine.push([]),
    "EMPTY_TUPLE": lambda machine, argument: machine.push(()),
    "EMPTY_DICT": lambda machine, argument: machine.push_table(),
    # A set is a call with elements, so that none of them is hashed.
    "EMPTY_SET": lambda machine, argument: machine.call(_SET, ()),
    "FROZENSET": lambda machine, argument: machine.call(_FROZENSET, (machine.since_mark(),)),
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": lambda machine, argument: machine.since_mark().clear(),
    "DUP": lambda machine, argument: machine.push_again(machine.stack[-1]),
    "PUT": lambda machine, argument: machine.put(argument),
    "BINPUT": lambda machine, argument: machine.put(argument),
    "LONG_BINPUT": lambda machine, argument: machine.put(argument),
    "MEMOIZE": lambda machine, argument: machine.put(len(machine.memo)),
    "GET": lambda machine, argument: machine.push_again(machine.memo[argument]),
    "BINGET": lambda machine, argument: machine.push_again(machine.memo[argument]),
    "LONG_BINGET": lambda machine, argument: machine.push_again(machine.memo[argument]),
    "TUPLE1": lambda machine, argument: machine.push_last(1),
    "TUPLE2": lambda machine, argument: machine.push_last(2),
    "TUPLE3": lambda machine, argument: machine.push_last(3),
    "TUPLE": lambda machine, argument: machine.push(tuple(machine.since_mark())),
    "LIST": lambda machine, argument: machine.push(machine.since_mark()),
    "DICT": lambda machine, argument: _dict(machine),
    "APPEND": _append,
    "APPENDS": lambda machine, argument: machine.extend(machine.since_mark()),
    "ADDITEMS": lambda machine, argument: machine.extend(machine.since_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, argument: machine.set_items(machine.since_mark()),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_with_keywords,
    "OBJ": _object,
    "INST": _instance,
    "BUILD": lambda machine, argument: machine.build(),
    "BINPERSID": lambda machine, argument: machine.push(Persistent(machine.stack.pop())),
}


def _dict(machine: _Machine) -> None:
    flat = machine.since_mark()
    machine.push_table()
    machine.set_items(flat)

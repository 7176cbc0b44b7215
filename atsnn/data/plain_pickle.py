"""Read the data in a pickle without unpickling it: nothing in the file is ever imported or called.

The python version of CIFAR is a pickle of a dictionary of lists, byte strings and one uint8 array.
This is a small stack machine for just the opcodes that such files need. Every other opcode, and
every global name but those of numpy's array builders and of byte strings, is refused.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_ARRAY_GLOBALS = {
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
    "numpy ndarray",
    "numpy dtype",
    "_codecs encode",  # how Python 3 writes byte strings at protocol 2,
    "__builtin__ bytes",  # and empty ones
}
_MARK = object()


class PlainPickleError(Exception):
    """A pickle that holds more than plain data, or is damaged."""


@dataclass
class _Name:
    """A global name; stands for itself and is never looked up."""

    name: str


MAX_AXES = 4


@dataclass
class _Built:
    """What a call of a global name would have built: its name, arguments and state."""

    name: str
    arguments: tuple
    state: Any = None


@dataclass
class _Machine:
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]


def loads(data: bytes) -> dict[Any, Any]:
    """The dictionary in a pickle: of lists, tuples, bytes, text and numbers, and of uint8 arrays.

    Time and memory are in proportion to the data, whatever refers to what in it.

    Raises:
        PlainPickleError: any other content, or damaged data.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            action = _ACTIONS.get(opcode.name)
            if action is None:
                raise PlainPickleError(f"holds the pickle instruction {opcode.name}")
            action(machine, argument)
        (value,) = machine.stack
        if not isinstance(value, dict):
            raise PlainPickleError(f"holds a {type(value).__name__}, not a dictionary")
        return {k: _array(v) if isinstance(v, _Built) else v for k, v in value.items()}
    except PlainPickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise PlainPickleError(f"damaged pickle ({error})") from None


def _array(built: _Built) -> np.ndarray:
    if not built.name.endswith("_reconstruct") or not isinstance(built.state, tuple):
        raise PlainPickleError(f"holds a {built.name} where data belongs")
    _, shape, kind, fortran, raw = built.state
    if not (isinstance(kind, _Built) and kind.arguments and kind.arguments[0] in (b"u1", "u1")):
        raise PlainPickleError("holds an array of another type than unsigned bytes")
    if not isinstance(raw, bytes) or not isinstance(shape, tuple) or len(shape) > MAX_AXES:
        raise PlainPickleError("holds an array without a plain shape and bytes")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise PlainPickleError("holds an array with a shape that is not of plain sizes")
    if math.prod(shape) != len(raw):
        raise PlainPickleError(f"holds an array of {len(raw)} bytes and of another shape")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _bytes(machine: _Machine, text: str) -> None:
    """Strings of Python 2 are bytes; pickletools hands them over as Latin-1 text."""
    machine.stack.append(text.encode("latin-1"))


def _name(machine: _Machine, name: str) -> None:
    if name not in _ARRAY_GLOBALS:
        raise PlainPickleError(f"refers to {name.replace(' ', '.')}")
    machine.stack.append(_Name(name))


def _call(machine: _Machine, _: None) -> None:
    arguments = machine.stack.pop()
    name = machine.stack.pop()
    if not isinstance(name, _Name) or not isinstance(arguments, tuple):
        raise PlainPickleError("calls something that is no name")
    if name.name == "_codecs encode":
        machine.stack.append(arguments[0].encode("latin-1"))
    elif name.name == "__builtin__ bytes" and not arguments:
        machine.stack.append(b"")
    else:
        machine.stack.append(_Built(name.name, arguments))


def _build(machine: _Machine, _: None) -> None:
    state = machine.stack.pop()
    target = machine.stack[-1]
    if not isinstance(target, _Built):
        raise PlainPickleError("sets the state of plain data")
    target.state = state


def _set_items(machine: _Machine, _: None) -> None:
    items = machine.pop_to_mark()
    for key, value in zip(items[::2], items[1::2], strict=True):
        _set(machine.stack[-1], key, value)


def _set_item(machine: _Machine, _: None) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set(machine.stack[-1], key, value)


def _set(target: dict[Any, Any], key: Any, value: Any) -> None:
    # Tuples are no keys: hashing (a, a) with a = (b, b), b = (c, c), ... takes for ever.
    if not isinstance(target, dict) or not isinstance(key, (bytes, str, int)):
        raise PlainPickleError(f"sets a key of type {type(key).__name__}")
    target[key] = value


def _append(machine: _Machine, _: None) -> None:
    item = machine.stack.pop()
    machine.stack[-1].append(item)


def _appends(machine: _Machine, _: None) -> None:
    items = machine.pop_to_mark()
    machine.stack[-1].extend(items)


def _tuple(count: int) -> Callable[[_Machine, None], None]:
    def action(machine: _Machine, _: None) -> None:
        items = tuple(machine.stack[len(machine.stack) - count :])
        del machine.stack[len(machine.stack) - count :]
        machine.stack.append(items)

    return action


def _remember(machine: _Machine, index: int | None) -> None:
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


def _constant(value: Any) -> Callable[[_Machine, None], None]:
    return lambda machine, _: machine.stack.append(value)


def _nothing(machine: _Machine, _: Any) -> None:
    del machine


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _nothing),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "INT", "LONG1", "BINFLOAT"), _push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"), _push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _bytes),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _remember),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, index: _push(machine, machine.memo[index])
    ),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "MARK": _constant(_MARK),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": _constant(()),
    "DICT": lambda machine, _: _dict(machine),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "APPEND": _append,
    "APPENDS": _appends,
    "GLOBAL": _name,
    "STACK_GLOBAL": lambda machine, _: _stack_name(machine),
    "REDUCE": _call,
    "BUILD": _build,
}


def _dict(machine: _Machine) -> None:
    items = machine.pop_to_mark()
    machine.stack.append({})
    for key, value in zip(items[::2], items[1::2], strict=True):
        _set(machine.stack[-1], key, value)


def _stack_name(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    _name(machine, f"{module} {name}")

"""A graph as plain lists, dictionaries and numbers (for JSON) plus its arrays, and back, strictly.

Each field of a node is read by its declared type: a missing, additional or wrongly typed field is a
`GraphFormatError`. No name in the file ever chooses code other than a node kind from `NODE_KINDS`.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from atsnn.fixed_point import NeuronConstants, NeuronModel
from export.errors import GraphFormatError
from export.graph import NODE_KINDS, Edge, Graph, Node

Arrays = dict[str, np.ndarray]
MAX_ITEMS = 100_000
MAX_TEXT = 65_536
_GRAPH_FIELDS = ("steps", "quantized", "fraction_bits", "depth", "blocks", "metadata")


def graph_to_structure(graph: Graph) -> tuple[dict[str, Any], Arrays]:
    """The graph without its arrays, and the arrays by `<node index>.<field>`."""
    arrays: Arrays = {}
    structure: dict[str, Any] = {label: getattr(graph, label) for label in _GRAPH_FIELDS}
    structure["edges"] = [_plain(edge, "", {}) for edge in graph.edges]
    structure["nodes"] = [
        {"kind": node.kind, **_plain(node, f"{index}.", arrays)}
        for index, node in enumerate(graph.nodes)
    ]
    return structure, arrays


def _plain(record: Any, prefix: str, arrays: Arrays) -> dict[str, Any]:
    result, hints = {}, _hints(type(record))
    for field in fields(record):
        value: Any = getattr(record, field.name)
        if isinstance(value, np.ndarray):
            arrays[prefix + field.name] = value
            value = {"array": prefix + field.name}
        elif isinstance(value, NeuronModel | NeuronConstants):
            value = _plain(value, f"{prefix}{field.name}.", arrays)
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, np.generic):
            value = value.item()
        if hints[field.name] is float:
            value = float(value)
        result[field.name] = value
    return result


def graph_from_structure(structure: dict[str, Any], arrays: Arrays, name: str) -> Graph:
    """Build the graph; every array must be used exactly once.

    Raises:
        GraphFormatError: the structure is not one that `graph_to_structure` writes.
    """
    reader = _Reader(name, dict(arrays))
    reader.keys(structure, {*_GRAPH_FIELDS, "nodes", "edges"}, "the graph")
    nodes = [
        reader.node(entry, f"node {index}")
        for index, entry in enumerate(reader.list(structure["nodes"], "nodes"))
    ]
    edges = [
        reader.record(entry, Edge, f"edge {index}")
        for index, entry in enumerate(reader.list(structure["edges"], "edges"))
    ]
    if reader.arrays:
        reader.fail(f"{len(reader.arrays)} arrays belong to no node, e.g. {min(reader.arrays)}")
    return Graph(
        nodes=tuple(nodes),
        edges=tuple(edges),
        steps=reader.value(structure["steps"], int, "steps"),
        quantized=reader.value(structure["quantized"], bool, "quantized"),
        fraction_bits=reader.value(structure["fraction_bits"], int, "fraction_bits"),
        depth=reader.table(structure["depth"], int, "depth"),
        blocks=reader.table(structure["blocks"], str, "blocks"),
        metadata=reader.table(structure["metadata"], str, "metadata"),
    )


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


class _Reader:
    """Reads plain values as the types they must have, and takes each array out of `arrays`."""

    def __init__(self, name: str, arrays: Arrays) -> None:
        self.name = name
        self.arrays = arrays

    def fail(self, problem: str) -> NoReturn:
        raise GraphFormatError(f"{self.name}: {problem}; it was not written by this program")

    def keys(self, value: Any, wanted: set[str], where: str) -> None:
        if not isinstance(value, dict):
            self.fail(f"{where} is not an object")
        if set(value) != wanted:
            odd = ", ".join(sorted(set(value) ^ wanted))
            self.fail(f"{where} lacks or adds {odd[:200]}")

    def list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            self.fail(f"{where} is not a list of at most {MAX_ITEMS}")
        return value

    def table(self, value: Any, kind: type, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > MAX_ITEMS:
            self.fail(f"{where} is not a table of at most {MAX_ITEMS}")
        return {
            key: self.value(item, kind, f"{where} of {key[:80]}") for key, item in value.items()
        }

    def node(self, value: Any, where: str) -> Node:
        if not isinstance(value, dict) or value.get("kind") not in NODE_KINDS:
            self.fail(f"{where} is of no known kind")
        fields_only = {key: item for key, item in value.items() if key != "kind"}
        return self.record(fields_only, NODE_KINDS[value["kind"]], where)

    def record(self, value: Any, cls: type, where: str) -> Any:
        hints = _hints(cls)
        self.keys(value, set(hints), where)
        return cls(
            **{
                label: self.value(value[label], hint, f"{where}, {label}")
                for label, hint in hints.items()
            }
        )

    def value(self, value: Any, hint: Any, where: str) -> Any:
        origin = typing.get_origin(hint)
        if origin is types.UnionType or origin is typing.Union:
            return None if value is None else self.value(value, typing.get_args(hint)[0], where)
        if origin is typing.Literal:
            return self._checked(value, value in typing.get_args(hint), where)
        if origin is tuple:
            return self._tuple(value, typing.get_args(hint), where)
        if origin is np.ndarray or npt.NDArray in (hint, origin):  # an alias since numpy 2.5
            return self._array(value, where)
        if hint in (NeuronModel, NeuronConstants):
            return self.record(value, hint, where)
        return self._scalar(value, hint, where)

    def _checked(self, value: Any, fits: bool, where: str) -> Any:
        if not fits:
            self.fail(f"{where} is {str(value)[:80]!r}")
        return value

    def _scalar(self, value: Any, hint: type, where: str) -> Any:
        check = _SCALARS.get(hint)
        if check is None:
            self.fail(f"{where} has a type that cannot be stored")
        self._checked(value, check(value), where)
        return float(value) if hint is float else value

    def _tuple(self, value: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
        items = self.list(value, where)
        length = len(items) if args[-1] is Ellipsis else len(args)
        self._checked(value, len(items) == length, where)
        return tuple(self.value(item, args[0], where) for item in items)

    def _array(self, value: Any, where: str) -> np.ndarray:
        self.keys(value, {"array"}, where)
        key = value["array"]
        if not isinstance(key, str) or key not in self.arrays:
            self.fail(f"{where} names an array that is not there")
        return self.arrays.pop(key)


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**62


_SCALARS: dict[Any, Callable[[Any], bool]] = {
    int: _is_int,
    float: lambda value: (type(value) is float and math.isfinite(value)) or _is_int(value),
    bool: lambda value: type(value) is bool,
    str: lambda value: type(value) is str and len(value) <= MAX_TEXT,
}

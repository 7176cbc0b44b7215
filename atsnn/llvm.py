"""A few words of LLVM: loops, loads and vectors, from which compiled functions are built.

numba cannot be told to keep a running sum in vector registers while weights stream by, so the
innermost loops build their instructions themselves. LLVM turns the vectors, which are of fixed
width, into whatever the machine has (AVX-512, AVX2, NEON).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
SIXTEEN = 16
"""Lanes of int32 that are worked on together."""


def constant(value: int) -> ir.Constant:
    """64-bit integer."""
    return ir.Constant(I64, value)


def vector(element: ir.IntType, lanes: int) -> ir.VectorType:
    """Type of so many neighbouring integers."""
    return ir.VectorType(element, lanes)


def splat(kind: ir.VectorType, value: int) -> ir.Constant:
    """The same constant in every lane."""
    return ir.Constant(kind, [value] * kind.count)


def broadcast(builder: ir.IRBuilder, scalar: Any, lanes: int) -> Any:
    """The same scalar in every lane."""
    kind = vector(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(vector(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def _pointer(builder: ir.IRBuilder, address: Any, kind: Any, offset: int = 0) -> Any:
    moved = builder.add(address, constant(offset)) if offset else address
    return builder.inttoptr(moved, kind.as_pointer())


def load(builder: ir.IRBuilder, address: Any, kind: Any, offset: int = 0) -> Any:
    """Read a value of type `kind`, `offset` bytes behind an address of any alignment."""
    return builder.load(_pointer(builder, address, kind, offset), align=1)


def store(builder: ir.IRBuilder, value: Any, address: Any, offset: int = 0) -> None:
    """Write a value, `offset` bytes behind an address of any alignment."""
    builder.store(value, _pointer(builder, address, value.type, offset), align=1)


def repeat(
    builder: ir.IRBuilder, count: Any, start: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """`for k in range(count): values = body(k, values)`, with the values in registers."""
    before = builder.block
    loop, after = (builder.append_basic_block(name) for name in ("loop", "after"))
    builder.cbranch(builder.icmp_signed(">", count, constant(0)), loop, after)
    builder.position_at_end(loop)
    k = builder.phi(I64)
    k.add_incoming(constant(0), before)
    held = [builder.phi(value.type) for value in start]
    for phi, value in zip(held, start, strict=True):
        phi.add_incoming(value, before)
    changed = body(k, held)
    following = builder.add(k, constant(1))
    k.add_incoming(following, builder.block)
    for phi, value in zip(held, changed, strict=True):
        phi.add_incoming(value, builder.block)
    last = builder.block
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    results = [builder.phi(value.type) for value in start]
    for phi, initial, final in zip(results, start, changed, strict=True):
        phi.add_incoming(initial, before)
        phi.add_incoming(final, last)
    return results


def choose(
    builder: ir.IRBuilder, selector: Any, cases: Sequence[tuple[int, Callable[[], Any]]]
) -> Any:
    """Instructions of the case that a 64-bit selector names (the last for any other); its value."""
    after = builder.append_basic_block("chosen")
    blocks = [builder.append_basic_block("case") for _ in cases]
    switch = builder.switch(selector, blocks[-1])
    results = []
    for (number, _), block in zip(cases[:-1], blocks[:-1], strict=True):
        switch.add_case(constant(number), block)
    for (_, build), block in zip(cases, blocks, strict=True):
        builder.position_at_end(block)
        results.append((build(), builder.block))
        builder.branch(after)
    builder.position_at_end(after)
    if results[0][0] is None:
        return None
    result = builder.phi(results[0][0].type)
    for value, block in results:
        result.add_incoming(value, block)
    return result


def sixteens(builder: ir.IRBuilder, lanes_of: Any) -> list[Any]:
    """The same integers as vectors of 16 int32."""
    kind = lanes_of.type
    pieces = []
    for first in range(0, kind.count, SIXTEEN):
        places = ir.Constant(vector(I32, SIXTEEN), list(range(first, first + SIXTEEN)))
        piece = builder.shuffle_vector(lanes_of, ir.Constant(kind, ir.Undefined), places)
        if kind.element is not I32:
            piece = builder.sext(piece, vector(I32, SIXTEEN))
        pieces.append(piece)
    return pieces


def total(builder: ir.IRBuilder, lanes_of: Any) -> Any:
    """Sum of a vector of int32, halved again and again."""
    lanes = lanes_of.type.count
    if lanes == 1:
        return builder.extract_element(lanes_of, ir.Constant(I32, 0))
    undefined = ir.Constant(lanes_of.type, ir.Undefined)
    low, high = (
        builder.shuffle_vector(lanes_of, undefined, ir.Constant(vector(I32, lanes // 2), places))
        for places in (list(range(lanes // 2)), list(range(lanes // 2, lanes)))
    )
    return total(builder, builder.add(low, high))

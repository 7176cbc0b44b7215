"""Short loops over neighbouring values, for use inside compiled functions only.

They take addresses (`array.ctypes.data`) and check nothing: their callers own the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from atsnn.llvm import (
    I1,
    I8,
    I16,
    I32,
    I64,
    SIXTEEN,
    broadcast,
    constant,
    load,
    repeat,
    sixteens,
    splat,
    store,
    total,
    vector,
)  # fmt: skip

LANES, LISTED = 32, 8


def _short_counter() -> Any:
    @intrinsic
    def count_shorts(context, address, length, shift, unit):
        """Count int16 values: those not 0, the units in their size, those not of one unit.

        Args:
            address: of the values.
            length: a multiple of 32, below 2^16.
            shift: logarithm of the unit.
            unit: what counts as one; parts of it count as one.

        Returns:
            The units, times 2^32, plus 2^16 times the third count, plus the first.
        """

        def code(backend, builder, signature, arguments):
            address, length, shift, unit = arguments
            shorts, mask = vector(I16, LANES), ir.IntType(LANES)
            shifts, units = (
                broadcast(builder, builder.trunc(scalar, I16), LANES) for scalar in (shift, unit)
            )
            zero, one = splat(shorts, 0), splat(shorts, 1)

            def body(k: Any, held: list[Any]) -> list[Any]:
                at = builder.add(address, builder.mul(k, constant(2 * LANES)))
                values = load(builder, at, shorts)
                negative = builder.icmp_signed("<", values, zero)
                sizes = builder.select(negative, builder.sub(zero, values), values)
                filled = builder.bitcast(builder.icmp_unsigned("!=", sizes, zero), mask)
                other = builder.bitcast(builder.icmp_unsigned("!=", sizes, units), mask)
                # a size of 0 gives -1 >> shift = -1, so that nothing is added
                rounded_up = builder.add(builder.ashr(builder.sub(sizes, one), shifts), one)
                return [
                    builder.add(held[0], builder.ctpop(filled)),
                    builder.add(held[1], builder.ctpop(builder.and_(filled, other))),
                    *map(builder.add, held[2:], sixteens(builder, rounded_up)),
                ]

            turns = builder.sdiv(length, constant(LANES))
            sums = [splat(vector(I32, SIXTEEN), 0) for _ in range(LANES // SIXTEEN)]
            start = [ir.Constant(mask, 0), ir.Constant(mask, 0), *sums]
            messages, several, *sums = repeat(builder, turns, start, body)
            spikes = total(builder, builder.add(sums[0], sums[1]))
            packed = builder.or_(
                builder.zext(messages, I64), builder.shl(builder.zext(several, I64), constant(16))
            )
            return builder.or_(packed, builder.shl(builder.zext(spikes, I64), constant(32)))

        return types.int64(*(types.int64,) * 4), code

    return count_shorts


count_shorts = _short_counter()


def _spike_adder() -> Any:
    @intrinsic
    def add_spikes(context, total, spikes, length, shift):
        """`total[:] += spikes << shift`, int16 and bytes, a multiple of `LANES` long."""

        def code(backend, builder, signature, arguments):
            total, spikes, length, shift = arguments
            shorts = vector(I16, LANES)
            shifts = broadcast(builder, builder.trunc(shift, I16), LANES)

            def body(k: Any, held: list[Any]) -> list[Any]:
                at = builder.mul(k, constant(LANES))
                target = builder.add(total, builder.shl(at, constant(1)))
                given = load(builder, builder.add(spikes, at), vector(I8, LANES))
                added = builder.shl(builder.zext(given, shorts), shifts)
                store(builder, builder.add(load(builder, target, shorts), added), target)
                return held

            repeat(builder, builder.sdiv(length, constant(LANES)), [], body)
            return backend.get_dummy_value()

        return types.void(*(types.int64,) * 4), code

    return add_spikes


add_spikes = _spike_adder()


def _masker(lanes: int) -> Any:
    kind = vector(I8, lanes)

    @intrinsic
    def bits_of(context, address):
        """Which of some neighbouring bytes are not 0: bit i of the result for byte i."""

        def code(backend, builder, signature, arguments):
            values = load(builder, arguments[0], kind)
            bits = builder.icmp_unsigned("!=", values, splat(kind, 0))
            return builder.zext(builder.bitcast(bits, ir.IntType(lanes)), I64)

        return types.uint64(types.int64), code

    return bits_of


bits_of_32, bits_of_8 = _masker(32), _masker(8)


def _word_reader(read: Callable[[ir.IRBuilder, Any], Any], purpose: str) -> Any:
    @intrinsic
    def of_word(context, word):
        def code(backend, builder, signature, arguments):
            return read(builder, arguments[0])

        return types.int64(types.uint64), code

    of_word.__doc__ = purpose
    return of_word


lowest = _word_reader(
    lambda builder, word: builder.cttz(word, ir.Constant(I1, 1)),
    "Place of the lowest bit that is set, of a word that is not 0.",
)
ones = _word_reader(lambda builder, word: builder.ctpop(word), "How many bits are set.")


def _adder(source: ir.IntType, target_type: ir.IntType, lanes: int) -> Any:
    narrow, wide = vector(source, lanes), vector(target_type, lanes)
    sizes = source.width // 8, target_type.width // 8

    @intrinsic
    def add(context, total, values, length):
        """`total[:] += values`, of addresses, a multiple of the lanes long; none negative."""

        def code(backend, builder, signature, arguments):
            total, values, length = arguments

            def body(k: Any, held: list[Any]) -> list[Any]:
                at = builder.mul(k, constant(lanes))
                given = builder.add(values, builder.mul(at, constant(sizes[0])))
                target = builder.add(total, builder.mul(at, constant(sizes[1])))
                added = load(builder, given, narrow)
                if source is not target_type:
                    added = builder.zext(added, wide)
                store(builder, builder.add(load(builder, target, wide), added), target)
                return held

            repeat(builder, builder.sdiv(length, constant(lanes)), [], body)
            return backend.get_dummy_value()

        return types.void(*(types.int64,) * 3), code

    return add


ADDED_LANES = 8
add_bytes_to_shorts = _adder(I8, I16, ADDED_LANES)
add_shorts = _adder(I16, I16, ADDED_LANES)
add_shorts_to_ints = _adder(I16, I32, ADDED_LANES)


def _filled_counter() -> Any:
    kind = vector(I16, ADDED_LANES)

    @intrinsic
    def filled_shorts(context, address, length):
        """How many of some int16 values, a multiple of `ADDED_LANES`, are not 0."""

        def code(backend, builder, signature, arguments):
            address, length = arguments

            def body(k: Any, held: list[Any]) -> list[Any]:
                at = builder.add(address, builder.mul(k, constant(2 * ADDED_LANES)))
                filled = builder.icmp_unsigned("!=", load(builder, at, kind), splat(kind, 0))
                bits = builder.bitcast(filled, ir.IntType(ADDED_LANES))
                return [builder.add(held[0], builder.zext(builder.ctpop(bits), I64))]

            turns = builder.sdiv(length, constant(ADDED_LANES))
            return repeat(builder, turns, [constant(0)], body)[0]

        return types.int64(types.int64, types.int64), code

    return filled_shorts


filled_shorts = _filled_counter()

JOINED_LANES = 16


def _joiner() -> Any:
    @intrinsic
    def join_bytes(context, total, values, length):
        """`total[:] |= values`, of addresses of bytes, a multiple of `JOINED_LANES` long."""

        def code(backend, builder, signature, arguments):
            total, values, length = arguments
            lanes = vector(I8, JOINED_LANES)

            def body(k: Any, held: list[Any]) -> list[Any]:
                at = builder.mul(k, constant(JOINED_LANES))
                target = builder.add(total, at)
                given = load(builder, builder.add(values, at), lanes)
                store(builder, builder.or_(load(builder, target, lanes), given), target)
                return held

            repeat(builder, builder.sdiv(length, constant(JOINED_LANES)), [], body)
            return backend.get_dummy_value()

        return types.void(*(types.int64,) * 3), code

    return join_bytes


join_bytes = _joiner()


def _lister(element: ir.IntType) -> Any:
    kind = vector(element, LISTED)

    @intrinsic
    def list_eight(context, values, level, first, table, listed):
        """Append to a list which of 8 neighbouring values are at least `level`.

        Args:
            values: address of 8 values, none negative.
            level: from 1.
            first: what to list for the first of them, one more for each further one.
            table: address of `places_of_bits`.
            listed: address of int32 [8], all written; what lies behind the result is of no use.

        Returns:
            How many were listed.
        """

        def code(backend, builder, signature, arguments):
            values, level, first, table, listed = arguments
            limit = broadcast(builder, builder.trunc(level, element), LISTED)
            reached = builder.icmp_unsigned(">=", load(builder, values, kind), limit)
            bits = builder.bitcast(reached, ir.IntType(LISTED))
            entry = builder.add(table, builder.shl(builder.zext(bits, I64), constant(3)))
            wide = vector(I32, LISTED)
            places = builder.zext(load(builder, entry, vector(I8, LISTED)), wide)
            base = broadcast(builder, builder.trunc(first, I32), LISTED)
            store(builder, builder.add(places, base), listed)
            return builder.zext(builder.ctpop(bits), I64)

        return types.int64(*(types.int64,) * 5), code

    return list_eight


list_eight_bytes, list_eight_shorts = _lister(I8), _lister(I16)


def places_of_bits() -> npt.NDArray[np.uint8]:
    """Entry m has the places of the bits that are set in m, in order: uint8 [256, 8]."""
    table = np.zeros((256, LISTED), np.uint8)
    for mask in range(256):
        places = [bit for bit in range(LISTED) if mask >> bit & 1]
        table[mask, : len(places)] = places
    return table

"""The innermost loops as LLVM vector instructions, for use inside compiled functions only.

numba cannot be told to keep a running sum in vector registers while weights stream by, so these few
functions build their instructions themselves. LLVM turns the vectors, which are of fixed width,
into whatever the machine has (AVX-512, AVX2, NEON). They take addresses (`array.ctypes.data`) and
check nothing: their callers own the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from atsnn.fixed_point import STATE_LIMIT

TILES = (16, 32, 64)
"""Output channels that one call sums up; the largest comes out fastest per channel."""
NARROW_EVENTS = 255
"""So many 8-bit weights always add up in 16 bits."""

IDLE_SHIFT, SATURATED_SHIFT = 16, 32

binding.initialize_native_asmparser()  # `vpdpbusd` goes by different names in different LLVM

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_LANES = 32
_NEURONS = 16
_LISTED = 8


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _vector(element: ir.IntType, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _splat(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _broadcast(builder: ir.IRBuilder, scalar: Any, lanes: int) -> Any:
    kind = _vector(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(_vector(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def _pointer(builder: ir.IRBuilder, address: Any, kind: Any, offset: int = 0) -> Any:
    moved = builder.add(address, _constant(offset)) if offset else address
    return builder.inttoptr(moved, kind.as_pointer())


def _load(builder: ir.IRBuilder, address: Any, kind: Any, offset: int = 0) -> Any:
    return builder.load(_pointer(builder, address, kind, offset), align=1)


def _store(builder: ir.IRBuilder, value: Any, address: Any, offset: int = 0) -> None:
    builder.store(value, _pointer(builder, address, value.type, offset), align=1)


def _repeat(
    builder: ir.IRBuilder, count: Any, start: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """`for k in range(count): values = body(k, values)`, with the values in registers."""
    before = builder.block
    loop, after = (builder.append_basic_block(name) for name in ("loop", "after"))
    builder.cbranch(builder.icmp_signed(">", count, _constant(0)), loop, after)
    builder.position_at_end(loop)
    k = builder.phi(_I64)
    k.add_incoming(_constant(0), before)
    held = [builder.phi(value.type) for value in start]
    for phi, value in zip(held, start, strict=True):
        phi.add_incoming(value, before)
    changed = body(k, held)
    following = builder.add(k, _constant(1))
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


NARROW, WIDE, PRODUCTS = range(3)
"""How sums are kept: in 16 bits; in 32, visited every 255 events; in 32, events times values."""


def _gathered(
    builder: ir.IRBuilder, mode: int, tile: int, shape: list[Any], lists: list[Any]
) -> list[Any]:
    """Sums of `tile` outputs over all events under a window, as vectors of 16 int32.

    `shape` is weights, rows, pitch, line: the address of int8 [rows][.., tile], bytes from one row
    of the window to the next in the weights, and in the list of starts. `lists` is starts, span,
    index, values: the address of the first start, bytes from it to the end of the events under one
    row of the window, and the addresses of the lists.
    """
    weights, rows, pitch, line = shape
    starts, span, index, values = lists
    lanes = min(tile, _LANES) if mode != PRODUCTS else _NEURONS
    parts = range(0, tile, lanes)
    short, long = _vector(_I16, lanes), _vector(_I32, lanes)

    def read(address: Any, place: Any) -> Any:
        return _load(builder, builder.add(address, builder.shl(place, _constant(2))), _I32)

    def row(first: Any, place: Any) -> list[Any]:
        at = builder.sext(read(index, place), _I64)
        taps = builder.add(first, builder.mul(at, _constant(tile)))
        return [_load(builder, taps, _vector(_I8, lanes), part) for part in parts]

    def added(first: Any, low: Any, count: Any, sums: list[Any]) -> list[Any]:
        def one(k: Any, held: list[Any]) -> list[Any]:
            taps = row(first, builder.add(low, k))
            return [
                builder.add(total, builder.sext(tap, short))
                for total, tap in zip(held, taps, strict=True)
            ]

        return _repeat(builder, count, sums, one)

    def multiplied(first: Any, low: Any, count: Any, sums: list[Any]) -> list[Any]:
        def one(k: Any, held: list[Any]) -> list[Any]:
            place = builder.add(low, k)
            times = _broadcast(builder, read(values, place), lanes)
            return [
                builder.add(total, builder.mul(builder.sext(tap, long), times))
                for total, tap in zip(held, row(first, place), strict=True)
            ]

        return _repeat(builder, count, sums, one)

    def in_turns(first: Any, low: Any, count: Any, sums: list[Any]) -> list[Any]:
        size = _constant(NARROW_EVENTS)
        turns = builder.sdiv(builder.add(count, _constant(NARROW_EVENTS - 1)), size)

        def turn(k: Any, held: list[Any]) -> list[Any]:
            done = builder.mul(k, size)
            left = builder.sub(count, done)
            few = builder.select(builder.icmp_signed("<", left, size), left, size)
            zeros = [_splat(short, 0) for _ in parts]
            found = added(first, builder.add(low, done), few, zeros)
            return [
                builder.add(total, builder.sext(part, long))
                for total, part in zip(held, found, strict=True)
            ]

        return _repeat(builder, turns, sums, turn)

    add = {NARROW: added, WIDE: in_turns, PRODUCTS: multiplied}[mode]

    def window_row(k: Any, held: list[Any]) -> list[Any]:
        at = builder.add(starts, builder.mul(k, line))
        low = builder.sext(_load(builder, at, _I32), _I64)
        high = builder.sext(_load(builder, builder.add(at, span), _I32), _I64)
        first = builder.add(weights, builder.mul(k, pitch))
        return add(first, low, builder.sub(high, low), held)

    start = [_splat(short if mode == NARROW else long, 0) for _ in parts]
    sums = _repeat(builder, rows, start, window_row)
    return [piece for total in sums for piece in _sixteens(builder, total)]


def _sixteens(builder: ir.IRBuilder, vector: Any) -> list[Any]:
    """The same integers as vectors of 16 int32."""
    kind = vector.type
    pieces = []
    for first in range(0, kind.count, _NEURONS):
        places = ir.Constant(_vector(_I32, _NEURONS), list(range(first, first + _NEURONS)))
        piece = builder.shuffle_vector(vector, ir.Constant(kind, ir.Undefined), places)
        if kind.element is not _I32:
            piece = builder.sext(piece, _vector(_I32, _NEURONS))
        pieces.append(piece)
    return pieces


def _fired(builder: ir.IRBuilder, sums: list[Any], neurons: list[Any]) -> Any:
    """Let neurons fire; `neurons` is as in `fire`. Returns the counts that `fire` returns."""
    shift, halving, threshold, bias, voltage, spikes = neurons
    wide = _vector(_I32, _NEURONS)
    shifts, halvings, limits = (
        _broadcast(builder, builder.trunc(scalar, _I32), _NEURONS)
        for scalar in (shift, halving, threshold)
    )
    zero, ceiling, floor = (_splat(wide, limit) for limit in (0, STATE_LIMIT, -STATE_LIMIT))
    counts = _constant(0)
    for part, arriving in enumerate(sums):
        words, places = 4 * _NEURONS * part, _NEURONS * part
        drive = _load(builder, bias, wide, words)
        before = _load(builder, voltage, wide, words)
        negative = builder.lshr(before, _splat(wide, 31))
        toward_zero = builder.add(before, builder.and_(negative, halvings))
        after = builder.add(
            builder.add(builder.ashr(toward_zero, halvings), drive), builder.shl(arriving, shifts)
        )
        lower = builder.select(builder.icmp_signed("<", after, ceiling), after, ceiling)
        clipped = builder.select(builder.icmp_signed(">", lower, floor), lower, floor)
        fired = builder.icmp_signed(">", clipped, limits)
        _store(builder, builder.select(fired, zero, clipped), voltage, words)
        _store(builder, builder.zext(fired, _vector(_I8, _NEURONS)), spikes, places)
        anything = builder.or_(builder.or_(arriving, before), drive)
        quiet = builder.icmp_unsigned("==", anything, zero)
        saturated = builder.icmp_unsigned("!=", clipped, after)
        for mask, place in ((fired, 0), (quiet, IDLE_SHIFT), (saturated, SATURATED_SHIFT)):
            found = builder.shl(_ones(builder, mask), _constant(place))
            counts = builder.add(counts, found)
    return counts


def _ones(builder: ir.IRBuilder, mask: Any) -> Any:
    bits = builder.bitcast(mask, ir.IntType(_NEURONS))
    return builder.zext(builder.ctpop(bits), _I64)


def _gatherer(mode: int, tile: int) -> Any:
    @intrinsic
    def gather(context, weights, rows, pitch, line, starts, span, index, values, sums):
        """Write the sums of `tile` outputs, int32, to `sums`; the rest as in `_gathered`."""

        def code(backend, builder, signature, arguments):
            found = _gathered(builder, mode, tile, list(arguments[:4]), list(arguments[4:8]))
            for part, piece in enumerate(found):
                _store(builder, piece, arguments[8], 4 * _NEURONS * part)
            return backend.get_dummy_value()

        return types.void(*(types.int64,) * 9), code

    return gather


def _gathering_neurons(mode: int, tile: int) -> Any:
    @intrinsic
    def gather_and_fire(
        context, weights, rows, pitch, line, starts, span, index, values,
        shift, halving, threshold, bias, voltage, spikes,
    ):  # fmt: skip
        """`_gather` and `fire` in one, the sums in registers."""

        def code(backend, builder, signature, arguments):
            found = _gathered(builder, mode, tile, list(arguments[:4]), list(arguments[4:8]))
            return _fired(builder, found, list(arguments[8:]))

        return types.int64(*(types.int64,) * 14), code

    return gather_and_fire


STEPS_AT_ONCE = 4
"""Time steps for which a dense product reads its weights once."""


def _dot_product(steps: int, tile: int) -> Any:
    bytes_in, sums_out = _vector(_I8, 4 * _NEURONS), _vector(_I32, _NEURONS)
    word = ir.FunctionType(sums_out, [sums_out, bytes_in, bytes_in])
    add_products = ir.InlineAsm(word, "vpdpbusd $3, $2, $0", "=v,0,v,v")

    @intrinsic
    def multiply(context, values, step, rows, pitch, fours, weights, sums):
        """Dense product of windows of unsigned bytes and 8-bit weights, for machines with VNNI.

        Args:
            values: address of the window's first byte at the first step.
            step: bytes from one step to the next.
            rows: rows of the window.
            pitch: bytes from one row to the next.
            fours: groups of 4 bytes in a row; the last may reach beyond it, with weights of 0.
            weights: address of int8 [rows, fours, tile, 4].
            sums: address of int32 [steps, tile], written.
        """

        def code(backend, builder, signature, arguments):
            values, step, rows, pitch, fours, weights, sums = arguments
            columns = range(0, tile, _NEURONS)

            def window_row(k: Any, held: list[Any]) -> list[Any]:
                line = builder.add(values, builder.mul(k, pitch))
                taps = builder.add(weights, builder.mul(builder.mul(k, fours), _constant(4 * tile)))

                def four(g: Any, totals: list[Any]) -> list[Any]:
                    at = builder.add(taps, builder.mul(g, _constant(4 * tile)))
                    tap = [_load(builder, at, bytes_in, 4 * column) for column in columns]
                    added = []
                    for t in range(steps):
                        offset = builder.add(builder.shl(g, _constant(2)), _times(builder, step, t))
                        given = _load(builder, builder.add(line, offset), _I32)
                        spread = builder.bitcast(_broadcast(builder, given, _NEURONS), bytes_in)
                        for part in range(len(columns)):
                            total = totals[t * len(columns) + part]
                            added.append(builder.call(add_products, [total, spread, tap[part]]))
                    return added

                return _repeat(builder, fours, held, four)

            start = [_splat(sums_out, 0) for _ in range(steps * len(columns))]
            found = _repeat(builder, rows, start, window_row)
            for place, total in enumerate(found):
                _store(builder, total, sums, 4 * _NEURONS * place)
            return backend.get_dummy_value()

        return types.void(*(types.int64,) * 7), code

    return multiply


def _times(builder: ir.IRBuilder, value: Any, factor: int) -> Any:
    return builder.mul(value, _constant(factor))


def has_dot_products() -> bool:
    """Whether this machine multiplies four pairs of bytes and adds them up in one instruction."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512f") and features.get("avx512vnni"))


multiply_one_16, multiply_one_32, multiply_one_64 = (_dot_product(1, tile) for tile in TILES)
multiply_four_16, multiply_four_32, multiply_four_64 = (
    _dot_product(STEPS_AT_ONCE, tile) for tile in TILES
)


def _neurons(tile: int) -> Any:
    @intrinsic
    def fire(context, sums, shift, halving, threshold, bias, voltage, spikes):
        """One step of `tile` neurons whose voltage halves (or stays).

        Args:
            sums: address of int32 [tile]; `<< shift` makes them currents.
            shift: of the sums.
            halving: 1, or 0 if the voltage stays.
            threshold: of the voltage, shifted.
            bias, voltage: addresses of int32 [tile]; the voltage is changed.
            spikes: address of bytes [tile], set to 0 or 1.

        Returns:
            Number of spikes, plus 2^16 times that of neurons without input, state or bias, plus
            2^32 times that of voltages that were clipped.
        """

        def code(backend, builder, signature, arguments):
            wide = _vector(_I32, _NEURONS)
            parts = [
                _load(builder, arguments[0], wide, 4 * first) for first in range(0, tile, _NEURONS)
            ]
            return _fired(builder, parts, list(arguments[1:]))

        return types.int64(*(types.int64,) * 7), code

    return fire


sum_narrow_16, sum_narrow_32, sum_narrow_64 = (_gatherer(NARROW, tile) for tile in TILES)
sum_wide_16, sum_wide_32, sum_wide_64 = (_gatherer(WIDE, tile) for tile in TILES)
sum_products_16, sum_products_32, sum_products_64 = (_gatherer(PRODUCTS, t) for t in TILES)
run_narrow_16, run_narrow_32, run_narrow_64 = (_gathering_neurons(NARROW, t) for t in TILES)
run_wide_16, run_wide_32, run_wide_64 = (_gathering_neurons(WIDE, tile) for tile in TILES)
fire_16, fire_32, fire_64 = (_neurons(tile) for tile in TILES)


def _short_counter() -> Any:
    @intrinsic
    def count_shorts(context, address, length, shift, unit, counts):
        """Count int16 values: those not 0, the units in their size, those not of one unit.

        Args:
            address: of the values.
            length: a multiple of 32.
            shift: logarithm of the unit.
            unit: what counts as one; parts of it count as one.
            counts: address of int32 [3], written.
        """

        def code(backend, builder, signature, arguments):
            address, length, shift, unit, counts = arguments
            shorts, mask = _vector(_I16, _LANES), ir.IntType(_LANES)
            shifts, units = (
                _broadcast(builder, builder.trunc(scalar, _I16), _LANES) for scalar in (shift, unit)
            )
            zero, one = _splat(shorts, 0), _splat(shorts, 1)

            def body(k: Any, held: list[Any]) -> list[Any]:
                at = builder.add(address, builder.mul(k, _constant(2 * _LANES)))
                values = _load(builder, at, shorts)
                negative = builder.icmp_signed("<", values, zero)
                sizes = builder.select(negative, builder.sub(zero, values), values)
                filled = builder.bitcast(builder.icmp_unsigned("!=", sizes, zero), mask)
                other = builder.bitcast(builder.icmp_unsigned("!=", sizes, units), mask)
                # a size of 0 gives -1 >> shift = -1, so that nothing is added
                rounded_up = builder.add(builder.ashr(builder.sub(sizes, one), shifts), one)
                return [
                    builder.add(held[0], builder.ctpop(filled)),
                    builder.add(held[1], builder.ctpop(builder.and_(filled, other))),
                    *map(builder.add, held[2:], _sixteens(builder, rounded_up)),
                ]

            turns = builder.sdiv(length, _constant(_LANES))
            sums = [_splat(_vector(_I32, _NEURONS), 0) for _ in range(_LANES // _NEURONS)]
            start = [ir.Constant(mask, 0), ir.Constant(mask, 0), *sums]
            messages, several, *sums = _repeat(builder, turns, start, body)
            spikes = _total(builder, builder.add(sums[0], sums[1]))
            for place, found in enumerate((messages, spikes, several)):
                _store(builder, found, counts, 4 * place)
            return backend.get_dummy_value()

        return types.void(*(types.int64,) * 5), code

    return count_shorts


count_shorts = _short_counter()


def _total(builder: ir.IRBuilder, vector: Any) -> Any:
    """Sum of a vector of int32, halved again and again."""
    lanes = vector.type.count
    if lanes == 1:
        return builder.extract_element(vector, ir.Constant(_I32, 0))
    undefined = ir.Constant(vector.type, ir.Undefined)
    low, high = (
        builder.shuffle_vector(vector, undefined, ir.Constant(_vector(_I32, lanes // 2), places))
        for places in (list(range(lanes // 2)), list(range(lanes // 2, lanes)))
    )
    return _total(builder, builder.add(low, high))


def _masker(lanes: int) -> Any:
    kind = _vector(_I8, lanes)

    @intrinsic
    def bits_of(context, address):
        """Which of some neighbouring bytes are not 0: bit i of the result for byte i."""

        def code(backend, builder, signature, arguments):
            values = _load(builder, arguments[0], kind)
            bits = builder.icmp_unsigned("!=", values, _splat(kind, 0))
            return builder.zext(builder.bitcast(bits, ir.IntType(lanes)), _I64)

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
    lambda builder, word: builder.cttz(word, ir.Constant(_I1, 1)),
    "Place of the lowest bit that is set, of a word that is not 0.",
)
ones = _word_reader(lambda builder, word: builder.ctpop(word), "How many bits are set.")


def _adder(source: ir.IntType, target_type: ir.IntType, lanes: int) -> Any:
    narrow, wide = _vector(source, lanes), _vector(target_type, lanes)
    sizes = source.width // 8, target_type.width // 8

    @intrinsic
    def add(context, total, values, length):
        """`total[:] += values`, of addresses, a multiple of the lanes long; none negative."""

        def code(backend, builder, signature, arguments):
            total, values, length = arguments

            def body(k: Any, held: list[Any]) -> list[Any]:
                at = builder.mul(k, _constant(lanes))
                given = builder.add(values, builder.mul(at, _constant(sizes[0])))
                target = builder.add(total, builder.mul(at, _constant(sizes[1])))
                added = _load(builder, given, narrow)
                if source is not target_type:
                    added = builder.zext(added, wide)
                _store(builder, builder.add(_load(builder, target, wide), added), target)
                return held

            _repeat(builder, builder.sdiv(length, _constant(lanes)), [], body)
            return backend.get_dummy_value()

        return types.void(*(types.int64,) * 3), code

    return add


ADDED_LANES = 8
add_bytes_to_shorts = _adder(_I8, _I16, ADDED_LANES)
add_shorts = _adder(_I16, _I16, ADDED_LANES)
add_shorts_to_ints = _adder(_I16, _I32, ADDED_LANES)


def _lister(element: ir.IntType) -> Any:
    kind = _vector(element, _LISTED)

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
            limit = _broadcast(builder, builder.trunc(level, element), _LISTED)
            reached = builder.icmp_unsigned(">=", _load(builder, values, kind), limit)
            bits = builder.bitcast(reached, ir.IntType(_LISTED))
            entry = builder.add(table, builder.shl(builder.zext(bits, _I64), _constant(3)))
            wide = _vector(_I32, _LISTED)
            places = builder.zext(_load(builder, entry, _vector(_I8, _LISTED)), wide)
            base = _broadcast(builder, builder.trunc(first, _I32), _LISTED)
            _store(builder, builder.add(places, base), listed)
            return builder.zext(builder.ctpop(bits), _I64)

        return types.int64(*(types.int64,) * 5), code

    return list_eight


list_eight_bytes, list_eight_shorts = _lister(_I8), _lister(_I16)


def places_of_bits() -> npt.NDArray[np.uint8]:
    """Entry m has the places of the bits that are set in m, in order: uint8 [256, 8]."""
    table = np.zeros((256, _LISTED), np.uint8)
    for mask in range(256):
        places = [bit for bit in range(_LISTED) if mask >> bit & 1]
        table[mask, : len(places)] = places
    return table

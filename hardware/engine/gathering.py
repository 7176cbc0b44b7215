"""The innermost loops of a layer, for use inside compiled functions only.

They take addresses (`array.ctypes.data`) and check nothing: their callers own the bounds. Where
they take a `tile`, it is one of `TILES`, the number of output channels that are summed up at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from atsnn.fixed_point import STATE_LIMIT
from hardware.engine.llvm import (
    I8,
    I16,
    I32,
    I64,
    SIXTEEN,
    broadcast,
    choose,
    constant,
    load,
    repeat,
    sixteens,
    splat,
    store,
    vector,
)  # fmt: skip

TILES = (16, 32, 64)
NARROW_EVENTS = 255
"""So many 8-bit weights always add up in 16 bits."""
STEPS_AT_ONCE = 4
"""Time steps for which a dense product reads its weights once."""
IDLE_SHIFT, SATURATED_SHIFT = 16, 32

binding.initialize_native_asmparser()  # `vpdpbusd` goes by different names in different LLVM

LANES = 32


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
    lanes = min(tile, LANES) if mode != PRODUCTS else SIXTEEN
    parts = range(0, tile, lanes)
    short, long = vector(I16, lanes), vector(I32, lanes)

    def read(address: Any, place: Any) -> Any:
        return load(builder, builder.add(address, builder.shl(place, constant(2))), I32)

    def row(first: Any, place: Any) -> list[Any]:
        at = builder.sext(read(index, place), I64)
        taps = builder.add(first, builder.mul(at, constant(tile)))
        return [load(builder, taps, vector(I8, lanes), part) for part in parts]

    def added(first: Any, low: Any, count: Any, sums: list[Any]) -> list[Any]:
        def one(k: Any, held: list[Any]) -> list[Any]:
            taps = row(first, builder.add(low, k))
            return [
                builder.add(total, builder.sext(tap, short))
                for total, tap in zip(held, taps, strict=True)
            ]

        return repeat(builder, count, sums, one)

    def multiplied(first: Any, low: Any, count: Any, sums: list[Any]) -> list[Any]:
        def one(k: Any, held: list[Any]) -> list[Any]:
            place = builder.add(low, k)
            times = broadcast(builder, read(values, place), lanes)
            return [
                builder.add(total, builder.mul(builder.sext(tap, long), times))
                for total, tap in zip(held, row(first, place), strict=True)
            ]

        return repeat(builder, count, sums, one)

    def in_turns(first: Any, low: Any, count: Any, sums: list[Any]) -> list[Any]:
        size = constant(NARROW_EVENTS)
        turns = builder.sdiv(builder.add(count, constant(NARROW_EVENTS - 1)), size)

        def turn(k: Any, held: list[Any]) -> list[Any]:
            done = builder.mul(k, size)
            left = builder.sub(count, done)
            few = builder.select(builder.icmp_signed("<", left, size), left, size)
            zeros = [splat(short, 0) for _ in parts]
            found = added(first, builder.add(low, done), few, zeros)
            return [
                builder.add(total, builder.sext(part, long))
                for total, part in zip(held, found, strict=True)
            ]

        return repeat(builder, turns, sums, turn)

    add = {NARROW: added, WIDE: in_turns, PRODUCTS: multiplied}[mode]

    def window_row(k: Any, held: list[Any]) -> list[Any]:
        at = builder.add(starts, builder.mul(k, line))
        low = builder.sext(load(builder, at, I32), I64)
        high = builder.sext(load(builder, builder.add(at, span), I32), I64)
        first = builder.add(weights, builder.mul(k, pitch))
        return add(first, low, builder.sub(high, low), held)

    start = [splat(short if mode == NARROW else long, 0) for _ in parts]
    sums = repeat(builder, rows, start, window_row)
    return [piece for total in sums for piece in sixteens(builder, total)]


def _fired(builder: ir.IRBuilder, sums: list[Any], neurons: list[Any]) -> Any:
    """Let neurons fire; `neurons` is as in `fire`. Returns the counts that `fire` returns."""
    shift, halving, threshold, bias, voltage, spikes = neurons
    wide = vector(I32, SIXTEEN)
    shifts, halvings, limits = (
        broadcast(builder, builder.trunc(scalar, I32), SIXTEEN)
        for scalar in (shift, halving, threshold)
    )
    zero, ceiling, floor = (splat(wide, limit) for limit in (0, STATE_LIMIT, -STATE_LIMIT))
    counts = constant(0)
    for part, arriving in enumerate(sums):
        words, places = 4 * SIXTEEN * part, SIXTEEN * part
        drive = load(builder, bias, wide, words)
        before = load(builder, voltage, wide, words)
        negative = builder.lshr(before, splat(wide, 31))
        toward_zero = builder.add(before, builder.and_(negative, halvings))
        after = builder.add(
            builder.add(builder.ashr(toward_zero, halvings), drive), builder.shl(arriving, shifts)
        )
        lower = builder.select(builder.icmp_signed("<", after, ceiling), after, ceiling)
        clipped = builder.select(builder.icmp_signed(">", lower, floor), lower, floor)
        fired = builder.icmp_signed(">", clipped, limits)
        store(builder, builder.select(fired, zero, clipped), voltage, words)
        store(builder, builder.zext(fired, vector(I8, SIXTEEN)), spikes, places)
        anything = builder.or_(builder.or_(arriving, before), drive)
        quiet = builder.icmp_unsigned("==", anything, zero)
        saturated = builder.icmp_unsigned("!=", clipped, after)
        for mask, place in ((fired, 0), (quiet, IDLE_SHIFT), (saturated, SATURATED_SHIFT)):
            found = builder.shl(_ones(builder, mask), constant(place))
            counts = builder.add(counts, found)
    return counts


def _ones(builder: ir.IRBuilder, mask: Any) -> Any:
    bits = builder.bitcast(mask, ir.IntType(SIXTEEN))
    return builder.zext(builder.ctpop(bits), I64)


def _by_tile(builder: ir.IRBuilder, tile: Any, build: Callable[[int], Any]) -> Any:
    return choose(builder, tile, [(size, partial(build, size)) for size in TILES])


def _written(builder: ir.IRBuilder, sums: list[Any], address: Any) -> None:
    for part, piece in enumerate(sums):
        store(builder, piece, address, 4 * SIXTEEN * part)


def _gather() -> Any:
    @intrinsic
    def gather(context, mode, tile, weights, rows, pitch, line, starts, span, index, values, sums):
        """Write the sums of a tile, int32, to `sums`; the rest as in `_gathered`."""

        def code(backend, builder, signature, arguments):
            mode, tile, *rest, sums = arguments

            def build(which: int, size: int) -> None:
                found = _gathered(builder, which, size, rest[:4], rest[4:])
                _written(builder, found, sums)

            choose(
                builder,
                mode,
                [
                    (which, lambda which=which: _by_tile(builder, tile, partial(build, which)))
                    for which in (NARROW, WIDE, PRODUCTS)
                ],
            )
            return backend.get_dummy_value()

        return types.void(*(types.int64,) * 11), code

    return gather


def _gather_and_fire() -> Any:
    @intrinsic
    def gather_and_fire(
        context, mode, tile, weights, rows, pitch, line, starts, span, index,
        shift, halving, threshold, bias, voltage, spikes,
    ):  # fmt: skip
        """`gather` and `fire` in one, the sums in registers; of NARROW and WIDE sums."""

        def code(backend, builder, signature, arguments):
            mode, tile = arguments[:2]
            lists = [*arguments[6:9], None]

            def build(which: int, size: int) -> Any:
                found = _gathered(builder, which, size, list(arguments[2:6]), lists)
                return _fired(builder, found, list(arguments[9:]))

            return choose(
                builder,
                mode,
                [
                    (which, lambda which=which: _by_tile(builder, tile, partial(build, which)))
                    for which in (NARROW, WIDE)
                ],
            )

        return types.int64(*(types.int64,) * 15), code

    return gather_and_fire


def _fire() -> Any:
    @intrinsic
    def fire(context, size, tile, sums, shift, halving, threshold, bias, voltage, spikes):
        """One step of a tile of neurons whose voltage halves (or stays).

        Args:
            size: bytes of a sum, 2 or 4.
            tile: number of neurons.
            sums: address of int16 or int32 [tile]; `<< shift` makes them currents.
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
            size, tile, sums, *neurons = arguments
            wide = vector(I32, SIXTEEN)

            def build(bits: int, count: int) -> Any:
                kind = vector(ir.IntType(bits), SIXTEEN)
                places = range(0, count * bits // 8, SIXTEEN * bits // 8)
                parts = [load(builder, sums, kind, place) for place in places]
                if bits < I32.width:
                    parts = [builder.sext(part, wide) for part in parts]
                return _fired(builder, parts, neurons)

            return choose(
                builder,
                size,
                [
                    (bits // 8, lambda bits=bits: _by_tile(builder, tile, partial(build, bits)))
                    for bits in (I16.width, I32.width)
                ],
            )

        return types.int64(*(types.int64,) * 9), code

    return fire


def _multiply() -> Any:
    @intrinsic
    def multiply(context, steps, tile, values, step, rows, pitch, fours, weights, sums):
        """Dense product of windows of unsigned bytes and 8-bit weights, for machines with VNNI.

        Args:
            steps: 1 or `STEPS_AT_ONCE`.
            tile: output channels.
            values: address of the window's first byte at the first step.
            step: bytes from one step to the next.
            rows: rows of the window.
            pitch: bytes from one row to the next.
            fours: groups of 4 bytes in a row; the last may reach beyond it, with weights of 0.
            weights: address of int8 [rows, fours, tile, 4].
            sums: address of int32 [steps, tile], written.
        """

        def code(backend, builder, signature, arguments):
            steps, tile, *rest, sums = arguments

            def build(count: int, size: int) -> None:
                _written(builder, _multiplied(builder, count, size, rest), sums)

            choose(
                builder,
                steps,
                [
                    (count, lambda count=count: _by_tile(builder, tile, partial(build, count)))
                    for count in (1, STEPS_AT_ONCE)
                ],
            )
            return backend.get_dummy_value()

        return types.void(*(types.int64,) * 9), code

    return multiply


def _multiplied(builder: ir.IRBuilder, steps: int, tile: int, arguments: list[Any]) -> list[Any]:
    """Sums of some steps, one after the other, as vectors of 16 int32; see `multiply`."""
    values, step, rows, pitch, fours, weights = arguments
    bytes_in, sums_out = vector(I8, 4 * SIXTEEN), vector(I32, SIXTEEN)
    instruction = ir.FunctionType(sums_out, [sums_out, bytes_in, bytes_in])
    add_products = ir.InlineAsm(instruction, "vpdpbusd $3, $2, $0", "=v,0,v,v")
    columns = range(0, tile, SIXTEEN)

    def window_row(k: Any, held: list[Any]) -> list[Any]:
        line = builder.add(values, builder.mul(k, pitch))
        taps = builder.add(weights, builder.mul(builder.mul(k, fours), constant(4 * tile)))

        def four(g: Any, totals: list[Any]) -> list[Any]:
            at = builder.add(taps, builder.mul(g, constant(4 * tile)))
            tap = [load(builder, at, bytes_in, 4 * column) for column in columns]
            added = []
            for t in range(steps):
                place = builder.add(builder.shl(g, constant(2)), builder.mul(step, constant(t)))
                given = load(builder, builder.add(line, place), I32)
                spread = builder.bitcast(broadcast(builder, given, SIXTEEN), bytes_in)
                for part in range(len(columns)):
                    held_sum = totals[t * len(columns) + part]
                    added.append(builder.call(add_products, [held_sum, spread, tap[part]]))
            return added

        return repeat(builder, fours, held, four)

    start = [splat(sums_out, 0) for _ in range(steps * len(columns))]
    return repeat(builder, rows, start, window_row)


def has_dot_products() -> bool:
    """Whether this machine multiplies four pairs of bytes and adds them up in one instruction."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512f") and features.get("avx512vnni"))


gather, gather_and_fire, fire, multiply = _gather(), _gather_and_fire(), _fire(), _multiply()

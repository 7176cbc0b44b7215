"""Sums of the weights of events, for use inside compiled functions only.

Intrinsics take addresses (`array.ctypes.data`) and check nothing: their callers own the bounds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from atsnn.llvm import (
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
    vector,
)  # fmt: skip
from hardware.engine.neuron_tiles import by_tile, fire_tile, store_words

NARROW_EVENTS = 255
"""So many 8-bit weights always add up in 16 bits."""
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


def _gather() -> Any:
    @intrinsic
    def gather(context, mode, tile, weights, rows, pitch, line, starts, span, index, values, sums):
        """Write the sums of a tile, int32, to `sums`; the rest as in `_gathered`."""

        def code(backend, builder, signature, arguments):
            mode, tile, *rest, sums = arguments

            def build(which: int, size: int) -> None:
                found = _gathered(builder, which, size, rest[:4], rest[4:])
                store_words(builder, found, sums)

            choose(
                builder,
                mode,
                [
                    (which, lambda which=which: by_tile(builder, tile, partial(build, which)))
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
                return fire_tile(builder, found, list(arguments[9:]))

            return choose(
                builder,
                mode,
                [
                    (which, lambda which=which: by_tile(builder, tile, partial(build, which)))
                    for which in (NARROW, WIDE)
                ],
            )

        return types.int64(*(types.int64,) * 15), code

    return gather_and_fire


gather, gather_and_fire = _gather(), _gather_and_fire()

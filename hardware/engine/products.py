"""Dense products of bytes (VNNI), for use inside compiled functions only.

Intrinsics take addresses (`array.ctypes.data`) and check nothing: their callers own the bounds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from atsnn.llvm import (
    I1,
    I8,
    I32,
    SIXTEEN,
    broadcast,
    choose,
    constant,
    load,
    repeat,
    splat,
    vector,
)  # fmt: skip
from hardware.engine.neuron_tiles import (
    WIDE,
    Line,
    by_tile,
    in_lanes,
    load_words,
    store_words,
)

AT_ONCE = 4
"""Windows (of as many time steps or places) for which a product reads its weights once."""
ALL_STEPS = 2**AT_ONCE - 1
"""A bit for each of them."""

binding.initialize_native_asmparser()  # `vpdpbusd` goes by different names in different LLVM


def has_dot_products() -> bool:
    """Whether this machine multiplies four pairs of bytes and adds them up in one instruction."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512f") and features.get("avx512vnni"))


def _multiplied(
    builder: ir.IRBuilder, windows: int, tile: int, arguments: list[Any]
) -> list[list[Any]]:
    """Sums of each window, as vectors of 16 int32; arguments as of `multiply`."""
    values, step, rows, pitch, fours, weights = arguments
    bytes_in = vector(I8, 4 * SIXTEEN)
    instruction = ir.FunctionType(WIDE, [WIDE, bytes_in, bytes_in])
    add_products = ir.InlineAsm(instruction, "vpdpbusd $3, $2, $0", "=v,0,v,v")
    columns = range(0, tile, SIXTEEN)

    def window_row(k: Any, held: list[Any]) -> list[Any]:
        line = builder.add(values, builder.mul(k, pitch))
        taps = builder.add(weights, builder.mul(builder.mul(k, fours), constant(4 * tile)))

        def four(g: Any, totals: list[Any]) -> list[Any]:
            at = builder.add(taps, builder.mul(g, constant(4 * tile)))
            tap = [load(builder, at, bytes_in, 4 * column) for column in columns]
            added = []
            for w in range(windows):
                place = builder.add(builder.shl(g, constant(2)), builder.mul(step, constant(w)))
                given = load(builder, builder.add(line, place), I32)
                spread = builder.bitcast(broadcast(builder, given, SIXTEEN), bytes_in)
                for part in range(len(columns)):
                    held_sum = totals[w * len(columns) + part]
                    added.append(builder.call(add_products, [held_sum, spread, tap[part]]))
            return added

        return repeat(builder, fours, held, four)

    start = [splat(WIDE, 0) for _ in range(windows * len(columns))]
    sums = repeat(builder, rows, start, window_row)
    return [sums[first : first + len(columns)] for first in range(0, len(sums), len(columns))]


def _multiply() -> Any:
    @intrinsic
    def multiply(context, windows, tile, values, step, rows, pitch, fours, weights, sums):
        """Dense product of windows of unsigned bytes and 8-bit weights, for machines with VNNI.

        Args:
            windows: 1 or `AT_ONCE`.
            tile: output channels.
            values: address of the first window's first byte.
            step: bytes from one window to the next.
            rows: rows of a window.
            pitch: bytes from one row to the next.
            fours: groups of 4 bytes in a row; the last may reach beyond it, with weights of 0.
            weights: address of int8 [rows, fours, tile, 4].
            sums: address of int32 [windows, tile], written.
        """

        def code(backend, builder, signature, arguments):
            windows, tile, *rest, sums = arguments

            def build(count: int, size: int) -> None:
                found = _multiplied(builder, count, size, rest)
                store_words(builder, [part for one in found for part in one], sums)

            choose(
                builder,
                windows,
                [
                    (count, lambda count=count: by_tile(builder, tile, partial(build, count)))
                    for count in (1, AT_ONCE)
                ],
            )
            return backend.get_dummy_value()

        return types.void(*(types.int64,) * 9), code

    return multiply


def _multiply_and_fire() -> Any:
    @intrinsic
    def multiply_and_fire(
        context, steps, tile, width, values, step, rows, pitch, fours, weights,
        shift, halving, threshold, voltage, bias, spikes, spikes_step, found, found_step,
    ):  # fmt: skip
        """`AT_ONCE` steps of a tile of neurons behind their products, sums in registers.

        Args:
            steps: bit s is set if the neurons take part in step s.
            voltage: address of int32 [tile], changed. The rest as in `multiply`, `fire` and `Line`.

        Returns:
            As `fire_still`.
        """

        def code(backend, builder, signature, arguments):
            steps, tile, width, *product = arguments[:9]
            constants = in_lanes(builder, *arguments[9:12])
            voltage, *rest = arguments[12:]

            def build(all_steps: bool, size: int) -> Any:
                sums = _multiplied(builder, AT_ONCE, size, product)
                line = Line(builder, size, width, constants, *rest)
                held = [*load_words(builder, voltage, size), constant(0)]
                for t, arriving in enumerate(sums):
                    bit = builder.trunc(builder.lshr(steps, constant(t)), I1)
                    held = line.step(constant(t), arriving, held, None if all_steps else bit)
                store_words(builder, held[:-1], voltage)
                return held[-1]

            cases = (ALL_STEPS, True), (0, False)
            return choose(
                builder,
                steps,
                [
                    (which, lambda every=every: by_tile(builder, tile, partial(build, every)))
                    for which, every in cases
                ],
            )

        return types.int64(*(types.int64,) * 18), code

    return multiply_and_fire


multiply, multiply_and_fire = _multiply(), _multiply_and_fire()

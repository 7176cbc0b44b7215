"""Tiles of neurons in vector registers, for use inside compiled functions only.

A tile is one of `TILES`, the number of output channels that are summed up at once. Intrinsics take
addresses (`array.ctypes.data`) and check nothing: their callers own the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from atsnn.fixed_point import STATE_LIMIT
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
    splat,
    store,
    vector,
)  # fmt: skip

TILES = (16, 32, 64)
IDLE_SHIFT, SATURATED_SHIFT = 16, 32
WIDE = vector(I32, SIXTEEN)
_BYTES = vector(I8, SIXTEEN)
_MASKED_STORE = "llvm.masked.store.v16i8.p0v16i8"


class Constants(NamedTuple):
    """Of all neurons of a layer, in every lane."""

    shift: Any
    halving: Any
    threshold: Any


class Step(NamedTuple):
    """16 neurons after a step: the voltage, and which of them fired, were idle, were clipped."""

    voltage: Any
    fired: Any
    quiet: Any
    saturated: Any


def in_lanes(builder: ir.IRBuilder, shift: Any, halving: Any, threshold: Any) -> Constants:
    """Constants from 64-bit scalars."""
    scalars = (builder.trunc(scalar, I32) for scalar in (shift, halving, threshold))
    return Constants(*(broadcast(builder, scalar, SIXTEEN) for scalar in scalars))


def step_neurons(
    builder: ir.IRBuilder, constants: Constants, arriving: Any, before: Any, drive: Any
) -> Step:
    """One step of 16 neurons: the sum that arrives, the voltage before it, and the bias."""
    zero, ceiling, floor = (splat(WIDE, limit) for limit in (0, STATE_LIMIT, -STATE_LIMIT))
    negative = builder.lshr(before, splat(WIDE, 31))
    toward_zero = builder.add(before, builder.and_(negative, constants.halving))
    kept = builder.ashr(toward_zero, constants.halving)
    after = builder.add(builder.add(kept, drive), builder.shl(arriving, constants.shift))
    lower = builder.select(builder.icmp_signed("<", after, ceiling), after, ceiling)
    clipped = builder.select(builder.icmp_signed(">", lower, floor), lower, floor)
    fired = builder.icmp_signed(">", clipped, constants.threshold)
    anything = builder.or_(builder.or_(arriving, before), drive)
    return Step(
        voltage=builder.select(fired, zero, clipped),
        fired=fired,
        quiet=builder.icmp_unsigned("==", anything, zero),
        saturated=builder.icmp_unsigned("!=", clipped, after),
    )


def _only_where(builder: ir.IRBuilder, mask: Any, before: Any, step: Step) -> Step:
    """The step in the lanes of a mask; in the others nothing happens."""
    voltage = builder.select(mask, step.voltage, before)
    return Step(voltage, *(builder.and_(mask, found) for found in step[1:]))


def ones(builder: ir.IRBuilder, mask: Any) -> Any:
    """How many of 16 lanes are set, 64-bit."""
    bits = builder.bitcast(mask, ir.IntType(SIXTEEN))
    return builder.zext(builder.ctpop(bits), I64)


def by_tile(builder: ir.IRBuilder, tile: Any, build: Callable[[int], Any]) -> Any:
    """Instructions for the size of tile that is asked for."""
    return choose(builder, tile, [(size, partial(build, size)) for size in TILES])


def load_words(builder: ir.IRBuilder, address: Any, tile: int) -> list[Any]:
    """A tile of int32 as vectors of 16."""
    return [load(builder, address, WIDE, 4 * first) for first in range(0, tile, SIXTEEN)]


def store_words(builder: ir.IRBuilder, vectors: list[Any], address: Any) -> None:
    """The reverse."""
    for part, piece in enumerate(vectors):
        store(builder, piece, address, 4 * SIXTEEN * part)


def fire_tile(builder: ir.IRBuilder, sums: list[Any], neurons: list[Any]) -> Any:
    """Let neurons fire; `neurons` is as in `fire`. Returns the counts that `fire` returns."""
    constants = in_lanes(builder, *neurons[:3])
    bias, voltage, spikes = neurons[3:]
    counts = constant(0)
    for part, arriving in enumerate(sums):
        words = 4 * SIXTEEN * part
        drive, before = load(builder, bias, WIDE, words), load(builder, voltage, WIDE, words)
        step = step_neurons(builder, constants, arriving, before, drive)
        store(builder, step.voltage, voltage, words)
        store(builder, builder.zext(step.fired, _BYTES), spikes, SIXTEEN * part)
        for mask, place in (
            (step.fired, 0),
            (step.quiet, IDLE_SHIFT),
            (step.saturated, SATURATED_SHIFT),
        ):
            counts = builder.add(counts, builder.shl(ones(builder, mask), constant(place)))
    return counts


class Line:
    """A tile of neurons that takes several steps, voltages and counts in registers.

    Args:
        width: neurons of the tile that there are (64-bit scalar).
        bias: address of int32 [tile].
        spikes, spikes_step: address of bytes [width] at the first step; bytes to the next step.
        found, found_step: address of an int32 that the spikes are added to; bytes to the next.
    """

    def __init__(
        self, builder: ir.IRBuilder, tile: int, width: Any, constants: Constants,
        bias: Any, spikes: Any, spikes_step: Any, found: Any, found_step: Any,
    ) -> None:  # fmt: skip
        self.builder, self.constants = builder, constants
        self.drive = load_words(builder, bias, tile)
        lanes = broadcast(builder, builder.trunc(width, I32), SIXTEEN)
        self.exists = [
            builder.icmp_signed("<", ir.Constant(WIDE, list(range(at, at + SIXTEEN))), lanes)
            for at in range(0, tile, SIXTEEN)
        ]
        self.spikes, self.spikes_step = spikes, spikes_step
        self.found, self.found_step = found, found_step

    def step(self, t: Any, sums: list[Any], held: list[Any], takes_part: Any = None) -> list[Any]:
        """One step of the tile.

        Args:
            t: which, 64-bit scalar.
            sums: what arrives.
            held: the voltages, then the counts that `fire_still` returns.
            takes_part: of type i1: if it is not set, nothing fires, changes or counts.

        Returns:
            What is held after the step; the spikes go to memory.
        """
        builder = self.builder
        *voltages, counts = held
        everybody = None if takes_part is None else broadcast(builder, takes_part, SIXTEEN)
        target = builder.add(self.spikes, builder.mul(t, self.spikes_step))
        spikes, after = constant(0), []
        for part, (arriving, before) in enumerate(zip(sums, voltages, strict=True)):
            step = step_neurons(builder, self.constants, arriving, before, self.drive[part])
            if everybody is not None:
                step = _only_where(builder, everybody, before, step)
            place = builder.add(target, constant(SIXTEEN * part))
            self._store(builder.zext(step.fired, _BYTES), place, self.exists[part])
            spikes = builder.add(spikes, ones(builder, step.fired))
            for mask, shift in ((step.quiet, 0), (step.saturated, SATURATED_SHIFT)):
                more = builder.shl(ones(builder, mask), constant(shift))
                counts = builder.add(counts, more)
            after.append(step.voltage)
        at = builder.add(self.found, builder.mul(t, self.found_step))
        total = builder.add(load(builder, at, I32), builder.trunc(spikes, I32))
        store(builder, total, at)
        return [*after, counts]

    def _store(self, values: Any, address: Any, exists: Any) -> None:
        pointer: Any = self.builder.inttoptr(address, _BYTES.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, pointer.type, I32, exists.type])
        function = cgutils.get_or_insert_function(self.builder.module, kind, _MASKED_STORE)
        self.builder.call(function, [values, pointer, ir.Constant(I32, 1), exists])


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

            def build(bits: int, count: int) -> Any:
                kind = vector(ir.IntType(bits), SIXTEEN)
                places = range(0, count * bits // 8, SIXTEEN * bits // 8)
                parts = [load(builder, sums, kind, place) for place in places]
                if bits < I32.width:
                    parts = [builder.sext(part, WIDE) for part in parts]
                return fire_tile(builder, parts, neurons)

            return choose(
                builder,
                size,
                [
                    (bits // 8, lambda bits=bits: by_tile(builder, tile, partial(build, bits)))
                    for bits in (I16.width, I32.width)
                ],
            )

        return types.int64(*(types.int64,) * 9), code

    return fire


def _fire_still() -> Any:
    @intrinsic
    def fire_still(
        context, tile, width, steps, sums, shift, halving, threshold, bias,
        spikes, spikes_step, found, found_step,
    ):  # fmt: skip
        """All steps of a tile of neurons, from zero, to which the same arrives at every step.

        Args:
            steps: T.
            sums: address of int32 [tile]. The rest as in `fire` and in `Line`.

        Returns:
            Number of neurons and steps without input, state or bias, plus 2^32 times that of
            voltages that were clipped.
        """

        def code(backend, builder, signature, arguments):
            tile, width, steps, sums, *rest = arguments
            constants = in_lanes(builder, *rest[:3])

            def build(size: int) -> Any:
                line = Line(builder, size, width, constants, *rest[3:])
                arriving = load_words(builder, sums, size)
                start = [*(splat(WIDE, 0) for _ in arriving), constant(0)]
                return repeat(builder, steps, start, lambda t, held: line.step(t, arriving, held))[
                    -1
                ]

            return by_tile(builder, tile, build)

        return types.int64(*(types.int64,) * 12), code

    return fire_still


fire, fire_still = _fire(), _fire_still()

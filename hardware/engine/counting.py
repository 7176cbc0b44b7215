"""Counts of messages, per image, of arrays [S, B, ...] that stand for `steps` time steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.engine import tally
from hardware.events import NodeCounter, PerImage, Seen


@dataclass(frozen=True)
class Traffic:
    """How a port's values count.

    Attributes:
        unit: the value of one spike (2^F in the residual stream).
        multiplied: False where nothing is multiplied, so that a graded value is one addition.
        pixels: multiplied whatever their value, 1 included.
    """

    unit: int = 1
    multiplied: bool = True
    pixels: bool = False


def weigh(
    counter: NodeCounter,
    values: npt.NDArray,
    fan_out: npt.NDArray | int,
    repeat: int,
    traffic: Traffic,
    *,
    gate: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Count the messages in `values` [S, B, ...], each meeting `fan_out` synapses.

    Args:
        counter: of the node that receives the messages.
        values: what arrives.
        fan_out: int, or int64 [H, W] where the values are maps [S, B, C, H, W].
        repeat: time steps that each of the S entries stands for.
        traffic: how values above 1 count.
        gate: bool [G, B, N] of tokens [S, B, N, D]: what closed ones hold is not sent.
    """
    counts = repeat * _tally(values, fan_out, traffic.unit, gate, counter.seen)
    sops = counts[:, tally.SYNAPSES]
    macs = np.zeros_like(sops)
    if values.dtype != np.bool_ and traffic.pixels:
        macs = sops
    elif traffic.multiplied:
        macs = counts[:, tally.GRADED]
    counter.add("messages", counts[:, tally.MESSAGES])
    counter.add("sops", sops)
    counter.add("acs", sops - macs)
    counter.add("macs", macs)
    counter.add("unrolled_acs", counts[:, tally.UNROLLED])


def nonzero(values: npt.NDArray, seen: Seen | None = None) -> PerImage:
    """Entries of [S, B, ...] that are not 0, per image, int64 [B]."""
    return _tally(values, 1, 1, None, seen)[:, tally.MESSAGES]


def _tally(
    values: npt.NDArray,
    fan_out: npt.NDArray | int,
    unit: int,
    gate: npt.NDArray[np.bool_] | None,
    seen: Seen | None,
) -> npt.NDArray[np.int64]:
    """Columns of `tally`, int64 [B, 4]; what several nodes read is counted once."""
    if not isinstance(fan_out, int):
        return _tally_maps(values, fan_out, unit)
    key = id(values), id(gate), unit
    before = seen.get(key) if seen else None
    if (
        before is None
        or before[0]() is not values
        or (gate is not None and before[1]() is not gate)
    ):
        before = _reference(values), _reference(gate), _tally_rows(values, unit, gate)
        if seen is not None:
            seen[key] = before
    return before[2] * np.array([1, fan_out, fan_out, fan_out])


def _reference(values: npt.NDArray | None) -> Callable[[], npt.NDArray | None]:
    return (lambda: None) if values is None else weakref.ref(values)


def _tally_rows(
    values: npt.NDArray, unit: int, gate: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.int64]:
    """Every value meets one synapse."""
    steps, images, *shape = values.shape
    rows = 1 if gate is None else shape[0]
    held = np.ascontiguousarray(values).reshape(steps, images, rows, -1)
    closed = np.zeros((0, images, rows), np.bool_) if gate is None else gate
    closed = np.ascontiguousarray(closed)
    if values.dtype != np.bool_:
        return _graded(held, closed, np.ones(1, np.int64), unit)
    if held.shape[-1] % 8:
        held = np.pad(held, [(0, 0)] * 3 + [(0, -held.shape[-1] % 8)])
    found = np.empty(images, np.int64)
    tally.tally_spikes(held.view(np.uint64), closed, found)
    return np.stack([found, found, found, np.zeros_like(found)], axis=1)


def _tally_maps(values: npt.NDArray, fan_out: npt.NDArray, unit: int) -> npt.NDArray[np.int64]:
    """Maps [S, B, C, H, W], whose pixels meet `fan_out` [H, W] synapses."""
    steps, images, channels, *_ = values.shape
    held = np.ascontiguousarray(values).reshape(steps, images, channels, -1)
    reach = fan_out.astype(np.int64).reshape(-1)
    if values.dtype != np.bool_:
        return _graded(held, np.zeros((0, images, channels), np.bool_), reach, unit)
    places = np.empty((images, len(reach)), np.int32)
    tally.tally_places(held.view(np.uint8), places)
    found, synapses = places.sum(axis=1, dtype=np.int64), places @ reach
    return np.stack([found, synapses, synapses, np.zeros_like(found)], axis=1)


def _graded(
    held: npt.NDArray, closed: npt.NDArray[np.bool_], reach: npt.NDArray[np.int64], unit: int
) -> npt.NDArray[np.int64]:
    counts = np.empty((held.shape[1], 4), np.int64)
    wide = np.int64 if held.dtype.itemsize > 4 else np.int32
    tally.tally_graded(held.astype(wide, copy=False), closed, reach, unit, counts)
    return counts

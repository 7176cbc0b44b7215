"""Counts of messages, per image, of values [S, B, ...] that stand for `steps` time steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.engine.rows import Array
from hardware.engine.shared import Shared
from hardware.engine.tally import RowArray, RowCounts, sum_over_time
from hardware.events import NodeCounter, PerImage


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
    shared: Shared,
    values: Array,
    fan_out: npt.NDArray[np.int64] | int,
    repeat: int,
    traffic: Traffic,
    *,
    gate: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Count the messages in `values` [S, B, ...], each meeting `fan_out` synapses.

    Args:
        counter: of the node that receives the messages.
        shared: of the batch.
        values: what arrives.
        fan_out: int, or one for each row, int64 [R] (rows are tokens or pixels).
        repeat: time steps that each of the S entries stands for.
        traffic: how values above 1 count.
        gate: bool [G, B, R]: what closed rows hold is not sent.
    """
    arriving = unrolled = _messages(shared, values, gate)
    graded = None
    if values.dtype != np.bool_:
        counts = shared.counts(values, traffic.unit)
        unrolled, graded = _over_time(counts.unrolled, gate), _over_time(counts.graded, gate)
    _add(counter, arriving, unrolled, graded, fan_out, repeat, traffic)


def weigh_counts(counter: NodeCounter, counts: RowCounts, repeat: int, traffic: Traffic) -> None:
    """As `weigh`, of counts that are known; each message meets one synapse."""
    arriving, unrolled, graded = (sum_over_time(part) for part in counts)
    _add(counter, arriving, unrolled, graded, 1, repeat, traffic)


def _add(
    counter: NodeCounter,
    arriving: RowArray,
    unrolled: RowArray,
    graded: RowArray | None,
    fan_out: npt.NDArray[np.int64] | int,
    repeat: int,
    traffic: Traffic,
) -> None:
    """Count messages of rows, int32 [B, R] each; `graded` None: all are single spikes."""
    sops = _meeting(arriving, fan_out)
    macs = np.zeros_like(sops)
    if graded is not None and traffic.pixels:
        macs = sops
    elif graded is not None and traffic.multiplied:
        macs = macs + _meeting(graded, fan_out)
    counter.add("messages", repeat * arriving.sum(axis=1, dtype=np.int64))
    counter.add("sops", repeat * sops)
    counter.add("acs", repeat * (sops - macs))
    counter.add("macs", repeat * macs)
    counter.add("unrolled_acs", repeat * _meeting(unrolled, fan_out))


def _messages(shared: Shared, values: Array, gate: npt.NDArray[np.bool_] | None) -> RowArray:
    """Messages of each open row over time, int32 [B, R]."""
    if gate is None:
        return shared.messages_over_time(values)
    return _over_time(shared.messages(values), gate)


def _over_time(counts: RowArray, gate: npt.NDArray[np.bool_] | None) -> RowArray:
    """Sum over time of counts [S, B, R] of open rows, int32 [B, R]."""
    return sum_over_time(counts if gate is None else counts * gate)


def _meeting(counts: RowArray, fan_out: npt.NDArray[np.int64] | int) -> PerImage:
    """Synapses that messages [B, R] meet, int64 [B]."""
    if isinstance(fan_out, int):
        return counts.sum(axis=1, dtype=np.int64) * fan_out
    return counts @ fan_out


def messages(shared: Shared, values: Array) -> PerImage:
    """Values of [S, B, ...] that are not 0, per image, int64 [B]."""
    return shared.messages_over_time(values).sum(axis=1, dtype=np.int64)


def nonzero(values: Array) -> PerImage:
    """The same of a small array [S, B, ...] that nothing else counts."""
    return np.count_nonzero(values, axis=(0, *range(2, values.ndim))).astype(np.int64)

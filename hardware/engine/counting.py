"""Counts of messages, per image, of values [S, B, ...] that stand for `steps` time steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.engine.rows import Array
from hardware.engine.shared import Shared
from hardware.engine.tally import RowArray, RowCounts, of_spikes, sum_rows, sum_weighted_rows
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
    if values.dtype == np.bool_:
        counts = of_spikes(shared.messages(values))
    else:
        counts = shared.counts(values, traffic.unit)
    weigh_counts(counter, counts, fan_out, repeat, traffic, gate=gate)


def weigh_counts(
    counter: NodeCounter,
    counts: RowCounts,
    fan_out: npt.NDArray[np.int64] | int,
    repeat: int,
    traffic: Traffic,
    *,
    gate: npt.NDArray[np.bool_] | None = None,
) -> None:
    """As `weigh`, of counts that are known."""
    arriving = unrolled = _sent(counts.messages, gate, fan_out)
    sops, macs = repeat * arriving.synapses, 0
    if counts.graded is not None:
        unrolled = _sent(counts.unrolled, gate, fan_out)
        if traffic.pixels:
            macs = sops
        elif traffic.multiplied:
            macs = repeat * _sent(counts.graded, gate, fan_out).synapses
    counter.add("messages", repeat * arriving.messages)
    counter.add("sops", sops)
    counter.add("acs", sops - macs)
    counter.add("macs", macs)
    counter.add("unrolled_acs", repeat * unrolled.synapses)


@dataclass(frozen=True)
class _Sent:
    """Messages of all open rows over time and the synapses that they meet, int64 [B] each."""

    messages: PerImage
    synapses: PerImage


def _sent(
    counts: RowArray, gate: npt.NDArray[np.bool_] | None, fan_out: npt.NDArray[np.int64] | int
) -> _Sent:
    """Of counts int32 [S, B, R]."""
    if isinstance(fan_out, int):
        messages = sum_rows(counts, gate)
        return _Sent(messages, messages * fan_out)
    return _Sent(*sum_weighted_rows(counts, gate, fan_out))


def messages(shared: Shared, values: Array) -> PerImage:
    """Values of [S, B, ...] that are not 0, per image, int64 [B]."""
    return shared.messages_over_time(values).sum(axis=1, dtype=np.int64)


def nonzero(values: Array) -> PerImage:
    """The same of a small array [S, B, ...] that nothing else counts."""
    return np.count_nonzero(values, axis=(0, *range(2, values.ndim))).astype(np.int64)

"""Counts of messages, per image, of values [S, B, ...] that stand for `steps` time steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.engine.rows import Array
from hardware.engine.shared import Shared
from hardware.engine.tally import Sent, sum_weighted_rows
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
    if isinstance(fan_out, int):
        sent = shared.sent(values, traffic.unit, gate)
        _add(counter, sent.messages, sent.times(fan_out), repeat, traffic)
    else:
        counts = shared.counts(values, traffic.unit)
        total, met = sum_weighted_rows(counts.messages, gate, fan_out)
        others = [
            None if part is None else sum_weighted_rows(part, gate, fan_out)[1]
            for part in (counts.unrolled, counts.graded)
        ]
        _add(counter, total, Sent(met, *others), repeat, traffic)


def weigh_sent(counter: NodeCounter, sent: Sent, repeat: int, traffic: Traffic) -> None:
    """As `weigh`, of messages that are known, each of which meets one synapse."""
    _add(counter, sent.messages, sent, repeat, traffic)


def _add(
    counter: NodeCounter, messages: PerImage, synapses: Sent, repeat: int, traffic: Traffic
) -> None:
    """Count messages and the synapses that they meet."""
    sops, macs = repeat * synapses.messages, 0
    if synapses.graded is not None and traffic.pixels:
        macs = sops
    elif synapses.graded is not None and traffic.multiplied:
        macs = repeat * synapses.graded
    counter.add("messages", repeat * messages)
    counter.add("sops", sops)
    counter.add("acs", sops - macs)
    counter.add("macs", macs)
    unrolled = sops if synapses.unrolled is None else repeat * synapses.unrolled
    counter.add("unrolled_acs", unrolled)


def messages(shared: Shared, values: Array) -> PerImage:
    """Values of [S, B, ...] that are not 0, per image, int64 [B]."""
    return shared.total(values)


def nonzero(values: Array) -> PerImage:
    """The same of a small array [S, B, ...] that nothing else counts."""
    return np.count_nonzero(values, axis=(0, *range(2, values.ndim))).astype(np.int64)

"""Counts of messages, per image, of values [S, B, ...] that stand for `steps` time steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.engine.rows import Array
from hardware.engine.shared import Shared
from hardware.engine.tally import RowArray
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
    counts = shared.counts(values, traffic.unit)
    sops = repeat * _per_image(counts.messages, fan_out, gate)
    macs = np.zeros_like(sops)
    if values.dtype != np.bool_ and traffic.pixels:
        macs = sops
    elif traffic.multiplied and values.dtype != np.bool_:
        macs = repeat * _per_image(counts.graded, fan_out, gate)
    unrolled = sops
    if values.dtype != np.bool_:
        unrolled = repeat * _per_image(counts.unrolled, fan_out, gate)
    counter.add("messages", repeat * _per_image(counts.messages, 1, gate))
    counter.add("sops", sops)
    counter.add("acs", sops - macs)
    counter.add("macs", macs)
    counter.add("unrolled_acs", unrolled)


def _per_image(
    counts: RowArray, fan_out: npt.NDArray[np.int64] | int, gate: npt.NDArray[np.bool_] | None
) -> PerImage:
    """Sum of counts [S, B, R] over steps and open rows, each times its fan-out: int64 [B]."""
    if gate is not None:
        counts = counts * gate
    rows = counts.sum(axis=0, dtype=np.int64)
    if isinstance(fan_out, int):
        return rows.sum(axis=1) * fan_out
    return rows @ fan_out


def messages(shared: Shared, values: Array, unit: int = 1) -> PerImage:
    """Values of [S, B, ...] that are not 0, per image, int64 [B]."""
    return _per_image(shared.counts(values, unit).messages, 1, None)


def nonzero(values: Array) -> PerImage:
    """The same of a small array [S, B, ...] that nothing else counts."""
    return np.count_nonzero(values, axis=(0, *range(2, values.ndim))).astype(np.int64)

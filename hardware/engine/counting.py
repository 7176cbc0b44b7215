"""Counts of messages, per image, of arrays [S, B, ...] that stand for `steps` time steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.engine import tally
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
    values: npt.NDArray,
    fan_out: npt.NDArray | int,
    repeat: int,
    traffic: Traffic,
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
    counts = repeat * _tally(values, fan_out, traffic.unit, gate)
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


def _tally(
    values: npt.NDArray,
    fan_out: npt.NDArray | int,
    unit: int = 1,
    gate: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.int64]:
    """Columns of `tally`, int64 [B, 4]."""
    steps, images, *shape = values.shape
    rows = shape[0] if len(shape) > 1 else 1
    held = np.ascontiguousarray(values).reshape(steps, images, rows, -1)
    closed = np.zeros((0, images, rows), np.bool_) if gate is None else gate
    reach = np.array(fan_out, np.int64).reshape(-1)
    counts = np.empty((images, 4), np.int64)
    if values.dtype == np.bool_:
        tally.tally_spikes(held, np.ascontiguousarray(closed), reach, counts)
    else:
        wide = np.int64 if values.dtype.itemsize > 4 else np.int32
        held = held.astype(wide, copy=False)
        tally.tally_graded(held, np.ascontiguousarray(closed), reach, unit, counts)
    return counts


def nonzero(values: npt.NDArray) -> PerImage:
    """Entries of [S, B, ...] that are not 0, per image, int64 [B]."""
    return _tally(values, 1)[:, tally.MESSAGES]

"""Counts of messages, per image, of arrays [S, B, ...] that stand for `steps` time steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.events import AttentionOrder, NodeCounter, PerImage


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
) -> None:
    """Count the messages in `values` [S, B, ...], each meeting `fan_out` synapses.

    Args:
        counter: of the node that receives the messages.
        values: what arrives.
        fan_out: int, or int64 [H, W] where the values are maps [S, B, C, H, W].
        repeat: time steps that each of the S entries stands for.
        traffic: how values above 1 count.
    """
    sent = values if values.dtype == np.bool_ else values != 0
    counter.add("messages", repeat * per_image(sent))
    sops = repeat * _meeting(sent, fan_out)
    macs, unrolled = np.zeros_like(sops), sops
    if values.dtype != np.bool_:
        sizes = np.abs(values.astype(np.int64))
        unrolled = repeat * _meeting(-(-sizes // traffic.unit), fan_out)
        if traffic.pixels:
            macs = sops
        elif traffic.multiplied:
            macs = repeat * _meeting(sent & (sizes != traffic.unit), fan_out)
    counter.add("sops", sops)
    counter.add("acs", sops - macs)
    counter.add("macs", macs)
    counter.add("unrolled_acs", unrolled)


def per_image(values: npt.NDArray) -> PerImage:
    """Sum of [S, B, ...] over all axes but B, int64 [B]."""
    if values.dtype == np.bool_:  # counting is an order of magnitude faster than summing
        counts = [[np.count_nonzero(image) for image in step] for step in values]
        return np.array(counts, np.int64).sum(axis=0)
    return values.sum(axis=(0, *range(2, values.ndim)), dtype=np.int64)


def _meeting(values: npt.NDArray, fan_out: npt.NDArray | int) -> PerImage:
    """Sum per image of values times fan-out; a fan-out [H, W] belongs to values [S, B, C, H, W]."""
    if isinstance(fan_out, int):
        return fan_out * per_image(values)
    return (values.sum(axis=(0, 2), dtype=np.int64) * fan_out).sum(axis=(1, 2))


def scores_first(q: npt.NDArray, k: npt.NDArray, v: npt.NDArray) -> AttentionOrder:
    """Events of (q k^T) v; q, k, v float32 [S, B, heads, N, d] of 0 and 1."""
    scores = q @ np.swapaxes(k, -1, -2)
    readers = v.sum(axis=-1)[..., None, :]
    return AttentionOrder(_counted(scores), _counted((scores > 0) * readers))


def table_first(q: npt.NDArray, table: npt.NDArray) -> AttentionOrder:
    """Events of q (k^T v); `table` is k^T v, float32 [S, B, heads, d, d]."""
    readers = q.sum(axis=-2)[..., :, None]
    return AttentionOrder(_counted(table), _counted((table > 0) * readers))


def _counted(values: npt.NDArray) -> PerImage:
    axes = tuple(axis for axis in range(values.ndim) if axis != 1)
    return values.sum(axis=axes, dtype=np.float64).astype(np.int64)

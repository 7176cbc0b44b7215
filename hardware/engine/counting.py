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
        fan_out: int, or int64 that broadcasts against values[0, 0].
        repeat: time steps that each of the S entries stands for.
        traffic: how values above 1 count.
    """
    sites = _per_site(values != 0)
    counter.add("messages", repeat * _total(sites))
    sops = repeat * _total(sites * fan_out)
    macs, unrolled = np.zeros_like(sops), sops
    if values.dtype != np.bool_:
        sizes = np.abs(values.astype(np.int64))
        unrolled = repeat * _total(_per_site(-(-sizes // traffic.unit)) * fan_out)
        if traffic.pixels:
            macs = sops
        elif traffic.multiplied:
            macs = repeat * _total(_per_site((sizes > 0) & (sizes != traffic.unit)) * fan_out)
    counter.add("sops", sops)
    counter.add("acs", sops - macs)
    counter.add("macs", macs)
    counter.add("unrolled_acs", unrolled)


def per_image(values: npt.NDArray) -> PerImage:
    """Sum of [S, B, ...] over all axes but B, int64 [B]."""
    return _total(_per_site(values))


def _per_site(values: npt.NDArray) -> npt.NDArray[np.int64]:
    return values.sum(axis=0, dtype=np.int64)


def _total(sites: npt.NDArray[np.int64]) -> PerImage:
    return sites.reshape(len(sites), -1).sum(axis=1)


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

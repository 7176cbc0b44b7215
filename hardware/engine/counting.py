"""Counts of messages, per image, of arrays [S, B, ...] that stand for `steps` time steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.events import AttentionOrder, NodeCounter, PerImage


@dataclass(frozen=True)
class Traffic:
    """How a port's values count: `pixels` are MACs whatever their value; `unit` is 2^F of the stream."""

    pixels: bool = False
    unit: int = 1


def weigh(
    counter: NodeCounter,
    values: npt.NDArray,
    fan_out: npt.NDArray | int,
    repeat: int,
    traffic: Traffic,
) -> None:
    """Count the messages in `values` [S, B, ...], each meeting `fan_out` synapses.

    Args:
        fan_out: int, or int64 that broadcasts against values[0, 0].
        repeat: time steps that each of the S entries stands for.
    """
    sites = _per_site(values != 0)
    counter.add("messages", repeat * _total(sites))
    sops = repeat * _total(sites * fan_out)
    if values.dtype == np.bool_:
        counter.add("sops", sops)
        counter.add("acs", sops)
        counter.add("unrolled_acs", sops)
        return
    graded = sops
    if not traffic.pixels:
        graded = repeat * _total(_per_site(np.abs(values) > 1) * fan_out)
    adds = -(-np.abs(values.astype(np.int64)) // traffic.unit)
    counter.add("sops", sops)
    counter.add("acs", sops - graded)
    counter.add("macs", graded)
    counter.add("unrolled_acs", repeat * _total(adds.sum(axis=0) * fan_out))


def per_image(values: npt.NDArray) -> PerImage:
    """Sum of [S, B, ...] over all axes but B, int64 [B]."""
    return _total(_per_site(values))


def _per_site(values: npt.NDArray) -> npt.NDArray[np.int64]:
    return values.sum(axis=0, dtype=np.int64)


def _total(sites: npt.NDArray[np.int64]) -> PerImage:
    return sites.reshape(len(sites), -1).sum(axis=1)


def scores_first(
    q: npt.NDArray, k: npt.NDArray, v: npt.NDArray, out_sum: PerImage
) -> AttentionOrder:
    """Events of (q k^T) v; q, k, v float32 [S, B, heads, N, d] of 0 and 1."""
    scores = q @ np.swapaxes(k, -1, -2)
    readers = v.sum(axis=-1)[..., None, :]
    return AttentionOrder(
        coincidences=_floats(scores),
        single_reads=_floats((scores == 1) * readers),
        graded_reads=_floats((scores > 1) * readers),
        unrolled_reads=out_sum,
    )


def table_first(q: npt.NDArray, table: npt.NDArray, out_sum: PerImage) -> AttentionOrder:
    """Events of q (k^T v); `table` float32 [S, B, heads, d, d]."""
    readers = q.sum(axis=-2)[..., :, None]
    return AttentionOrder(
        coincidences=_floats(table),
        single_reads=_floats((table == 1) * readers),
        graded_reads=_floats((table > 1) * readers),
        unrolled_reads=out_sum,
    )


def _floats(values: npt.NDArray) -> PerImage:
    axes = tuple(axis for axis in range(values.ndim) if axis != 1)
    return values.sum(axis=axes, dtype=np.float64).astype(np.int64)

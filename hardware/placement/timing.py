"""How long a time step takes on the placed cores, and what that means for an image.

A step ends when the slowest core has done its work, the farthest message has arrived, and all cores
have met at the barrier. Links between tiles never wait for each other here: congestion is not
modelled. Images stream: while a late layer works on one image, an early one has the next, so the
work of a layer is set back by its depth before the slowest core of a step is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from export.graph import Graph
from hardware.placement.flows import Distances
from hardware.placement.layers import RELAYS, Layer, Path
from hardware.profile import Grade, Latencies, Quantity, weakest

if TYPE_CHECKING:
    from hardware.placement.place import Placement

Array = npt.NDArray
Range = tuple[float, float]


@dataclass(frozen=True)
class StepTimes:
    """Time of a step in seconds, (low, high), means over all steps.

    Attributes:
        step: from barrier to barrier. slowest_core, network, barrier: its parts.
        longest_step: the longest of all steps.
        steps_per_image: hardware steps between two images. image_steps: from first to last of one.
        pipelined: images stream; False where gates look back, so that each step waits for the last.
        grade: the weakest grade of the times used.
        complete: the profile has times of operations, updates and the barrier.
        bottleneck: core that is most often the slowest.
    """

    step: Range
    slowest_core: Range
    network: Range
    barrier: Range
    longest_step: Range
    steps_per_image: int
    image_steps: int
    pipelined: bool
    grade: Grade
    complete: bool
    bottleneck: int

    @property
    def latency(self) -> Range:
        """Seconds from the image's first step to its result."""
        return self.step[0] * self.image_steps, self.step[1] * self.image_steps

    @property
    def images_per_second(self) -> Range:
        """Throughput, (low, high)."""
        slow, fast = self.step[1] * self.steps_per_image, self.step[0] * self.steps_per_image
        return (1 / slow if slow else 0.0), (1 / fast if fast else 0.0)

    @property
    def seconds_per_image(self) -> Range:
        """Time that a chip spends on one image when images stream."""
        return self.step[0] * self.steps_per_image, self.step[1] * self.steps_per_image


_WORK = {
    "updates_active": "neuron_update_active",
    "updates_idle": "neuron_update_idle",
}


class Clock:
    """Adds up the time of every step of every core; `start`, many of `travel` and `work`,
    `finish`."""

    def __init__(self, placement: Placement, graph: Graph) -> None:
        self.placement, self.graph = placement, graph
        self.times: Latencies = placement.profile.time
        self.pipelined = not graph.feedback
        depth = max((layer.depth for layer in placement.network.layers.values()), default=0)
        self.depth = depth
        self.steps = graph.steps
        self.parts: list[Array] = []
        self.slowest = np.zeros(placement.cores, np.int64)

    def start(self, images: int) -> None:
        self.images = images
        self.cores = np.zeros((2, images * self.steps, self.placement.cores))
        self.network = np.zeros((2, images * self.steps))

    def travel(self, path: Path, present: Array, distance: Distances) -> None:
        """The farthest message of a path at each step; present bool [M, segments, pairs]."""
        east, north, cross = distance.farthest
        depth = self._depth(path.source)
        for side in (0, 1):
            times = (
                east * _seconds(self.times.hop_east_west, side)
                + north * _seconds(self.times.hop_north_south, side)
                + cross * _seconds(self.times.chip_crossing, side)
            )
            if times.any():
                longest = (present * times).max(axis=(1, 2))
                longest = self._set_back(longest[:, None], depth)[:, 0]
                np.maximum(self.network[side], longest, out=self.network[side])

    def work(self, layer: Layer, work: Mapping[str, Array], received: Array, sent: Array) -> None:
        """A layer's work by tile, each [M, tiles]."""
        core_of = self.placement.packing.core_of[layer.name]
        convolved = any(path.kind == "conv" for path in layer.paths)
        operation = self.times.synaptic_operation
        if convolved and self.times.convolution_operation:
            operation = self.times.convolution_operation
        operations = work["sops"] + work.get("repeats", 0)
        for side in (0, 1):
            seconds = operations * _seconds(operation, side)
            seconds = seconds + received * _seconds(self.times.message_in, side)
            seconds = seconds + sent * _seconds(self.times.message_out, side)
            fired = work["updates_active"] if layer.kind in RELAYS else work["spikes"]
            seconds = seconds + fired * _seconds(self.times.spike, side)
            for name, latency in _WORK.items():
                seconds = seconds + work[name] * _seconds(getattr(self.times, latency), side)
            shifted = self._set_back(seconds, layer.depth)
            np.add.at(self.cores[side].T, core_of, shifted.T)

    def _depth(self, name: str) -> int:
        layer = self.placement.network.layers.get(name)
        return layer.depth if layer else 0

    def _set_back(self, values: Array, depth: int) -> Array:
        """[T * B, n] of an image's steps -> [B * T, n] of hardware steps, the images in a ring."""
        columns = values.shape[1]
        stream = values.reshape(self.steps, self.images, columns).swapaxes(0, 1)
        stream = stream.reshape(-1, columns)
        return np.roll(stream, depth, axis=0) if self.pipelined else stream

    def finish(self) -> None:
        slow = self.cores.max(axis=2)
        self.slowest += np.bincount(self.cores[1].argmax(axis=1), minlength=len(self.slowest))
        self.parts.append(np.stack([slow, self.network]))

    def times_of_steps(self) -> Array:
        """Seconds [slowest core or network, low or high, steps]."""
        return np.concatenate(self.parts, axis=2)

    def result(self) -> StepTimes:
        parts = self.times_of_steps()
        barrier = tuple(_seconds(self.times.barrier, side) for side in (0, 1))
        steps = parts.sum(axis=0) + np.array(barrier)[:, None]
        used = [q for _, q in self.times if q is not None]
        needed = ("synaptic_operation", "neuron_update_active", "barrier")
        mean = parts.mean(axis=2)
        image_steps = self.steps + self.depth
        if not self.pipelined:
            image_steps = self.steps * (self.depth + 1)
        return StepTimes(
            step=_range(steps.mean(axis=1)),
            slowest_core=_range(mean[0]),
            network=_range(mean[1]),
            barrier=_range(np.array(barrier)),
            longest_step=_range(steps.max(axis=1)),
            steps_per_image=self.steps if self.pipelined else image_steps,
            image_steps=image_steps,
            pipelined=self.pipelined,
            grade=weakest(q.grade for q in used),
            complete=all(getattr(self.times, name) is not None for name in needed),
            bottleneck=int(self.slowest.argmax()),
        )


def _range(pair: Array) -> Range:
    return float(pair[0]), float(pair[1])


def _seconds(quantity: Quantity | None, side: int) -> float:
    return 0.0 if quantity is None else quantity.range[side]

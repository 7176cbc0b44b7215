"""Energy of a placed network: per image, per layer and by cause, low to high."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hardware.energy import FREE, Cost, cost_of
from hardware.placement.measure import LayerEvents, PlacedEvents
from hardware.placement.place import Placement
from hardware.profile import Profile, Quantity, weakest

CAUSES = ("synapse", "neuron", "message", "idle", "static")
"""synapse: operations, those that a cut attention repeats included. neuron: active updates, and
what they fire (spikes, and the values that relays pass on). message: every copy sent to a core, its
hops and borders. idle: updates that change nothing. static: what the chips draw while they work on
the image."""
STATE_BYTES = 6
"""Current and voltage of a neuron, 24 bits each, read at an update and written at an active one."""
MESSAGE_BYTES = 4


@dataclass(frozen=True)
class PlacedCost:
    """Energy of one image.

    Attributes:
        causes: cause -> cost. layers: layer -> cause -> cost (static energy belongs to no layer).
        convention: of the profile. unpriced: events that the profile gives no price for.
    """

    causes: dict[str, Cost]
    layers: dict[str, dict[str, Cost]]
    convention: str
    unpriced: tuple[str, ...]

    @property
    def total(self) -> Cost:
        """All causes."""
        return _sum(self.causes.values())

    @property
    def dynamic(self) -> Cost:
        """All causes but static power."""
        return _sum(cost for cause, cost in self.causes.items() if cause != "static")

    def as_json(self) -> dict[str, Any]:
        return {
            "convention": self.convention,
            "total": _cost_json(self.total),
            "dynamic": _cost_json(self.dynamic),
            "causes": {cause: _cost_json(cost) for cause, cost in self.causes.items()},
            "layers": {
                name: {cause: _cost_json(cost) for cause, cost in costs.items()}
                for name, costs in self.layers.items()
            },
            "unpriced": list(self.unpriced),
        }


def _cost_json(cost: Cost) -> dict[str, Any]:
    return {"low": cost.low, "high": cost.high, "joules": cost.middle, "grade": cost.grade}


def _sum(costs: Iterable[Cost]) -> Cost:
    return sum(costs, FREE)


def placed_cost(
    placement: Placement, events: PlacedEvents, profile: Profile | None = None
) -> PlacedCost:
    """Price the events of a placed network.

    Args:
        profile: other prices for the same events; None: those of the chip. Times, and so
            the static energy, stay those of the chip.
    """
    chip = profile or placement.profile
    layers = {
        layer.name: layer_cost(layer, chip, _convolved(placement, layer), events.images)
        for layer in events.layers
    }
    causes = {
        cause: _sum(costs[cause] for costs in layers.values())
        for cause in CAUSES
        if cause != "static"
    }
    causes["static"] = static_cost(placement, events, chip)
    return PlacedCost(causes, layers, chip.convention, _unpriced(placement, chip))


def _convolved(placement: Placement, layer: LayerEvents) -> bool:
    return any(path.kind == "conv" for path in placement.network.layers[layer.name].paths)


def layer_cost(layer: LayerEvents, chip: Profile, convolved: bool, images: int) -> dict[str, Cost]:
    """Energy of one layer per image, by cause; linear in every price."""
    prices = chip.energy

    def of(name: str, quantity: Quantity | None) -> Cost:
        return FREE if quantity is None else cost_of(layer.sum(name) / images, quantity)

    def each(count: int, quantity: Quantity | None) -> Cost:
        return FREE if quantity is None else cost_of(count / images, quantity)

    operation = prices.synaptic_operation
    if convolved and prices.convolution_operation:
        operation = prices.convolution_operation
    if operation is not None:
        synapse = of("sops", operation) + of("repeats", operation)
    else:
        synapse = of("acs", prices.accumulate) + of("repeats", prices.accumulate)
        synapse += of("macs", prices.multiply_accumulate)
    message = of("received", prices.message_in) + of("received", prices.spike_within_tile)
    message += of("sent", prices.message_out)
    message += each(layer.east_west, prices.hop_east_west)
    message += each(layer.north_south, prices.hop_north_south)
    message += each(layer.crossings, prices.chip_crossing)
    return {
        "synapse": synapse,
        "neuron": of("updates_active", prices.neuron_update_active)
        + each(layer.fired, prices.spike),
        "message": message,
        "idle": of("updates_idle", prices.neuron_update_idle),
    }


def static_cost(placement: Placement, events: PlacedEvents, chip: Profile) -> Cost:
    """Power of all chips for as long as an image takes them, while images stream."""
    power = chip.power.static_per_chip
    if power is None:
        return FREE
    seconds = events.times.seconds_per_image
    chips = placement.mesh.chips
    low, high = power.range
    grade = weakest([power.grade, events.times.grade])
    return Cost(low * chips * seconds[0], high * chips * seconds[1], grade)


def _unpriced(placement: Placement, chip: Profile) -> tuple[str, ...]:
    prices = chip.energy
    missing = []
    if not any((prices.message_out, prices.message_in, prices.spike_within_tile)):
        missing.append("messages")
    if prices.hop_east_west is None:
        missing.append("hops")
    if placement.mesh.chips > 1 and prices.chip_crossing is None:
        missing.append("borders between chips")
    if chip.power.static_per_chip is None:
        missing.append("static power")
    return tuple(missing)


def memory_traffic(placement: Placement, events: PlacedEvents) -> dict[str, float]:
    """Bytes per image that cores read and write: weights, neuron state, messages."""
    weights = 0.0
    for layer in events.layers:
        bits = placement.network.layers[layer.name].weight_bits
        weights += (layer.sum("sops") + layer.sum("repeats")) * bits / 8 / events.images
    state = STATE_BYTES * (2 * events.mean("updates_active") + events.mean("updates_idle"))
    messages = MESSAGE_BYTES * events.mean("received")
    return {
        "weights": weights,
        "state": state,
        "messages": messages,
        "bytes": weights + state + messages,
    }

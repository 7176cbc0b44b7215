"""Networks on the cores of Loihi-style chips: placement, events after it, time and energy."""

from hardware.placement.activity import Activity, measured
from hardware.placement.energy import PlacedCost, placed_cost
from hardware.placement.layers import Network, network_of
from hardware.placement.measure import LayerEvents, PlacedEvents, differences, measure
from hardware.placement.place import Placement, place, violations
from hardware.placement.presets import preset_graph, preset_names, spikformer_shape
from hardware.placement.split import Split, core_limits
from hardware.placement.timing import StepTimes

__all__ = [
    "Activity",
    "LayerEvents",
    "Network",
    "PlacedCost",
    "PlacedEvents",
    "Placement",
    "Split",
    "StepTimes",
    "core_limits",
    "differences",
    "measure",
    "measured",
    "network_of",
    "place",
    "placed_cost",
    "preset_graph",
    "preset_names",
    "spikformer_shape",
    "violations",
]

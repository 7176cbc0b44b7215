"""What quantisation rounded, layer by layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from atsnn.fixed_point import (
    ACTIVATION_LIMIT,
    ACTIVATION_SHIFT,
    DECAY_UNITY,
    STATE_LIMIT,
    NeuronConstants,
    NeuronModel,
)


@dataclass(frozen=True)
class LayerRounding:
    """One synapse and the neurons behind it.

    Attributes:
        node, source: of the synapse, and its torch module.
        neuron: the LIF node behind it.
        scale: activation units per real unit of input current.
        weight_bits: bits that a core stores per weight: sign included, without the last bit, which
            is always 0; 0 for attention, which has no weights.
        weight_error: largest |real - rounded| weight, as a share of the largest real weight.
        zeroed: share of the nonzero real weights that became 0.
        bias_error: largest error of the bias, as a share of the threshold current.
        threshold_error: relative error of the threshold.
        decay_error: largest error of a decay per step (membrane or current).
        bound: largest |activation| that any input can cause.
        headroom: what an activation holds / bound; at least 1.
        membrane_headroom: what a membrane holds / the furthest that it can be driven within one
            image; below 1 it may saturate, alike in every executor, and the engine counts it.
    """

    node: str
    source: str
    neuron: str
    scale: float
    weight_bits: int
    weight_error: float
    zeroed: float
    bias_error: float
    threshold_error: float
    decay_error: float
    bound: int
    headroom: float
    membrane_headroom: float

    def as_json(self) -> dict[str, Any]:
        """JSON types; headroom without a limit is None."""
        return {
            key: None if isinstance(value, float) and math.isinf(value) else value
            for key, value in asdict(self).items()
        }


def weight_rounding(
    real: npt.NDArray[np.float64], integers: npt.NDArray[np.int32], weight_scale: float
) -> tuple[int, float, float]:
    """Bits of the largest integer, largest relative error, and the share that became zero."""
    largest = float(np.abs(real).max(initial=0.0))
    if largest == 0:
        return 0, 0.0, 0.0
    error = float(np.abs(real - integers / weight_scale).max()) / largest
    nonzero = np.count_nonzero(real)
    zeroed = np.count_nonzero((integers == 0) & (real != 0)) / nonzero
    halves = integers // 2
    bits = 1 + max(int(halves.max()).bit_length(), int(-1 - halves.min()).bit_length())
    return bits, error, float(zeroed)


def neuron_rounding(
    model: NeuronModel,
    constants: NeuronConstants,
    scale: float,
    bias: npt.NDArray[np.float64],
) -> tuple[float, float, float]:
    """Errors of bias (share of the threshold), threshold (relative) and decay (per step)."""
    wanted = model.gain * scale * model.threshold
    held = constants.bias / (scale * 2**ACTIVATION_SHIFT)
    bias_error = float(np.abs(bias + model.leak - held).max(initial=0.0)) / model.threshold
    decays = (
        abs(model.membrane_rate - constants.dv / DECAY_UNITY),
        abs(model.current_rate - (constants.du + 1) / DECAY_UNITY),
    )
    return bias_error, abs(constants.threshold - wanted) / wanted, max(decays)


def headroom(bound: int) -> float:
    """How many times larger an activation could be."""
    return ACTIVATION_LIMIT / bound if bound else float("inf")


def membrane_headroom(
    model: NeuronModel, constants: NeuronConstants, bound: int, steps: int
) -> float:
    """How many times further a membrane could be driven than any image can within `steps`."""
    current = growth(1.0 - model.current_rate, steps) * bound * 2**ACTIVATION_SHIFT
    drive = current + int(np.abs(constants.bias).max(initial=0))
    reach = growth(1.0 - model.membrane_rate, steps) * drive
    return STATE_LIMIT / reach if reach else float("inf")


def growth(keep: float, steps: int) -> float:
    """How far a constant drive of 1 accumulates in a state that keeps a share `keep` per step."""
    return sum(keep**t for t in range(steps))

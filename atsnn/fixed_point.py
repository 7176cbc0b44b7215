"""Integer arithmetic of a Loihi-style neuron core, as Lava's bit-accurate LIF model has it.

numpy only: the quantised torch model, the graph passes, the engine and the Lava processes all take
their constants and roundings from here, so that they cannot drift apart. Source of the arithmetic:
`lava/proc/lif/models.py` (PyLifModelFixed) and `lava/proc/dense/models.py` of lava-nc 0.10.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.floating]

ACTIVATION_SHIFT = 6
DECAY_UNITY = 4096
STATE_LIMIT = 2**23 - 1
ACTIVATION_LIMIT = 2**17 - 1
"""Largest |activation| that survives `<< 6` in a 24-bit current."""
THRESHOLD_LIMIT = 2**17 - 1
BIAS_MANTISSA_LIMIT = 2**12 - 1
BIAS_EXPONENT_LIMIT = 7
WEIGHT_MIN, WEIGHT_MAX = -256, 254
"""Range of a mixed-sign 8-bit synapse: even values only."""
SCORE_UNITY = 4096
"""Halting scores and accumulators are integers in units of 1/4096."""
MERGE_UNITY = 256
"""The weights of one synaptic reduction add up to this."""
EXACT_FLOAT32 = 2**24
"""Integers up to this magnitude are exact in float32; the quantised torch model relies on it."""


def decay(state: IntArray, constant: int) -> IntArray:
    """`sign(x) * ((|x| * (4096 - constant)) >> 12)`: exponential decay that rounds toward zero."""
    magnitude = (np.abs(state).astype(np.int64) * (DECAY_UNITY - constant)) >> 12
    return (np.sign(state) * magnitude).astype(state.dtype)


def wrap24(state: IntArray) -> IntArray:
    """Wrap modulo 2^24 into [-(2^23 - 1), 2^23], the range of a current in Lava's model."""
    return ((state + STATE_LIMIT) & (2**24 - 1)) - STATE_LIMIT


@dataclass(frozen=True)
class NeuronConstants:
    """What a neuron core holds of one LIF layer.

    Attributes:
        du: 12-bit current decay (4095: no current memory).
        dv: 12-bit voltage decay (2048: tau = 2; 0: integrate and fire).
        threshold: 17-bit mantissa; the voltage is compared with `threshold << 6`.
        bias_mantissa: int32 [channels], each |m| <= 4095.
        bias_exponent: 0 ... 7.
    """

    du: int
    dv: int
    threshold: int
    bias_mantissa: npt.NDArray[np.int32]
    bias_exponent: int

    @property
    def bias(self) -> npt.NDArray[np.int32]:
        """Bias that is added to the voltage each step, int32 [channels]."""
        return (self.bias_mantissa << self.bias_exponent).astype(np.int32)


@dataclass(frozen=True)
class LIFStep:
    """Result of `lif_step`: new state, spikes, and how often the arithmetic left its range."""

    current: npt.NDArray[np.int32]
    voltage: npt.NDArray[np.int32]
    spikes: npt.NDArray[np.bool_]
    current_wraps: int
    voltage_saturations: int


def lif_step(
    current: npt.NDArray[np.int32],
    voltage: npt.NDArray[np.int32],
    activation: IntArray,
    constants: NeuronConstants,
    bias: IntArray | int,
) -> LIFStep:
    """One time step of Lava's fixed-point LIF, elementwise on arrays of any one shape.

    Args:
        current, voltage: state before the step.
        activation: sum of weighted spikes.
        constants: layer constants.
        bias: `constants.bias`, broadcast by the caller to the state's shape.
    """
    raw = decay(current, constants.du + 1).astype(np.int64) + (
        activation.astype(np.int64) << ACTIVATION_SHIFT
    )
    new_current = wrap24(raw)
    unclipped = decay(voltage, constants.dv).astype(np.int64) + new_current + bias
    new_voltage = np.clip(unclipped, -STATE_LIMIT, STATE_LIMIT)
    spikes = new_voltage > (constants.threshold << ACTIVATION_SHIFT)
    return LIFStep(
        current=new_current.astype(np.int32),
        voltage=np.where(spikes, 0, new_voltage).astype(np.int32),
        spikes=spikes,
        current_wraps=int(np.count_nonzero(raw != new_current)),
        voltage_saturations=int(np.count_nonzero(unclipped != new_voltage)),
    )


def even_weights(weight: FloatArray, scale: float) -> npt.NDArray[np.int32]:
    """Round `scale * weight` to the even integers in [-256, 254] of a mixed-sign synapse."""
    doubled = 2.0 * np.rint(weight.astype(np.float64) * (scale / 2.0))
    return np.clip(doubled, WEIGHT_MIN, WEIGHT_MAX).astype(np.int32)


def activation_bound(weight: IntArray, input_max: int) -> int:
    """Largest |sum of weight * input| over inputs in [0, input_max]; output channels on axis 0."""
    flat = weight.reshape(weight.shape[0], -1)
    size = np.abs(flat).sum(axis=1, dtype=np.int64)
    total = flat.sum(axis=1, dtype=np.int64)
    larger_side = (size + np.abs(total)) // 2  # of the positive and the negative weights
    return int(larger_side.max(initial=0)) * input_max


@dataclass(frozen=True)
class NeuronModel:
    """The real-valued neuron: `i = (1-syn) i + x; v = v + mem * (i + v_leak - v)`, or `v + x`.

    Attributes:
        membrane_rate: dt * tau_mem_inv (1/tau); 0 for a neuron that only integrates.
        current_rate: dt * tau_syn_inv; 1 for a neuron without current memory (LIFBox).
        threshold: v_th.
        leak: v_leak.
    """

    membrane_rate: float
    current_rate: float
    threshold: float
    leak: float = 0.0

    @property
    def gain(self) -> float:
        """Factor between the membrane in real units and the membrane in units of its input."""
        return 1.0 / self.membrane_rate if self.membrane_rate else 1.0


@dataclass(frozen=True)
class QuantizedSynapse:
    """Integer weights of one layer, the constants of its neurons, and what rounding did.

    Attributes:
        weight: int32, even, shape of the float weight.
        scale: activation units per real unit of input current.
        weight_scale: integer weight per real weight (scale = weight_scale * input_scale).
        constants: of the neurons behind the synapse.
        bound: largest |activation| that any input can cause.
    """

    weight: npt.NDArray[np.int32]
    scale: float
    weight_scale: float
    constants: NeuronConstants
    bound: int


def quantize_synapse(
    weight: FloatArray,
    bias: FloatArray,
    neuron: NeuronModel,
    input_max: int,
    input_scale: float,
) -> QuantizedSynapse:
    """Choose the largest scale at which weights, activations, threshold and bias all fit the core.

    Args:
        weight: real weights, output channels on axis 0.
        bias: real bias [output channels].
        neuron: the real-valued neuron behind the synapse.
        input_max: largest integer that arrives on one axon.
        input_scale: integer on the axon per real unit.
    """
    scale = _largest_weight_scale(weight, bias, neuron, input_max, input_scale)
    integers = even_weights(weight, scale)
    while activation_bound(integers, input_max) > ACTIVATION_LIMIT:
        scale *= 0.999 * ACTIVATION_LIMIT / activation_bound(integers, input_max)
        integers = even_weights(weight, scale)
    current_scale = scale * input_scale
    return QuantizedSynapse(
        weight=integers,
        scale=current_scale,
        weight_scale=scale,
        constants=neuron_constants(neuron, current_scale, bias),
        bound=activation_bound(integers, input_max),
    )


def _largest_weight_scale(
    weight: FloatArray,
    bias: FloatArray,
    neuron: NeuronModel,
    input_max: int,
    input_scale: float,
) -> float:
    flat = weight.reshape(weight.shape[0], -1).astype(np.float64)
    reach = max(np.maximum(flat, 0).sum(1).max(), np.maximum(-flat, 0).sum(1).max())
    largest_bias = float(np.abs(bias + neuron.leak).max(initial=0.0))
    candidates = [THRESHOLD_LIMIT / (input_scale * neuron.gain * neuron.threshold)]
    if reach > 0:
        candidates += [
            WEIGHT_MAX / float(np.abs(flat).max()),
            ACTIVATION_LIMIT / (reach * input_max),
        ]
    if largest_bias > 0:
        fits = (BIAS_MANTISSA_LIMIT << BIAS_EXPONENT_LIMIT) / 2**ACTIVATION_SHIFT
        candidates.append(fits / (largest_bias * input_scale))
    return min(candidates)


def neuron_constants(neuron: NeuronModel, scale: float, bias: FloatArray) -> NeuronConstants:
    """Constants of a LIF layer whose activation carries `scale` units per real unit of current."""
    drive = (np.asarray(bias, np.float64) + neuron.leak) * scale * 2**ACTIVATION_SHIFT
    largest = float(np.abs(drive).max(initial=0.0))
    exponent = max(0, math.ceil(math.log2(max(largest, 1.0) / BIAS_MANTISSA_LIMIT)))
    exponent = min(exponent, BIAS_EXPONENT_LIMIT)
    mantissa = np.clip(
        np.rint(drive / 2**exponent), -BIAS_MANTISSA_LIMIT, BIAS_MANTISSA_LIMIT
    ).astype(np.int32)
    return NeuronConstants(
        du=round(DECAY_UNITY * neuron.current_rate) - 1,
        dv=round(DECAY_UNITY * neuron.membrane_rate),
        threshold=round(neuron.gain * scale * neuron.threshold),
        bias_mantissa=mantissa,
        bias_exponent=exponent,
    )


def halting_table(
    gamma: float, beta: float, levels: int, fraction_bits: int
) -> npt.NDArray[np.int32]:
    """`sigmoid(gamma * x + beta)` in units of 1/4096, int32 [levels], entry X for x = X / 2^F."""
    x = np.arange(levels, dtype=np.float64) / 2**fraction_bits
    drive = np.maximum(gamma * x + beta, -700.0)  # exp stays finite; the entry is 0 long before
    return np.rint(SCORE_UNITY / (1.0 + np.exp(-drive))).astype(np.int32)


def halting_threshold(epsilon: float) -> int:
    """`1 - epsilon` in units of 1/4096: a gate is open while its accumulator is below this."""
    return round((1.0 - epsilon) * SCORE_UNITY)


def pixels_to_integers(images: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Keep the upper `bits` of 8-bit pixels; the result stands for `value / (2^bits - 1)`."""
    return (images >> (8 - bits)).astype(np.uint8)


def quantize_readout(
    weight: FloatArray, bias: FloatArray, cells: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], float]:
    """Even 8-bit weights, integer bias and the scale of the read-out's logits.

    `logits = (weight_int @ sum + bias_int) / scale`, where `sum` adds up `cells` values
    (time steps * tokens * 2^F) per channel.
    """
    largest = float(np.abs(weight).max(initial=0.0))
    weight_scale = WEIGHT_MAX / largest if largest > 0 else 1.0
    scale = weight_scale * cells
    return even_weights(weight, weight_scale), np.rint(bias * scale).astype(np.int64), scale

"""Integer arithmetic: limits of the core, and which scale the quantiser takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atsnn import fixed_point
from atsnn.fixed_point import NeuronConstants, NeuronModel

LIF_BOX = NeuronModel(membrane_rate=0.5, current_rate=1.0, threshold=1.0)
FINITE = st.floats(-50, 50, width=32, allow_subnormal=False)
WEIGHTS = hnp.arrays(np.float32, (4, 6), elements=FINITE)
BIASES = hnp.arrays(np.float32, 4, elements=FINITE)


class TestDecay:
    @given(st.integers(-(2**23), 2**23), st.integers(0, 4096))
    def test_rounds_toward_zero(self, state: int, constant: int) -> None:
        exact = abs(state) * (4096 - constant) // 4096
        expected = exact if state >= 0 else -exact
        assert fixed_point.decay(np.array([state]), constant)[0] == expected


class TestWrap:
    @pytest.mark.parametrize(
        ("value", "wrapped"),
        [
            (0, 0),
            (2**23, 2**23),
            (2**23 + 1, -(2**23) + 1),
            (-(2**23) + 1, -(2**23) + 1),
            (-(2**23), 2**23),
        ],
    )
    def test_wraps_as_lava_does(self, value: int, wrapped: int) -> None:
        assert fixed_point.wrap24(np.array([value]))[0] == wrapped


class TestStep:
    CONSTANTS = NeuronConstants(4095, 2048, 100, np.zeros(1, np.int32), 0)

    def step(self, activation: int, voltage: int = 0) -> fixed_point.LIFStep:
        state = np.zeros(1, np.int32)
        return fixed_point.lif_step(
            state, state + np.int32(voltage), np.array([activation]), self.CONSTANTS, 0
        )

    def test_fires_strictly_above_threshold_and_resets(self) -> None:
        at, above = self.step(100), self.step(101)
        assert (at.spikes[0], at.voltage[0]) == (False, 100 << 6)
        assert (above.spikes[0], above.voltage[0]) == (True, 0)

    def test_counts_saturation_and_wrap(self) -> None:
        assert self.step(131_071, voltage=2**23 - 1).voltage_saturations == 1
        assert self.step(131_073).current_wraps == 1
        assert self.step(131_071).current_wraps == 0


class TestQuantizeSynapse:
    @given(WEIGHTS, BIASES, st.sampled_from([(1, 1.0), (63, 63.0), (80, 8.0)]))
    def test_every_limit_of_the_core_holds(
        self, weight: np.ndarray, bias: np.ndarray, entering: tuple[int, float]
    ) -> None:
        input_max, input_scale = entering
        found = fixed_point.quantize_synapse(weight, bias, LIF_BOX, input_max, input_scale)
        constants = found.constants
        assert not np.any(found.weight % 2)
        assert found.weight.min() >= -256
        assert found.weight.max() <= 254
        assert found.bound <= fixed_point.ACTIVATION_LIMIT
        assert 0 <= constants.threshold <= fixed_point.THRESHOLD_LIMIT
        assert np.abs(constants.bias_mantissa).max() <= fixed_point.BIAS_MANTISSA_LIMIT
        assert 0 <= constants.bias_exponent <= fixed_point.BIAS_EXPONENT_LIMIT

    @given(WEIGHTS)
    def test_weights_are_within_one_of_the_scaled_reals(self, weight: np.ndarray) -> None:
        found = fixed_point.quantize_synapse(weight, np.zeros(4), LIF_BOX, 1, 1.0)
        assert np.abs(found.weight - weight * found.weight_scale).max() <= 1 + 1e-6

    def test_threshold_is_tau_times_scale_times_v_th(self) -> None:
        found = fixed_point.quantize_synapse(np.ones((1, 2)), np.zeros(1), LIF_BOX, 1, 1.0)
        assert found.constants.threshold == 2 * 254

    def test_attention_needs_no_rounding(self) -> None:
        """0.125 * counts with v_th 0.5 and tau 2: counts against a threshold of 8."""
        attention = NeuronModel(membrane_rate=0.5, current_rate=1.0, threshold=0.5)
        constants = fixed_point.neuron_constants(attention, 8.0, np.zeros(1))
        assert (constants.threshold, constants.du, constants.dv) == (8, 4095, 2048)


class TestTables:
    def test_halting_table_is_monotone_and_ends_at_certainty(self) -> None:
        table = fixed_point.halting_table(5.0, -5.0, levels=17, fraction_bits=3)
        assert np.all(np.diff(table) >= 0)
        assert table[8] == 2048
        assert table[16] >= fixed_point.halting_threshold(0.01)

    def test_pixels_keep_their_upper_bits(self) -> None:
        pixels = np.array([0, 3, 4, 255], np.uint8)
        assert fixed_point.pixels_to_integers(pixels, 6).tolist() == [0, 0, 1, 63]

    def test_readout_holds_eight_bit_even_weights(self) -> None:
        weight, bias, scale = fixed_point.quantize_readout(
            np.array([[0.5, -0.25]]), np.array([1.0]), cells=10
        )
        assert weight.tolist() == [[254, -126]] or weight.tolist() == [[254, -128]]
        assert bias[0] == scale == 254 / 0.5 * 10

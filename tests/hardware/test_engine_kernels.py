"""Each event-driven kernel gives the integers of its numpy definition, whatever runs it."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_networks import Adaptive, conv_network, images_for

from atsnn.fixed_point import ACTIVATION_SHIFT, STATE_LIMIT, NeuronConstants, decay, lif_step
from hardware.engine import coincidence, run
from hardware.engine import layers as layer_executors
from hardware.engine.coincidence import attend, attend_and_fire, can_fire
from hardware.engine.counting import Traffic, messages, weigh
from hardware.engine.dense import DenseSynapses, as_bytes, can_be_bytes, dense_is_faster
from hardware.engine.kernels import Convolution, or_pool
from hardware.engine.lists import EventLists, list_events
from hardware.engine.neurons import Neurons
from hardware.engine.plan import Interval
from hardware.engine.pooling import pool_spikes
from hardware.engine.products import has_dot_products
from hardware.engine.shared import Shared
from hardware.engine.synapses import (
    SpikingSynapses,
    Synapses,
    Window,
    can_fuse,
    fits_eight_bits,
    map_window,
    token_window,
)
from hardware.events import NodeCounter

seeds = st.integers(0, 10_000)


def inputs(rng: np.random.Generator, shape: tuple[int, ...], graded: bool) -> np.ndarray:
    """A third of them not 0: spikes, or integers of either sign."""
    spikes = rng.random(shape) < 0.33
    return spikes * rng.integers(-40, 200, shape, dtype=np.int32) if graded else spikes


@dataclass(frozen=True)
class Layer:
    """A convolution over [S, B, H * W, C], or a linear layer where `kernel` is None."""

    weight: np.ndarray
    window: Window
    rows: np.ndarray
    gate: np.ndarray | None
    constants: NeuronConstants
    shift: int
    steps: int = 5

    @property
    def products(self) -> np.ndarray:
        """int64 [S, B, places, O] by definition."""
        w = self.window
        maps = self.rows.reshape(-1, w.height, w.width, w.channels).transpose(0, 3, 1, 2)
        weight = self.weight.reshape(len(self.weight), w.channels, w.kernel_height, -1)
        out = Convolution(
            weight, (w.stride_y, w.stride_x), (w.padding_y, w.padding_x), (1, 1), 1, np.float64
        )(maps)
        out = out.transpose(0, 2, 3, 1)
        return out.reshape(*self.rows.shape[:2], w.places, -1).astype(np.int64)

    @property
    def bound(self) -> Interval:
        low, high = int(self.rows.min(initial=0)), int(self.rows.max(initial=0))
        return Interval(low, high) if self.rows.dtype != np.bool_ else Interval(0, 1)

    @property
    def synapses(self) -> Synapses:
        largest = int(np.abs(self.products).max(initial=0))
        return Synapses(self.weight, self.window, largest, self.shift)

    @property
    def events(self) -> EventLists:
        return list_events(self.rows, self.window.width, self.gate, self.bound, self.shift)


@st.composite
def layers(draw: st.DrawFn, lists: bool = False) -> Layer:
    """Any geometry, any values; with `lists` only what the neurons' kernels take."""
    rng = np.random.default_rng(draw(seeds))
    kind = draw(st.sampled_from(["spikes", "few", "bytes"] if lists else KINDS))
    outputs, channels = draw(st.sampled_from([1, 8, 16, 20, 33, 64, 70])), draw(st.integers(1, 21))
    odd = draw(st.booleans())
    steps = draw(st.sampled_from([1, 5]))
    shift = draw(st.sampled_from([0, 3])) if kind != "spikes" else 0
    if draw(st.booleans()):
        window = token_window(draw(st.integers(1, 9)), channels)
        weight = np.zeros((outputs, channels), np.int32)
    else:
        kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        padding = (draw(st.integers(0, kernel[0] - 1)), draw(st.integers(0, kernel[1] - 1)))
        size = tuple(draw(st.integers(k, 7)) for k in kernel)
        stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        weight = np.zeros((outputs, channels, *kernel), np.int32)
        window = map_window((channels, *size), weight, stride, padding)
    weight = rng.integers(-128, 128, weight.shape, dtype=np.int32) * (1 if odd else 2)
    rows = values_of(kind, rng, (steps, 2, window.height * window.width, channels)) << shift
    gate = None
    if weight.ndim == 2 and draw(st.booleans()):
        gate = rng.random((5, 2, window.places)) < 0.6
    bias = (rng.integers(-300, 301, outputs) * rng.integers(0, 2, outputs)).astype(np.int32)
    constants = NeuronConstants(4095, draw(st.sampled_from([0, 2048])), 300, bias, 2)
    return Layer(weight, window, rows.astype(rows.dtype), gate, constants, shift)


KINDS = ["spikes", "few", "bytes", "signed"]


def values_of(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A third of them not 0."""
    spikes = rng.random(shape) < 0.33
    low, high = {"spikes": (1, 2), "few": (1, 5), "bytes": (1, 256), "signed": (-40, 200)}[kind]
    if kind == "spikes":
        return spikes
    return (spikes * rng.integers(low, high, shape)).astype(np.int32)


def by_definition(layer: Layer) -> tuple[np.ndarray, np.ndarray, int]:
    """Spikes, idle updates and saturations, with `lif_step`; closed tokens are held."""
    products = layer.products
    shape = products.shape[1:]
    voltage = np.zeros(shape, np.int32)
    spikes = np.zeros((layer.steps, *shape), np.bool_)
    idle, saturations = np.zeros(shape[0], np.int64), 0
    for t in range(layer.steps):
        now = products[t % len(products)]
        is_open = np.ones(shape[:2], np.bool_) if layer.gate is None else layer.gate[t]
        quiet = (now == 0) & (voltage == 0) & (layer.constants.bias == 0)
        idle += (quiet & is_open[..., None]).sum(axis=(1, 2))
        before, rest = voltage, np.zeros(shape, np.int32)
        step = lif_step(rest, voltage, now, layer.constants, layer.constants.bias)
        spikes[t] = step.spikes & is_open[..., None]
        voltage = np.where(is_open[..., None], step.voltage, voltage)
        clipped = np.abs(
            decay(before, layer.constants.dv) + (now << ACTIVATION_SHIFT) + layer.constants.bias
        )
        saturations += int(((clipped > STATE_LIMIT) & is_open[..., None]).sum())
    return spikes, idle, saturations


class TestSynapses:
    @settings(max_examples=100, deadline=None)
    @given(layer=layers())
    def test_sums_are_those_of_the_dense_layer_and_0_where_the_gate_is_closed(
        self, layer: Layer
    ) -> None:
        expected = layer.products
        if layer.gate is not None:
            expected = np.where(layer.gate[..., None], expected, 0)
        sums = layer.synapses.sums(layer.events, layer.gate)
        assert np.array_equal(sums, np.broadcast_to(expected, sums.shape))

    @settings(max_examples=100, deadline=None)
    @given(layer=layers())
    def test_neurons_behind_them_fire_as_lif_step_has_it(self, layer: Layer) -> None:
        largest = int(np.abs(layer.products).max(initial=0))
        assume(can_fuse(layer.constants, Interval(-largest, largest)))
        spikes, idle, saturations = by_definition(layer)
        fired = SpikingSynapses(layer.synapses, layer.constants).fire(
            layer.events, layer.gate, layer.steps
        )
        assert np.array_equal(fired.spikes, spikes)
        assert np.array_equal(fired.found, spikes.sum(axis=-1))
        assert np.array_equal(fired.idle, idle)
        assert fired.saturations == saturations

    @pytest.mark.skipif(not has_dot_products(), reason="needs a processor with VNNI")
    @settings(max_examples=100, deadline=None)
    @given(layer=layers(lists=True))
    def test_dense_products_give_the_same(self, layer: Layer) -> None:
        spiking = SpikingSynapses(layer.synapses, layer.constants)
        listed = spiking.fire(layer.events, layer.gate, layer.steps)
        assert can_be_bytes(layer.bound, layer.shift)
        arriving = as_bytes(layer.rows, spiking.synapses, layer.shift)
        dense = DenseSynapses(spiking).fire(arriving, 2, layer.gate, layer.steps)
        assert np.array_equal(dense.spikes, listed.spikes)
        assert np.array_equal(dense.found, listed.found)
        assert np.array_equal(dense.idle, listed.idle)
        assert dense.saturations == listed.saturations

    @pytest.mark.parametrize("dense", [False, True])
    def test_a_voltage_that_would_leave_24_bits_is_clipped_and_counted(self, dense: bool) -> None:
        window = token_window(1, 1100)
        weight = np.full((1, 1100), -254, np.int32)
        synapses = Synapses(weight, window, 254 * 1100)
        zero = np.zeros(1, np.int32)
        neurons = SpikingSynapses(synapses, NeuronConstants(4095, 0, 10, zero, 0))
        rows = np.zeros((2, 1, 1, 1100), np.bool_)
        rows[:, :, :, :500] = True  # 127,000 a step: under the limit of a current
        if dense and not has_dot_products():
            pytest.skip("needs a processor with VNNI")
        if dense:
            arriving = as_bytes(rows, synapses, 0)
            fired = DenseSynapses(neurons).fire(arriving, 1, None, 2)
        else:
            fired = neurons.fire(list_events(rows, 1, None, Interval(0, 1), 0), None, 2)
        assert fired.saturations == 1
        assert not fired.spikes.any()

    def test_sums_in_between_may_leave_16_bits_if_the_last_one_does_not(self) -> None:
        weight = np.repeat(np.array([254, -256], np.int32), 400)[None]
        rows = np.ones((1, 1, 1, 800), np.bool_)
        events = list_events(rows, 1, None, Interval(0, 1), 0)
        narrow = Synapses(weight, token_window(1, 800), 800)
        assert narrow.narrow
        assert narrow.sums(events, None).tolist() == [[[[-800]]]]

    @pytest.mark.parametrize("sign", [254, -256])
    def test_sums_that_leave_16_bits_are_carried_to_32(self, sign: int) -> None:
        weight = np.full((3, 2000), sign, np.int32)
        events = list_events(np.ones((1, 1, 1, 2000), np.bool_), 1, None, Interval(0, 1), 0)
        wide = Synapses(weight, token_window(1, 2000), 2000 * 256)
        assert not wide.narrow
        assert wide.sums(events, None).tolist() == [[[[2000 * sign] * 3]]]

    @pytest.mark.parametrize(("largest", "narrow"), [(65_535, True), (65_536, False)])
    def test_sums_are_narrow_where_the_bound_proves_it(self, largest: int, narrow: bool) -> None:
        weight = np.full((1, 2), 254, np.int32)
        assert Synapses(weight, token_window(1, 2), largest).narrow is narrow

    @pytest.mark.parametrize(
        ("weights", "fits"),
        [([-256, 254], True), ([-128, 127], True), ([-258, 0], False), ([-129, 1], False)],
    )
    def test_which_weights_fit(self, weights: list[int], fits: bool) -> None:
        assert fits_eight_bits(np.array([weights])) is fits

    def test_an_image_alone_is_cut_into_parts_for_the_threads(self) -> None:
        rng = np.random.default_rng(0)
        weight = 2 * rng.integers(-9, 9, (4, 3, 3, 3), dtype=np.int32)
        window = map_window((3, 11, 7), weight, (1, 1), (1, 1))
        rows = rng.random((2, 9, 77, 3)) < 0.4
        synapses = Synapses(weight, window, 1000)
        together = synapses.sums(list_events(rows, 7, None, Interval(0, 1), 0), None)
        for b in range(9):
            alone = list_events(rows[:, b : b + 1], 7, None, Interval(0, 1), 0)
            assert np.array_equal(synapses.sums(alone, None), together[:, b : b + 1])


class TestWhichKernel:
    def test_dense_above_some_density_and_never_below_it(self) -> None:
        weight = np.zeros((384, 384), np.int32)
        synapses = Synapses(weight, token_window(64, 384), 1)
        chosen = [bool(dense_is_faster(synapses, share)) for share in np.linspace(0, 1, 101)]
        assert chosen == sorted(chosen)
        assert chosen[0] is False
        assert chosen[-1] is True

    @pytest.mark.parametrize(
        ("values", "shift", "fit"),
        [
            (Interval(0, 255), 0, True),
            (Interval(0, 256), 0, False),
            (Interval(0, 2047), 3, True),
            (Interval(-1, 9), 0, False),
        ],
    )
    def test_dense_products_take_unsigned_bytes(
        self, values: Interval, shift: int, fit: bool
    ) -> None:
        assert can_be_bytes(values, shift) is fit


class TestLists:
    def test_pixels_of_a_line_lie_side_by_side(self) -> None:
        rows = np.zeros((1, 1, 6, 2), np.bool_)  # two lines of three pixels, two channels
        rows[0, 0, 1, 1] = rows[0, 0, 2, 0] = rows[0, 0, 4, 0] = True
        events = list_events(rows, 3, None, Interval(0, 1), 0)
        assert events.starts[0, 0].tolist() == [0, 0, 1, 2, 2, 3, 3]
        assert events.index[0, 0, :3].tolist() == [3, 4, 2]

    def test_few_spikes_in_one_value_are_listed_as_often(self) -> None:
        rows = np.array([[[[0, 2, 1] + [0] * 9 + [3]]]], np.int32)
        events = list_events(rows, 1, None, Interval(0, 3), 0)
        assert not events.graded
        assert sorted(events.index[0, 0, :6].tolist()) == [1, 1, 2, 12, 12, 12]

    def test_many_keep_their_value(self) -> None:
        rows = np.array([[[[0, 200, 8]]]], np.int32)
        events = list_events(rows, 1, None, Interval(0, 255), 3)
        assert events.graded
        assert events.value[0, 0, :2].tolist() == [25, 1]

    def test_closed_rows_list_nothing(self) -> None:
        rows = np.ones((1, 1, 3, 9), np.bool_)
        gate = np.array([[[True, False, True]]])
        events = list_events(rows, 1, gate, Interval(0, 1), 0)
        assert events.starts[0, 0].tolist() == [0, 9, 9, 18]


class TestPool:
    @settings(max_examples=60)
    @given(
        seed=seeds,
        size=st.tuples(st.integers(4, 12), st.integers(4, 12)),
        kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    )
    def test_equals_the_maximum_over_windows(
        self, seed: int, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int]
    ) -> None:
        padding = (kernel[0] // 2, kernel[1] // 2)
        maps = np.random.default_rng(seed).random((2, *size, 3)) < 0.1
        expected = or_pool(maps.transpose(0, 3, 1, 2), kernel, stride, padding)
        found, spikes = pool_spikes(maps, kernel, stride, padding)
        assert np.array_equal(spikes, found.sum(axis=3).reshape(len(maps), -1))
        assert np.array_equal(found.transpose(0, 3, 1, 2), expected)


class TestFiring:
    @settings(max_examples=60)
    @given(
        seed=seeds,
        du=st.sampled_from([4095, 4095, 2000]),
        dv=st.sampled_from([0, 2048, 1300]),
        largest=st.sampled_from([3, 400, 200_000]),
        width=st.sampled_from([6, 16, 80]),
        still=st.booleans(),
        gated=st.booleans(),
    )
    def test_equals_lif_step_with_closed_tokens_held(
        self, seed: int, du: int, dv: int, largest: int, width: int, still: bool, gated: bool
    ) -> None:
        rng = np.random.default_rng(seed)
        mantissa = rng.integers(-300, 301, width, dtype=np.int32) * rng.integers(0, 2, width)
        constants = NeuronConstants(du, dv, 300, mantissa.astype(np.int32), 2)
        activation = rng.integers(-largest, largest + 1, (1 if still else 5, 2, 4, width))
        activation *= rng.integers(0, 2, activation.shape)
        if largest < 2**15:
            activation = activation.astype(np.int16)
        gate = rng.random((5, 2, 4)) < 0.6
        neurons = Neurons(constants, (4, width), largest)
        neurons.start(2)
        fired = neurons.advance(activation, gate if gated else None, 5, count_idle=True)
        open_at = gate[..., None] if gated else np.ones((5, 2, 4, 1), bool)
        voltage, current = np.zeros((2, 2, 4, width), np.int32)
        wraps = saturations = 0
        idle = np.zeros(2, np.int64)
        for t in range(5):
            now = activation[t % len(activation)].astype(np.int32)
            quiet = (now == 0) & (voltage == 0) & (current == 0) & (constants.bias == 0)
            idle += (quiet & open_at[t]).sum(axis=(1, 2))
            for b, n in np.argwhere(open_at[t][..., 0]):
                step = lif_step(current[b, n], voltage[b, n], now[b, n], constants, constants.bias)
                assert np.array_equal(fired.spikes[t, b, n], step.spikes)
                kept = step.current if not neurons.short else np.zeros(width, np.int32)
                current[b, n], voltage[b, n] = kept, step.voltage
                wraps += step.current_wraps
                saturations += step.voltage_saturations
            assert not (fired.spikes[t] & ~open_at[t]).any()
        assert np.array_equal(fired.idle, idle)
        assert np.array_equal(fired.gated, width * (~open_at).sum(axis=(0, 2, 3)))
        assert (neurons.current_wraps, neurons.voltage_saturations) == (wraps, saturations)


class TestCoincidences:
    @settings(max_examples=60)
    @given(seed=seeds, heads=st.sampled_from([1, 2, 3]), share=st.sampled_from([0.05, 0.5]))
    def test_equals_masked_attention_in_both_orders(
        self, seed: int, heads: int, share: float
    ) -> None:
        rng = np.random.default_rng(seed)
        spikes = np.asarray(rng.random((3, 2, 2, 7, 6 * heads)) < share)
        gate = rng.random((2, 2, 7)) < 0.7
        out, counts, messages = attend(spikes[0], spikes[1], spikes[2], gate, heads, True)
        assert np.array_equal(messages, np.count_nonzero(out, axis=3))
        split = (spikes & gate[..., None]).reshape(3, 2, 2, 7, heads, 6).astype(np.int64)
        q, k, v = split.transpose(0, 1, 2, 4, 3, 5)
        scores, table = q @ k.swapaxes(-1, -2), k.swapaxes(-1, -2) @ v
        assert np.array_equal(out, (scores @ v).swapaxes(-2, -3).reshape(out.shape))
        over = (0, 2, 3, 4)
        reads = ((scores > 0) * v.sum(axis=-1)[..., None, :]).sum(axis=over)
        table_reads = ((table > 0) * q.sum(axis=-2)[..., None]).sum(axis=over)
        assert np.array_equal(counts[:, coincidence.MESSAGES], (q + k + v).sum(axis=over))
        assert np.array_equal(counts[:, coincidence.SCORES], scores.sum(axis=over))
        assert np.array_equal(counts[:, coincidence.SCORE_READS], reads)
        assert np.array_equal(counts[:, coincidence.TABLE], table.sum(axis=over))
        assert np.array_equal(counts[:, coincidence.TABLE_READS], table_reads)


class TestFiringAttention:
    @settings(max_examples=40, deadline=None)
    @given(
        seed=seeds,
        heads=st.sampled_from([1, 2, 4]),
        gated=st.booleans(),
        bias=st.sampled_from([0, 90]),
        halving=st.booleans(),
    )
    def test_equals_attention_and_then_its_neurons(
        self, seed: int, heads: int, gated: bool, bias: int, halving: bool
    ) -> None:
        rng = np.random.default_rng(seed)
        q, k, v = rng.random((3, 4, 2, 7, 32)) < 0.2
        gate = rng.random((4, 2, 7)) < 0.7 if gated else None
        dv = 2048 if halving else 0
        constants = NeuronConstants(4095, dv, 3, np.full(32, bias, np.int32), 0)
        attended = attend(q, k, v, gate, heads, True)
        neurons = Neurons(constants, (7, 32), 100)
        neurons.start(2)
        alone = neurons.advance(attended.out, gate, 4, count_idle=True)
        threshold = constants.threshold << ACTIVATION_SHIFT
        fired = attend_and_fire(q, k, v, gate, heads, True, neurons.bias, int(halving), threshold)
        assert np.array_equal(fired.spikes, alone.spikes)
        assert np.array_equal(fired.found, alone.spikes.sum(axis=3))
        assert np.array_equal(fired.events, attended.events)
        assert np.array_equal(fired.messages, attended.messages)
        assert np.array_equal(fired.idle, alone.idle)
        assert fired.saturations == neurons.voltage_saturations

    @pytest.mark.parametrize(
        ("tokens", "channels", "heads", "fits"),
        [(49, 64, 4, True), (49, 64, 16, False), (49, 24, 3, False), (2000, 64, 1, False)],
    )
    def test_heads_fill_lanes_and_sums_fit_16_bits(
        self, tokens: int, channels: int, heads: int, fits: bool
    ) -> None:
        assert can_fire(tokens, channels, heads) == fits


class TestTally:
    @settings(max_examples=60)
    @given(
        seed=seeds,
        width=st.integers(1, 40) | st.sampled_from([32, 64, 384]),
        unit=st.sampled_from([1, 8]),
        graded=st.booleans(),
        narrow=st.booleans(),
        gated=st.booleans(),
    )
    def test_tokens(
        self, seed: int, width: int, unit: int, graded: bool, narrow: bool, gated: bool
    ) -> None:
        rng = np.random.default_rng(seed)
        values = inputs(rng, (3, 2, 5, width), graded)
        values = values.astype(np.int16) if graded and narrow else values
        gate = rng.random((3, 2, 5)) < 0.6
        counter = NodeCounter(2)
        weigh(counter, Shared(), values, 7, 2, Traffic(unit), gate=gate if gated else None)
        sizes = np.abs(values.astype(np.int64)) * (gate[..., None] if gated else 1)
        plain = unit if graded else 1
        over = (0, 2, 3)
        sent = (sizes != 0).sum(axis=over)
        macs = ((sizes != 0) & (sizes != plain)).sum(axis=over)
        assert np.array_equal(counter.counts["messages"], 2 * sent)
        assert np.array_equal(counter.counts["sops"], 14 * sent)
        assert np.array_equal(counter.counts["macs"], 14 * macs)
        unrolled = ((sizes + plain - 1) // plain).sum(axis=over)
        assert np.array_equal(counter.counts["unrolled_acs"], 14 * unrolled)

    @settings(max_examples=40)
    @given(seed=seeds, graded=st.booleans())
    def test_maps_meet_their_own_fan_out(self, seed: int, graded: bool) -> None:
        rng = np.random.default_rng(seed)
        values = inputs(rng, (3, 2, 4, 5, 3), graded)
        fan_out = rng.integers(0, 10, (5, 3))
        counter = NodeCounter(2)
        weigh(counter, Shared(), values, fan_out.reshape(-1), 1, Traffic())
        assert np.array_equal(
            counter.counts["sops"], ((values != 0) * fan_out).sum(axis=(0, 2, 3, 4))
        )

    def test_rows_longer_than_a_byte_can_count(self) -> None:
        spikes = np.ones((2, 1, 8 * 1000), np.bool_)
        assert messages(Shared(), spikes).tolist() == [16_000]

    def test_shared_counts_are_of_the_same_values_and_the_same_gate(self) -> None:
        values = np.ones((1, 1, 2, 3), np.bool_)
        gate = np.array([[[True, False]]])
        shared = Shared()
        found = []
        for which in (None, gate, None, np.zeros_like(gate)):
            counter = NodeCounter(1)
            weigh(counter, shared, values, 1, 1, Traffic(), gate=which)
            found.append(counter.counts["messages"].tolist())
        assert found == [[6], [3], [6], [0]]

    def test_what_was_shared_goes_with_the_values(self) -> None:
        shared = Shared()
        values = np.ones((1, 1, 2, 3), np.bool_)
        shared.lists(values, 1, None, Interval(0, 1), 0)
        shared.messages(values)
        assert len(shared) == 2
        del values
        assert len(shared) == 0


GRAPHS = [
    Adaptive(merge=2, fraction_bits=3).build(),
    Adaptive(channels=32, merge=2, fraction_bits=3).build(),
    conv_network(),
]


@pytest.mark.parametrize("graph", GRAPHS, ids=["transformer", "wide transformer", "convolutions"])
class TestWhateverRunsIt:
    def test_one_thread_equals_two(self, graph) -> None:
        images = images_for(graph, 5)
        before = numba.get_num_threads()
        results = []
        try:
            for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):  # pyright: ignore[reportAttributeAccessIssue]  (built at run time)
                numba.set_num_threads(threads)
                results.append(run(graph, images, record="all"))
        finally:
            numba.set_num_threads(before)
        self._equal(*results)

    def test_event_driven_equals_dense(self, graph, monkeypatch: pytest.MonkeyPatch) -> None:
        images = images_for(graph, 5)
        results = []
        for dense in (False, has_dot_products()):
            monkeypatch.setattr(layer_executors, "dense_is_faster", lambda *_, dense=dense: dense)
            results.append(run(graph, images))
        self._equal(*results)

    def test_a_machine_without_byte_products_gives_the_same(
        self, graph, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = images_for(graph, 5)
        expected = run(graph, images)
        monkeypatch.setattr(layer_executors, "has_dot_products", lambda: False)
        self._equal(run(graph, images), expected)

    def test_synapses_and_neurons_in_one_equal_each_alone(self, graph) -> None:
        """Recording everything needs the sums, so each node runs by itself."""
        images = images_for(graph, 5)
        together, alone = run(graph, images), run(graph, images, record="all")
        for name in together.trace:
            assert np.array_equal(together.trace[name], alone.trace[name]), name
        assert together.events is not None
        assert alone.events is not None
        assert together.events.as_json() == alone.events.as_json()
        assert together.ranges == alone.ranges

    @staticmethod
    def _equal(a, b) -> None:
        for name in a.trace:
            assert np.array_equal(a.trace[name], b.trace[name]), name
        assert a.events.as_json() == b.events.as_json()
        assert a.ranges == b.ranges

"""Each event-driven kernel gives the integers of its numpy definition, whatever runs it."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import Adaptive, conv_network, images_for

from atsnn.fixed_point import NeuronConstants, lif_step
from hardware.engine import coincidence, executors, run, tally
from hardware.engine.coincidence import attend
from hardware.engine.counting import Traffic, nonzero, weigh
from hardware.engine.kernels import Convolution, or_pool
from hardware.engine.neurons import Neurons
from hardware.engine.pooling import pool_spikes
from hardware.engine.rows import NarrowWeights, sum_rows
from hardware.engine.scatter import Scatter
from hardware.events import NodeCounter

seeds = st.integers(0, 10_000)


def inputs(rng: np.random.Generator, shape: tuple[int, ...], graded: bool) -> np.ndarray:
    """A third of them not 0: spikes, or integers of either sign."""
    spikes = rng.random(shape) < 0.33
    return spikes * rng.integers(-40, 200, shape, dtype=np.int32) if graded else spikes


class TestRows:
    @settings(max_examples=60)
    @given(
        seed=seeds,
        size=st.tuples(st.integers(1, 150), st.integers(1, 40), st.integers(1, 70)),
        graded=st.booleans(),
        step=st.sampled_from([1, 2]),
    )
    def test_equals_the_matrix_product_of_the_open_rows(
        self, seed: int, size: tuple[int, int, int], graded: bool, step: int
    ) -> None:
        rows, width, outputs = size
        rng = np.random.default_rng(seed)
        values = inputs(rng, (rows, width), graded)
        weights = step * rng.integers(-128, 128, (width, outputs), dtype=np.int32)
        expected = values.astype(np.int64) @ weights
        chosen = np.flatnonzero(rng.random(rows) < 0.6)
        out = sum_rows(values, chosen, NarrowWeights(weights, int(np.abs(expected).max())))
        assert np.array_equal(out[chosen], expected[chosen])
        assert not np.delete(out, chosen, axis=0).any()

    def test_more_outputs_than_one_tile(self) -> None:
        rng = np.random.default_rng(0)
        values = inputs(rng, (70, 20), False)
        weights = 2 * rng.integers(-128, 128, (20, 5000), dtype=np.int32)
        out = sum_rows(values, np.arange(70), NarrowWeights(weights, 20 * 256))
        assert np.array_equal(out, values.astype(np.int64) @ weights)

    @pytest.mark.parametrize(
        ("largest", "dtype"), [(65_535, np.int16), (65_536, np.int32), (2**31 - 1, np.int32)]
    )
    def test_accumulators_are_narrow_where_the_bound_proves_it(
        self, largest: int, dtype: type
    ) -> None:
        weights = np.full((2, 1), 254, np.int32)
        assert NarrowWeights(weights, largest).accumulator.dtype == dtype

    def test_sums_in_between_may_leave_16_bits_if_the_last_one_does_not(self) -> None:
        weights = np.repeat(np.array([254, -256], np.int32), 400)[:, None]
        out = sum_rows(np.ones((1, 800), np.bool_), np.arange(1), NarrowWeights(weights, 800))
        assert out.tolist() == [[-800]]

    @pytest.mark.parametrize(
        ("weights", "fits"),
        [([-256, 254], True), ([-128, 127], True), ([-258, 0], False), ([-129, 1], False)],
    )
    def test_which_weights_fit(self, weights: list[int], fits: bool) -> None:
        assert NarrowWeights.fits(np.array([weights])) is fits


class TestScatter:
    @settings(max_examples=60)
    @given(
        seed=seeds,
        size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        channels=st.tuples(st.integers(1, 4), st.integers(1, 20)),
        graded=st.booleans(),
        pad=st.booleans(),
    )
    def test_equals_the_dense_convolution(
        self,
        seed: int,
        size: tuple[int, int],
        kernel: tuple[int, int],
        channels: tuple[int, int],
        graded: bool,
        pad: bool,
    ) -> None:
        padding = (kernel[0] // 2, kernel[1] - 1) if pad else (0, 0)
        size = (max(size[0], kernel[0]), max(size[1], kernel[1]))
        rng = np.random.default_rng(seed)
        weight = 2 * rng.integers(-128, 128, (channels[1], channels[0], *kernel), dtype=np.int32)
        maps = inputs(rng, (3, channels[0], *size), graded)
        dense = Convolution(weight, (1, 1), padding, (1, 1), 1, np.float64)(maps)
        scatter = Scatter(weight, padding, int(np.abs(dense).max()))
        assert np.array_equal(scatter(maps), dense)


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
        maps = np.random.default_rng(seed).random((2, 3, *size)) < 0.1
        expected = or_pool(maps, kernel, stride, padding)
        assert np.array_equal(pool_spikes(maps, kernel, stride, padding), expected)


class TestFiring:
    @settings(max_examples=60)
    @given(
        seed=seeds,
        du=st.sampled_from([4095, 4095, 2000]),
        dv=st.sampled_from([0, 2048, 1300]),
        largest=st.sampled_from([3, 400, 200_000]),
        still=st.booleans(),
        gated=st.booleans(),
    )
    def test_equals_lif_step_with_closed_tokens_held(
        self, seed: int, du: int, dv: int, largest: int, still: bool, gated: bool
    ) -> None:
        rng = np.random.default_rng(seed)
        mantissa = rng.integers(-300, 301, 6, dtype=np.int32) * rng.integers(0, 2, 6)
        constants = NeuronConstants(du, dv, 300, mantissa.astype(np.int32), 2)
        activation = rng.integers(-largest, largest + 1, (1 if still else 5, 2, 4, 6))
        activation *= rng.integers(0, 2, activation.shape)
        gate = rng.random((5, 2, 4)) < 0.6
        neurons = Neurons(constants, (4, 6), largest)
        neurons.start(2)
        fired = neurons.advance(activation, gate if gated else None, 5, count_idle=True)
        open_at = gate[..., None] if gated else np.ones((5, 2, 4, 1), bool)
        voltage, current = np.zeros((2, 2, 4, 6), np.int32)
        wraps = saturations = 0
        idle = np.zeros(2, np.int64)
        for t in range(5):
            now = activation[t % len(activation)]
            quiet = (now == 0) & (voltage == 0) & (current == 0) & (constants.bias == 0)
            idle += (quiet & open_at[t]).sum(axis=(1, 2))
            for b, n in np.argwhere(open_at[t][..., 0]):
                step = lif_step(current[b, n], voltage[b, n], now[b, n], constants, constants.bias)
                assert np.array_equal(fired.spikes[t, b, n], step.spikes)
                kept = step.current if not neurons.short else np.zeros(6, np.int32)
                current[b, n], voltage[b, n] = kept, step.voltage
                wraps += step.current_wraps
                saturations += step.voltage_saturations
            assert not (fired.spikes[t] & ~open_at[t]).any()
        assert np.array_equal(fired.idle, idle)
        assert np.array_equal(fired.gated, 6 * (~open_at).sum(axis=(0, 2, 3)))
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
        out, counts = attend(spikes[0], spikes[1], spikes[2], gate, heads, True)
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


class TestTally:
    @settings(max_examples=60)
    @given(
        seed=seeds,
        width=st.integers(1, 40),
        unit=st.sampled_from([1, 8]),
        graded=st.booleans(),
        gated=st.booleans(),
    )
    def test_tokens(self, seed: int, width: int, unit: int, graded: bool, gated: bool) -> None:
        rng = np.random.default_rng(seed)
        values = inputs(rng, (3, 2, 5, width), graded)
        gate = rng.random((3, 2, 5)) < 0.6
        counter = NodeCounter(2)
        weigh(counter, values, 7, 2, Traffic(unit), gate=gate if gated else None)
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
        weigh(counter, values, fan_out, 1, Traffic())
        assert np.array_equal(
            counter.counts["sops"], ((values != 0) * fan_out).sum(axis=(0, 2, 3, 4))
        )

    def test_a_row_of_more_words_than_a_byte_can_count(self) -> None:
        spikes = np.ones((2, 1, 8 * 1000), np.bool_)
        assert nonzero(spikes).tolist() == [16_000]
        assert tally.MESSAGES == 0

    def test_shared_counts_are_of_the_same_values_and_the_same_gate(self) -> None:
        values = np.ones((1, 1, 2, 3), np.bool_)
        gate = np.array([[[True, False]]])
        seen = {}
        found = []
        for which in (None, gate, None, np.zeros_like(gate)):
            counter = NodeCounter(1, seen)
            weigh(counter, values, 1, 1, Traffic(), gate=which)
            found.append(counter.counts["messages"].tolist())
        assert found == [[6], [3], [6], [0]]


GRAPHS = [Adaptive(merge=2, fraction_bits=3).build(), conv_network()]


@pytest.mark.parametrize("graph", GRAPHS, ids=["transformer", "convolutions"])
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
        for limit in (1.0, -1.0):
            monkeypatch.setattr(executors, "DENSE_ABOVE", limit)
            results.append(run(graph, images, record="all"))
        self._equal(*results)

    @staticmethod
    def _equal(a, b) -> None:
        for name in a.trace:
            assert np.array_equal(a.trace[name], b.trace[name]), name
        assert a.events.as_json() == b.events.as_json()
        assert a.ranges == b.ranges

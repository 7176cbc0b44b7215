"""The process models of Lava that we rely on, and the arithmetic that ours have in common."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atsnn.fixed_point import MERGE_UNITY, NeuronConstants
from export.lava import kernels
from export.lava.watch import WORK, job_folder, run_watched
from export.lava.wire import Recorder, from_wire, to_wire, wire_shape

ARITHMETIC = Path(__file__).parent / "lava_models" / "arithmetic.py"


@pytest.fixture(scope="module")
def results():
    with job_folder() as folder:
        run_watched(f"{ARITHMETIC}:compare", {}, folder)
        with np.load(folder / WORK / "result.npz") as arrays:
            return dict(arrays)


@pytest.mark.lava
class TestModelsOfLava:
    @pytest.mark.parametrize(
        "case", ["no current memory", "no leak", "both memories", "wraps once"]
    )
    def test_lif_reset_is_our_neuron(self, case, results):
        assert 0 < results[f"lif, {case}/ours"][0].mean() < 1
        np.testing.assert_array_equal(results[f"lif, {case}/lava"], results[f"lif, {case}/ours"])

    def test_lif_reset_wraps_no_second_time(self, results):
        assert (results["lif, wraps twice/lava"] != results["lif, wraps twice/ours"]).any()

    @pytest.mark.parametrize("case", ["spikes", "graded", "groups"])
    def test_our_model_of_conv_gives_what_that_of_lava_gives(self, case, results):
        assert np.abs(results[f"conv, {case}/lava"][1:]).max() > 0
        np.testing.assert_array_equal(results[f"conv, {case}/lava"], results[f"conv, {case}/ours"])

    def test_dense_keeps_negative_weights_when_told_that_signs_are_mixed(self, results):
        np.testing.assert_array_equal(
            results["dense, mixed signs/lava"], results["dense, mixed signs/ours"]
        )

    def test_dense_alters_negative_weights_when_left_to_guess(self, results):
        assert (results["dense, guessed signs/lava"] != results["dense, guessed signs/ours"]).any()

    def test_a_run_imports_no_torch(self, results):
        assert not results["torch"]


class TestKernels:
    @given(data=st.data())
    def test_convolution_by_the_definition(self, data):
        groups = data.draw(st.sampled_from([1, 2]))
        kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        stride = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
        padding = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
        dilation = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        maps = rng.integers(0, 9, (4, 6, 7))
        weight = rng.integers(-9, 9, (2 * groups, 4 // groups, *kernel))
        result = kernels.convolve(maps, weight, stride, padding, dilation, groups)
        around = np.pad(maps, ((0, 0), (padding[0],) * 2, (padding[1],) * 2))
        for o, y, x in np.ndindex(result.shape):
            first = (o // 2) * (4 // groups)
            expected = sum(
                weight[o, c, i, j]
                * around[
                    first + c, y * stride[0] + i * dilation[0], x * stride[1] + j * dilation[1]
                ]
                for c, i, j in np.ndindex(weight.shape[1:])
            )
            assert result[o, y, x] == expected

    @given(data=st.data())
    def test_matching_by_the_definition(self, data):
        tokens = data.draw(st.integers(1, 9))
        count = data.draw(st.integers(0, 3))
        minimum = data.draw(st.sampled_from([-1.0, 0.0, 0.5, 0.99]))
        rng = np.random.default_rng(data.draw(st.integers(0, 999)))
        features = rng.integers(0, 3, (tokens, 3))
        eligible = rng.random(tokens) < 0.8
        partner = kernels.match(features, eligible, count, minimum).partner

        def norm(k):
            return float(features[k] @ features[k])

        def usable(k):
            return eligible[k] and norm(k) > 0

        edges = []
        for a in range(0, tokens, 2):
            found = [
                (int(features[a] @ features[b]) ** 2 / (norm(a) * norm(b)), -b)
                for b in range(1, tokens, 2)
                if usable(a) and usable(b)
            ]
            if found:
                similarity, target = max(found)
                if similarity > 0 and similarity >= minimum**2:
                    edges.append((-similarity, a, -target))
        limit = count or tokens
        expected = np.full(tokens, -1)
        for _, a, b in sorted(edges)[:limit]:
            expected[a] = b
        np.testing.assert_array_equal(partner, expected)

    def test_mean_of_merged_tokens_weighs_by_size(self):
        matching = kernels.Matching(np.array([1, -1, 1]))
        stream, size = np.array([[16], [32], [48]]), np.array([1, 1, 2])
        merged = kernels.combine(matching, stream, size, "mean")
        assert merged[1, 0] == (64 * 16 + 64 * 32 + 128 * 48) // MERGE_UNITY
        np.testing.assert_array_equal(merged[[0, 2]], stream[[0, 2]])
        np.testing.assert_array_equal(kernels.merged_sizes(matching, size), [0, 4, 0])

    @pytest.mark.parametrize(
        ("size", "kept"), [([1, 1, 1], 32), ([2, 1, 2], 16), ([1, 1, 2], 48), ([2, 2, 2], 32)]
    )
    def test_keep_takes_the_largest_and_among_equals_the_target_then_the_lowest(self, size, kept):
        stream = np.array([[16], [32], [48]])
        merged = kernels.combine(
            kernels.Matching(np.array([1, -1, 1])), stream, np.array(size), "keep"
        )
        assert merged[1, 0] == kept

    def test_max_of_merged_tokens(self):
        stream = np.array([[16, 5], [32, 1], [48, 2]])
        merged = kernels.combine(
            kernels.Matching(np.array([1, -1, 1])), stream, np.ones(3, int), "max"
        )
        np.testing.assert_array_equal(merged, [[16, 5], [48, 5], [48, 2]])

    def test_closed_gate_holds_the_state_and_fires_nothing(self):
        constants = NeuronConstants(4095, 2048, 1, np.full(2, 100, np.int32), 0)
        u, v = np.zeros((2, 2), np.int32), np.full((2, 2), 7, np.int32)
        gate = np.array([[1], [0]])
        spikes = kernels.neurons(u, v, np.full((2, 2), 50), constants, constants.bias, gate)
        np.testing.assert_array_equal(spikes, [[True, True], [False, False]])
        np.testing.assert_array_equal(v, [[0, 0], [7, 7]])


class TestWire:
    @given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    def test_what_travels_arrives(self, shape):
        value = np.arange(np.prod(shape)).reshape(shape)
        assert to_wire(value).shape == wire_shape(shape)
        np.testing.assert_array_equal(from_wire(to_wire(value), shape), value)

    @pytest.mark.parametrize("binary", [True, False])
    def test_recorder_keeps_the_steps_of_the_images_only(self, binary, tmp_path, rng):
        recorder = Recorder(tmp_path / "spikes", (3, 5), 2, 4, 3, binary)
        values = rng.integers(0, 2 if binary else 2**40, (15, 3, 5))
        for time_step, value in enumerate(values, start=1):
            recorder.record(time_step, value)
        expected = values[3:11].reshape(4, 2, 3, 5).swapaxes(0, 1)
        np.testing.assert_array_equal(recorder.read(), expected)

    def test_recorder_tells_a_run_that_was_cut_short(self, tmp_path):
        recorder = Recorder(tmp_path / "spikes", (8,), 1, 2, 0, True)
        recorder.record(1, np.ones(8))
        with pytest.raises(ValueError, match="spikes holds 1 items, a whole run has 2"):
            recorder.read()

"""Sums on the residual stream, merging of tokens and the memory that they are kept in."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import Adaptive, images_for

from export.lava import kernels as lava_kernels
from hardware.engine import Engine, buffers, run
from hardware.engine.addition import add_rows, join_rows, sum_sized_rows
from hardware.engine.buffers import SMALLEST, Buffers
from hardware.engine.merging import Reduction, match_tokens
from hardware.engine.tally import RowCounts, count_rows

seeds = st.integers(0, 10_000)
widths = st.sampled_from([5, 32, 40, 64])
integers = st.sampled_from([np.int16, np.int32])


def stream_and_spikes(seed: int, width: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """A stream [3, 2, 5, width] and spikes for it; some rows have none."""
    rng = np.random.default_rng(seed)
    stream = rng.integers(0, 40, (3, 2, 5, width)).astype(dtype)
    spikes = (rng.random(stream.shape) < 0.2) & (rng.random((3, 2, 5, 1)) < 0.5)
    return stream, spikes


def same_counts(found: RowCounts | None, expected: RowCounts) -> bool:
    assert found is not None
    assert found.unrolled is not None
    assert expected.unrolled is not None
    assert found.graded is not None
    assert expected.graded is not None
    return (
        np.array_equal(found.messages, expected.messages)
        and np.array_equal(found.unrolled, expected.unrolled)
        and np.array_equal(found.graded, expected.graded)
    )


class TestSums:
    @settings(max_examples=40)
    @given(seed=seeds, width=widths, dtype=integers, shift=st.integers(0, 3))
    def test_sums_and_their_counts(self, seed: int, width: int, dtype: type, shift: int) -> None:
        stream, spikes = stream_and_spikes(seed, width, dtype)
        expected = stream + (spikes.astype(dtype) << shift)
        total, counts = add_rows([spikes, stream], [shift, 0], dtype, unit=1 << shift)
        assert total.dtype == dtype
        assert np.array_equal(total, expected)
        assert same_counts(counts, count_rows(expected, 1 << shift))

    @settings(max_examples=40)
    @given(seed=seeds, width=widths, dtype=integers, shift=st.integers(0, 3))
    def test_spikes_that_join_where_the_stream_is_give_the_same(
        self, seed: int, width: int, dtype: type, shift: int
    ) -> None:
        stream, spikes = stream_and_spikes(seed, width, dtype)
        expected, _ = add_rows([spikes, stream], [shift, 0], dtype)
        unit, found = 1 << shift, spikes.sum(axis=3, dtype=np.int32)
        for before in (None, count_rows(stream, unit)):
            total = stream.copy()
            counts = join_rows(total, spikes, shift, found, before, unit)
            assert np.array_equal(total, expected)
            if before is None:
                assert counts is None
            else:
                assert same_counts(counts, count_rows(expected, unit))

    @settings(max_examples=40)
    @given(seed=seeds, width=widths, dtype=integers, unit=st.sampled_from([1, 8]))
    def test_rows_times_their_size(self, seed: int, width: int, dtype: type, unit: int) -> None:
        stream, _ = stream_and_spikes(seed, width, dtype)
        size = np.random.default_rng(seed).integers(0, 4, (1, 2, 5))
        products = stream.astype(np.int64) * size[..., None]
        total, counts = sum_sized_rows(stream, size, unit)
        assert np.array_equal(total, products.sum(axis=(0, 2)))
        assert same_counts(counts, count_rows(products, unit))


class TestMerging:
    """As the process models of Lava have it, which are written in numpy, token by token."""

    @settings(max_examples=80, deadline=None)
    @given(
        seed=seeds,
        tokens=st.integers(1, 9),
        count=st.integers(0, 3),
        minimum=st.sampled_from([0.0, 0.3, 0.7]),
        how=st.sampled_from(["mean", "max", "keep"]),
        dtype=integers,
    )
    def test_partners_sizes_and_sums(
        self,
        seed: int,
        tokens: int,
        count: int,
        minimum: float,
        how: Literal["mean", "max", "keep"],
        dtype: type,
    ) -> None:
        rng = np.random.default_rng(seed)
        stream = rng.integers(0, 3, (2, 3, tokens, 6)).astype(dtype)
        eligible = rng.random((3, tokens)) < 0.8
        size = rng.integers(1, 4, (3, tokens))
        found = match_tokens(stream[:1], eligible, count, minimum, largest=3)
        reduction = Reduction(found.partner, size, eligible, how)
        out = reduction(stream)
        for b in range(3):
            expected = lava_kernels.match(stream[0, b], eligible[b], count, minimum)
            partner = np.full(tokens, -1)
            partner[0::2] = np.where(found.partner[b] < 0, -1, 2 * found.partner[b] + 1)
            assert partner.tolist() == expected.partner.tolist()
            assert np.array_equal(reduction.size[b], lava_kernels.merged_sizes(expected, size[b]))
            assert np.array_equal(reduction.alive[b], eligible[b] & expected.stays)
            for t in range(2):
                sums = lava_kernels.combine(expected, stream[t, b], size[b], how)
                assert np.array_equal(out[t, b], sums)

    def test_features_are_summed_over_all_steps_that_are_given(self) -> None:
        """Alone, step 0 prefers token 1 for token 0, and step 1 token 3."""
        steps = np.zeros((2, 1, 4, 8), np.bool_)
        steps[0, 0, 0, 0] = steps[0, 0, 1, 0] = True
        steps[1, 0, 0, 1:8] = steps[1, 0, 3, 1:8] = True
        everybody = np.ones((1, 4), np.bool_)
        first, both = (match_tokens(part, everybody, 1, 0.0, 1) for part in (steps[:1], steps))
        assert (first.partner[0, 0], both.partner[0, 0]) == (0, 1)


class TestOverwriting:
    """An Add takes the memory of a stream that nobody reads after it."""

    NETWORK = Adaptive(channels=32, merge=2, fraction_bits=3)

    def test_recorded_values_stay(self) -> None:
        graph = self.NETWORK.build()
        images = images_for(graph, 5)
        quiet, everything = (run(graph, images, record=what) for what in ("none", "all"))
        assert np.array_equal(quiet.logits, everything.logits)
        assert quiet.events is not None
        assert everything.events is not None
        assert quiet.events.as_json() == everything.events.as_json()

    def test_an_engine_gives_the_same_again(self) -> None:
        graph = self.NETWORK.build()
        images = images_for(graph, 6)
        engine = Engine(graph)
        runs = [engine.run(images, batch=batch) for batch in (6, 2, 6, 4)]
        for again in runs[1:]:
            for name, values in runs[0].trace.items():
                assert np.array_equal(values, again.trace[name]), name


class TestBuffers:
    def test_a_block_is_used_again_when_its_last_view_is_gone(self) -> None:
        memory = Buffers()
        with buffers.using(memory):
            first = buffers.empty((SMALLEST,), np.uint8)
            view = first.reshape(2, -1)[1]
            address = first.ctypes.data
            del first
            assert buffers.empty((SMALLEST,), np.uint8).ctypes.data != address
            del view
            assert buffers.empty((SMALLEST,), np.uint8).ctypes.data == address

    def test_zeros_are_zeros_where_others_wrote(self) -> None:
        with buffers.using(Buffers()):
            buffers.empty((SMALLEST,), np.int32).fill(7)
            assert not buffers.zeros((SMALLEST,), np.int32).any()

    @pytest.mark.parametrize(("size", "same"), [(SMALLEST, True), (SMALLEST - 1, False)])
    def test_small_arrays_come_from_the_system(self, size: int, same: bool) -> None:
        memory = Buffers()
        with buffers.using(memory):
            array = buffers.empty((size,), np.uint8)
        assert (array.base is not None) == same

    def test_a_large_block_is_not_given_for_little(self) -> None:
        with buffers.using(Buffers()):
            large = buffers.empty((8 * SMALLEST,), np.uint8).ctypes.data
            assert buffers.empty((SMALLEST,), np.uint8).ctypes.data != large

    def test_without_buffers_memory_comes_from_the_system(self) -> None:
        assert buffers.empty((SMALLEST,), np.uint8).base is None

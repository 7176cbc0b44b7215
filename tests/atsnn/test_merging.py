"""Bipartite matching and the synaptic reduction, on tokens small enough to check by hand."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atsnn.merging import TokenMerging, fixed_weights, floor_straight_through, match_tokens


def tokens(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)[None, None]


ALL_OPEN = torch.ones(1, 4, dtype=torch.bool)


class TestMatching:
    FOUR = tokens([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0])

    def test_even_tokens_join_their_most_similar_odd_one(self) -> None:
        pairs = match_tokens(self.FOUR, ALL_OPEN, count=2, minimum_similarity=0.0).pairs
        assert pairs[0].tolist() == [[0, 1], [1, 0]]

    def test_the_most_similar_edges_go_first(self) -> None:
        pairs = match_tokens(self.FOUR, ALL_OPEN, count=1, minimum_similarity=0.0).pairs
        assert pairs[0].tolist() == [[0, 0], [1, 0]]

    def test_minimum_similarity_without_a_count(self) -> None:
        pairs = match_tokens(self.FOUR, ALL_OPEN, count=0, minimum_similarity=0.9).pairs
        assert pairs[0].tolist() == [[0, 0], [1, 0]]

    def test_ties_go_to_the_lower_index(self) -> None:
        same = tokens([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0])
        pairs = match_tokens(same, ALL_OPEN, count=1, minimum_similarity=0.0).pairs
        assert pairs[0].tolist() == [[1, 0], [0, 0]]

    def test_silent_tokens_never_match(self) -> None:
        silent = tokens([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0])
        assert match_tokens(silent, ALL_OPEN, count=2, minimum_similarity=0.0).pairs.sum() == 0

    def test_closed_tokens_never_match(self) -> None:
        closed = torch.tensor([[False, True, True, True]])
        pairs = match_tokens(self.FOUR, closed, count=2, minimum_similarity=0.0).pairs
        assert pairs[0, :, 0].sum() == 0


class TestReduction:
    def merge(self, x: Tensor, combine: str = "mean", size: Tensor | None = None):
        layer = TokenMerging(
            1, 0.0, combine, "stream", "first", fixed_weights, floor_straight_through
        )
        return layer(x, torch.ones(1, 1, x.shape[2]), None, size)

    def test_equal_tokens_of_equal_size_weigh_half_each(self) -> None:
        out, gate, alive, size, _ = self.merge(tokens([8.0, 5.0], [8.0, 6.0]))
        assert out[0, 0, 1].tolist() == [8.0, 5.0]
        assert size.tolist() == [[0.0, 2.0]]
        assert alive.tolist() == [[0.0, 1.0]]
        assert gate[0].tolist() == [[0.0, 1.0]]

    def test_larger_token_weighs_more(self) -> None:
        """Sizes 3 and 1: weights 192 and 64 of 256; (192 * 8 + 64 * 4) >> 8 = 7."""
        out, *_ = self.merge(tokens([8.0, 8.0], [4.0, 4.0]), size=torch.tensor([[3.0, 1.0]]))
        assert out[0, 0, 1].tolist() == [7.0, 7.0]

    def test_max_is_the_or_of_counted_spikes(self) -> None:
        out, *_ = self.merge(tokens([8.0, 0.0], [4.0, 4.0]), combine="max")
        assert out[0, 0, 1].tolist() == [8.0, 4.0]

    def test_keep_takes_the_larger_token(self) -> None:
        sized = torch.tensor([[2.0, 1.0]])
        assert self.merge(tokens([8.0, 1.0], [4.0, 4.0]), "keep", sized)[0][0, 0, 1, 0] == 8.0
        assert self.merge(tokens([8.0, 1.0], [4.0, 4.0]), "keep")[0][0, 0, 1, 0] == 4.0

    @given(seed=st.integers(0, 10_000), count=st.integers(1, 6), tokens=st.integers(2, 11))
    def test_sizes_add_up_to_the_number_of_tokens(self, seed: int, count: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(0, 17, (3, 2, tokens, 5), generator=generator).float()
        layer = TokenMerging(
            count, 0.0, "mean", "stream", "first", fixed_weights, floor_straight_through
        )
        out, gate, alive, size, _ = layer(x, torch.ones(3, 2, tokens))
        assert torch.all(size.sum(1) == tokens)
        assert torch.equal(alive, (size > 0).float())
        assert torch.equal(gate, alive.expand(3, -1, -1))
        assert torch.equal(out, out.floor())
        assert out.max() <= x.max()

    def test_latched_assignment_holds_at_later_steps(self) -> None:
        layer = TokenMerging(
            1, 0.0, "mean", "stream", "first", fixed_weights, floor_straight_through
        )
        first = tokens([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0])
        later = first.flip(-1)
        gate = torch.ones(1, 1, 4)
        whole, *_ = layer(torch.cat([first, later]), gate.expand(2, -1, -1))
        *_, latched = layer(first, gate)
        second, *_ = layer(later, gate, latched=latched)
        assert torch.equal(whole[1:], second)

"""Two pairs of tokens of exactly the same similarity: every executor merges the first of them."""

from __future__ import annotations

import numpy as np
import torch

from atsnn.merging import match_tokens
from export.graph import Merge
from export.lava import kernels as lava_kernels
from export.torch_module import _partners
from hardware.engine import merging


def tied_tokens() -> np.ndarray:
    """Four tokens of 64 channels, int64 [4, 64].

    Tokens 0 and 1 share 20 of 22 and 25 spikes, 2 and 3 share 24 of 24 and 33: 20^2 / (22 * 25) =
    24^2 / (24 * 33) = 8 / 11. In units of 8, as a stream with three fraction bits has them,
    1280 / sqrt(1408 * 1600) and 1536 / sqrt(1536 * 2112) differ by one unit in the last place if
    every operation is rounded to the nearest.
    """
    tokens = np.zeros((4, 64), np.int64)
    tokens[0, :22] = tokens[1, 2:27] = 8
    tokens[2, 31:55] = tokens[3, 31:64] = 8
    return tokens


def test_the_square_roots_do_differ() -> None:
    a = 1280 / np.sqrt(1408.0 * 1600)
    b = 1536 / np.sqrt(1536.0 * 2112)
    assert a != b
    assert 1280**2 / (1408 * 1600) == 1536**2 / (1536 * 2112)


class TestTheFirstOfEqualsMerges:
    def test_in_torch(self) -> None:
        features = torch.from_numpy(tied_tokens()).float()[None, None]
        eligible = torch.ones(1, 4, dtype=torch.bool)
        pairs = match_tokens(features, eligible, 1, 0.0).pairs
        assert pairs[0].nonzero().tolist() == [[0, 0]]

    def test_in_the_engine(self) -> None:
        tokens = tied_tokens()[None, None].astype(np.int16)
        found = merging.match_tokens(tokens, np.ones((1, 4), np.bool_), 1, 0.0, largest=8)
        assert found.partner.tolist() == [[0, -1]]

    def test_in_lava(self) -> None:
        partner = lava_kernels.match(tied_tokens(), np.ones(4, np.bool_), 1, 0.0).partner
        assert partner.tolist() == [1, -1, -1, -1]

    def test_in_the_graph_as_a_torch_module(self) -> None:
        node = Merge("merge", "", 1, 0.0, "mean", "stream", "first")
        features = torch.from_numpy(tied_tokens()).double()[None, None]
        partner = _partners(node, features, torch.ones(1, 4, dtype=torch.bool))
        assert partner.tolist() == [[1, -1, -1, -1]]

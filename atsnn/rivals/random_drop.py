"""Random dropping of tokens: the floor under every method that claims to choose well.

Training draws anew for every image and pass. Inference draws from the image itself, so that the
same image always loses the same tokens, whoever runs it and in whatever batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from atsnn.distributed import drawn_for_all
from atsnn.rivals.selection import TokenSelection, over_time, top_tokens


class RandomDrop(TokenSelection):
    """Keeps a random choice of the tokens that the block before kept.

    Args:
        index: of the block, so that blocks draw apart.
    """

    def __init__(self, tokens: int, keep: float, index: int) -> None:
        super().__init__(tokens, keep)
        self.index = index

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        open_before = None if before is None else before[0]
        if self.training:
            score = drawn_for_all(
                lambda rows: torch.rand(rows, self.tokens, device=x.device), x.shape[1]
            )
        else:
            score = self._score(x.detach())
        return over_time(top_tokens(score, self.kept, open_before), x)

    def _score(self, x: Tensor) -> Tensor:
        """[T, B, N, D] -> [B, N], drawn from whole numbers that tell one image from another."""
        spikes = torch.round(x.double() / self.unit).sum((0, 3))
        places = torch.arange(1, self.tokens + 1, dtype=spikes.dtype, device=x.device)
        keys = (spikes * places).sum(1).long().tolist()
        draws = [np.random.default_rng((self.index, key)).random(self.tokens) for key in keys]
        return torch.from_numpy(np.stack(draws)).to(x.device)

    def macs_per_image(self, steps: int, arriving: int) -> int:
        return 0

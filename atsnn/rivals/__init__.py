"""Methods of others that decide which tokens a block processes, on the same Spikformer blocks.

One interface: a *selection* is a module `forward(x, before) -> gate`, where x [T, B, N, D] is the
residual stream in front of a block, `before` [T, B, N] the gate of the block before (None in front
of the first) and the gate [T, B, N] is 1 where the block processes the token. `macs_per_image` says
what the decision itself costs.

| method | module | trained | tokens that a block leaves out |
|---|---|---|---|
| SparseSpikformer | `sparse_spikformer` | yes | stay out of all later blocks |
| TP-Spikformer | `tp_spikformer` | no | may come back in a later block |
| random dropping | `random_drop` | either | stay out of all later blocks |

Four more need no module of their own, since halting and merging have them as configurations:
all tokens (neither), ToMe (`merging` with `similarity: keys` and a count, without halting), A-ViT
(`halting.order: blocks`, scores summed within each step alone), and ours.
"""

from __future__ import annotations

from atsnn.config import ModelConfig
from atsnn.rivals.random_drop import RandomDrop
from atsnn.rivals.selection import TokenSelection
from atsnn.rivals.sparse_spikformer import SpikingTokenSelector
from atsnn.rivals.tp_spikformer import TokenPreference

__all__ = [
    "RandomDrop",
    "SpikingTokenSelector",
    "TokenPreference",
    "TokenSelection",
    "build_selection",
]


def build_selection(config: ModelConfig, index: int) -> TokenSelection:
    """The selection in front of block `index` (counted from 0), as `config.selection` says."""
    chosen = config.selection
    tokens, keep = config.tokens, chosen.keep[index]
    if chosen.method == "sparse-spikformer":
        return SpikingTokenSelector(tokens, keep, config.dim, chosen.hidden or config.dim // 2)
    if chosen.method == "tp-spikformer":
        return TokenPreference(tokens, keep, config.dim, config.grid, chosen.neighbourhood)
    return RandomDrop(tokens, keep, index)

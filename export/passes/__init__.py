"""Graph passes: each a frozen dataclass whose fields are its options, `Graph -> Graph`."""

from export.passes.fold_norm import FoldNorm
from export.passes.quantize import Quantize
from export.passes.rounding import LayerRounding
from export.passes.schedule import Schedule

__all__ = ["FoldNorm", "Quantize", "Schedule", "LayerRounding"]

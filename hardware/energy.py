"""Energy per image of a network, system by system, each under its named convention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from export.graph import Graph


@dataclass(frozen=True)
class EnergyRow:
    """One line of the energy table; `as_json()` has system, convention, grade, joules_per_image, sops, macs."""

    system: str
    convention: str
    grade: str
    joules_per_image: float
    sops: float
    macs: float
    joules_low: float
    joules_high: float
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class EnergyTable:
    """Rows of the table over `images` images; `as_json()` gives the list of rows."""

    rows: tuple[EnergyRow, ...]
    images: int
    average_tokens: float

    def as_json(self) -> list[dict[str, Any]]:
        return [row.as_json() for row in self.rows]


def energy_table(
    graph: Graph,
    images: npt.NDArray[np.uint8],
    *,
    profile: str = "loihi1",
    gpu: Literal["auto", "modelled", "measured", "none"] = "auto",
    gpu_profile: str = "a100",
    progress: Callable[[int, int], None] | None = None,
) -> EnergyTable:
    """Run the adaptive graph and its all-tokens form, count events, and price them.

    Args:
        profile: name of a shipped chip profile or path of a YAML file.
        gpu: "auto" measures by NVML where a GPU is usable, else models it from `gpu_profile`.
    """
    raise NotImplementedError

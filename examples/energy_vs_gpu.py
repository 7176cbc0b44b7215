"""Energy per image: adaptive tokens, all tokens, a quantised ANN of the same shape, and a GPU.

Shows: events counted on real images, priced under named conventions. With an NVIDIA GPU the last
rows are measured through NVML; without one they are modelled from a profile and say so.
Prints: the assumptions, then the table. Joules of different conventions must not be compared.

    python examples/energy_vs_gpu.py --images 128 --profile loihi1 --gpu auto
"""

from __future__ import annotations

import argparse

from rich.console import Console

from atsnn.errors import AtsnnError
from export import load_images, load_subject
from hardware import energy_table
from hardware.gpu import gpu_problem
from hardware.report import energy_rich_table

ASSUMPTIONS = """Assumptions
- SOPs: messages times fan-out, attention and the position branch included; zero weights count.
- Before placement: no hops, no chip-to-chip traffic, no static power.
- 45 nm rows are arithmetic only (no memory); Loihi 1 rows add neuron updates.
- The ANN computes every multiply-accumulate of the same shape once per image, not per time step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--profile", default="loihi1", help="chip profile")
    parser.add_argument("--gpu", choices=["auto", "modelled", "measured", "none"], default="auto")
    options = parser.parse_args()
    console = Console()

    subject = load_subject()
    images = load_images(subject.graph, options.images)
    console.print(ASSUMPTIONS)
    problem = gpu_problem()
    if options.gpu == "auto" and problem:
        console.print(f"GPU rows are modelled: {problem}")
    table = energy_table(subject.graph, images.pixels, profile=options.profile, gpu=options.gpu)
    console.print(energy_rich_table(table))


if __name__ == "__main__":
    try:
        main()
    except AtsnnError as error:
        raise SystemExit(f"error: {error}") from None

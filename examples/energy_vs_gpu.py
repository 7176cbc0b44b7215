"""Energy per image on a chip's cores, and beside a GPU, a CPU and a quantised ANN.

Shows: the network in four forms (all tokens, halting, merging, both), each placed on the cores of
a chip and counted on real images; its rivals; and where the chip stops winning. With an NVIDIA GPU
the GPU rows are measured through NVML; without one they are modelled, and say so in one line.
Prints: the assumptions, then the tables. Joules of different conventions must not be compared.

    python examples/energy_vs_gpu.py --images 128 --profile loihi1_calibrated --gpu auto
"""

from __future__ import annotations

import argparse

from rich.console import Console

from atsnn.errors import AtsnnError
from atsnn.tables import print_table
from export import load_images, load_subject
from hardware.gpu import gpu_problem
from hardware.gpu_import import load_measurements
from hardware.placement.break_even import break_even, plot
from hardware.placement.report import break_even_table, energy_placed_table, rivals_table
from hardware.placement.table import RIVAL_GPUS, placed_table

ASSUMPTIONS = """Assumptions
- Chip rows are a model: events counted to the last one, times prices from a file. No chip was run.
- SOPs: messages times fan-out, attention and the position branch included; zero weights count.
- The first layer counts: its pixels are sent, and priced, at every time step.
- Memory: a chip's price per operation includes the fetch of its weight; 45 nm rows have none.
- Messages: one for each core that reads, hops by XY routing; links never wait for each other.
- Idle: updates that change nothing, and the chip's static power while images stream.
- A closed gate costs one message to each core it concerns, and its neurons nothing.
- The ANN computes every multiply-accumulate of the same shape once per image, not per time step.
- GPU and CPU: the dense network; modelled rows span 10 to 60 % of the peak."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--profile", default="loihi1_calibrated", help="chip profile")
    parser.add_argument("--gpu", choices=["auto", "modelled", "measured", "none"], default="auto")
    parser.add_argument("--gpu-profile", default="a100", help="GPU that is modelled")
    parser.add_argument("--gpu-file", help="measurement made elsewhere, with provenance (JSON)")
    parser.add_argument("--plot", metavar="FILE", help="draw break-even (.png, .svg or .pdf)")
    options = parser.parse_args()
    console = Console()

    subject = load_subject()
    images = load_images(subject.graph, options.images)
    console.print(ASSUMPTIONS)
    problem = gpu_problem()
    if options.gpu == "auto" and problem:
        console.print(f"GPU rows are modelled: {problem}")
    imported = load_measurements(options.gpu_file) if options.gpu_file else ()
    table = placed_table(
        subject.graph,
        images.pixels,
        profile=options.profile,
        gpu=options.gpu,
        gpu_profiles=(options.gpu_profile, "xeon-8380"),
        imported=imported,
    )
    print_table(energy_placed_table(table))
    print_table(rivals_table(table.rivals))
    print_table(break_even_table(break_even(table.systems[-1])))
    if options.plot:
        plot(table.systems[-1:], RIVAL_GPUS, options.plot)
        console.print(f"plot: {options.plot}")


if __name__ == "__main__":
    try:
        main()
    except AtsnnError as error:
        raise SystemExit(f"error: {error}") from None

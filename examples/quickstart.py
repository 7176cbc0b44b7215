"""From the built-in trained model to a verified network, in a minute.

Shows: a quantised adaptive Spikformer becomes a graph, the graph runs on the bit-exact engine, and
every spike is compared with the torch model.
Prints: accuracy, open gates per block and step, spikes compared and differing, events per layer
with all tokens and with adaptive ones.

    python examples/quickstart.py --images 128
"""

from __future__ import annotations

import argparse

from rich.console import Console

from atsnn.errors import AtsnnError
from atsnn.tables import print_table
from export import load_images, load_subject
from export.spikformer import model_trace
from hardware import open_all_gates, run
from hardware.report import layers_rich_table, tokens_rich_table, verify_rich_table
from hardware.verify import Stage, verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=128, help="test images to run")
    count = parser.parse_args().images
    console = Console()

    subject = load_subject()  # give a checkpoint folder or a graph file to use your own
    images = load_images(subject.graph, count)
    model = subject.model
    assert model is not None

    result = run(subject.graph, images.pixels)
    accuracy = (result.classes == images.labels).mean()
    console.print(f"accuracy on {len(images.labels)} images: {accuracy:.1%}")
    print_table(tokens_rich_table(result))

    torch_model = Stage("quantised torch", lambda pixels: model_trace(model, pixels))
    verification = verify(subject.graph, images.pixels, ["engine"], reference=torch_model)
    print_table(verify_rich_table(verification))

    everything = run(open_all_gates(subject.graph), images.pixels)
    assert everything.events is not None
    print_table(layers_rich_table(everything.events, result.events))


if __name__ == "__main__":
    try:
        main()
    except AtsnnError as error:
        raise SystemExit(f"error: {error}") from None

"""Train, adapt, quantise and deploy a Spikformer on scikit-learn's digits, on two cores.

Shows: the three training stages of a preset (all tokens, adaptive, quantised), the graph file, and
the check that engine and Lava fire the spikes of the torch model.
Prints: accuracy, average tokens, open gates per block and step, spikes compared and differing.

    python examples/train_and_deploy_digits.py --out runs/digits
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from atsnn.checkpoint import load_model
from atsnn.config import load_preset
from atsnn.data import load_dataset
from atsnn.errors import AtsnnError
from atsnn.tables import print_table
from atsnn.training import train
from export import compile_spikformer, load_images, save
from export.errors import LavaUnavailableError
from export.spikformer import model_trace
from hardware import run
from hardware.report import tokens_rich_table, verify_rich_table
from hardware.verify import Stage, verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder of the run")
    parser.add_argument("--images", type=int, default=64, help="test images to verify")
    parser.add_argument("--epochs", type=int, help="epochs per stage (default: the preset's)")
    options = parser.parse_args()
    console = Console()

    config = load_preset("digits", _shorter(options.epochs))
    dataset = load_dataset("digits", config.data, config.model)
    model_file = train(config, dataset, options.out, resume=options.out.exists())

    model = load_model(model_file)
    graph = compile_spikformer(model)
    console.print(f"graph: {save(graph, options.out / 'graph.h5')}")

    every = load_images(graph, data="digits")
    result = run(graph, every.pixels)
    accuracy = (result.classes == every.labels).mean()
    console.print(f"accuracy of the deployed network on {len(every.labels)} images: {accuracy:.1%}")
    print_table(tokens_rich_table(result))

    images = every.pixels[: options.images]
    torch_model = Stage("quantised torch", lambda pixels: model_trace(model, pixels))
    for against in (["engine"], ["lava-blocks"]):
        try:
            print_table(verify_rich_table(verify(graph, images, against, reference=torch_model)))
        except LavaUnavailableError as reason:
            console.print(f"{against[0]} skipped: {reason}")


def _shorter(epochs: int | None) -> list[str]:
    if epochs is None:
        return []
    stages = ("all-tokens", "adaptive", "quantized")
    return [f"stages.{stage}.train.epochs={epochs}" for stage in stages]


if __name__ == "__main__":
    try:
        main()
    except AtsnnError as error:
        raise SystemExit(f"error: {error}") from None

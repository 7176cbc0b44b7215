"""A convolutional norse network of your own, with a residual branch, on neuromorphic cores.

Shows: an ordinary torch module with norse neurons is captured as it is (branches and states
included), folded, quantised after training, scheduled, and compared spike by spike.
Prints: accuracy of the float and the quantised network, what rounding did, spikes compared.

    python examples/own_network.py --epochs 6
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from norse.torch import LIFBoxCell, LIFBoxParameters, LIFCell, LIFParameters
from rich.console import Console
from torch import Tensor, nn

from atsnn.config import DataConfig, ModelConfig
from atsnn.data import load_dataset
from atsnn.errors import AtsnnError
from atsnn.tables import print_table
from export import FoldNorm, Quantize, Schedule
from export.capture import capture
from export.errors import LavaUnavailableError
from hardware import run
from hardware.report import verify_rich_table
from hardware.verify import verify

STEPS = 8
BOX = LIFBoxParameters(tau_mem_inv=torch.tensor(0.5), v_th=torch.tensor(1.0))
LIF = LIFParameters(tau_mem_inv=torch.tensor(0.5), tau_syn_inv=torch.tensor(0.5))


class ResidualNet(nn.Module):
    """One time step: conv, pool, a residual conv branch, and spiking class neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.lif1 = LIFBoxCell(BOX, dt=1.0)
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.lif2 = LIFBoxCell(BOX, dt=1.0)
        self.head = nn.Linear(12 * 4 * 4, 10)
        self.classes = LIFCell(LIF, dt=1.0)

    def forward(self, image: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        s1, s2, s3 = state or (None, None, None)
        spikes, s1 = self.lif1(self.norm1(self.conv1(image)), s1)
        pooled = self.pool(spikes)
        branch, s2 = self.lif2(self.norm2(self.conv2(pooled)), s2)
        joined = torch.flatten(pooled + branch, 1)
        out, s3 = self.classes(self.head(joined), s3)
        return out, (s1, s2, s3)


def spike_counts(model: ResidualNet, images: Tensor) -> Tensor:
    """Class spikes [B, 10] summed over all steps."""
    state, total = None, torch.zeros(len(images), 10)
    for _ in range(STEPS):
        spikes, state = model(images, state)
        total = total + spikes
    return total


def train(model: ResidualNet, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(spike_counts(model, images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=64, help="test images to verify in Lava")
    options = parser.parse_args()
    console = Console()
    torch.manual_seed(0)

    sizes = ModelConfig(in_channels=1, image_size=(8, 8))
    data = load_dataset("digits", DataConfig(format="digits"), sizes)
    train_pixels = data.train.batch(torch.arange(len(data.train)))
    test_pixels = data.test.batch(torch.arange(len(data.test)))

    model = ResidualNet()
    train(model, train_pixels / 255, data.train.labels, options.epochs)
    model.eval()
    with torch.no_grad():
        found = spike_counts(model, test_pixels / 255).argmax(1)
    console.print(f"float network:     {(found == data.test.labels).float().mean():.1%}")

    graph = FoldNorm()(capture(model, test_pixels[:1] / 255, STEPS))
    quantize = Quantize(pixel_bits=6)
    for layer in quantize.report(graph):
        console.print(
            f"{layer.node}: {layer.weight_bits}-bit weights, largest error "
            f"{layer.weight_error:.4f}, activations within {layer.bound:,} of 131,071"
        )
    graph = Schedule()(quantize(graph))

    images, labels = test_pixels.numpy(), data.test.labels.numpy()
    result = run(graph, images)
    console.print(f"quantised network: {np.mean(result.classes == labels):.1%}")

    few = images[: options.images]
    for against in (["engine"], ["lava-layers"], ["lava-blocks"]):
        try:
            print_table(verify_rich_table(verify(graph, few, against)))
        except LavaUnavailableError as reason:
            console.print(f"{against[0]} skipped: {reason}")


if __name__ == "__main__":
    try:
        main()
    except AtsnnError as error:
        raise SystemExit(f"error: {error}") from None

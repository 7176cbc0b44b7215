"""Accuracy, tokens, firing rates and confusion of a model on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from atsnn.augment import to_input
from atsnn.data import ImageSet
from atsnn.layers import ConvLayer, TokenLayer
from atsnn.quantization import (
    FixedPointConvLayer,
    FixedPointNeuron,
    FixedPointTokenLayer,
    float_twin,
)
from atsnn.spikformer import Spikformer

SYNAPTIC_LAYERS = (ConvLayer, TokenLayer, FixedPointConvLayer, FixedPointTokenLayer)
SPIKING_LAYERS = (*SYNAPTIC_LAYERS, FixedPointNeuron)
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Evaluation:
    """What a model did with a set of images.

    Attributes:
        predictions, labels: int64 [images].
        open_gates: float64 [L, T], mean share of tokens that block l processed at step t.
        confusion: int64 [classes, classes], true class by row, predicted class by column.
        rates: firing rate of each spiking layer (spikes per neuron and step; halted neurons count).
    """

    predictions: Tensor
    labels: Tensor
    open_gates: Tensor
    confusion: Tensor
    rates: dict[str, float]

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """Share of images whose class was found."""
        return float((self.predictions == self.labels).double().mean())

    @property
    def average_tokens(self) -> float:
        """Mean over images of active cells / (L * T * N)."""
        return float(self.open_gates.mean())

    @property
    def class_accuracy(self) -> list[float]:
        """Accuracy per true class; not a number where a class has no images."""
        correct = self.confusion.diagonal().double()
        return (correct / self.confusion.sum(1).double()).tolist()


@torch.no_grad()
def evaluate(
    model: Spikformer, images: ImageSet, batch: int = 256, tick: Tick | None = None
) -> Evaluation:
    """Run a model over all images in inference; the model's mode is restored.

    Args:
        batch: images at a time. tick: called with the number of images of each finished batch.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    bits = model.config.quantization.pixel_bits
    predictions, gates = [], torch.zeros(model.config.blocks, model.config.steps).double()
    with firing_rates(model) as rates:
        for indices in torch.arange(len(images)).split(batch):
            output = model(to_input(images.batch(indices).to(device), bits))
            predictions.append(output.logits.argmax(1).cpu())
            gates += output.gates.double().mean(3).sum(2).cpu()
            if tick is not None:
                tick(len(indices))
    model.train(was_training)
    predicted = torch.cat(predictions)
    confusion = multiclass_confusion_matrix(predicted, images.labels, model.config.classes)
    return Evaluation(predicted, images.labels, gates / len(images), confusion, rates())


@contextmanager
def firing_rates(model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
    """Count spikes of every spiking layer inside the context; the result is asked for by a call."""
    counts: dict[str, list[float]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            spikes = output[0] if isinstance(output, tuple) else output
            entry = counts.setdefault(name, [0.0, 0.0])
            # per step a float32 sum of spikes is exact; float64 all through would cost more
            entry[0] += float(spikes.detach().flatten(1).sum(1).double().sum())
            entry[1] += spikes.numel()

        return hook

    hooks = [
        module.register_forward_hook(watch(layer_name(name)))
        for name, module in model.named_modules()
        if isinstance(module, SPIKING_LAYERS) or name.endswith("attention_neuron")
    ]
    try:
        yield lambda: {name: spikes / cells for name, (spikes, cells) in counts.items()}
    finally:
        for hook in hooks:
            hook.remove()


def layer_name(module_name: str) -> str:
    """The same name for a layer of the float and of the quantised model."""
    return module_name.replace("stem.stem.", "stem.")


@dataclass(frozen=True)
class Comparison:
    """A quantised model beside the float model of the same weights, on the same images."""

    model: Evaluation
    float_model: Evaluation

    @property
    def agreement(self) -> Tensor:
        """int64 [classes, classes]: class of the float model by row, of the model by column."""
        classes = len(self.model.confusion)
        return multiclass_confusion_matrix(
            self.model.predictions, self.float_model.predictions, classes
        )

    @property
    def agreeing(self) -> float:
        """Share of images on which both find the same class."""
        return float((self.model.predictions == self.float_model.predictions).double().mean())


def compare(
    model: Spikformer, images: ImageSet, batch: int = 256, tick: Tick | None = None
) -> Comparison:
    """Evaluate a model and its float twin (for a float model, itself: one pass)."""
    ours = evaluate(model, images, batch, tick)
    twin = evaluate(float_twin(model), images, batch, tick) if model.quantized else ours
    return Comparison(ours, twin)

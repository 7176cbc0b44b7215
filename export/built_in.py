"""What a command works on: a model or graph given by path, or the built-in one, and its images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from atsnn.errors import DatasetError
from export.errors import GraphError
from export.formats import hdf5
from export.graph import Graph, Readout
from export.validation import check_classes

if TYPE_CHECKING:
    from atsnn.spikformer import Spikformer

GRAPH_SUFFIXES = (".h5", ".hdf5")


@dataclass(frozen=True)
class Subject:
    """A quantised graph and where it comes from.

    Attributes:
        name: for headings.
        graph: quantised and, unless it was read from a file without a schedule, scheduled.
        model: the torch model that the graph was captured from, if it came from one.
    """

    name: str
    graph: Graph
    model: Spikformer | None

    @property
    def events(self) -> bool:
        """True if it takes events; a graph without its model does where its input has 1 bit."""
        return self.model.config.events if self.model else self.graph.input.bits == 1


def load_subject(path: Path | None = None) -> Subject:
    """The graph of a checkpoint (file or run folder), of a graph file, or of the built-in model.

    Raises:
        GraphError, CheckpointError: the file is missing, damaged, or holds a float graph.
    """
    if path is not None and path.suffix in GRAPH_SUFFIXES:
        graph = hdf5.load(path)
        if not graph.quantized:
            raise GraphError(
                f"{path}: holds a float graph; write a quantised one with `atsnn-export graph`"
            )
        check_classes(graph)
        return Subject(str(path), graph, None)
    model, name = _load_model(path)
    from export.spikformer import compile_spikformer

    return Subject(name, compile_spikformer(model), model)


def _load_model(path: Path | None) -> tuple[Spikformer, str]:
    if path is None:
        from atsnn.demo import load_demo_model

        return load_demo_model(), "built-in model"
    from atsnn.checkpoint import load_model

    return load_model(path), str(path)


@dataclass(frozen=True)
class Images:
    """Test images or recordings.

    Attributes:
        pixels: uint8 [B, C, H, W], or events of 0 and 1 over time, [T, B, C, H, W].
        labels: int64 [B].
        origin: where they come from.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    origin: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def events(self) -> bool:
        return self.pixels.ndim == 5

    def first(self, count: int) -> Images:
        """The first `count` of them."""
        pixels = self.pixels[:, :count] if self.events else self.pixels[:count]
        return Images(pixels, self.labels[:count], self.origin)


def load_images(graph: Graph, count: int | None = None, data: str | None = None) -> Images:
    """The first test images of a data folder, or of the built-in ones.

    Args:
        count: how many at most; None for all.
        data: folder or zip (see `atsnn.data`); None for the built-in images. Recordings of events
            are for a graph whose input has 1 bit, and are cut into its time steps.

    Raises:
        DatasetError: missing, empty, or of another size than the graph takes.
    """
    if count is not None and count < 1:
        raise DatasetError(f"{count} images asked for; at least 1 is needed")
    if data is not None:
        return _from_folder(graph, count, data)
    from atsnn.demo import load_demo_images

    pixels, labels = load_demo_images()
    shape = graph.input.shape
    if pixels.shape[1:] != shape:
        raise DatasetError(
            f"the built-in images have shape {list(pixels.shape[1:])}, this network takes "
            f"{list(shape)}; give images of its own with --data DIR"
        )
    return Images(pixels[:count], labels[:count], "built-in images")


def _from_folder(graph: Graph, count: int | None, data: str) -> Images:
    import torch

    from atsnn.config import DataConfig
    from atsnn.data import detect, is_built_in, load_dataset
    from atsnn.data.recordings import steps_first

    config = DataConfig(test_images=count, resize=data == "digits")
    takes_events = graph.input.bits == 1 and not is_built_in(data, config)
    events = takes_events and detect(Path(data)) == "nmnist"
    test = load_dataset(data, config, _model_config(graph, events)).test
    pixels = test.batch(torch.arange(len(test))).numpy()
    return Images(steps_first(pixels) if events else pixels, test.labels.numpy(), data)


def _model_config(graph: Graph, events: bool) -> Any:
    """A configuration that takes the graph's images; only its sizes matter here."""
    from atsnn.config import ModelConfig, parse

    shape = graph.input.shape
    if len(shape) != 3:
        raise DatasetError(
            f"this network takes {list(shape)}, a data folder holds images [C, H, W]"
        )
    classes = next((len(n.weight) for n in graph.of_kind(Readout) if isinstance(n, Readout)), 1000)
    sizes = {"in_channels": shape[0], "image_size": shape[1:], "classes": max(classes, 2)}
    if events:
        sizes |= {"events": True, "steps": graph.steps}
    return parse(ModelConfig, sizes, "the graph's input")

"""Graphs of our own model: what capture alone cannot see of it, and all passes in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from atsnn.fixed_point import pixels_to_integers
from atsnn.halting import Gate as GateModule
from atsnn.layers import SpikePool
from atsnn.quantization import (
    FixedPointConvLayer,
    FixedPointNeuron,
    FixedPointTokenLayer,
    float_twin,
)
from atsnn.rivals import TokenSelection
from atsnn.spikformer import Spikformer
from export.capture import capture
from export.errors import GraphError
from export.graph import Edge, Graph, HaltingScore, Node, Readout, Selection
from export.passes.fold_norm import FoldNorm
from export.passes.quantize import Quantize
from export.passes.schedule import Schedule
from export.torch_module import Trace
from export.validation import topological, validate


def capture_spikformer(model: Spikformer) -> Graph:
    """The float graph of a Spikformer, or of the float twin of a quantised one.

    The orders that look back (`rectangle`, `raster`, `steps`) get edges with lag 1 from the scores
    of later blocks.

    Raises:
        UnsupportedModuleError, GraphError: see `export.capture.capture`.
    """
    twin = float_twin(model) if model.quantized else model
    config = twin.config
    example = torch.zeros(2, config.in_channels, *config.image_size)
    graph = capture(twin, example, config.steps, method="forward_layers", events=config.events)
    if twin.adaptive:
        graph = _look_back(graph, twin)
    labels = _labels(graph)
    return validate(
        replace(
            graph,
            blocks=labels,
            metadata={"model": "Spikformer", "halting": config.halting.order},
        )
    )


def compile_spikformer(model: Spikformer) -> Graph:
    """Quantised, scheduled graph of a Spikformer; equals `quantize_model(model)` in every spike.

    Raises:
        UnsupportedModuleError, GraphError: see `export.capture.capture`.
    """
    bits = model.config.quantization
    folded = FoldNorm()(capture_spikformer(model))
    quantize = Quantize(bits.pixel_bits, bits.fraction_bits, events=model.config.events)
    return Schedule()(quantize(folded))


def selection_of(graph: Graph, trace: Trace) -> dict[str, npt.NDArray[np.uint8]]:
    """What a graph's Selection nodes chose in a trace: name -> uint8 [B, N], 1 = processed."""
    chosen = {}
    for node in graph.of_kind(Selection):
        (edge,) = graph.out_of(node.name)
        chosen[node.name] = trace[edge.target][0].astype(np.uint8)
    return chosen


# --- the trace of the torch model itself ---


def model_trace(model: Spikformer, images: npt.NDArray[np.uint8], batch: int = 64) -> Trace:
    """Spikes, gates and logits of a quantised Spikformer itself, under the names of its graph.

    Args:
        model: quantised, in evaluation mode.
        images: uint8 [B, C, H, W], or events of 0 and 1, uint8 [T, B, C, H, W].
        batch: images at a time.

    Raises:
        GraphError: the model is not quantised.
    """
    if not model.quantized:
        raise GraphError("the model is a float model; quantise it (atsnn.quantization) first")
    bits = model.config.quantization.pixel_bits
    values = np.swapaxes(images, 0, 1) if model.config.events else pixels_to_integers(images, bits)
    parts = []
    with torch.no_grad():
        for start in range(0, len(values), batch):
            pixels = np.ascontiguousarray(values[start : start + batch])
            parts.append(_hooked(model, torch.from_numpy(pixels).float() / (2**bits - 1)))
    return {
        key: np.concatenate([part[key] for part in parts], axis=int(key != "logits"))
        for key in parts[0]
    }


def _hooked(model: Spikformer, image: Tensor) -> Trace:
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            value = output if isinstance(output, Tensor) else output[0]
            seen.setdefault(name, []).append(value)

        return keep

    handles = [m.register_forward_hook(hook(name)) for m, name in _recorded(model)]
    try:
        logits = model(image).logits
    finally:
        for handle in handles:
            handle.remove()
    gates = {name: name.startswith(("gates.", "selections.", "stem_merging.")) for name in seen}
    trace: Trace = {
        name: _all_steps(torch.cat(values), model.config.steps)
        .numpy()
        .astype(np.uint8 if gates[name] else bool)
        for name, values in seen.items()
    }
    return {**trace, "logits": logits.double().numpy()}


def _all_steps(values: Tensor, steps: int) -> Tensor:
    """What ran at the first step only holds for all of them."""
    return values.expand(steps, *values.shape[1:]) if len(values) == 1 else values


def _recorded(model: Spikformer) -> Iterator[tuple[nn.Module, str]]:
    """Modules whose output is spikes or gates, with the node that they become."""
    for name, module in model.named_modules():
        node = name.replace("stem.stem.", "stem.")
        if isinstance(module, FixedPointConvLayer | FixedPointTokenLayer):
            yield module, f"{node}.neuron"
        elif isinstance(module, FixedPointNeuron | SpikePool | GateModule | TokenSelection):
            yield module, node


# --- gates that look back ---


def _look_back(graph: Graph, model: Spikformer) -> Graph:
    """Late edges into each gate: accumulated, they add up what the order lets it see."""
    order, blocks = model.config.halting.order, model.config.blocks
    if order not in ("rectangle", "raster", "steps"):
        return graph
    readout = next(graph.of_kind(Readout))
    (stream,) = graph.into(readout.name, "x")
    last = model.score_list[blocks]
    score = HaltingScore(
        f"scores.{blocks}",
        f"scores.{blocks}",
        float(last.gamma.detach()),
        float(last.beta.detach()),
    )
    edges = [*graph.edges, Edge(stream.source, score.name, stream.source_port)]
    for index, gate in enumerate(graph.block_gates):
        first = blocks if order == "steps" else index + 1
        stop = index + 2 if order == "rectangle" else blocks + 1
        edges += [
            Edge(f"scores.{late}", gate, target_port="score", lag=1) for late in range(first, stop)
        ]
    if order == "steps":
        edges = [e for e in edges if e.target_port != "score" or e.lag]
    wired = replace(graph, nodes=(*graph.nodes, score), edges=tuple(edges))
    return _without_dead_ends(replace(wired, nodes=topological(wired.nodes, wired)))


def _without_dead_ends(graph: Graph) -> Graph:
    """Drop scores and sums of scores that no gate sees."""
    while True:
        read = {edge.source for edge in graph.edges} | {"output"}
        if all(node.name in read for node in graph.nodes):
            return graph
        graph = replace(
            graph,
            nodes=tuple(node for node in graph.nodes if node.name in read),
            edges=tuple(edge for edge in graph.edges if edge.target in read),
            blocks={name: label for name, label in graph.blocks.items() if name in read},
        )


# --- block labels ---


def _labels(graph: Graph) -> dict[str, str]:
    """`stem`, `block1` ... and `head`; a sum of scores belongs to the latest block it reads."""
    labels: dict[str, str] = {}
    order = ["stem"]
    for node in graph.nodes:
        label = _own_label(node)
        if label is None:
            before = [labels[e.source] for e in graph.into(node.name) if e.source in labels]
            label = max(before, key=order.index, default="stem")
        if label not in order:
            order.append(label)
        labels[node.name] = label
    return labels


def _own_label(node: Node) -> str | None:
    part, _, rest = node.name.partition(".")
    if part in ("blocks", "scores", "gates", "selections"):
        return f"block{int(rest.split('.')[0]) + 1}"
    if part == "stem_merging":
        return "block1"
    return {"stem": "stem", "image": "stem", "readout": "head", "output": "head"}.get(part)

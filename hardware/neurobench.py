"""NeuroBench's names for what a network is and does, in its definitions.

Definitions (NeuroBench 1.x, harness metrics), per image ("model execution") and mean over images:

* Footprint: bytes of the parameters as stored, weights at their bits and biases at 16 bits.
* ConnectionSparsity: share of weights that are 0.
* ActivationSparsity: share of neurons and time steps without a spike.
* SynapticOperations: Effective_MACs and Effective_ACs leave out zero inputs and zero weights; a
  layer whose inputs are not all 0 or 1 counts MACs for every operation, as NeuroBench has it; Dense
  counts every weight at every step.

NeuroBench counts Conv and Linear layers. What attention does between them is given apart, under
`attention`, and as sums with it: other counters report it as nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from export.graph import LIF, Attention, Conv, Graph, Linear, OrPool, Readout
from hardware.engine import run
from hardware.engine.plan import dense_macs, make_plan
from hardware.placement.activity import Activity, measured
from hardware.placement.layers import Path, network_of

DEFINITIONS = {
    "Footprint": "bytes of all parameters as stored on cores",
    "ConnectionSparsity": "zero weights / weights, Conv, Linear and Readout",
    "ActivationSparsity": "1 - spikes / (spiking neurons x time steps), mean over images",
    "Effective_MACs": "non-zero input x non-zero weight, layers whose input is not 0 or 1",
    "Effective_ACs": "non-zero input x non-zero weight, layers whose input is 0 or 1",
    "Dense": "every weight, every position, every time step",
    "attention": "not in NeuroBench: additions of the attention product, and its dense MACs",
}
_BIAS_BYTES = 2


def neurobench(
    graph: Graph, images: npt.NDArray[np.uint8], activity: Activity | None = None
) -> dict[str, Any]:
    """The metrics of a quantised graph on images, ready for JSON.

    Args:
        images: uint8 [B, *input shape].
        activity: measured on the same images, if that has been done.

    Raises:
        EngineError: see `hardware.engine.run`.
    """
    network = network_of(graph)
    known = activity or measured(network, images)
    plan = make_plan(graph)
    events = run(graph, images, record="none").events
    assert events is not None  # counting is on
    macs = acs = 0.0
    for layer in network.layers.values():
        for path in layer.data_paths:
            if path.kind not in ("conv", "linear") or path not in known.means:
                continue
            done = effective_operations(path, known.means[path])
            binary = plan.bounds[path.source, path.port].magnitude <= 1
            acs += done * binary
            macs += done * (not binary)
    readouts = [node for node in graph.of_kind(Readout) if isinstance(node, Readout)]
    for node in readouts:
        share = float((node.weight != 0).mean()) if node.weight.size else 0.0
        macs += events[node.name].mean("macs") * share
    weighted = [node for node in graph.nodes if isinstance(node, Conv | Linear | Readout)]
    zeros = sum(int((node.weight == 0).sum()) for node in weighted)
    weights = sum(node.weight.size for node in weighted)
    dense = graph.steps * sum(dense_macs(plan, n) for n in weighted if not isinstance(n, Readout))
    dense += sum(dense_macs(plan, node) for node in readouts)
    attention = sum(n.mean("sops") for n in events.nodes if n.kind == "Attention")
    dense_attention = graph.steps * sum(dense_macs(plan, n) for n in graph.of_kind(Attention))
    spiking = {node.name for node in graph.of_kind(LIF, OrPool)}
    spikes = sum(n.mean("spikes") for n in events.nodes if n.name in spiking)
    neurons = sum(network.layers[name].grid.neurons for name in spiking)
    biases = sum(
        node.constants.bias_mantissa.size
        for node in graph.of_kind(LIF)
        if isinstance(node, LIF) and node.constants is not None
    )
    return {
        "Footprint": weights + _BIAS_BYTES * biases,
        "ConnectionSparsity": zeros / weights if weights else 0.0,
        "ActivationSparsity": 1 - spikes / (neurons * graph.steps) if neurons else 0.0,
        "SynapticOperations": {"Effective_MACs": macs, "Effective_ACs": acs, "Dense": dense},
        "attention": {
            "Effective_ACs": attention,
            "Dense": dense_attention,
            "in_NeuroBench": False,
        },
        "with_attention": {
            "Effective_MACs": macs,
            "Effective_ACs": acs + attention,
            "Dense": dense + dense_attention,
        },
        "images": known.images,
        "definitions": DEFINITIONS,
    }


def effective_operations(path: Path, mean: npt.NDArray[np.float64]) -> float:
    """Non-zero inputs times non-zero weights per image, exact at the borders of a convolution.

    Args:
        path: of kind "conv" or "linear".
        mean: messages per image of each source position and channel, float64 [P, C].
    """
    synapse = path.synapse
    if isinstance(synapse, Linear):
        inputs = mean.sum(axis=0)
        if path.flatten:
            inputs = (mean.T if path.grid.maps else mean).reshape(-1)
        return float(((synapse.weight != 0).sum(axis=0) * inputs).sum())
    assert isinstance(synapse, Conv)
    height, width = path.grid.size
    maps = mean.T.reshape(path.grid.channels, height, width)
    used = synapse.weight != 0
    per_group = used.reshape(synapse.groups, -1, *used.shape[1:]).sum(axis=1)
    alive = per_group.reshape(path.grid.channels, *used.shape[2:])
    total = 0.0
    for ky in range(used.shape[2]):
        rows = _sources(height, used.shape[2], ky, synapse, 0)
        for kx in range(used.shape[3]):
            columns = _sources(width, used.shape[3], kx, synapse, 1)
            seen = maps[:, rows][:, :, columns].sum(axis=(1, 2))
            total += float((seen * alive[:, ky, kx]).sum())
    return total


def _sources(length: int, kernel: int, offset: int, conv: Conv, axis: int) -> npt.NDArray[np.int64]:
    """Source places that a kernel's tap reads, one for each output that is inside."""
    stride, padding, dilation = conv.stride[axis], conv.padding[axis], conv.dilation[axis]
    outputs = (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    at = np.arange(outputs) * stride - padding + offset * dilation
    return at[(at >= 0) & (at < length)]

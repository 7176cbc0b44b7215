"""NeuroBench's metrics, against a plain count that follows its definitions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from placed_networks import conv, dense, spikes_for
from tiny_networks import Adaptive, conv_network, images_for

from export.graph import Conv, Graph, Linear
from hardware.engine import run
from hardware.neurobench import DEFINITIONS, neurobench


def effective(graph: Graph, images: np.ndarray, node: str, source: str) -> float:
    """Non-zero inputs times non-zero weights per image, by a dense product of zeros and ones."""
    values = run(graph, images, record="all").trace[source] != 0
    layer = graph[node]
    assert isinstance(layer, Conv | Linear)
    used = (layer.weight != 0).astype(float)
    if isinstance(layer, Linear):
        return float((values.reshape(-1, used.shape[1]) @ used.T).sum() / values.shape[1])
    assert isinstance(layer, Conv)
    maps = values.reshape(-1, *values.shape[2:]).astype(float)
    padded = np.pad(maps, [(0, 0), (0, 0), *[(p, p) for p in layer.padding]])
    total = 0.0
    outputs, per_group, kernel_y, kernel_x = used.shape
    reach_y, reach_x = (
        d * (k - 1) + 1 for d, k in zip(layer.dilation, (kernel_y, kernel_x), strict=True)
    )
    for o in range(outputs):
        first = (o // (outputs // layer.groups)) * per_group
        for y in range(0, padded.shape[2] - reach_y + 1, layer.stride[0]):
            for x in range(0, padded.shape[3] - reach_x + 1, layer.stride[1]):
                seen = padded[
                    :, first : first + per_group,
                    y : y + reach_y : layer.dilation[0], x : x + reach_x : layer.dilation[1],
                ]  # fmt: skip
                total += float((seen * used[o]).sum())
    return total / values.shape[1]


def test_effective_operations_leave_out_zero_weights_and_zero_inputs() -> None:
    graph = conv()
    images = spikes_for(graph, 3)
    found = neurobench(graph, images)["SynapticOperations"]
    expected = effective(graph, images, "conv1", "image")
    expected += effective(graph, images, "conv2", "pool")
    expected += effective(graph, images, "dense", "flat")
    assert found["Effective_ACs"] == pytest.approx(expected, rel=1e-12)
    assert found["Effective_MACs"] == 0


def test_layers_with_other_inputs_than_0_and_1_count_macs() -> None:
    graph = conv_network()  # 4-bit pixels
    images = images_for(graph, 3)
    found = neurobench(graph, images)["SynapticOperations"]
    macs = effective(graph, images, "conv1", "image")
    assert found["Effective_MACs"] == pytest.approx(macs, rel=1e-12)
    others = effective(graph, images, "conv2", "pool") + effective(graph, images, "dense", "flat")
    assert found["Effective_ACs"] == pytest.approx(others, rel=1e-12)


def test_footprint_and_sparsities_by_hand() -> None:
    graph = dense()
    images = spikes_for(graph, 4)
    found = neurobench(graph, images)
    weights = [node.weight for node in graph.nodes if isinstance(node, Linear)]
    count = sum(w.size for w in weights)
    assert found["Footprint"] == count + 2 * (40 + 30 + 10)
    assert found["ConnectionSparsity"] == sum(int((w == 0).sum()) for w in weights) / count
    trace = run(graph, images).trace
    spikes = sum(trace[name].sum() for name in ("lif1", "lif2", "classes"))
    assert found["ActivationSparsity"] == 1 - spikes / (80 * graph.steps * 4)
    assert found["SynapticOperations"]["Dense"] == graph.steps * count


def test_attention_is_in_it_and_marked() -> None:
    graph = Adaptive(channels=16).build()
    images = images_for(graph, 3)
    found = neurobench(graph, images)
    events = run(graph, images).events
    assert events is not None
    additions = sum(n.mean("sops") for n in events.nodes if n.kind == "Attention")
    assert found["attention"]["in_NeuroBench"] is False
    assert found["attention"]["Effective_ACs"] == additions > 0
    both = found["SynapticOperations"]["Effective_ACs"] + additions
    assert found["with_attention"]["Effective_ACs"] == pytest.approx(both)
    json.dumps(found, allow_nan=False)
    assert set(DEFINITIONS) >= {"Footprint", "ConnectionSparsity", "ActivationSparsity", "Dense"}

"""Networks for SANA-FE: spikes only, no value above 1, small enough for its one chip."""

from __future__ import annotations

import numpy as np
from tiny_networks import Sketch

from atsnn.fixed_point import halting_table, halting_threshold
from export.graph import (
    Add,
    Conv,
    Gate,
    Graph,
    HaltingScore,
    Input,
    Linear,
    OrPool,
    Output,
    Reshape,
)


def dense(seed: int = 0) -> Graph:
    """Three fully connected layers."""
    s = Sketch(seed)
    s.node(Input("image", "", (24,), 1))
    s.node(Linear("fc1", "net.fc1", s.weights(40, 24), None), in_="image")
    s.lif("lif1", "fc1", 40, 40)
    s.node(Linear("fc2", "net.fc2", s.weights(30, 40), None), in_="lif1")
    s.lif("lif2", "fc2", 60, 30)
    s.node(Linear("fc3", "net.fc3", s.weights(10, 30), None), in_="lif2")
    s.lif("classes", "fc3", 40, 10)
    s.node(Output("output", ""), in_="classes")
    return s.graph(5)


def conv(seed: int = 0) -> Graph:
    """Two convolutions (one strided, one grouped), a pool, a dense layer."""
    s = Sketch(seed)
    s.node(Input("image", "", (2, 8, 8), 1))
    s.node(Conv("conv1", "net.conv1", s.weights(6, 2, 3, 3), None, (1, 1), (1, 1)), in_="image")
    s.lif("lif1", "conv1", 60, 6)
    s.node(OrPool("pool", "net.pool", (3, 3), (2, 2), (1, 1)), in_="lif1")
    s.node(
        Conv("conv2", "net.conv2", s.weights(4, 3, 3, 3), None, (2, 2), (1, 1), (1, 1), 2),
        in_="pool",
    )
    s.lif("lif2", "conv2", 60, 4)
    s.node(Reshape("flat", "", "flatten"), in_="lif2")
    s.node(Linear("dense", "net.dense", s.weights(5, 16), None), in_="flat")
    s.lif("classes", "dense", 40, 5)
    s.node(Output("output", ""), in_="classes")
    return s.graph(4)


def residual(seed: int = 0) -> Graph:
    """A residual branch that writes channels which the stream leaves free: sums stay 1."""
    s = Sketch(seed)
    s.node(Input("image", "", (6, 8), 1))
    first = s.weights(8, 8)
    first[1::2] = 0
    branch = s.weights(8, 8)
    branch[0::2] = 0
    s.node(Linear("fc1", "net.fc1", first, None), in_="image")
    s.lif("lif1", "fc1", 40, 8, bias=0)
    s.node(Linear("fc2", "net.fc2", branch, None), in_="lif1")
    s.lif("lif2", "fc2", 40, 8, bias=0)
    s.node(Add("stream", "net.stream", (0, 0)), in_=["lif1", "lif2"])
    s.node(Linear("fc3", "net.fc3", s.weights(12, 8), None), in_="stream")
    s.lif("lif3", "fc3", 40, 12)
    s.node(Reshape("flat", "", "flatten"), in_="lif3")
    s.node(Linear("fc4", "net.fc4", s.weights(4, 72), None), in_="flat")
    s.lif("classes", "fc4", 40, 4)
    s.node(Output("output", ""), in_="classes")
    return s.graph(5)


def gated(seed: int = 0) -> Graph:
    """Tokens whose gates close; without bias, so that SANA-FE's neurons behind gates are silent."""
    s = Sketch(seed)
    s.node(Input("image", "", (10, 8), 1))
    s.node(Linear("fc0", "net.fc0", s.weights(8, 8), None), in_="image")
    s.lif("stem", "fc0", 40, 8)
    table = halting_table(2.0, -1.5, 2, 0)
    s.node(HaltingScore("score", "net.halting", 2.0, -1.5, table), in_="stem")
    s.node(Gate("gate", "net.halting", halting_threshold(0.01), True), score="score")
    s.node(Linear("fc1", "net.fc1", s.weights(16, 8), None), in_="stem", gate="gate")
    s.lif("lif1", "fc1", 40, 16, "gate", bias=0)
    s.node(Linear("fc2", "net.fc2", s.weights(8, 16), None), in_="lif1", gate="gate")
    s.lif("lif2", "fc2", 40, 8, "gate", bias=0)
    s.node(Reshape("flat", "", "flatten"), in_="lif2")
    s.node(Linear("fc3", "net.fc3", s.weights(4, 80), None), in_="flat")
    s.lif("classes", "fc3", 40, 4)
    s.node(Output("output", ""), in_="classes")
    return s.graph(5)


NETWORKS = {"dense": dense, "conv": conv, "residual": residual, "gated": gated}


def spikes_for(graph: Graph, count: int, seed: int = 0) -> np.ndarray:
    """Events [T, B, *input shape] of 0 and 1, uint8."""
    rng = np.random.default_rng(seed)
    return (rng.random((graph.steps, count, *graph.input.shape)) < 0.4).astype(np.uint8)

"""Passes, each as before and after on the smallest graph that shows what it does."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norse.torch import LIFBoxCell, LIFBoxParameters, LIFCell, LIFParameters, SequentialState
from torch import Tensor, nn

from atsnn.fixed_point import ACTIVATION_LIMIT, WEIGHT_MAX, NeuronModel, decay
from export.capture import capture
from export.errors import GraphError
from export.formats.hdf5 import identical
from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Edge,
    Graph,
    HaltingScore,
    Input,
    Linear,
    Norm,
    Output,
    Readout,
)
from export.passes import FoldNorm, Quantize, Schedule
from export.ranges import maxima
from export.torch_module import torch_trace
from hardware.engine import run

BOX = NeuronModel(0.5, 1.0, 1.0)
LIF_BOX = LIFBoxParameters(tau_mem_inv=torch.tensor(500.0))
CURRENT = LIFParameters(tau_mem_inv=torch.tensor(400.0), tau_syn_inv=torch.tensor(600.0))


class Normalised(nn.Module):
    """A residual branch under batch normalisation, neurons with and without current memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.lif = LIFBoxCell(LIF_BOX)
        self.branch = SequentialState(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), LIFCell(CURRENT))
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lif(self.norm(self.stem(x)))
        y, _ = self.branch(x)
        return self.head((x + y).flatten(1))


def normalised(seed: int = 0) -> Graph:
    torch.manual_seed(seed)
    model = Normalised()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(4)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 1.0)
            module.bias.data.uniform_(0, 0.5)
    return capture(model, torch.zeros(1, 1, 4, 4), steps=4)


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 1, 4, 4), dtype=np.uint8)


def float_graph(*nodes, steps: int = 4) -> Graph:
    """A chain of nodes between an input of 2 features and the output."""
    chain = (Input("x", "", (2,)), *nodes, Output("out", ""))
    edges = tuple(
        Edge(a.name, b.name, target_port=b.inputs[0]) for a, b in itertools.pairwise(chain)
    )
    return Graph(chain, edges, steps)


def linear(name: str = "fc", bias: float = 0.25) -> Linear:
    weight = np.array([[1.0, -0.5], [0.25, 2.0]], np.float32)
    return Linear(name, f"net.{name}", weight, np.full(2, bias, np.float32))


def neurons(name: str = "lif", model: NeuronModel = BOX) -> LIF:
    return LIF(name, f"net.{name}", model)


def head(features: int = 2) -> Readout:
    return Readout("head", "net.head", np.eye(features, dtype=np.float32), np.zeros(features))


class TestFoldNorm:
    def test_puts_factor_and_shift_into_the_synapse(self) -> None:
        norm = Norm("bn", "net.bn", *(np.full(2, v) for v in (0.5, 3.0, 4.0, 1.0)), epsilon=1.0)
        before = float_graph(linear(), norm, neurons(), head())
        after = FoldNorm()(before)
        assert [node.name for node in after.nodes] == ["x", "fc", "lif", "head", "out"]
        folded = after["fc"]
        assert isinstance(folded, Linear)
        assert folded.bias is not None
        np.testing.assert_array_equal(folded.weight, 2 * linear().weight)  # 4 / sqrt(3 + 1)
        np.testing.assert_allclose(folded.bias, (0.25 - 0.5) * 2 + 1.0)
        assert folded.weight.dtype == np.float32

    def test_leaves_a_graph_without_norm_alone(self) -> None:
        before = float_graph(linear(), neurons(), head())
        assert identical(FoldNorm()(before), before)

    def test_refuses_a_norm_behind_something_else(self) -> None:
        ones = np.ones(2)
        graph = float_graph(linear(), neurons(), Norm("bn", "net.bn", ones, ones, ones, ones, 0.1))
        nodes = (*graph.nodes[:-1], linear("fc2"), neurons("l2"), graph.nodes[-1])
        edges = (*graph.edges[:-1], Edge("bn", "fc2"), Edge("fc2", "l2"), Edge("l2", "out"))
        with pytest.raises(GraphError, match=r"Norm bn .*stands behind LIF lif"):
            FoldNorm()(replace(graph, nodes=nodes, edges=edges))

    def test_refuses_a_synapse_that_another_node_reads_too(self) -> None:
        ones = np.ones(2)
        norm = Norm("bn", "net.bn", ones, ones, ones, ones, 0.1)
        graph = float_graph(linear(), norm, Add("sum", "net.sum", (0, 0)), neurons(), head())
        with pytest.raises(GraphError, match="fc is read by 2 nodes"):
            FoldNorm()(replace(graph, edges=(*graph.edges, Edge("fc", "sum"))))


class TestQuantize:
    def test_one_layer_worked_by_hand(self) -> None:
        after = Quantize(pixel_bits=8)(float_graph(linear(), neurons(), head()))
        fc, lif = after["fc"], after["lif"]
        assert isinstance(fc, Linear)
        assert isinstance(lif, LIF)
        assert lif.constants is not None
        # the largest weight, 2.0, fills the synapse: 254; a pixel of 255 stands for 1
        np.testing.assert_array_equal(fc.weight, [[128, -64], [32, 254]])
        assert fc.bias is None
        assert lif.scale == pytest.approx(127 * 255)
        assert (lif.constants.du, lif.constants.dv) == (4095, 2048)
        assert lif.constants.threshold == round(2 * 127 * 255 * 1.0)
        held = lif.constants.bias / (lif.scale * 64)
        np.testing.assert_allclose(held, 0.25, rtol=1e-3)

    def test_attention_becomes_counts_and_its_factor_a_threshold(self) -> None:
        spikes = neurons("qkv")
        nodes = (
            Input("x", "", (3, 2)),
            linear(),
            spikes,
            Attention("attention", "net.attention", 1, 0.125),
            neurons("mixed", NeuronModel(0.5, 1.0, 0.5)),
            head(),
            Output("out", ""),
        )
        edges = (
            Edge("x", "fc"),
            Edge("fc", "qkv"),
            *(Edge("qkv", "attention", target_port=port) for port in "qkv"),
            Edge("attention", "mixed"),
            Edge("mixed", "head", target_port="x"),
            Edge("head", "out"),
        )
        after = Quantize()(Graph(nodes, edges, 4))
        attention, mixed = after["attention"], after["mixed"]
        assert isinstance(attention, Attention)
        assert isinstance(mixed, LIF)
        assert mixed.constants is not None
        assert attention.scale == 1
        assert mixed.constants.threshold == 8  # tau * v_th / 0.125

    def test_the_stream_carries_fraction_bits(self) -> None:
        graph = FoldNorm()(normalised())
        after = Quantize(fraction_bits=3)(graph)
        add, readout = after["add"], after["head"]
        assert isinstance(add, Add)
        assert isinstance(readout, Readout)
        assert add.shifts == (3, 3)
        assert maxima(after)["add", "out"] == 16
        largest = float(np.abs(graph["head"].weight).max())  # pyright: ignore[reportAttributeAccessIssue]
        assert readout.scale == pytest.approx(WEIGHT_MAX / largest * 4 * 8)

    def test_two_synapses_share_one_scale(self) -> None:
        nodes = (
            Input("x", "", (2,)),
            linear("a"),
            linear("b", bias=-0.5),
            Add("sum", "net.sum", (0, 0)),
            neurons(),
            head(),
            Output("out", ""),
        )
        edges = (
            Edge("x", "a"),
            Edge("x", "b"),
            Edge("a", "sum"),
            Edge("b", "sum"),
            Edge("sum", "lif"),
            Edge("lif", "head", target_port="x"),
            Edge("head", "out"),
        )
        graph = Graph(nodes, edges, 4)
        halved = replace(linear("b", bias=-0.5), weight=0.5 * linear().weight)
        graph = replace(graph, nodes=(*nodes[:2], halved, *nodes[3:]))
        after = Quantize(pixel_bits=4)(graph)
        a, b, lif = after["a"], after["b"], after["lif"]
        assert isinstance(a, Linear)
        assert isinstance(b, Linear)
        assert isinstance(lif, LIF)
        assert lif.constants is not None
        assert np.abs(a.weight).max() == 254
        assert np.abs(b.weight - a.weight / 2).max() <= 1
        np.testing.assert_allclose(lif.constants.bias / (lif.scale * 64), -0.25, rtol=1e-3)
        report = Quantize(pixel_bits=4).report(graph)
        assert [layer.node for layer in report] == ["a", "b"]

    def test_a_spike_that_enters_a_neuron_gets_a_relay(self) -> None:
        after = Quantize()(float_graph(linear(), neurons(), neurons("second"), head()))
        relay = after["lif>second"]
        assert isinstance(relay, Linear)
        np.testing.assert_array_equal(relay.weight > 0, np.eye(2, dtype=bool))

    def test_reports_every_rounding(self) -> None:
        (layer,) = Quantize(pixel_bits=8).report(float_graph(linear(), neurons(), head()))
        assert (layer.node, layer.source, layer.neuron) == ("fc", "net.fc", "lif")
        assert layer.weight_bits == 8
        assert layer.weight_error <= 0.5 / 127
        assert layer.zeroed == 0
        assert layer.threshold_error < 1e-4
        assert layer.decay_error == 0
        assert layer.bound == 255 * (32 + 254)
        assert layer.headroom == pytest.approx(ACTIVATION_LIMIT / layer.bound)

    def test_a_bias_exponent_is_kept(self) -> None:
        after = Quantize(bias_exponent=6)(float_graph(linear(), neurons(), head()))
        lif = after["lif"]
        assert isinstance(lif, LIF)
        assert lif.constants is not None
        assert lif.constants.bias_exponent == 6
        np.testing.assert_allclose(lif.constants.bias / (lif.scale * 64), 0.25, rtol=1e-2)

    @pytest.mark.parametrize(
        ("graph", "message"),
        [
            (lambda: Quantize()(FoldNorm()(normalised())), "quantised already"),
            (normalised, "run FoldNorm first"),
            (
                lambda: float_graph(linear(), linear("fc2"), neurons(), head()),
                "fc .*its current goes to fc2, not to a neuron; put a spiking neuron behind it",
            ),
            (
                lambda: float_graph(linear(), neurons("lif", NeuronModel(0.5, 1.0, 1e-9)), head()),
                "threshold is 0 at scale",
            ),
        ],
    )
    def test_refuses(self, graph, message: str) -> None:
        with pytest.raises(GraphError, match=message):
            Quantize()(graph())

    def test_refuses_a_current_that_goes_to_neurons_and_elsewhere(self) -> None:
        graph = float_graph(linear(), neurons(), Add("sum", "net.sum", (0, 0)), head())
        graph = replace(graph, edges=(*graph.edges, Edge("fc", "sum")))
        with pytest.raises(GraphError, match="its current goes to neurons and to Add sum"):
            Quantize()(graph)

    def test_refuses_to_add_values_of_two_scales(self) -> None:
        pool = Conv(
            "pool", "net.pool", np.full((1, 1, 3, 3), 1 / 9, np.float32), None, padding=(1, 1)
        )
        nodes = (
            Input("x", "", (1, 4, 4)),
            Conv("conv", "net.conv", np.ones((1, 1, 1, 1), np.float32), None),
            neurons(),
            pool,
            Add("sum", "net.sum", (0, 0)),
            Conv("conv2", "net.conv2", np.ones((1, 1, 1, 1), np.float32), None),
            neurons("lif2"),
            Output("out", ""),
        )
        names = ["x", "conv", "lif", "pool", "sum", "conv2", "lif2", "out"]
        edges = [Edge(a, b) for a, b in itertools.pairwise(names)]
        with pytest.raises(GraphError, match=r"adds values that count 1 and 18 per unit"):
            Quantize()(Graph(nodes, (*edges, Edge("lif", "sum")), 2))

    def test_the_halting_table_reaches_the_largest_value_of_the_stream(self) -> None:
        nodes = (
            Input("x", "", (3, 2)),
            linear(),
            neurons(),
            HaltingScore("score", "net.score", 5.0, -5.0),
            head(),
            Output("out", ""),
        )
        edges = (
            Edge("x", "fc"),
            Edge("fc", "lif"),
            Edge("lif", "score"),
            Edge("lif", "head", target_port="x"),
            Edge("head", "out"),
        )
        score = Quantize()(Graph(nodes, edges, 2))["score"]
        assert isinstance(score, HaltingScore)
        assert score.table is not None
        assert score.table.tolist() == [round(4096 / (1 + np.exp(5))), 2048]

    @given(seed=st.integers(0, 2**32 - 1), gain=st.floats(0.01, 100), bits=st.integers(1, 8))
    @settings(max_examples=30)
    def test_no_image_can_overflow_a_layer(self, seed: int, gain: float, bits: int) -> None:
        rng = np.random.default_rng(seed)
        weight = (gain * rng.normal(size=(3, 2, 3, 3))).astype(np.float32)
        bias = (gain * rng.normal(size=3)).astype(np.float32)
        model = NeuronModel(rng.uniform(0.2, 1.0), rng.uniform(0.2, 1.0), 1.0 * gain)
        nodes = (
            Input("x", "", (2, 3, 3)),
            Conv("conv", "net.conv", weight, bias),
            LIF("lif", "net.lif", model),
            Output("out", ""),
        )
        edges = (Edge("x", "conv"), Edge("conv", "lif"), Edge("lif", "out"))
        after = Quantize(pixel_bits=bits)(Graph(nodes, edges, 6))
        worst = np.where(weight > 0, 255, 0).astype(np.uint8)
        images = np.concatenate([worst, 255 - worst, np.full_like(worst[:1], 255)])
        quantised = after["conv"]
        assert isinstance(quantised, Conv)
        assert maxima(after)["conv", "out"] <= ACTIVATION_LIMIT
        lif = after["lif"]
        assert isinstance(lif, LIF)
        assert _current_peak(quantised, lif, images, bits, steps=6) < 2**23


def _current_peak(conv: Conv, lif: LIF, images: np.ndarray, bits: int, steps: int) -> int:
    """Largest |current| over time, integer by integer, from the definition."""
    assert lif.constants is not None
    pixels = (images >> (8 - bits)).astype(np.int64)
    activation = np.einsum("bcij,ocij->bo", pixels, conv.weight.astype(np.int64))
    current, peak = np.zeros_like(activation), 0
    for _ in range(steps):
        current = decay(current, lif.constants.du + 1) + activation * 64
        peak = max(peak, int(np.abs(current).max()))
    return peak


class TestSchedule:
    def test_depths_and_delays_of_a_residual(self) -> None:
        after = Schedule()(Quantize()(FoldNorm()(normalised())))
        assert after.depth == {
            "image": 0,
            "stem": 1,
            "lif": 1,
            "branch.0": 2,
            "branch.2": 2,
            "add": 2,
            "flatten": 2,
            "head": 2,
            "output": 2,
        }
        delays = {(e.source, e.target): e.delay for e in after.edges if e.delay}
        assert delays == {("lif", "add"): 1}

    def test_all_messages_into_a_node_arrive_together(self) -> None:
        from export.passes.schedule import latency

        after = Schedule()(Quantize()(FoldNorm()(normalised())))
        for edge in after.edges:
            arrives = after.depth[edge.source] + edge.delay
            assert arrives == after.depth[edge.target] - latency(after[edge.target])

    def test_refuses_a_message_that_would_wait_too_long(self) -> None:
        with pytest.raises(GraphError, match=r"message from lif must wait 1 steps, at most 0"):
            Schedule(max_delay=0)(FoldNorm()(normalised()))


@given(
    before=st.lists(st.sampled_from([FoldNorm(), Schedule()]), max_size=3),
    between=st.lists(st.sampled_from([FoldNorm(), Schedule()]), max_size=3),
    after=st.lists(st.just(Schedule()), max_size=2),
    seed=st.integers(0, 3),
)
@settings(max_examples=20)
def test_any_valid_order_of_passes_keeps_the_spikes(before, between, after, seed: int) -> None:
    plain = Quantize()(FoldNorm()(normalised(seed)))
    graph = normalised(seed)
    for step in [*before, FoldNorm(), *between, Quantize(), *after]:
        graph = step(graph)
    ours, theirs = torch_trace(graph, PIXELS), torch_trace(plain, PIXELS)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("seed", range(3))
def test_only_a_membrane_without_headroom_saturates(seed: int) -> None:
    folded = FoldNorm()(normalised(seed))
    passing = Quantize(pixel_bits=8)
    room = {layer.neuron: layer.membrane_headroom for layer in passing.report(folded)}
    for layer in run(passing(folded), PIXELS).ranges:
        assert layer.current_wraps == 0
        assert layer.voltage_saturations == 0 or room[layer.node] < 1

"""Each way in which a graph can be wrong has an error: the node, the numbers and the mend."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from atsnn.fixed_point import NeuronConstants, NeuronModel
from export.errors import GraphError
from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Edge,
    Gate,
    Graph,
    HaltingScore,
    Input,
    Linear,
    Merge,
    Norm,
    OrPool,
    Output,
    Readout,
    Reshape,
)
from export.passes.base import GraphPass
from export.ranges import kinds, maxima
from export.shapes import shapes
from export.validation import topological, validate

BOX = NeuronModel(0.5, 1.0, 1.0)


def constants(channels: int, **changes) -> NeuronConstants:
    return replace(NeuronConstants(4095, 2048, 900, np.zeros(channels, np.int32), 0), **changes)


def even(*shape: int) -> np.ndarray:
    return np.full(shape, 4, np.int32)


class Tokens:
    """Image -> Conv -> LIF -> tokens -> gated Linear and LIF, attention, merging, read-out."""

    def __init__(self) -> None:
        self.nodes = [
            Input("image", "", (1, 4, 4), bits=4),
            Conv("conv", "net.conv", even(6, 1, 1, 1), None, stride=(2, 2)),
            LIF("stem", "net.stem", BOX, constants(6)),
            Reshape("tokens", "net.tokens", "tokens"),
            HaltingScore("score", "net.score", 2.0, -1.0, np.arange(2, dtype=np.int32) * 2000),
            Gate("gate", "net.gate", 4055, True),
            Linear("q", "net.q", even(6, 6), None),
            LIF("q_lif", "net.q_lif", BOX, constants(6)),
            Attention("attention", "net.attention", 3, 1.0),
            LIF("mixed", "net.mixed", BOX, constants(6)),
            Add("stream", "net.stream", (0, 0)),
            Merge("merge", "net.merge", 1, 0.0, "max", "stream", "first"),
            Readout("head", "net.head", even(3, 6), np.zeros(3, np.int64), scale=4.0),
            Output("output", ""),
        ]
        self.edges = [
            Edge("image", "conv"),
            Edge("conv", "stem"),
            Edge("stem", "tokens"),
            Edge("tokens", "score"),
            Edge("score", "gate", target_port="score"),
            Edge("tokens", "q"),
            Edge("gate", "q", target_port="gate"),
            Edge("q", "q_lif"),
            Edge("gate", "q_lif", target_port="gate"),
            *(Edge("q_lif", "attention", target_port=port) for port in "qkv"),
            Edge("attention", "mixed"),
            Edge("mixed", "stream"),
            Edge("tokens", "stream"),
            Edge("stream", "merge", target_port="x"),
            Edge("gate", "merge", target_port="gate"),
            Edge("merge", "head", target_port="x"),
            Edge("merge", "head", "size", "size"),
            Edge("head", "output"),
        ]

    def graph(self, **changes) -> Graph:
        return replace(Graph(tuple(self.nodes), tuple(self.edges), 2, True), **changes)

    def with_node(self, name: str, **changes) -> Graph:
        return self.graph(
            nodes=tuple(replace(n, **changes) if n.name == name else n for n in self.nodes)
        )


@pytest.fixture
def net() -> Tokens:
    return Tokens()


def test_a_valid_graph_comes_back_as_it_is(net: Tokens) -> None:
    graph = net.graph()
    assert validate(graph) is graph


def test_shapes_of_every_port(net: Tokens) -> None:
    found = shapes(net.graph())
    assert found["conv", "out"] == (6, 2, 2)
    assert found["tokens", "out"] == (4, 6)
    assert found["gate", "out"] == found["merge", "size"] == found["merge", "gate"] == (4,)
    assert found["head", "out"] == (3,)


def test_kinds_and_maxima(net: Tokens) -> None:
    graph = net.graph()
    assert kinds(graph)["q", "out"] == "current"
    assert kinds(graph)["stream", "out"] == "value"
    largest = maxima(graph)
    assert largest["image", "out"] == 15
    assert largest["conv", "out"] == 15 * 4
    assert largest["attention", "out"] == 4 * 2
    assert largest["stream", "out"] == 2


class TestStructure:
    def test_two_nodes_of_one_name(self, net: Tokens) -> None:
        net.nodes[2] = replace(net.nodes[2], name="conv")
        with pytest.raises(GraphError, match=r"LIF conv \(torch module net.stem\): two nodes"):
            validate(net.graph())

    def test_an_open_input(self, net: Tokens) -> None:
        net.edges = [e for e in net.edges if e.target_port != "v"]
        with pytest.raises(
            GraphError, match=r"Attention attention .*input port v is open; connect"
        ):
            validate(net.graph())

    def test_two_edges_into_one_port(self, net: Tokens) -> None:
        net.edges.append(Edge("image", "conv"))
        with pytest.raises(GraphError, match="2 edges enter input port in; sum them with an Add"):
            validate(net.graph())

    @pytest.mark.parametrize(
        ("edge", "message"),
        [
            (Edge("stem", "conv", "spikes"), "leaves output port spikes; its ports are out"),
            (Edge("gate", "conv", target_port="gate"), "enters input port gate; its ports are in"),
            (Edge("nobody", "conv"), "the graph has no node nobody"),
            (Edge("gate", "q", target_port="gate", lag=1), "only a Gate can take a late value"),
            (Edge("stem", "stream", lag=2), "has lag 2 and delay 0"),
        ],
    )
    def test_an_edge_that_leads_nowhere(self, net: Tokens, edge: Edge, message: str) -> None:
        with pytest.raises(GraphError, match=message):
            validate(net.graph(edges=(*net.edges, edge)))

    def test_nodes_out_of_order(self, net: Tokens) -> None:
        net.nodes[1], net.nodes[2] = net.nodes[2], net.nodes[1]
        with pytest.raises(GraphError, match="stands at place 1, before its input conv at place 2"):
            validate(net.graph())

    def test_topological_puts_them_in_order(self, net: Tokens) -> None:
        shuffled = tuple(reversed(net.nodes))
        ordered = topological(shuffled, net.graph(nodes=shuffled))
        assert validate(net.graph(nodes=ordered))

    def test_a_loop_without_lag(self, net: Tokens) -> None:
        net.edges = [e for e in net.edges if (e.source, e.target) != ("tokens", "stream")]
        net.edges.append(Edge("merge", "stream"))
        with pytest.raises(GraphError, match="waits for its own output; put lag=1"):
            topological(tuple(net.nodes), net.graph())

    def test_no_input(self, net: Tokens) -> None:
        with pytest.raises(GraphError, match="0 Input nodes, a graph has exactly one"):
            validate(net.graph(nodes=tuple(net.nodes[1:])))

    @pytest.mark.parametrize("steps", [0, 5000])
    def test_a_number_of_steps(self, net: Tokens, steps: int) -> None:
        with pytest.raises(GraphError, match=f"steps is {steps}"):
            validate(net.graph(steps=steps))

    def test_depth_of_an_unknown_node(self, net: Tokens) -> None:
        with pytest.raises(GraphError, match="depth speaks of node nobody"):
            validate(net.graph(depth={"nobody": 1}))

    def test_a_gate_that_sees_late_scores_only(self, net: Tokens) -> None:
        net.edges = [replace(e, lag=1) if e.target_port == "score" else e for e in net.edges]
        assert validate(net.graph()).feedback


class TestShapes:
    @pytest.mark.parametrize(
        ("node", "changes", "message"),
        [
            ("conv", {"weight": even(6, 2, 1, 1)}, "receives 1 channels; its weight takes 2"),
            ("conv", {"weight": even(6, 1, 9, 9)}, r"window \[9, 9\] does not fit into the map"),
            ("conv", {"stride": (0, 1)}, "stride and dilation are >= 1"),
            ("conv", {"groups": 4}, "with 4 groups"),
            ("conv", {"padding": (10**6, 10**6)}, "at most 134217728 elements"),
            ("conv", {"stride": (4, 4)}, "it receives 1 token; merging needs at least 2"),
            ("q", {"weight": even(6, 5)}, "receives 6 features; its weight takes 5"),
            ("stem", {"constants": constants(5)}, r"bias has shape \[5\]; it needs \[6\]"),
            ("attention", {"heads": 4}, "4 heads for 6 features"),
            ("stream", {"shifts": (0,)}, "2 edges and 1 shifts"),
            ("stream", {"shifts": (0, 99)}, "must be 0 to 12"),
            ("merge", {"similarity": "keys"}, "port keys is open; connect the k spikes"),
            ("merge", {"count": -1}, "count -1"),
            ("head", {"weight": even(3, 7)}, r"weight \[3, 7\] on shape \[4, 6\]"),
            ("head", {"bias": np.zeros(2, np.int64)}, r"bias has shape \[2\]; it needs \[3\]"),
            ("head", {"scale": 0.0}, "its scale is 0.0"),
            ("tokens", {"to": "flatten"}, r"needs tokens \[N, D\]"),
        ],
    )
    def test_do_not_fit(self, net: Tokens, node: str, changes: dict, message: str) -> None:
        with pytest.raises(GraphError, match=message):
            validate(net.with_node(node, **changes))

    def test_branches_of_two_shapes(self, net: Tokens) -> None:
        net.edges = [
            replace(e, source="conv") if (e.source, e.target) == ("tokens", "stream") else e
            for e in net.edges
        ]
        with pytest.raises(GraphError, match=r"adds shapes \[4, 6\] and \[6, 2, 2\]"):
            validate(net.graph())

    def test_a_gate_on_a_feature_map(self, net: Tokens) -> None:
        net.nodes.insert(6, net.nodes.pop(2))
        net.edges.append(Edge("gate", "stem", target_port="gate"))
        net.edges = [replace(e, source="conv") if e.target == "tokens" else e for e in net.edges]
        with pytest.raises(GraphError, match="only tokens"):
            validate(net.graph())

    def test_a_pool_on_tokens(self, net: Tokens) -> None:
        net.nodes.insert(4, OrPool("pool", "net.pool", (2, 2), (2, 2)))
        net.edges.append(Edge("tokens", "pool"))
        with pytest.raises(GraphError, match=r"OrPool pool .*needs a feature map \[C, H, W\]"):
            validate(net.graph())


class TestLimitsOfAQuantisedGraph:
    @pytest.mark.parametrize(
        ("node", "changes", "message"),
        [
            ("image", {"bits": 0}, "pixels have 0 bits; use 1 to 8"),
            ("conv", {"weight": even(6, 1, 1, 1) + 1}, "6 of 6 weights are odd"),
            ("conv", {"weight": even(6, 1, 1, 1) * 100}, "from 400 to 400; the core holds -256"),
            ("conv", {"weight": even(6, 1, 1, 1).astype(float)}, "its weight is float64"),
            ("conv", {"bias": np.zeros(6, np.int32)}, "the bias belongs to the LIF behind it"),
            ("stem", {"constants": None}, "no integer constants; run the quantize pass"),
            ("stem", {"constants": constants(6, dv=5000)}, "dv is 5000; the core holds integers 0"),
            ("stem", {"constants": constants(6, threshold=0)}, "threshold is 0"),
            ("stem", {"constants": constants(6, threshold=2**17)}, "threshold is 131072"),
            ("stem", {"constants": constants(6, bias_exponent=8)}, "bias exponent is 8"),
            (
                "stem",
                {"constants": constants(6, bias_mantissa=np.full(6, 5000, np.int32))},
                "bias reaches from 5000 to 5000; the core holds -4095 to 4095",
            ),
            ("attention", {"scale": 0.125}, "scale is 0.125; it must be 1"),
            ("score", {"table": None}, "no int32 table"),
            ("score", {"table": np.zeros(1, np.int32)}, "1 entries and the stream reaches 1"),
            ("gate", {"threshold": 0.5}, "threshold is 0.5; it must be an integer"),
            ("head", {"weight": even(3, 6) * 1.0}, "its weight is float64"),
        ],
    )
    def test_are_checked(self, net: Tokens, node: str, changes: dict, message: str) -> None:
        with pytest.raises(GraphError, match=message):
            validate(net.with_node(node, **changes))

    def test_no_normalisation(self, net: Tokens) -> None:
        ones = np.ones(6)
        net.nodes.insert(2, Norm("norm", "net.norm", ones, ones, ones, ones, 1e-5))
        net.edges[1] = Edge("conv", "norm")
        net.edges.append(Edge("norm", "stem"))
        with pytest.raises(GraphError, match="no normalisation; run the fold_norm pass first"):
            validate(net.graph())


class TestFloatGraph:
    @pytest.fixture
    def graph(self) -> Graph:
        nodes = (
            Input("x", "", (2,)),
            Linear("fc", "fc", np.ones((2, 2)), np.zeros(2)),
            LIF("lif", "lif", BOX),
            Output("out", ""),
        )
        return Graph(nodes, (Edge("x", "fc"), Edge("fc", "lif"), Edge("lif", "out")), 2)

    def test_weights_that_are_not_numbers(self, graph: Graph) -> None:
        fc = replace(graph.nodes[1], weight=np.array([[np.nan, 1], [np.inf, 1]]))
        with pytest.raises(GraphError, match="2 of 4 entries of weight are not finite"):
            validate(replace(graph, nodes=(graph.nodes[0], fc, *graph.nodes[2:])))

    def test_a_threshold_below_zero(self, graph: Graph) -> None:
        lif = replace(graph.nodes[2], model=NeuronModel(0.5, 1.0, -1.0))
        with pytest.raises(GraphError, match=r"threshold is -1\.0"):
            validate(replace(graph, nodes=(*graph.nodes[:2], lif, graph.nodes[3])))

    def test_a_pass_is_checked_on_both_sides(self, graph: Graph) -> None:
        @dataclass(frozen=True)
        class Breaking(GraphPass):
            def rewrite(self, graph: Graph) -> Graph:
                return replace(graph, steps=0)

        class Keeping(GraphPass):
            def rewrite(self, graph: Graph) -> Graph:
                return graph

        with pytest.raises(GraphError, match="steps is 0"):
            Breaking()(graph)
        with pytest.raises(GraphError, match="steps is 0"):
            Keeping()(replace(graph, steps=0))

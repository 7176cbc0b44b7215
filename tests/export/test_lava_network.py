"""The Lava network of a graph fires the spikes that the engine fires, at both grains."""

import os
import signal
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atsnn.errors import DatasetError
from atsnn.fixed_point import NeuronConstants, NeuronModel, halting_table, halting_threshold
from export.errors import LavaRunError, UnsupportedTargetError
from export.formats import hdf5
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
    Node,
    OrPool,
    Output,
    Readout,
    Reshape,
)
from export.lava import job_folder, run_lava, run_watched, watch
from export.lava.interpreter import Interpreter
from export.lava.kernels import WRAPS_ONCE
from export.lava.network import (
    check_images,
    hardware_steps,
    make_recorders,
    prepare,
    read_trace,
)
from export.lava.partition import partition
from export.lava.watch import WORK
from export.ranges import maxima
from hardware.engine import run as run_engine

MODEL = NeuronModel(membrane_rate=0.5, current_rate=1.0, threshold=1.0)
OWN_SCRIPT = Path(__file__).parent / "lava_models" / "own_script.py"


@dataclass
class Drawing:
    """Nodes and edges of a graph in the making; methods return the node's name."""

    rng: np.random.Generator
    label: str = "stem"
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    blocks: dict[str, str] = field(default_factory=dict)

    def node(self, node: Node, *sources: str, **ports: str | None) -> str:
        self.nodes.append(node)
        self.blocks[node.name] = self.label
        into = [(node.inputs[0], source) for source in sources] if sources else []
        for port, source in [*into, *ports.items()]:
            if source is not None:
                name, _, out = source.partition(":")
                self.edges.append(Edge(name, node.name, out or "out", port))
        return node.name

    def weight(self, *shape: int) -> np.ndarray:
        return 2 * self.rng.integers(-25, 30, shape, dtype=np.int32)

    def conv(self, name: str, source: str, shape: tuple[int, ...], **options) -> str:
        return self.node(Conv(name, f"net.{name}", self.weight(*shape), None, **options), source)

    def linear(self, name: str, source: str, out: int, size: int, gate: str | None = None) -> str:
        return self.node(
            Linear(name, f"net.{name}", self.weight(out, size), None), source, gate=gate
        )

    def lif(self, name, source, channels, threshold, gate=None, du=4095, dv=2048, bias=900) -> str:
        mantissa = self.rng.integers(-bias, bias + 1, channels, dtype=np.int32)
        constants = NeuronConstants(du, dv, threshold, mantissa, 1)
        return self.node(LIF(name, f"net.{name}", MODEL, constants), source, gate=gate)

    def graph(self, steps: int = 3, fraction_bits: int = 0, labels: bool = True) -> Graph:
        return Graph(
            tuple(self.nodes),
            tuple(self.edges),
            steps,
            quantized=True,
            fraction_bits=fraction_bits,
            blocks=self.blocks if labels else {},
        )


def conv_graph(labels: bool = True) -> Graph:
    """A user's network: strides, groups, dilation, pool, sums of spikes and of currents."""
    d = Drawing(np.random.default_rng(1))
    image = d.node(Input("image", "", (2, 9, 8), 5))
    d.conv("conv1", image, (4, 2, 3, 3), padding=(1, 1))
    d.lif("lif1", "conv1", 4, 1500)
    d.node(OrPool("pool", "", (3, 3), (2, 2), (1, 1)), "lif1")
    d.conv("left", "pool", (4, 4, 1, 1))
    d.conv("right", "pool", (4, 2, 3, 3), padding=(1, 1), groups=2)
    d.node(Add("currents", "", (0, 1)), "left", "right")
    d.lif("lif2", "currents", 4, 150, du=1023, dv=512)
    d.node(Add("residual", "", (0, 2, 0)), "lif2", "pool", "lif2")
    d.label = "head"
    d.conv("conv3", "residual", (6, 4, 2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    d.lif("lif3", "conv3", 6, 400)
    d.node(Reshape("flat", "", "flatten"), "lif3")
    d.linear("dense", "flat", 5, 6 * 3 * 4)
    d.lif("classes", "dense", 5, 100)
    d.node(Output("output", ""), "classes")
    return d.graph(labels=labels)


def vector_graph() -> Graph:
    """Graded vectors, a residual stream, a current that wraps, and a readout."""
    d = Drawing(np.random.default_rng(2))
    x = d.node(Input("events", "", (12,), 8))
    d.linear("dense1", x, 16, 12)
    d.lif("lif1", "dense1", 16, 9000, du=0, dv=100)
    d.linear("dense2", "lif1", 16, 16)
    d.lif("lif2", "dense2", 16, 80)
    d.node(Add("stream", "", (3, 3)), "lif1", "lif2")
    d.linear("dense3", "stream", 16, 16)
    d.node(Add("many", "", (12, 0)), "dense3", "dense3")
    d.lif("lif3", "many", 16, 900, du=100)
    d.node(Readout("head", "", d.weight(3, 16), d.weight(3), 11.0), "lif3")
    d.node(Output("output", ""), "head")
    return d.graph(steps=4)


def event_graph() -> Graph:
    """Events instead of an image."""
    d = Drawing(np.random.default_rng(3))
    x = d.node(Input("events", "", (1, 4, 5), 1))
    d.conv("conv", x, (3, 1, 3, 3), padding=(1, 1))
    d.lif("lif", "conv", 3, 30)
    d.node(Reshape("flat", "", "flatten"), "lif")
    d.linear("dense", "flat", 4, 60)
    d.lif("classes", "dense", 4, 90)
    d.node(Output("output", ""), "classes")
    return d.graph(steps=5)


def token_graph(
    seed: int = 0,
    merge: Merge | None = None,
    accumulate: bool = True,
    fraction_bits: int = 4,
    steps: int = 3,
    stem_merge: bool = False,
) -> Graph:
    """Two blocks of an adaptive spiking transformer on 4 x 3 tokens."""
    d, channels, bits = Drawing(np.random.default_rng(seed)), 8, fraction_bits
    x = d.node(Input("image", "", (1, 4, 3), 4))
    d.conv("stem_conv", x, (channels, 1, 3, 3), padding=(1, 1))
    d.lif("stem_lif", "stem_conv", channels, 250)
    d.node(Reshape("tokens", "", "tokens"), "stem_lif")
    stream = d.node(Add("stream", "", (bits,)), "tokens")
    table = halting_table(1.5, -2.0, (8 << bits) + 1, bits)
    alive = size = None
    if stem_merge:
        assert merge is not None
        off = d.node(HaltingScore("off", "", 1.0, -1e4, np.zeros_like(table)), stream)
        always = d.node(Gate("always", "", halting_threshold(0.01), False), off)
        m = d.node(replace(merge, name="stem_merge"), x=stream, gate=always)
        stream, alive, size = m, f"{m}:alive", f"{m}:size"
    scores = d.node(HaltingScore("score0", "", 1.5, -2.0, table), stream)
    for l in (1, 2):
        d.label = b = f"block{l}"
        gate = d.node(
            Gate(f"{b}_gate", "", halting_threshold(0.01), accumulate), scores, alive=alive
        )
        for part in "qkv":
            d.linear(f"{b}_{part}", stream, channels, channels, gate)
            d.lif(f"{b}_{part}_lif", f"{b}_{part}", channels, 60 << bits, gate)
        q, k, v = (f"{b}_{part}_lif" for part in "qkv")
        d.node(Attention(f"{b}_attention", "", 2, 1.0), q=q, k=k, v=v)
        d.lif(f"{b}_attention_lif", f"{b}_attention", channels, 1, gate, bias=0)
        d.linear(f"{b}_proj", f"{b}_attention_lif", channels, channels, gate)
        d.lif(f"{b}_proj_lif", f"{b}_proj", channels, 40, gate)
        stream = d.node(Add(f"{b}_attended", "", (0, bits)), stream, f"{b}_proj_lif")
        if merge is not None:
            m = d.node(
                replace(merge, name=f"{b}_merge"),
                x=stream,
                gate=gate,
                alive=alive,
                size=size,
                keys=k if merge.similarity == "keys" else None,
            )
            stream, gate, alive, size = m, f"{m}:gate", f"{m}:alive", f"{m}:size"
        d.linear(f"{b}_fc1", stream, 2 * channels, channels, gate)
        d.lif(f"{b}_fc1_lif", f"{b}_fc1", 2 * channels, 90 << bits, gate)
        d.linear(f"{b}_fc2", f"{b}_fc1_lif", channels, 2 * channels, gate)
        d.lif(f"{b}_fc2_lif", f"{b}_fc2", channels, 60, gate)
        stream = d.node(Add(f"{b}_out", "", (0, bits)), stream, f"{b}_fc2_lif")
        if l == 1:
            score = d.node(HaltingScore(f"{b}_score", "", 1.5, -2.0, table), stream)
            scores = d.node(Add(f"{b}_scores", "", (0, 0)), scores, score)
    d.label = "head"
    d.node(Readout("head", "", d.weight(3, channels), d.weight(3), 7.0), x=stream, size=size)
    d.node(Output("output", ""), "head")
    return d.graph(steps, bits)


MERGE = Merge("", "", 3, 0.3, "mean", "stream", "first")


def images_of(graph: Graph, count: int = 3) -> np.ndarray:
    entry = next(graph.of_kind(Input))
    assert isinstance(entry, Input)
    rng = np.random.default_rng(5)
    if entry.bits == 1:
        return rng.integers(0, 2, (graph.steps, count, *entry.shape), dtype=np.uint8)
    return rng.integers(0, 256, (count, *entry.shape), dtype=np.uint8)


def interpreted(graph: Graph, images: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """The `blocks` grain without Lava: every part's interpreter, one hardware step at a time."""
    graph = prepare(graph)
    entry = next(graph.of_kind(Input))
    assert isinstance(entry, Input)
    still = entry.bits > 1
    frames = (images >> (8 - entry.bits))[None] if still else images
    recorders = make_recorders(graph, frames.shape[1], folder)
    parts = [(part, Interpreter(part, recorders)) for part in partition(graph)]
    for time_step in range(1, hardware_steps(graph, frames.shape[1]) + 1):
        image, step = divmod(time_step - 1, graph.steps)
        shown = image < frames.shape[1]
        frame = frames[step % len(frames), image] if shown else np.zeros(entry.shape, int)
        values = {(entry.name, "out"): frame}
        for part, interpreter in parts:
            out = interpreter.step(time_step, [values[source] for source in part.sources])
            values.update(zip(part.sinks, out, strict=True))
    return read_trace(graph, recorders)


def assert_equal_spikes(trace: dict[str, np.ndarray], graph: Graph, images: np.ndarray) -> None:
    expected = run_engine(graph, images, count_events=False).trace
    assert trace.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(trace[name], values, err_msg=name)


def rates(trace: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in trace.items() if name != "logits"}


GRAPHS = {
    "conv": conv_graph,
    "conv without labels": lambda: conv_graph(labels=False),
    "vector": vector_graph,
    "events": event_graph,
    "tokens": lambda: token_graph(seed=6),
    "tokens merged": lambda: token_graph(seed=6, merge=MERGE),
    "tokens merged behind the stem": lambda: token_graph(seed=6, merge=MERGE, stem_merge=True),
}


@pytest.mark.lava
@pytest.mark.parametrize(
    ("name", "grain"),
    [
        ("conv", "layers"),
        ("conv", "blocks"),
        ("conv without labels", "blocks"),
        ("vector", "layers"),
        ("vector", "blocks"),
        ("events", "layers"),
        ("tokens merged", "layers"),
        ("tokens merged", "blocks"),
        ("tokens merged behind the stem", "layers"),
        ("tokens", "blocks"),
    ],
)
def test_lava_fires_the_spikes_of_the_engine(name, grain):
    graph = GRAPHS[name]()
    images = images_of(graph)
    assert_equal_spikes(run_lava(graph, images, grain), graph, images)


@pytest.mark.lava
def test_own_convolution_of_lava_gives_the_same():
    graph = conv_graph()
    images = images_of(graph)
    assert_equal_spikes(run_lava(graph, images, "layers", lava_conv=True), graph, images)


class TestInterpreter:
    @pytest.mark.parametrize("name", GRAPHS)
    def test_fires_the_spikes_of_the_engine(self, name, tmp_path):
        graph = GRAPHS[name]()
        images = images_of(graph)
        trace = interpreted(graph, images, tmp_path)
        assert_equal_spikes(trace, graph, images)
        assert any(0 < rate < 1 for rate in rates(trace).values())

    def test_block_that_appears_before_the_one_it_reads_from(self, tmp_path):
        d = Drawing(np.random.default_rng(0), label="late")
        d.node(Input("image", "", (6,), 4))
        d.linear("dense1", "image", 6, 6)
        d.label = "early"
        d.linear("dense2", "image", 6, 6)
        d.lif("lif2", "dense2", 6, 100)
        d.label = "late"
        d.node(Add("sum", "", (0, 3)), "dense1", "lif2")
        d.lif("classes", "sum", 6, 100)
        d.node(Output("output", ""), "classes")
        graph = d.graph()
        assert [part.label for part in partition(prepare(graph))] == ["early", "late"]
        images = images_of(graph)
        assert_equal_spikes(interpreted(graph, images, tmp_path), graph, images)

    @settings(max_examples=25)
    @given(data=st.data())
    def test_adaptive_tokens(self, data):
        merge = Merge(
            "",
            "",
            count=data.draw(st.integers(0, 4)),
            minimum_similarity=data.draw(st.sampled_from([0.0, 0.4])),
            combine=data.draw(st.sampled_from(["mean", "max", "keep"])),
            similarity=data.draw(st.sampled_from(["stream", "keys"])),
            assignment="first",
        )
        graph = token_graph(
            seed=data.draw(st.integers(0, 99)),
            merge=merge,
            accumulate=data.draw(st.booleans()),
            fraction_bits=data.draw(st.sampled_from([0, 4])),
            steps=data.draw(st.integers(1, 3)),
        )
        images = images_of(graph, data.draw(st.integers(1, 3)))
        with tempfile.TemporaryDirectory() as folder:
            assert_equal_spikes(interpreted(graph, images, Path(folder)), graph, images)

    def test_networks_here_halt_and_merge_some_tokens_but_not_all(self, tmp_path):
        graph = token_graph(seed=6, merge=MERGE)
        trace = interpreted(graph, images_of(graph), tmp_path)
        found = rates(trace)
        assert 0.2 < found["block2_gate"] < found["block1_gate"] < 1
        assert found["block2_fc2_lif"] > 0
        plain = interpreted_rates(token_graph(seed=6), tmp_path / "plain")
        assert plain["block2_gate"] > found["block2_gate"]

    def test_vector_network_here_has_a_current_that_lava_would_not_wrap(self):
        graph = prepare(vector_graph())
        assert maxima(graph)["many", "out"] > WRAPS_ONCE


def interpreted_rates(graph: Graph, folder: Path) -> dict[str, float]:
    folder.mkdir()
    return rates(interpreted(graph, images_of(graph), folder))


def wide_graph(terms: tuple[int, ...]) -> Graph:
    """A stem of many layers side by side, added up in the head by one sum for each entry."""
    d = Drawing(np.random.default_rng(0))
    d.node(Input("image", "", (4,), 4))
    layers = [f"lif{i}" for i in range(sum(terms))]
    for i, name in enumerate(layers):
        d.linear(f"dense{i}", "image", 4, 4)
        d.lif(name, f"dense{i}", 4, 10)
    d.label = "head"
    total: list[str] = []
    for i, count in enumerate(terms):
        added = [layers.pop() for _ in range(count)] + total
        total = [d.node(Add(f"sum{i}", "", (0,) * len(added)), *added)]
    d.lif("classes", total[0], 4, 10)
    d.node(Output("output", ""), "classes")
    return d.graph()


class TestRefusals:
    def test_float_graph(self):
        with pytest.raises(UnsupportedTargetError, match=r"^the graph is in floating point"):
            prepare(replace(_float_graph(), quantized=False))

    def test_gate_that_looks_back(self):
        graph = token_graph()
        late = Edge("block2_score", "block1_gate", "out", "score", lag=1)
        score = HaltingScore("block2_score", "", 1.0, -1.0, np.zeros(200, np.int32))
        nodes = (*graph.nodes[:-2], score, *graph.nodes[-2:])
        edges = (*graph.edges, Edge("block2_out", "block2_score"), late)
        with pytest.raises(UnsupportedTargetError) as caught:
            prepare(replace(graph, nodes=nodes, edges=edges))
        assert str(caught.value) == (
            "gate block1_gate looks back at block2_score from an earlier time step: a pipelined "
            "chip has not yet computed it; use halting order upstream or blocks, or run this graph "
            "in the engine or in torch"
        )

    def test_merge_from_all_time_steps(self):
        graph = token_graph(merge=replace(MERGE, assignment="all"))
        with pytest.raises(
            UnsupportedTargetError, match=r"^merge block1_merge assigns tokens from"
        ):
            prepare(graph)

    def test_blocks_in_a_circle(self):
        graph = conv_graph()
        graph = replace(graph, blocks={**graph.blocks, "lif2": "head"})
        with pytest.raises(UnsupportedTargetError, match=r"^blocks stem, head read one another"):
            partition(prepare(graph))

    def test_too_many_ports(self):
        with pytest.raises(UnsupportedTargetError) as caught:
            partition(prepare(wide_graph(terms=(9, 8))))
        assert str(caught.value) == (
            "block stem: 17 out-ports exceed the maximum (16); label fewer, larger blocks"
        )

    def test_too_many_terms_of_a_sum(self):
        with pytest.raises(UnsupportedTargetError, match=r"^add sum0: 17 edges exceed the maximum"):
            prepare(wide_graph(terms=(17,)))

    def test_schedule_of_another_hardware(self):
        graph = prepare(conv_graph())
        edges = tuple(replace(e, delay=e.delay + (e.target == "lif3")) for e in graph.edges)
        with pytest.raises(
            UnsupportedTargetError, match=r"^LIF lif3 has depth 4, but conv3 reaches"
        ):
            prepare(replace(graph, edges=edges))

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (np.zeros((2, 2, 9, 9), np.uint8), "images have shape [2, 2, 9, 9], the network takes"),
            (np.zeros((2, 2, 9, 8)), "images of type float64, the network takes uint8 pixels"),
            (np.zeros((0, 2, 9, 8), np.uint8), "no images: the array of images is empty"),
            (np.zeros((3, 2, 2, 9, 8), np.uint8), "events of shape [3, 2, 2, 9, 8] with values up"),
        ],
    )
    def test_images(self, images, message):
        with pytest.raises(DatasetError) as caught:
            check_images(conv_graph(), images)
        assert str(caught.value).startswith(message)


def _float_graph() -> Graph:
    return Graph(
        (Input("image", "", (4,)), Linear("dense", "", np.ones((2, 4)), None), Output("o", "")),
        (Edge("image", "dense"), Edge("dense", "o")),
        steps=2,
    )


@pytest.mark.lava
def test_network_in_a_script_of_ones_own(tmp_path):
    graph = prepare(conv_graph())
    images = images_of(graph)
    hdf5.save(graph, tmp_path / "graph.h5")
    np.save(tmp_path / "images.npy", images)
    arguments = {
        "graph": str(tmp_path / "graph.h5"),
        "images": str(tmp_path / "images.npy"),
        "port": "out0",
    }
    with job_folder() as folder:
        run_watched(f"{OWN_SCRIPT}:main", arguments, folder)
        with np.load(folder / WORK / "result.npz") as result:
            trace = dict(result)
    heard = trace.pop("heard")
    assert_equal_spikes(trace, graph, images)

    assert partition(graph)[0].sinks == (("residual", "out"),)
    depth, steps, count = graph.depth["residual"], graph.steps, len(images)
    stream = heard[depth : depth + steps * count].transpose(0, 3, 2, 1)
    expected = 2 * trace["lif2"] + 4 * trace["pool"].astype(int)
    np.testing.assert_array_equal(
        stream.reshape(count, steps, *stream.shape[1:]).swapaxes(0, 1), expected
    )


@pytest.mark.lava
class TestRun:
    def test_progress_rises_to_the_number_of_time_steps(self):
        graph = vector_graph()
        seen = []
        run_lava(graph, images_of(graph, 100), "blocks", on_progress=lambda *p: seen.append(p))
        steps = [step for step, _ in seen]
        assert steps == sorted(set(steps))
        assert {total for _, total in seen} == {hardware_steps(prepare(graph), 100)}

    def test_killed_process_model_is_named_and_nothing_stays(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

        def kill_the_stem(step, steps):
            for note in tmp_path.glob(f"*/{watch.ACTORS}/*"):
                if note.read_text().startswith("stem "):
                    os.kill(int(note.name), signal.SIGKILL)

        graph = vector_graph()
        with pytest.raises(LavaRunError) as caught:
            run_lava(graph, images_of(graph, 5000), "blocks", on_progress=kill_the_stem)
        assert str(caught.value).startswith("process stem (BlocksModel) (pid ")
        assert str(caught.value).endswith("was killed by SIGKILL")
        assert list(tmp_path.iterdir()) == []

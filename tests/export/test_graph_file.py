"""Graph files: save -> load is the identity, and whatever is not a whole graph file is refused."""

import itertools
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atsnn.fixed_point import NeuronConstants, NeuronModel
from export.errors import GraphError, GraphFormatError
from export.formats import hdf5
from export.graph import LIF, Conv, Edge, Graph, Input, Linear, Output, Readout, Reshape

BOX = NeuronModel(membrane_rate=0.5, current_rate=1.0, threshold=1.0)


def chain(
    rng: np.random.Generator,
    *,
    image: tuple[int, int, int] = (1, 6, 6),
    channels: int = 2,
    classes: int = 3,
    steps: int = 2,
    quantized: bool = True,
) -> Graph:
    """Input -> Conv -> LIF -> flatten -> Readout."""

    def weight(*shape: int) -> np.ndarray:
        return (2 * rng.integers(-60, 60, shape)).astype(np.int32 if quantized else np.float32)

    constants = NeuronConstants(4095, 2048, 900, np.zeros(channels, np.int32), 0)
    features = channels * (image[1] - 2) * (image[2] - 2)
    nodes = (
        Input("image", "", image, bits=4 if quantized else 0),
        Conv("conv", "net.0", weight(channels, image[0], 3, 3), None),
        LIF("lif", "net.1", BOX, constants if quantized else None, scale=12.5),
        Reshape("flatten", "net.2", "flatten"),
        Readout(
            "head",
            "net.3",
            weight(classes, features),
            np.arange(classes).astype(np.int64 if quantized else np.float32),
            scale=17.0,
        ),
        Output("output", ""),
    )
    names = [node.name for node in nodes]
    edges = tuple(
        Edge(a, b, target_port="x" if b == "head" else "in") for a, b in itertools.pairwise(names)
    )
    return Graph(
        nodes,
        edges,
        steps,
        quantized,
        blocks={"conv": "stem"},
        depth={"conv": 1},
        metadata={"classes": "häuser, cats"},
    )


@pytest.fixture
def graph(rng: np.random.Generator) -> Graph:
    return chain(rng)


@pytest.fixture
def file(graph: Graph, tmp_path: Path) -> Path:
    return hdf5.save(graph, tmp_path / "net.h5")


class TestSaveThenLoad:
    @given(
        seed=st.integers(0, 2**32 - 1),
        image=st.tuples(st.integers(1, 3), st.integers(3, 8), st.integers(3, 8)),
        channels=st.integers(1, 5),
        classes=st.integers(1, 5),
        steps=st.integers(1, 9),
        quantized=st.booleans(),
    )
    @settings(max_examples=40)
    def test_is_the_identity(self, seed, image, channels, classes, steps, quantized) -> None:
        before = chain(
            np.random.default_rng(seed),
            image=image,
            channels=channels,
            classes=classes,
            steps=steps,
            quantized=quantized,
        )
        after = hdf5.decode(hdf5.encode(before))
        assert hdf5.identical(before, after)
        assert hdf5.encode(after) == hdf5.encode(before)
        assert [type(node) for node in after.nodes] == [type(node) for node in before.nodes]
        assert after.edges == before.edges
        assert (after.depth, after.blocks, after.metadata) == (
            before.depth,
            before.blocks,
            before.metadata,
        )

    def test_keeps_every_number_of_a_node(self, file: Path, graph: Graph) -> None:
        lif = hdf5.load(file)["lif"]
        assert isinstance(lif, LIF)
        assert lif.constants is not None
        assert lif.constants.bias_mantissa.dtype == np.int32
        assert (lif.model, lif.scale, lif.source) == (BOX, 12.5, "net.1")

    def test_tells_two_graphs_apart_by_one_weight(self, graph: Graph) -> None:
        conv = graph["conv"]
        assert isinstance(conv, Conv)
        weight = conv.weight.copy()
        weight[0, 0, 0, 0] += 2
        other = replace(
            graph, nodes=(graph.nodes[0], replace(conv, weight=weight), *graph.nodes[2:])
        )
        assert not hdf5.identical(graph, other)

    def test_is_a_plain_hdf5_file_for_others(self, file: Path) -> None:
        with h5py.File(file, "r") as h5:
            assert h5["arrays/1.weight"].shape == (2, 1, 3, 3)

    def test_an_invalid_graph_is_not_written(self, graph: Graph, tmp_path: Path) -> None:
        with pytest.raises(GraphError, match="steps is 0"):
            hdf5.save(replace(graph, steps=0), tmp_path / "net.h5")
        assert list(tmp_path.iterdir()) == []


class TestDamagedFiles:
    def test_truncated_at_50_places(self, file: Path) -> None:
        whole = file.read_bytes()
        for place in np.random.default_rng(1).integers(0, len(whole), 50):
            with pytest.raises(GraphFormatError):
                hdf5.decode(whole[:place])

    def test_a_flipped_bit_at_200_places(self, file: Path) -> None:
        whole = file.read_bytes()
        generator = np.random.default_rng(2)
        for place in generator.integers(0, len(whole), 200):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << generator.integers(8)
            with pytest.raises(GraphFormatError):
                hdf5.decode(bytes(damaged))

    def test_a_longer_file(self, file: Path) -> None:
        with pytest.raises(GraphFormatError, match="announces"):
            hdf5.decode(file.read_bytes() + b"\0")

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "empty.h5").touch()
        with pytest.raises(GraphFormatError, match=r"empty\.h5: 0 bytes are too few"):
            hdf5.load(tmp_path / "empty.h5")

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(GraphFormatError, match="No such file"):
            hdf5.load(tmp_path / "none.h5")

    def test_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(GraphFormatError, match="cannot be read"):
            hdf5.load(tmp_path)

    def test_an_hdf5_file_of_someone_else(self, tmp_path: Path) -> None:
        path = tmp_path / "other.h5"
        with h5py.File(path, "w") as h5:
            h5["weights"] = np.zeros(100)
        with pytest.raises(GraphFormatError, match="does not begin as a graph file"):
            hdf5.load(path)

    def test_a_later_version(self, file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[16] = 9
        with pytest.raises(GraphFormatError, match="version 9, this program reads version 1"):
            hdf5.decode(bytes(content))


def sealed(payload: bytes) -> bytes:
    """A payload under a right header, as an attacker would write it."""
    import hashlib

    header = hdf5._HEADER.pack(
        hdf5._MAGIC, hdf5.VERSION, len(payload), hashlib.sha256(payload).digest()
    )
    return header.ljust(hdf5.USER_BLOCK, b"\0") + payload


class TestHostileFiles:
    """The digest is right, the content is not ours."""

    @pytest.fixture
    def payload(self, file: Path, tmp_path: Path) -> Path:
        path = tmp_path / "payload.h5"
        path.write_bytes(file.read_bytes()[hdf5.USER_BLOCK :])
        return path

    def test_a_claimed_array_of_2_to_the_40_elements(self, payload: Path) -> None:
        with h5py.File(payload, "r+") as h5:
            del h5["arrays/1.weight"]
            h5["arrays"].create_dataset("1.weight", shape=(2**20, 2**20), dtype=np.int32)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(GraphFormatError, match=r"claims shape \[1048576, 1048576\]"):
            hdf5.decode(sealed(payload.read_bytes()))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024

    def test_a_claimed_array_within_the_size_of_the_file(self, payload: Path) -> None:
        with h5py.File(payload, "r+") as h5:
            del h5["arrays/1.weight"]
            h5["arrays"].create_dataset("1.weight", shape=(2, 1, 3, 3), dtype=np.int32)
        with pytest.raises(GraphFormatError, match="incomplete"):
            hdf5.decode(sealed(payload.read_bytes()))

    def test_a_compressed_bomb(self, payload: Path) -> None:
        with h5py.File(payload, "r+") as h5:
            del h5["arrays/1.weight"]
            h5["arrays"].create_dataset(
                "1.weight", data=np.zeros((2, 1, 3, 3), np.int32), compression="gzip"
            )
        with pytest.raises(GraphFormatError, match="chunked, filtered"):
            hdf5.decode(sealed(payload.read_bytes()))

    @pytest.mark.parametrize(
        "link",
        [
            h5py.ExternalLink("/etc/hostname", "/x"),
            h5py.SoftLink("/structure"),
        ],
        ids=["external", "soft"],
    )
    def test_a_link(self, payload: Path, link: object) -> None:
        with h5py.File(payload, "r+") as h5:
            del h5["arrays/1.weight"]
            h5["arrays"]["1.weight"] = link
        with pytest.raises(GraphFormatError, match="link to elsewhere"):
            hdf5.decode(sealed(payload.read_bytes()))

    def test_a_virtual_data_set(self, payload: Path) -> None:
        layout = h5py.VirtualLayout(shape=(2, 1, 3, 3), dtype=np.int32)
        with h5py.File(payload, "r+") as h5:
            del h5["arrays/1.weight"]
            h5["arrays"].create_virtual_dataset("1.weight", layout)
        with pytest.raises(GraphFormatError, match="chunked, filtered, external"):
            hdf5.decode(sealed(payload.read_bytes()))

    def test_strings_of_variable_length(self, payload: Path) -> None:
        with h5py.File(payload, "r+") as h5:
            del h5["structure"]
            h5.create_dataset("structure", data="text", dtype=h5py.string_dtype())
        with pytest.raises(GraphFormatError, match="structure has type object"):
            hdf5.decode(sealed(payload.read_bytes()))

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('"kind": "Conv"', '"kind": "Path"', "of no known kind"),
            ('"steps": 2', '"steps": -2', "steps is -2"),
            ('"steps": 2', '"steps": 2e9', "steps is '2000000000.0'"),
            ('"steps": 2', '"steps": NaN', "number NaN"),
            ('"groups": 1', '"group": 1', "lacks or adds group, groups"),
            ('"array": "1.weight"', '"array": "4.weight"', "names an array that is not there"),
            ('"stride": [1, 1]', '"stride": [1, 0]', "stride"),
            ('"to": "flatten"', '"to": "__import__"', "__import__"),
            ('"name": "lif"', '"name": "conv"', "two nodes have this name"),
        ],
    )
    def test_a_structure_that_is_not_ours(
        self, payload: Path, old: str, new: str, message: str
    ) -> None:
        with h5py.File(payload, "r+") as h5:
            text = h5["structure"][()].tobytes().decode()
            assert old in text
            del h5["structure"]
            h5["structure"] = np.frombuffer(text.replace(old, new, 1).encode(), np.uint8)
        with pytest.raises(GraphFormatError, match=message):
            hdf5.decode(sealed(payload.read_bytes()))

    def test_nested_a_million_deep(self, payload: Path) -> None:
        with h5py.File(payload, "r+") as h5:
            del h5["structure"]
            h5["structure"] = np.frombuffer(b"[" * 1_000_000, np.uint8)
        with pytest.raises(GraphFormatError, match="RecursionError"):
            hdf5.decode(sealed(payload.read_bytes()))

    def test_random_bytes_under_a_right_digest_never_crash(self, payload: Path) -> None:
        script = (
            "import sys, numpy as np\n"
            "from export.errors import GraphFormatError\n"
            "from export.formats import hdf5\n"
            "import hashlib\n"
            "whole = open(sys.argv[1], 'rb').read()\n"
            "rng = np.random.default_rng(3)\n"
            "for _ in range(300):\n"
            "    b = bytearray(whole)\n"
            "    for place in rng.integers(0, len(b), rng.integers(1, 6)):\n"
            "        b[place] = rng.integers(256)\n"
            "    h = hdf5._HEADER.pack(hdf5._MAGIC, 1, len(b), hashlib.sha256(b).digest())\n"
            "    try:\n"
            "        hdf5.decode(h.ljust(512, b'\\0') + bytes(b))\n"
            "    except GraphFormatError:\n"
            "        pass\n"
            "print('survived')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(payload)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == "survived\n", done.stderr


class TestFullDisk:
    def test_keeps_the_old_file_and_leaves_nothing_else(self, file: Path, graph: Graph) -> None:
        old = file.read_bytes()
        script = (
            "import resource, sys\n"
            "from export.errors import GraphFormatError\n"
            "from export.formats import hdf5\n"
            "graph = hdf5.load(sys.argv[1])\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "try:\n"
            "    hdf5.save(graph, sys.argv[1])\n"
            "except GraphFormatError as error:\n"
            "    print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(file)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).parents[2],
        )
        assert "File too large" in done.stdout
        assert "unchanged" in done.stdout
        assert file.read_bytes() == old
        assert [path.name for path in file.parent.iterdir()] == [file.name]

    def test_a_place_below_a_file(self, graph: Graph, file: Path) -> None:
        with pytest.raises(GraphFormatError, match=r"net\.h5.*File exists|Not a directory"):
            hdf5.save(graph, file / "net.h5")


def test_needs_no_torch() -> None:
    script = "import sys, export.formats.hdf5, export.validation; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "False\n", done.stderr


def test_linear_graphs_too(rng: np.random.Generator) -> None:
    nodes = (
        Input("x", "", (4,), bits=1),
        Linear("fc", "fc", np.full((2, 4), 2, np.int32), None),
        LIF("lif", "lif", BOX, NeuronConstants(4095, 2048, 3, np.zeros(2, np.int32), 0)),
        Output("out", ""),
    )
    edges = (Edge("x", "fc"), Edge("fc", "lif"), Edge("lif", "out"))
    graph = Graph(nodes, edges, 3, quantized=True)
    assert hdf5.identical(graph, hdf5.decode(hdf5.encode(graph)))

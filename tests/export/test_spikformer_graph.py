"""The graph of a Spikformer fires the spikes of the quantised torch model, in every form it has."""

import numpy as np
import pytest
import torch
from torch import nn

from atsnn.config import HaltingConfig, MergingConfig, ModelConfig
from atsnn.fixed_point import pixels_to_integers
from atsnn.quantization import quantize_model
from atsnn.spikformer import Spikformer
from export.errors import GraphError, UnsupportedTargetError
from export.formats import hdf5
from export.formats.hdf5 import identical
from export.formats.onnx import onnx_trace, save_onnx, to_onnx
from export.graph import Add, Gate, Graph, Merge
from export.spikformer import capture_spikformer, compile_spikformer, model_trace
from export.torch_module import graph_to_torch, torch_trace
from hardware.engine import run

ORDERS = ("upstream", "blocks", "rectangle", "raster", "steps")
MERGES = {
    "none": MergingConfig(),
    "mean": MergingConfig(enabled=True, count=2),
    "max of keys": MergingConfig(
        enabled=True, count=0, minimum_similarity=0.3, combine="max", similarity="keys"
    ),
    "keep": MergingConfig(enabled=True, count=3, combine="keep", blocks=(2,)),
    "tokens alike": MergingConfig(enabled=True, count=3, readout="token"),
    "all steps": MergingConfig(enabled=True, count=2, assignment="all"),
    "stem": MergingConfig(enabled=True, count=2, blocks=(0,)),
    "stem and blocks": MergingConfig(enabled=True, count=1, blocks=(0, 1, 2)),
}
CASES = [
    *((order, "mean") for order in ORDERS),
    *(("upstream", merge) for merge in MERGES if merge != "mean"),
    ("rectangle", "max of keys"),
    (None, "none"),
    ("raster", "stem and blocks"),
    (None, "keep"),
    (None, "stem"),
]


def config(order: str | None, merge: str) -> ModelConfig:
    halting = HaltingConfig(enabled=order is not None, gamma=3.0, beta=-1.2)
    if order is not None:
        halting = HaltingConfig(enabled=True, order=order, gamma=3.0, beta=-1.2)  # pyright: ignore[reportArgumentType]
    return ModelConfig(
        in_channels=1,
        image_size=(12, 12),
        classes=5,
        steps=3,
        blocks=2,
        dim=16,
        heads=2,
        mlp_ratio=2,
        halting=halting,
        merging=MERGES[merge],
    )


def spikformer(order: str | None = "upstream", merge: str = "mean") -> Spikformer:
    """A random model in which every layer fires."""
    torch.manual_seed(1)
    model = Spikformer(config(order, merge)).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.1, 0.6)
            module.weight.data.uniform_(0.8, 2.0)
            module.bias.data.uniform_(-0.1, 0.6)
    return model


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 1, 12, 12), dtype=np.uint8)


def differing(ours: dict, theirs: dict) -> dict[str, int]:
    assert ours.keys() == theirs.keys()
    counts = {name: int(np.count_nonzero(ours[name] != theirs[name])) for name in ours}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize(("order", "merge"), CASES)
class TestEveryOrderAndMerge:
    def test_float_graph_equals_float_model(self, order: str | None, merge: str) -> None:
        model = spikformer(order, merge)
        bits = model.config.quantization.pixel_bits
        image = torch.from_numpy(pixels_to_integers(PIXELS, bits)).float() / (2**bits - 1)
        with torch.no_grad():
            expected = model(image).logits
            got = graph_to_torch(capture_spikformer(model))(image)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)

    def test_torch_model_graph_engine_and_onnx_fire_the_same_spikes(
        self, order: str | None, merge: str
    ) -> None:
        model = quantize_model(spikformer(order, merge)).eval()
        graph = compile_spikformer(model)
        reference = model_trace(model, PIXELS)
        assert sum(values.sum() for name, values in reference.items() if name != "logits") > 1000
        assert differing(reference, torch_trace(graph, PIXELS)) == {}
        assert differing(reference, dict(run(graph, PIXELS, count_events=False).trace)) == {}
        assert differing(reference, onnx_trace(to_onnx(graph, spikes=True), PIXELS)) == {}

    def test_quantised_checkpoint_and_float_model_give_the_same_graph(
        self, order: str | None, merge: str
    ) -> None:
        model = spikformer(order, merge)
        assert identical(compile_spikformer(model), compile_spikformer(quantize_model(model)))

    def test_saved_and_loaded_it_is_the_same(self, order: str | None, merge: str) -> None:
        graph = compile_spikformer(spikformer(order, merge))
        loaded = hdf5.decode(hdf5.encode(graph))
        assert identical(graph, loaded)
        assert list(loaded.blocks.items()) == list(graph.blocks.items())


class TestTheGraph:
    def test_halts_and_merges_in_this_test(self) -> None:
        trace = torch_trace(compile_spikformer(spikformer("rectangle", "mean")), PIXELS)
        gates = np.stack([trace["gates.0"], trace["gates.1"]])
        assert 0.2 < gates.mean() < 0.8

    def test_block_labels(self) -> None:
        graph = compile_spikformer(spikformer())
        assert list(dict.fromkeys(graph.blocks.values())) == ["stem", "block1", "block2", "head"]
        assert (
            graph.blocks["scores.1"] == graph.blocks["gates.1"] == graph.blocks["add"] == "block2"
        )

    def test_a_plain_spikformer_has_no_gates(self) -> None:
        graph = compile_spikformer(spikformer(None, "none"))
        assert not list(graph.of_kind(Gate, Merge))

    def test_look_back_orders_have_late_edges(self) -> None:
        assert not compile_spikformer(spikformer("upstream")).feedback
        late = {
            order: sorted(
                (e.source, e.target) for e in compile_spikformer(spikformer(order)).edges if e.lag
            )
            for order in ("rectangle", "raster", "steps")
        }
        assert late["rectangle"] == [("scores.1", "gates.0"), ("scores.2", "gates.1")]
        assert late["raster"] == [
            ("scores.1", "gates.0"),
            ("scores.2", "gates.0"),
            ("scores.2", "gates.1"),
        ]
        assert late["steps"] == [("scores.2", "gates.0"), ("scores.2", "gates.1")]

    def test_spikes_join_the_stream_with_its_fraction_bits(self) -> None:
        graph = compile_spikformer(spikformer("upstream", "mean"))
        shifts = {n.name: n.shifts for n in graph.of_kind(Add) if isinstance(n, Add)}
        assert graph.fraction_bits == 3
        assert shifts["stem.add"] == (3, 3)
        assert shifts["blocks.0.add_attention"] == (3, 0)
        assert shifts["add"] == (0, 0)  # of scores

    def test_steps_and_all_steps_exclude_each_other_in_every_form(self) -> None:
        graph = compile_spikformer(spikformer("raster", "mean"))
        merges = [n for n in graph.nodes if isinstance(n, Merge)]
        broken = _with(graph, merges[0], assignment="all")
        with pytest.raises(GraphError, match="look back step by step"):
            graph_to_torch(broken)
        with pytest.raises(UnsupportedTargetError, match="gates look back step by step"):
            to_onnx(broken)

    def test_a_float_model_has_no_quantised_trace(self) -> None:
        with pytest.raises(GraphError, match="float model; quantise it"):
            model_trace(spikformer(), PIXELS)


def _with(graph: Graph, node: Merge, **changes) -> Graph:
    from dataclasses import replace

    changed = replace(node, **changes)
    return replace(graph, nodes=tuple(changed if n is node else n for n in graph.nodes))


class TestImagesThatDoNotFit:
    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (PIXELS[:, :, :8], r"images of shape \[1, 8, 12\], the graph takes \[1, 12, 12\]"),
            (PIXELS.astype(np.float32), "pixels are float32; a quantised graph takes uint8"),
            (PIXELS[:0], "no images to run"),
            (np.stack([PIXELS, PIXELS]), "events of 2 steps, the graph runs 3"),
        ],
    )
    def test_are_refused(self, images: np.ndarray, message: str) -> None:
        with pytest.raises(GraphError, match=message):
            torch_trace(compile_spikformer(spikformer()), images)

    def test_onnxruntime_says_so_too(self) -> None:
        model = to_onnx(compile_spikformer(spikformer()))
        with pytest.raises(UnsupportedTargetError, match=r"onnxruntime: .*Got: 8 Expected: 12"):
            onnx_trace(model, PIXELS[:, :, :8])


class TestOnnxFile:
    def test_any_batch_size(self, tmp_path) -> None:
        graph = compile_spikformer(spikformer())
        path = save_onnx(graph, tmp_path / "model.onnx")
        whole = onnx_trace(path, PIXELS)
        assert set(whole) == {"logits", "gates.0", "gates.1"}
        assert whole["gates.0"].shape == (3, 5, 9)
        one = onnx_trace(path, PIXELS[2:3])
        assert np.array_equal(one["logits"], whole["logits"][2:3])

    def test_refuses_a_float_graph(self) -> None:
        with pytest.raises(UnsupportedTargetError, match="float graph; run the quantize pass"):
            to_onnx(capture_spikformer(spikformer()))

    def test_a_file_that_is_none(self, tmp_path) -> None:
        (tmp_path / "broken.onnx").write_bytes(b"no model")
        with pytest.raises(UnsupportedTargetError, match="onnxruntime:"):
            onnx_trace(tmp_path / "broken.onnx", PIXELS)

    def test_a_place_where_nothing_can_be_written(self, tmp_path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UnsupportedTargetError, match="cannot write"):
            save_onnx(compile_spikformer(spikformer()), tmp_path / "file" / "model.onnx")

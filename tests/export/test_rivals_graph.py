"""A rival's choice enters the graph beside the image, and engine and torch fire the same spikes."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from spikformers import lively, small_config

from atsnn.config import ModelConfig
from atsnn.quantization import quantize_model
from atsnn.spikformer import Spikformer
from export.errors import GraphError, UnsupportedTargetError
from export.formats import hdf5
from export.formats.hdf5 import identical
from export.formats.onnx import to_onnx
from export.graph import Graph, Selection
from export.lava.partition import check_supported
from export.spikformer import compile_spikformer, model_trace, selection_of
from export.torch_module import torch_trace
from hardware.engine import Engine, run
from hardware.errors import EngineError, PlacementError
from hardware.placement import place
from hardware.profile import load_profile
from hardware.variants import open_all_gates
from hardware.verify import compare

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 1, 12, 12), dtype=np.uint8)
HALTING = {"enabled": True, "gamma": 3.0, "beta": -1.2}
NETWORKS = {
    "sparse-spikformer": {"selection": {"method": "sparse-spikformer", "keep": [0.7, 0.4]}},
    "tp-spikformer": {"selection": {"method": "tp-spikformer", "keep": [0.5, 0.5]}},
    "random": {"selection": {"method": "random", "keep": [0.7, 0.4]}},
    "random, stem once": {
        "stem_once": True,
        "selection": {"method": "random", "keep": [0.7, 0.4]},
    },
    "all tokens, stem once": {"stem_once": True},
    "halting, stem once": {"stem_once": True, "halting": HALTING},
    "halting and merging, stem once": {
        "stem_once": True,
        "halting": HALTING,
        "merging": {"enabled": True, "count": 2},
    },
    "looking back, stem once": {"stem_once": True, "halting": {**HALTING, "order": "raster"}},
    "without the stem's score": {"halting": {**HALTING, "stem_score": False}},
    "A-ViT": {"halting": {**HALTING, "order": "blocks"}},
    "ToMe": {"merging": {"enabled": True, "count": 2, "similarity": "keys"}},
}
RIVALS = [name for name, changes in NETWORKS.items() if "selection" in changes]
ONCE = [name for name, changes in NETWORKS.items() if "stem_once" in changes]


def model_of(name: str) -> Spikformer:
    values = small_config().model_dump()
    values.pop("quantization")
    plain = {**values, "halting": {"enabled": False}, "merging": {"enabled": False}}
    config = ModelConfig.model_validate({**plain, **NETWORKS[name]})
    return quantize_model(lively(config)).eval()


def made(name: str) -> tuple[Spikformer, Graph]:
    model = model_of(name)
    return model, compile_spikformer(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_engine_and_torch_fire_the_spikes_of_the_quantised_model(name):
    model, graph = made(name)
    trace = model_trace(model, IMAGES, batch=4)
    chosen = selection_of(graph, trace)
    assert bool(chosen) == (name in RIVALS)
    result = run(graph, IMAGES, selection=chosen, batch=3)
    assert compare(graph, trace, result.trace).equal
    assert compare(graph, trace, torch_trace(graph, IMAGES, selection=chosen, batch=4)).equal
    assert sum(int(values.sum()) for values in result.trace.values()) > 0


@pytest.mark.parametrize("changes", [{}, NETWORKS["random"], NETWORKS["A-ViT"]])
def test_events_of_every_step_reach_engine_and_torch_alike(changes):
    values = small_config().model_dump(exclude={"quantization"})
    plain = {**values, "halting": {"enabled": False}, "merging": {"enabled": False}}
    config = ModelConfig.model_validate({**plain, "events": True, "in_channels": 2, **changes})
    torch.manual_seed(0)
    model = Spikformer(config)
    events = (np.random.default_rng(1).random((3, 7, 2, 12, 12)) < 0.3).astype(np.uint8)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.momentum = 1.0
            torch.nn.init.uniform_(module.weight, 0.5, 2.5)
            torch.nn.init.uniform_(module.bias, -0.5, 1.0)
    model(torch.from_numpy(np.swapaxes(events, 0, 1).astype(np.float32)))
    quantized = quantize_model(model.eval()).eval()
    graph = compile_spikformer(quantized)
    assert graph.input.bits == 1
    trace = model_trace(quantized, events, batch=4)
    chosen = selection_of(graph, trace)
    result = run(graph, events, selection=chosen)
    assert compare(graph, trace, result.trace).equal
    assert compare(graph, trace, torch_trace(graph, events, selection=chosen)).equal
    assert result.trace["stem.conv1.neuron"].any()
    assert not np.array_equal(run(graph, events[::-1], selection=chosen).logits, result.logits)


@pytest.mark.parametrize("name", RIVALS)
def test_what_a_rival_leaves_out_costs_nothing(name):
    model, graph = made(name)
    chosen = selection_of(graph, model_trace(model, IMAGES))
    events = run(graph, IMAGES, selection=chosen, record="none").events
    everything = run(
        graph,
        IMAGES,
        selection={key: np.ones_like(mask) for key, mask in chosen.items()},
        record="none",
    )
    plain = run(open_all_gates(graph), IMAGES, record="none")
    assert events is not None
    assert everything.events is not None
    assert plain.events is not None
    assert everything.average_tokens == 1.0
    assert_array_equal(everything.logits, plain.logits)
    assert everything.events.mean("sops") == plain.events.mean("sops")
    for layer in ("fc1", "fc2", "q"):
        node = f"blocks.1.{layer}.neuron"
        gated = events[node].counts["updates_gated"]
        dropped = (chosen["selections.1.chosen"] == 0).sum(1)
        assert_array_equal(gated, dropped * graph.steps * (32 if layer == "fc1" else 16))
    assert events.mean("sops") < plain.events.mean("sops")


@pytest.mark.parametrize("name", ONCE)
def test_a_stem_that_runs_once_is_counted_once(name):
    model, graph = made(name)
    trace = model_trace(model, IMAGES)
    events = run(graph, IMAGES, selection=selection_of(graph, trace), record="none").events
    assert events is not None
    first = trace["stem.conv1.neuron"][0].reshape(len(IMAGES), -1).sum(1)
    assert_array_equal(events["stem.conv1.neuron"].counts["spikes"], first)
    pixels = np.count_nonzero((IMAGES >> 2).reshape(len(IMAGES), -1), axis=1)
    assert_array_equal(events["stem.conv1.synapse"].counts["messages"], pixels)


def test_an_engine_runs_again_with_another_choice():
    model, graph = made("random")
    engine = Engine(graph)
    trace = model_trace(model, IMAGES)
    chosen = selection_of(graph, trace)
    reverse = {name: 1 - mask for name, mask in chosen.items()}
    first = engine.run(IMAGES, selection=chosen).logits
    assert not np.array_equal(engine.run(IMAGES, selection=reverse).logits, first)
    assert_array_equal(engine.run(IMAGES, selection=chosen).logits, first)


@pytest.mark.parametrize("name", sorted({*RIVALS, *ONCE}))
def test_a_stored_graph_is_the_same_graph(name, tmp_path):
    _, graph = made(name)
    path = tmp_path / "graph.h5"
    hdf5.save(graph, path)
    assert identical(hdf5.load(path), graph)


def test_a_choice_must_be_given_and_must_fit():
    _, graph = made("random")
    with pytest.raises(EngineError, match=r"masks are given for \[\], the graph has Selection"):
        run(graph, IMAGES)
    with pytest.raises(GraphError, match=r"give one mask \[images, tokens\] for each"):
        torch_trace(graph, IMAGES)
    names = [node.name for node in graph.of_kind(Selection)]
    wrong = {name: np.ones((7, 8), np.uint8) for name in names}
    with pytest.raises(EngineError, match=r"shape \[7, 8\], it needs \[7, 9\]"):
        run(graph, IMAGES, selection=wrong)
    with pytest.raises(GraphError, match=r"shape \[7, 8\], it needs \[7, 9\]"):
        torch_trace(graph, IMAGES, selection=wrong)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random", r"selections\.0\.chosen .* chooses tokens outside of the network"),
        ("all tokens, stem once", "no Lava process here"),
    ],
)
def test_lava_refuses_by_name(name, message):
    _, graph = made(name)
    with pytest.raises(UnsupportedTargetError, match=message):
        check_supported(graph)


@pytest.mark.parametrize("name", ["random", "all tokens, stem once"])
def test_onnx_and_placement_refuse_by_name(name):
    _, graph = made(name)
    with pytest.raises(UnsupportedTargetError, match="has no ONNX form here"):
        to_onnx(graph)
    with pytest.raises(PlacementError, match="has no form on a core"):
        place(graph, load_profile("loihi1"))

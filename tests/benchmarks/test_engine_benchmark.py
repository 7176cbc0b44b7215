"""Networks, peers and the command of the engine's benchmarks, on tiny networks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from atsnn.config import ModelConfig
from benchmarks import engine, memory, networks, peers, plot
from benchmarks.bandwidth import l2_read_bandwidth
from benchmarks.errors import BenchmarkError
from benchmarks.side_by_side import Comparison, Section
from export.spikformer import compile_spikformer
from hardware.engine import run
from hardware.variants import open_all_gates

TINY = ModelConfig(image_size=(16, 16), blocks=2, dim=32, heads=4, steps=3)
L2 = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
IMAGES = networks.random_images(TINY, 8)


@pytest.fixture(scope="module")
def tuned() -> networks.Tuned:
    return networks.tuned_spikformer(networks.halting_config(TINY), 0.1, tolerance=0.02)


# --- networks ---


def test_tuning_reaches_the_density_and_says_how(tuned: networks.Tuned) -> None:
    events = networks.events_of(tuned.graph, networks.random_images(TINY, networks.TUNING_IMAGES))

    assert networks.density_of(events) == tuned.density == pytest.approx(0.1, abs=0.02)
    assert f"{tuned.drive:.3f}" in tuned.note
    assert f"{tuned.firing:.1%} of the neurons fire" in tuned.note


def test_density_leaves_out_the_layer_that_takes_pixels(tuned: networks.Tuned) -> None:
    events = networks.events_of(tuned.graph, IMAGES)
    layers = [node for node in events.nodes if node.kind in ("Conv", "Linear")]

    assert layers[0].sum("macs") > 0  # pixels are multiplied
    dense = sum(n.dense_macs for n in layers[1:]) * events.images * events.steps
    assert networks.density_of(events) == sum(n.sum("sops") for n in layers[1:]) / dense


def test_firing_is_spikes_per_neuron_and_step(tuned: networks.Tuned) -> None:
    result = run(tuned.graph, IMAGES)
    assert result.events is not None
    spikes = [v for k, v in result.trace.items() if k.endswith("neuron")]

    expected = sum(int(s.sum()) for s in spikes) / sum(s.size for s in spikes)
    assert networks.firing_of(tuned.graph, result.events) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_halting_keeps_that_share_of_the_tokens_at_every_step(
    tuned: networks.Tuned, share: float
) -> None:
    graph = networks.halted(tuned.model, share, IMAGES)

    kept = run(graph, IMAGES, record="none").tokens_per_block

    assert kept == pytest.approx(np.full((2, 3), share), abs=0.02)
    assert not tuned.model.adaptive


def test_halting_leaves_the_network_with_all_tokens_as_it_is(tuned: networks.Tuned) -> None:
    every = open_all_gates(networks.halted(tuned.model, 0.5, IMAGES))

    expected = run(tuned.graph, IMAGES).logits

    assert np.array_equal(run(every, IMAGES).logits, expected)


def test_the_stem_alone_fires_what_it_fires_in_the_network(tuned: networks.Tuned) -> None:
    stem = networks.stem_only(tuned.graph)

    whole, alone = (run(graph, IMAGES, record=["stem.add"]) for graph in (tuned.graph, stem))

    assert np.array_equal(whole.trace["stem.add"], alone.trace["stem.add"])
    assert {tuned.graph.blocks[node.name] for node in stem.nodes} == {"stem", "head"}


def test_the_linear_layer_is_silent_and_within_its_range() -> None:
    events = networks.random_events(2, 3, (16, 8, 8), 0.1)

    result = run(networks.linear_layer(16, 24, 2), events)

    assert result.events is not None
    assert result.events["linear"].sum("sops") == events.sum() * 24
    assert result.events["neuron"].sum("spikes") == 0
    assert result.events["neuron"].sum("updates_idle") == 0
    assert not result.out_of_range


def test_events_of_the_event_network_reach_its_last_layer() -> None:
    net = networks.EventNet()
    events = networks.random_events(20, 2, (2, 32, 32), 0.03)

    result = run(networks.event_graph(net, 20), events)

    with torch.inference_mode():
        counts = net.counts(torch.from_numpy(events).float())
    assert result.logits.sum() > 0
    assert counts.sum() > 0


# --- peers ---


def test_every_peer_computes_the_same_network(tuned: networks.Tuned) -> None:
    names = [name for name in peers.ALL if name != peers.COMPILED]

    found, absent = peers.make_peers(tuned.model, IMAGES, names)

    assert [peer.name for peer in found] == names
    assert absent == []
    first, *others = (peer.infer(IMAGES) for peer in found)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


def test_a_peer_of_another_network_is_refused(
    tuned: networks.Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peers._MAKE, peers.NORSE, lambda _: lambda x: torch.eye(10)[: len(x)] * -1)

    with pytest.raises(BenchmarkError, match=r"norse as written: the same class as PyTorch on"):
        peers.make_peers(tuned.model, IMAGES, [peers.NORSE])


def test_compilation_without_a_compiler_is_left_out_in_one_line(
    tuned: networks.Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise BenchmarkError("no C++ compiler (InvalidCxxCompiler); install g++ or set CXX")

    monkeypatch.setattr(peers, "_check_compiler", missing)

    found, absent = peers.make_peers(tuned.model, IMAGES, [peers.COMPILED])

    assert found == []
    assert absent == [
        "torch.compile left out: no C++ compiler (InvalidCxxCompiler); install g++ or set CXX"
    ]


def test_a_missing_spikingjelly_is_left_out_in_one_line(
    tuned: networks.Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("benchmarks.rivals.import_module", missing)

    _, (line,) = peers.make_peers(tuned.model, IMAGES, [peers.JELLY])

    assert line.startswith("SpikingJelly left out: SpikingJelly cannot be imported (No module")
    assert line.endswith("pip install '.[benchmarks]'")


# --- the command ---


def test_exactness_is_checked_and_a_difference_is_named(tuned: networks.Tuned) -> None:
    engine.check_exact(tuned, IMAGES[:2])
    other = networks.random_spikformer(networks.halting_config(TINY), IMAGES, drive=0.5)

    with pytest.raises(BenchmarkError, match=r"values differ from the quantised torch model's"):
        engine.check_exact(dataclasses.replace(tuned, graph=compile_spikformer(other)), IMAGES[:2])


def test_every_part_has_a_table() -> None:
    assert set(engine.PARTS) == set(engine.Part)
    assert set(engine.QUICK) == set(engine.Part) - {engine.Part.test_set}


def test_json_is_one_list_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    section = Section("kernel", "Title", [Comparison("a", 1.0, "b", 2.0)])
    monkeypatch.setitem(engine.PARTS, engine.Part.kernel, lambda _: section)

    result = CliRunner().invoke(engine.app, ["kernel", "--json"])

    assert json.loads(result.stdout) == [
        {"what": "a", "ours_s": 1.0, "peer": "b", "peer_s": 2.0, "ratio": 2.0}
    ]


def test_a_page_without_a_place_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(engine.PARTS, engine.Part.kernel, lambda _: pytest.fail("measured"))
    page = tmp_path / "page.md"
    page.write_text("nothing")

    result = CliRunner().invoke(engine.app, ["kernel", "--into", str(page)])

    assert isinstance(result.exception, BenchmarkError)
    assert "add <!-- kernel --> and <!-- /kernel -->" in str(result.exception)


def test_linear_layers_are_compared_with_the_bound_and_with_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "LINEAR", ((16, 24),))
    monkeypatch.setattr(engine, "l2_read_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(engine, "median_difference", lambda *_: 1e-3)
    options = engine.Options(1, 8, 2, "", Console(stderr=True))

    bound, product = engine.kernel(options).comparisons

    sops = int(networks.random_events(4, 2, (16, 8, 8), networks.DENSITY).sum()) * 24
    assert bound.theirs == pytest.approx(sops / 1e9)  # a byte per SOP
    assert f"{sops / 1e-3 / 1e9:.1f} G SOP/s" in bound.what
    assert product.peer == "torch float32 product"


@pytest.mark.skipif(not L2.exists(), reason="the system does not tell the size of L2")
def test_l2_bandwidth_is_that_of_a_processor() -> None:
    assert 1e9 < l2_read_bandwidth(1) < 1e13


def test_footprint_counts_a_byte_per_weight_and_value(tuned: networks.Tuned) -> None:
    graph = networks.linear_layer(16, 24, steps=2)

    assert memory.weight_bytes(graph) == 16 * 24 + 10 * 24
    assert memory.activation_bytes(graph) == 2 * 64 * (16 + 24)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")
def test_peak_memory_of_a_network_is_at_least_its_weights() -> None:
    graph = networks.linear_layer(1536, 1536, steps=2)
    events = networks.random_events(2, 1, (1536, 8, 8), 0.1)
    small, few = networks.linear_layer(16, 24, 2), networks.random_events(2, 1, (16, 8, 8), 0.1)

    found = memory.measure(graph, events, small, few, turns=1)

    assert found.peak > memory.weight_bytes(graph)
    assert found.load_s > 0


def test_an_interpreter_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, wrong = networks.linear_layer(16, 24, 2), np.zeros((2, 1, 8, 8, 8), np.uint8)

    with pytest.raises(BenchmarkError, match=r"ended with an error: .*EngineError: images of size"):
        memory.measure(graph, wrong, graph, wrong, turns=1)


# --- the plot ---


def test_slope_is_the_exponent_of_a_power_law() -> None:
    points = [plot.Point("steps", "engine", x, 3 * x**0.7) for x in (1.0, 2.0, 4.0)]

    assert plot.slope(points) == pytest.approx(0.7)


def test_points_at_one_place_have_no_slope() -> None:
    with pytest.raises(BenchmarkError, match=r"2 points at one place have no slope"):
        plot.slope([plot.Point("steps", "engine", 1.0, 1.0)] * 2)


def test_points_are_drawn_again_without_measuring(tmp_path: Path) -> None:
    points = [
        dataclasses.asdict(plot.Point(panel.key, series, x, x))
        for panel in plot.PANELS
        for series in (plot.ENGINE, plot.EAGER)
        for x in (0.25, 0.5, 1.0)
    ]
    source, out = tmp_path / "points.json", tmp_path / "plot.png"
    source.write_text(json.dumps({"conditions": "Python 3; two cores", "points": points}))

    result = CliRunner().invoke(plot.app, ["--from", str(source), "--out", str(out)])

    assert result.exit_code == 0
    assert "slope 1.00" in result.output
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_file_without_points_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "points.json"
    source.write_text("[]")

    result = CliRunner().invoke(plot.app, ["--from", str(source), "--out", str(tmp_path / "x.png")])

    assert isinstance(result.exception, BenchmarkError)
    assert "does not hold the points that --json prints" in str(result.exception)
    assert not (tmp_path / "x.png").exists()

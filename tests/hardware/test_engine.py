"""The engine fires the spikes of the written-out semantics, whatever it leaves out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_reference import simulate
from tiny_networks import Adaptive, Order, Sketch, conv_network, images_for

from atsnn.fixed_point import NeuronConstants, lif_step
from atsnn.neurons import SpikingNeuron
from export.graph import (
    LIF,
    Attention,
    Conv,
    Gate,
    Graph,
    Input,
    Linear,
    Merge,
    Output,
    Readout,
    Reshape,
)
from hardware.engine import Engine, EngineResult, run
from hardware.engine.executors import AttentionExecutor
from hardware.engine.kernels import exact_dtype
from hardware.engine.neurons import Neurons
from hardware.engine.plan import Interval, make_plan
from hardware.errors import EngineError
from hardware.events import FIELDS


def differing_values(graph: Graph, images: np.ndarray, result: EngineResult) -> list[str]:
    """Names of all ports whose values differ from the reference anywhere (logits included)."""
    wrong: set[str] = set()
    for index, image in enumerate(images):
        history, logits = simulate(graph, image)
        for t, now in enumerate(history):
            for (name, port), value in now.items():
                key = name if port == "out" else f"{name}:{port}"
                if not np.array_equal(result.trace[key][t, index], value):
                    wrong.add(key)
        if logits is not None and not np.array_equal(result.logits[index], logits):
            wrong.add("logits")
    return sorted(wrong)


adaptive_networks = st.builds(
    Adaptive,
    seed=st.integers(0, 200),
    steps=st.integers(1, 4),
    blocks=st.integers(1, 2),
    heads=st.sampled_from([1, 2, 4]),
    order=st.sampled_from(get_args(Order)),
    merge=st.sampled_from([0, 1, 3, 8]),
    minimum_similarity=st.sampled_from([0.0, 0.3, 0.8]),
    combine=st.sampled_from(["mean", "max", "keep"]),
    similarity=st.sampled_from(["stream", "keys"]),
    fraction_bits=st.sampled_from([0, 3, 8]),
    gates_know_merges=st.booleans(),
)


class TestEqualsTheMaskedReference:
    """Rows left out = masked dense, at every value of every node at every step."""

    @settings(max_examples=40)
    @given(network=adaptive_networks)
    def test_adaptive_transformers(self, network: Adaptive) -> None:
        graph = network.build()
        images = images_for(graph, 2, network.seed)
        result = run(graph, images, record="all")
        assert differing_values(graph, images, result) == []

    @pytest.mark.parametrize(("du", "dv"), [(4095, 2048), (4095, 0), (4095, 1300), (2000, 900)])
    def test_convolutions_strides_groups_and_pools(self, du: int, dv: int) -> None:
        graph = conv_network(du=du, dv=dv)
        images = images_for(graph, 3)
        result = run(graph, images, record="all")
        assert differing_values(graph, images, result) == []
        assert result.trace["classes"].any()

    def test_the_networks_of_this_test_do_halt_merge_and_fire(self) -> None:
        """Otherwise equality above would say little."""
        graph = Adaptive(merge=3, fraction_bits=4).build()
        result = run(graph, images_for(graph, 8))
        assert 0.3 < result.average_tokens < 0.9
        assert result.events is not None
        assert result.events.sum("merges") > 8
        assert all(result.trace[node.name].any() for node in graph.of_kind(LIF))

    def test_assignment_from_all_steps_merges_the_tokens_most_similar_over_all_steps(self) -> None:
        graph = Adaptive(merge=2, assignment="all", blocks=1, steps=4).build()
        result = run(graph, images_for(graph, 6), record="all")
        merge = next(node for node in graph.nodes if isinstance(node, Merge))
        for image in range(6):
            stream = result.trace["block1.after_attention"][:, image].astype(np.int64)
            open_tokens = result.trace["block1.gate"][0, image].astype(bool)
            dots = np.einsum("tnd,tmd->nm", stream, stream)
            norms = np.outer(dots.diagonal(), dots.diagonal())
            usable = open_tokens & (dots.diagonal() > 0)
            pairs = [
                (int(dots[a, b]) ** 2 / int(norms[a, b]), -a, -b)
                for a in range(0, 16, 2)
                for b in range(1, 16, 2)
                if usable[a] and usable[b] and dots[a, b] > 0
            ]
            best = {}
            for similarity, a, b in sorted(pairs):
                best[a] = (similarity, a, b)
            givers = {-a for _, a, _ in sorted(best.values())[-merge.count :]}
            gone = set(np.flatnonzero(result.trace["block1.merge:size"][0, image] == 0).tolist())
            assert gone == givers


def silent_look_back() -> Graph:
    """The network of order "rectangle", with one late score left, and that one always 0."""
    graph = Adaptive(merge=2, fraction_bits=4, order="rectangle").build()
    nodes = tuple(
        replace(node, table=np.zeros(1000, np.int32)) if node.name == "block2.score" else node
        for node in graph.nodes
    )
    edges = tuple(e for e in graph.edges if not e.lag or e.source == "block2.score")
    assert replace(graph, edges=edges).feedback
    return replace(graph, nodes=nodes, edges=edges)


class TestTime:
    def test_step_by_step_equals_layer_by_layer(self) -> None:
        """A late score that is always 0 changes nothing but the order of execution."""
        graph = Adaptive(merge=2, fraction_bits=4).build()
        images = images_for(graph, 5)
        layered, stepped = (
            run(graph, images, record="all"),
            run(silent_look_back(), images, record="all"),
        )
        for name in layered.trace:
            assert np.array_equal(layered.trace[name], stepped.trace[name]), name
        assert layered.events is not None
        assert stepped.events is not None
        for node in layered.events.nodes:
            after = stepped.events[node.name]
            assert {f: node.sum(f) for f in FIELDS} == {f: after.sum(f) for f in FIELDS}, node.name

    def test_state_starts_from_zero_for_every_image(self) -> None:
        graph = Adaptive().build()
        image = images_for(graph, 1)
        twice = run(graph, np.concatenate([image, image]))
        assert np.array_equal(
            twice.trace["block2.fc2_lif"][:, 0], twice.trace["block2.fc2_lif"][:, 1]
        )
        assert np.array_equal(twice.logits[0], twice.logits[1])

    def test_events_over_time_may_change_from_step_to_step(self) -> None:
        graph = conv_network(bits=1)
        still = images_for(graph, 2)
        over_time = np.repeat((still >> 7)[None], graph.steps, axis=0)
        a, b = run(graph, still), run(graph, over_time)
        assert np.array_equal(a.logits, b.logits)
        over_time[1] = 0
        changed = run(graph, over_time)
        assert np.array_equal(changed.trace["lif1"][0], a.trace["lif1"][0])
        assert not np.array_equal(changed.trace["lif1"], a.trace["lif1"])


class TestGates:
    @settings(max_examples=25)
    @given(seed=st.integers(0, 500), steps=st.integers(1, 5), merge=st.sampled_from([0, 2]))
    def test_upstream_gates_never_open_again(self, seed: int, steps: int, merge: int) -> None:
        """Monotone in the block l and in the step t."""
        graph = Adaptive(seed=seed, steps=steps, merge=merge, fraction_bits=2 * merge).build()
        result = run(graph, images_for(graph, 3, seed), count_events=False)
        gates = np.stack(list(result.gates.values())).astype(int)
        assert (np.diff(gates, axis=0) <= 0).all()
        assert (np.diff(gates, axis=1) <= 0).all()

    def test_average_tokens_is_the_share_of_open_gates_over_blocks_steps_and_tokens(self) -> None:
        result = run(Adaptive().build(), images_for(Adaptive().build(), 4))
        gates = np.stack(list(result.gates.values()))
        assert result.average_tokens == pytest.approx(gates.sum() / gates.size)
        assert result.tokens_per_block.shape == (2, 3)
        assert result.tokens_per_block[0, 0] == pytest.approx(gates[0, 0].mean())

    def test_a_network_without_gates_processes_all_tokens(self) -> None:
        graph = Adaptive(gates=False).build()
        assert run(graph, images_for(graph, 1)).average_tokens == 1.0


class TestBatches:
    @settings(max_examples=15)
    @given(batch=st.integers(1, 9), network=adaptive_networks)
    def test_how_images_are_batched_changes_nothing(self, batch: int, network: Adaptive) -> None:
        graph = network.build()
        images = images_for(graph, 7)
        whole, split = run(graph, images, batch=7), run(graph, images, batch=batch)
        for name in whole.trace:
            assert np.array_equal(whole.trace[name], split.trace[name]), name
        assert np.array_equal(whole.classes, split.classes)
        assert whole.ranges == split.ranges
        assert whole.events is not None
        assert split.events is not None
        assert whole.events.as_json() == split.events.as_json()

    def test_large_maps_go_through_a_few_images_at_a_time(self) -> None:
        """80 maps of 500 x 500 at 2 steps: the spikes of two images would be more than 64 MB."""
        s = Sketch()
        s.node(Input("image", "", (1, 500, 500), 4))
        s.node(Conv("conv", "", s.weights(80, 1, 1, 1), None), in_="image")
        s.lif("lif", "conv", 900, 80)
        s.node(Conv("all", "", s.weights(2, 80, 500, 500, largest=2), None), in_="lif")
        s.node(Reshape("flat", "", "flatten"), in_="all")
        s.lif("classes", "flat", 900, 2)
        s.node(Output("output", ""), in_="classes")
        told: list[tuple[int, int]] = []
        graph = s.graph(2)
        run(
            graph, images_for(graph, 3), count_events=False, record="none",
            progress=lambda *news: told.append(news),
        )  # fmt: skip
        assert told == [(1, 3), (2, 3), (3, 3)]

    def test_progress_is_told_after_each_batch(self) -> None:
        graph, told = conv_network(), []
        run(
            graph,
            images_for(graph, 5),
            batch=2,
            progress=lambda done, total: told.append((done, total)),
        )
        assert told == [(2, 5), (4, 5), (5, 5)]

    def test_counting_can_be_left_out(self) -> None:
        graph = conv_network()
        assert run(graph, images_for(graph, 1), count_events=False).events is None


class TestEngine:
    def test_runs_as_often_as_one_likes(self) -> None:
        graph = Adaptive(merge=2).build()
        engine = Engine(graph)
        for seed in (0, 1):
            images = images_for(graph, 5, seed)
            for record in ("none", "spikes", "all"):
                ours, once = engine.run(images, record=record), run(graph, images, record=record)
                assert ours.trace.keys() == once.trace.keys()
                for name in once.trace:
                    assert np.array_equal(ours.trace[name], once.trace[name]), name
                assert ours.events is not None
                assert once.events is not None
                assert ours.events.as_json() == once.events.as_json()

    def test_what_left_its_range_is_told_anew_for_each_run(self) -> None:
        engine = Engine(wide_network(inputs=2, dv=0, threshold=131_071))
        images = np.full((1, 2), 200, np.uint8)
        first, second = engine.run(images), engine.run(images)
        assert first.out_of_range
        assert first.out_of_range == second.out_of_range

    def test_a_graph_that_cannot_run_is_refused_at_once(self) -> None:
        graph = replace(Adaptive().build(), quantized=False)
        with pytest.raises(EngineError, match="float graph"):
            Engine(graph)


class TestAttentionInIntegers:
    def test_what_halted_tokens_hold_is_never_read(self) -> None:
        """Even if they held spikes, which their gated neurons never fire."""
        graph = Adaptive(blocks=1, heads=2).build()
        plan = make_plan(graph)
        attend = AttentionExecutor(plan.graph["block1.attention"], plan)  # pyright: ignore[reportArgumentType]
        rng = np.random.default_rng(7)
        q, k, v = rng.integers(0, 2, (3, 2, 3, 16, 8)).astype(bool)
        gate = rng.integers(0, 2, (2, 3, 16)).astype(bool)
        gate[0, 0] = False
        masked = [x & gate[..., None] for x in (q, k, v)]
        everything = attend.advance(dict(zip("qkv", ([x] for x in masked), strict=True)), 2, None)
        open_only = attend.advance({"q": [q], "k": [k], "v": [v], "gate": [gate]}, 2, None)
        assert np.array_equal(open_only["out"], everything["out"])
        assert everything["out"].any()

    @settings(max_examples=50)
    @given(seed=st.integers(0, 10_000), n=st.integers(1, 12), d=st.integers(1, 9))
    def test_scores_first_equals_table_first(self, seed: int, n: int, d: int) -> None:
        """(q k^T) v = q (k^T v), exactly, so that either order may run on the chip."""
        q, k, v = np.random.default_rng(seed).integers(0, 2, (3, n, d), dtype=np.int64)
        assert np.array_equal((q @ k.T) @ v, q @ (k.T @ v))


class TestNeurons:
    @settings(max_examples=60)
    @given(
        seed=st.integers(0, 10_000),
        dv=st.sampled_from([0, 2048]),
        largest=st.sampled_from([40, 131_071]),
        threshold=st.sampled_from([1, 300, 131_071]),
    )
    def test_the_32_bit_short_cut_gives_the_integers_of_lif_step(
        self, seed: int, dv: int, largest: int, threshold: int
    ) -> None:
        rng = np.random.default_rng(seed)
        mantissa = rng.integers(-4095, 4096, 6, dtype=np.int32)
        constants = NeuronConstants(4095, dv, threshold, mantissa, 7)
        neurons = Neurons(constants, (6,), largest)
        assert neurons.short
        neurons.start(4)
        voltage = current = np.zeros((4, 6), np.int32)
        saturations = 0
        for _ in range(8):
            activation = rng.integers(-largest, largest + 1, (4, 6))
            expected = lif_step(current, voltage, activation, constants, constants.bias)
            fired = neurons.advance(activation[None], None, 1)
            assert np.array_equal(fired.spikes[0], expected.spikes)
            assert np.array_equal(neurons.voltage[:, 0], expected.voltage)
            current, voltage = expected.current, expected.voltage
            saturations += expected.voltage_saturations
        assert neurons.voltage_saturations == saturations
        assert neurons.current_wraps == 0

    def test_layers_that_can_wrap_or_remember_take_the_long_way(self) -> None:
        zero = np.zeros(1, np.int32)
        assert not Neurons(NeuronConstants(4095, 2048, 1, zero, 0), (1,), 131_072).short
        assert not Neurons(NeuronConstants(4094, 2048, 1, zero, 0), (1,), 1).short
        assert not Neurons(NeuronConstants(4095, 2047, 1, zero, 0), (1,), 1).short


def wide_network(inputs: int, dv: int, threshold: int, steps: int = 6) -> Graph:
    """One neuron that sums `inputs` pixels with weight 254."""
    s = Sketch()
    s.node(Input("image", "", (inputs,), 8))
    s.node(Linear("dense", "net.dense", np.full((1, inputs), 254, np.int32), None), in_="image")
    s.lif("lif", "dense", threshold, 1, dv=dv, bias=0)
    s.node(Output("output", ""), in_="lif")
    return s.graph(steps)


class TestRanges:
    """Wraps of the current and saturations of the voltage are counted under the layer's name."""

    def test_a_current_that_wraps(self) -> None:
        graph = wide_network(inputs=3, dv=2048, threshold=1)
        result = run(graph, np.full((2, 3), 255, np.uint8))
        (layer,) = result.out_of_range
        assert (layer.node, layer.source) == ("lif", "net.lif")
        assert layer.current_wraps == 2 * 6  # 254 * 255 * 3 > 2^17, every image and step

    def test_a_current_of_minus_2_to_the_23_wraps_to_the_positive_end(self) -> None:
        """As in Lava's model, so that the sum 512 * -256 makes the neuron fire."""
        s = Sketch()
        s.node(Input("image", "", (3,), 8))
        s.node(Linear("dense", "", np.full((1, 3), -256, np.int32), None), in_="image")
        s.lif("lif", "dense", 1, 1, bias=0)
        s.node(Output("output", ""), in_="lif")
        images = np.array([[255, 255, 2]], np.uint8)
        result = run(s.graph(2), images, record="all")
        assert differing_values(s.graph(2), images, result) == []
        assert result.trace["lif"].all()
        assert result.ranges[0].current_wraps == 2

    def test_a_voltage_that_saturates(self) -> None:
        graph = wide_network(inputs=2, dv=0, threshold=131_071)
        result = run(graph, np.full((1, 2), 200, np.uint8))
        (layer,) = result.out_of_range
        assert layer.current_wraps == 0
        # 101600 << 6 is 6.5 M; the second addition exceeds 2^23, saturates, fires and resets
        assert layer.voltage_saturations == 3

    def test_a_layer_that_stays_in_range_is_not_reported(self) -> None:
        graph = wide_network(inputs=1, dv=2048, threshold=100)
        assert run(graph, np.full((1, 1), 255, np.uint8)).out_of_range == ()

    def test_the_bounds_of_a_layer_behind_a_layer_are_signed(self) -> None:
        """Weight -254 on 255, then weight -254 on that: up to 254 * 254 * 255, never below 0."""
        s = Sketch()
        s.node(Input("image", "", (1,), 8))
        negative = np.array([[-254]], np.int32)
        s.node(Linear("first", "", negative, None), in_="image")
        s.node(Linear("second", "", negative, None), in_="first")
        s.lif("lif", "second", 1, 1)
        s.node(Output("output", ""), in_="lif")
        bounds = make_plan(s.graph(1)).bounds
        assert bounds["first", "out"] == Interval(-254 * 255, 0)
        assert bounds["second", "out"] == Interval(0, 254 * 254 * 255)

    def test_sums_beyond_32_bits_are_refused_by_name(self) -> None:
        s = Sketch()
        s.node(Input("image", "", (1,), 8))
        for index, source in enumerate(("image", "dense0", "dense1", "dense2")):
            weight = np.array([[254]], np.int32)
            s.node(Linear(f"dense{index}", f"net.{index}", weight, None), in_=source)
        s.lif("lif", "dense3", 1, 1)
        s.node(Output("output", ""), in_="lif")
        with pytest.raises(
            EngineError, match=r"dense2 \(torch module net\.2\): .* beyond .* 32 bits"
        ):
            make_plan(s.graph(1))

    def test_products_use_float32_only_where_it_is_exact(self) -> None:
        weight = np.full((1, 100), 254, np.int32)
        assert exact_dtype("layer", weight, 1) is np.float32
        assert exact_dtype("layer", weight, 2**24 // 25400) is np.float32
        assert exact_dtype("layer", weight, 2**24 // 25400 + 1) is np.float64

    def test_products_beyond_float64_are_refused_by_name(self) -> None:
        with pytest.raises(
            EngineError, match=r"block1\.fc1: sums of up to .* beyond exact .*2\^53"
        ):
            exact_dtype("block1.fc1", np.full((1, 100), 254, np.int32), 2**40)


class TestRecording:
    graph = Adaptive(blocks=1, merge=1).build()

    def test_spikes_by_default(self) -> None:
        trace = run(self.graph, images_for(self.graph, 1)).trace
        assert "stem.lif" in trace
        assert "block1.gate" in trace
        assert "logits" in trace
        assert "block1.out" not in trace
        assert trace["stem.lif"].dtype == np.bool_
        assert trace["block1.gate"].dtype == np.uint8

    def test_everything(self) -> None:
        trace = run(self.graph, images_for(self.graph, 1), record="all").trace
        assert trace["block1.out"].shape == (3, 1, 16, 8)
        assert trace["image"].shape == (3, 1, 2, 4, 4)
        assert trace["block1.merge:size"].shape == (3, 1, 16)

    def test_nothing_but_logits(self) -> None:
        assert set(run(self.graph, images_for(self.graph, 1), record="none").trace) == {"logits"}

    def test_chosen_nodes(self) -> None:
        trace = run(self.graph, images_for(self.graph, 1), record=["block1.out"]).trace
        assert set(trace) == {"block1.out", "logits"}

    def test_an_unknown_node_is_named(self) -> None:
        with pytest.raises(EngineError, match=r"no node block9\.out"):
            run(self.graph, images_for(self.graph, 1), record=["block9.out"])


class TestClasses:
    def test_of_spikes_the_class_with_most_spikes_wins(self) -> None:
        graph = conv_network()
        result = run(graph, images_for(graph, 6))
        assert np.array_equal(result.logits, result.trace["classes"].sum(axis=0))
        assert np.array_equal(result.classes, result.logits.argmax(axis=1))

    def test_the_lowest_index_wins_ties(self) -> None:
        logits = np.array([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
        result = EngineResult(logits, {}, {}, None, (), 1)
        assert result.classes.tolist() == [1, 0]


class TestRefusals:
    def test_images_of_another_size(self) -> None:
        with pytest.raises(EngineError, match=r"size 1 x 28 x 28 .*`image` .* takes 2 x 7 x 6"):
            run(conv_network(), np.zeros((4, 1, 28, 28), np.uint8))

    def test_images_of_another_type(self) -> None:
        with pytest.raises(EngineError, match=r"type float32, .* raw 8-bit pixels"):
            run(conv_network(), np.zeros((4, 2, 7, 6), np.float32))  # pyright: ignore[reportArgumentType]

    def test_no_images(self) -> None:
        with pytest.raises(EngineError, match="no images"):
            run(conv_network(), np.zeros((0, 2, 7, 6), np.uint8))

    def test_events_into_a_network_that_takes_pixels(self) -> None:
        with pytest.raises(EngineError, match="4-bit pixels, which stand still"):
            run(conv_network(), np.zeros((3, 1, 2, 7, 6), np.uint8))

    def test_events_over_another_number_of_steps(self) -> None:
        with pytest.raises(EngineError, match=r"shape \[5, 1, 2, 7, 6\].* over 3 time steps"):
            run(conv_network(bits=1), np.zeros((5, 1, 2, 7, 6), np.uint8))

    def test_a_float_graph(self) -> None:
        with pytest.raises(EngineError, match=r"float graph.*quantize"):
            run(replace(conv_network(), quantized=False), images_for(conv_network(), 1))

    def test_attention_of_values_that_are_not_spikes(self) -> None:
        s = Sketch()
        s.node(Input("image", "", (4, 2, 2), 4))
        s.node(Reshape("tokens", "", "tokens"), in_="image")
        s.node(Attention("attention", "net.attn", 2, 1.0), q="tokens", k="tokens", v="tokens")
        s.lif("lif", "attention", 5, 4)
        s.node(Readout("head", "", s.weights(2, 4), s.weights(2)), x="lif")
        s.node(Output("output", ""), in_="head")
        with pytest.raises(
            EngineError, match=r"attention \(torch module net\.attn\): port q .* 15"
        ):
            run(s.graph(1), np.zeros((1, 4, 2, 2), np.uint8))

    def test_assignment_from_all_steps_where_gates_look_back(self) -> None:
        graph = Adaptive(merge=1, assignment="all", order="rectangle").build()
        with pytest.raises(EngineError, match=r"block1\.merge .*all time steps.*'first'"):
            run(graph, images_for(graph, 1))

    def test_an_output_that_is_neither_logits_nor_classes(self) -> None:
        s = Sketch()
        s.node(Input("image", "", (1, 3, 3), 4))
        s.node(Conv("conv", "net.conv", s.weights(2, 1, 3, 3), None), in_="image")
        s.lif("lif", "conv", 5, 2)
        s.node(Output("output", ""), in_="lif")
        with pytest.raises(EngineError, match=r"LIF lif of shape \[2, 1, 1\]; end the network"):
            run(s.graph(1), np.zeros((1, 1, 3, 3), np.uint8))


def test_a_gate_that_only_looks_back_without_accumulating() -> None:
    """At the first step nothing has arrived at it yet, for each of the images."""
    graph = Adaptive(order="rectangle", merge=0).build()
    gates = {node.name for node in graph.of_kind(Gate)}
    nodes = tuple(
        replace(node, accumulate=False) if isinstance(node, Gate) else node for node in graph.nodes
    )
    edges = tuple(
        replace(edge, lag=1) if edge.target in gates and edge.target_port == "score" else edge
        for edge in graph.edges
    )
    graph = replace(graph, nodes=nodes, edges=edges)
    images = images_for(graph, 3)
    found = run(graph, images)
    assert all(gate[0].all() for gate in found.gates.values())
    for image in range(3):
        alone = run(graph, images[image : image + 1])
        np.testing.assert_array_equal(alone.logits[0], found.logits[image])


def test_a_batch_of_no_images_is_refused() -> None:
    graph = Adaptive().build()
    with pytest.raises(EngineError, match="at least 1 image at a time"):
        run(graph, images_for(graph, 1), batch=0)


def test_threads_of_engine_and_fused_neurons_take_turns() -> None:
    """numba's workqueue would end the process if both were in a kernel at the same time."""
    graph = Adaptive().build()
    images = images_for(graph, 4)
    neuron, current = SpikingNeuron(2.0, 1.0), torch.rand(4, 8, 16, 64) * 3
    expected, spikes = run(graph, images).logits, neuron(current)[0]
    with ThreadPoolExecutor(2) as pool:
        logits = [pool.submit(lambda: run(graph, images).logits) for _ in range(4)]
        fired = [pool.submit(lambda: neuron(current)[0]) for _ in range(4)]
    assert all(np.array_equal(found.result(), expected) for found in logits)
    assert all(torch.equal(found.result(), spikes) for found in fired)

"""Event counts equal a count by hand: every message followed to every synapse, one at a time."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_reference import Values, simulate
from tiny_networks import Adaptive, Sketch, conv_network, images_for

from export.graph import Conv, Edge, Graph, Input, Linear, Merge, OrPool, Output, Readout, Reshape
from hardware.engine import run
from hardware.engine.kernels import Convolution, window_hits
from hardware.events import SCORES_FIRST, TABLE_FIRST, EventCounts, NodeEvents
from hardware.variants import open_all_gates


def events_of(graph: Graph, images: np.ndarray) -> EventCounts:
    events = run(graph, images).events
    assert events is not None
    return events


def history_of(graph: Graph, images: np.ndarray) -> list[Values]:
    """Values of every image and step, one after the other."""
    return [now for image in images for now in simulate(graph, image)[0]]


def arriving(graph: Graph, now: Values, name: str, port: str = "in") -> np.ndarray:
    (edge,) = graph.into(name, port)
    return now[edge.source, edge.source_port]


def sum_of(node: NodeEvents, *fields: str) -> tuple[int, ...]:
    return tuple(node.sum(field) for field in fields)


class TestConvolutions:
    @settings(max_examples=40)
    @given(
        size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
        kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
        dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    )
    def test_the_fan_out_of_every_pixel_is_exact_at_the_borders(
        self,
        size: tuple[int, int],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> None:
        """One pixel lit at a time through weights of one: how many outputs see it?"""
        weight = np.ones((3, 1, *kernel), np.int32)
        convolve = Convolution(weight, stride, padding, dilation, 1, np.float32)
        pixels = np.eye(size[0] * size[1], dtype=np.uint8).reshape(-1, 1, *size)
        seen = convolve(pixels).sum(axis=(1, 2, 3)).reshape(size)
        assert np.array_equal(3 * window_hits(size, kernel, stride, padding, dilation), seen)

    def test_messages_sops_acs_and_macs_of_a_network(self) -> None:
        graph = conv_network()
        images = images_for(graph, 3)
        events, history = events_of(graph, images), history_of(graph, images)
        for name, source, pixels in (("conv1", "image", True), ("conv2", "pool", False)):
            node = next(n for n in graph.nodes if n.name == name)
            assert isinstance(node, Conv)
            sops = messages = unrolled = 0
            for now in history:
                lit = now[source, "out"]
                for place in zip(*np.nonzero(lit), strict=True):
                    one = np.zeros_like(lit)
                    one[place] = 1
                    synapses = count_synapses(node, one)
                    messages += 1
                    sops += synapses
                    unrolled += synapses * lit[place]
            counted = events[name]
            assert sum_of(counted, "messages", "sops", "unrolled_acs") == (messages, sops, unrolled)
            assert sum_of(counted, "acs", "macs") == ((0, sops) if pixels else (sops, 0))

    def test_pooling_is_a_synapse_into_every_window(self) -> None:
        graph = conv_network()
        images = images_for(graph, 2)
        history = history_of(graph, images)
        pool = next(n for n in graph.nodes if isinstance(n, OrPool))
        hits = 0
        for now in history:
            padded = np.pad(arriving(graph, now, "pool"), ((0, 0), (1, 1), (1, 1)))
            for y in range(0, padded.shape[1] - 2, pool.stride[0]):
                for x in range(0, padded.shape[2] - 2, pool.stride[1]):
                    hits += padded[:, y : y + 3, x : x + 3].sum()
        counted = events_of(graph, images)["pool"]
        assert sum_of(counted, "sops", "acs", "macs") == (hits, hits, 0)
        assert counted.sum("spikes") == sum(now["pool", "out"].sum() for now in history)


def count_synapses(node: Conv, one: np.ndarray) -> int:
    """Outputs that a single pixel reaches, found by trying every output and kernel place."""
    (channel,), (row,), (column,) = np.nonzero(one)
    out_channels, in_channels, kernel_h, kernel_w = node.weight.shape
    height = (
        one.shape[1] + 2 * node.padding[0] - node.dilation[0] * (kernel_h - 1) - 1
    ) // node.stride[0] + 1
    width = (
        one.shape[2] + 2 * node.padding[1] - node.dilation[1] * (kernel_w - 1) - 1
    ) // node.stride[1] + 1
    synapses = 0
    for o in range(out_channels):
        if o // (out_channels // node.groups) != channel // in_channels:
            continue
        for y in range(height):
            for x in range(width):
                for i in range(kernel_h):
                    for j in range(kernel_w):
                        synapses += (
                            y * node.stride[0] + i * node.dilation[0] - node.padding[0] == row
                            and x * node.stride[1] + j * node.dilation[1] - node.padding[1]
                            == column
                        )
    return synapses


class TestTransformers:
    @settings(max_examples=15)
    @given(seed=st.integers(0, 300), merge=st.sampled_from([0, 2]), bits=st.sampled_from([0, 4]))
    def test_gated_layers_receive_only_what_open_tokens_send(
        self, seed: int, merge: int, bits: int
    ) -> None:
        graph = Adaptive(seed=seed, merge=merge, fraction_bits=bits, blocks=1).build()
        images = images_for(graph, 2, seed)
        events, history = events_of(graph, images), history_of(graph, images)
        for node in graph.of_kind(Linear):
            assert isinstance(node, Linear)
            messages = graded = adds = 0
            for now in history:
                gate = arriving(graph, now, node.name, "gate").astype(bool)
                sent = arriving(graph, now, node.name)[gate]
                spikes = graph.into(node.name, "in")[0].source.endswith("_lif")
                unit = 1 if spikes else 2**bits
                messages += np.count_nonzero(sent)
                graded += np.count_nonzero((sent != 0) & (sent != unit))
                adds += sum(-(-int(value) // unit) for value in sent.ravel())
            outputs = node.weight.shape[0]
            assert sum_of(events[node.name], "messages", "sops", "macs", "unrolled_acs") == (
                messages,
                messages * outputs,
                graded * outputs,
                adds * outputs,
            )

    @settings(max_examples=15)
    @given(seed=st.integers(0, 300), heads=st.sampled_from([1, 2, 4]))
    def test_both_orders_of_attention_are_counted_and_the_cheaper_is_taken(
        self, seed: int, heads: int
    ) -> None:
        graph = Adaptive(seed=seed, heads=heads, blocks=1).build()
        images = images_for(graph, 2, seed)
        by_hand = {
            SCORES_FIRST: [0, 0],
            TABLE_FIRST: [0, 0],
        }
        for now in history_of(graph, images):
            q, k, v = (arriving(graph, now, "block1.attention", port) for port in "qkv")
            for h in range(heads):
                part = slice(h * 8 // heads, (h + 1) * 8 // heads)
                count_attention(q[:, part], k[:, part], v[:, part], by_hand)
        counted = events_of(graph, images)["block1.attention"]
        for order, (coincidences, reads) in by_hand.items():
            assert counted.orders[order].coincidences.sum() == coincidences
            assert counted.orders[order].reads.sum() == reads
        assert counted.order == min(by_hand, key=lambda order: sum(by_hand[order]))
        assert counted.sum("sops") == sum(by_hand[counted.order])
        assert counted.sum("acs") == counted.sum("sops")

    def test_neuron_updates_add_up_and_closed_tokens_are_gated_off(self) -> None:
        graph = Adaptive().build()
        images = images_for(graph, 4)
        result = run(graph, images)
        assert result.events is not None
        closed = (result.gates["block2.gate"] == 0).sum()
        for name, channels in (("block2.fc1_lif", 16), ("block2.attention", 8)):
            counted = result.events[name]
            assert counted.sum("updates_gated") == closed * channels
            updates = sum_of(counted, "updates_active", "updates_idle", "updates_gated")
            assert sum(updates) == 4 * graph.steps * 16 * channels
            assert min(updates) >= 0
        counted = result.events["block2.fc1_lif"]
        assert counted.sum("spikes") == result.trace["block2.fc1_lif"].sum()

    def test_an_update_that_changes_nothing_is_idle(self) -> None:
        """One event at t = 1 lifts the voltage to 128; it halves to 0 in the update of t = 9."""
        s = Sketch()
        s.node(Input("image", "", (1,), 1))
        s.node(Linear("dense", "", np.array([[2]], np.int32), None), in_="image")
        s.lif("lif", "dense", 1000, 1, bias=0)
        s.node(Output("output", ""), in_="lif")
        event = np.zeros((11, 1, 1), np.uint8)
        event[1] = 1
        counted = events_of(s.graph(11), event)["lif"]
        assert sum_of(counted, "updates_active", "updates_idle", "updates_gated") == (9, 2, 0)

    def test_a_neuron_whose_gate_is_closed_is_not_idle_but_gated_off(self) -> None:
        graph = Adaptive(blocks=1).build()
        result = run(graph, images_for(graph, 4), record="all")
        assert result.events is not None
        counted = result.events["block1.attention_lif"]  # without bias, so that it can be idle
        idle = 0
        for image in range(4):
            voltage = np.zeros((16, 8), np.int64)
            for t in range(graph.steps):
                gate = result.trace["block1.gate"][t, image].astype(bool)
                arriving_now = result.trace["block1.attention"][t, image].astype(np.int64)
                idle += ((voltage == 0) & (arriving_now == 0))[gate].sum()
                fired = result.trace["block1.attention_lif"][t, image]
                voltage[gate] = (voltage // 2 + 64 * arriving_now * ~fired)[gate] * ~fired[gate]
        assert 0 < idle == counted.sum("updates_idle")

    def test_gate_closings_and_merges(self) -> None:
        graph = Adaptive(merge=2, fraction_bits=4).build()
        result = run(graph, images_for(graph, 5), record="all")
        assert result.events is not None
        sizes = result.trace["block1.merge:size"][0]
        assert result.events["block1.merge"].sum("merges") == (sizes == 0).sum()
        first = result.gates["block1.gate"]
        assert result.events["block1.gate"].sum("gate_closings") == (first[-1] == 0).sum()
        # a token that was merged away in block 1 does not close its gate in block 2 once more
        alive = result.trace["block1.merge:alive"][0].astype(bool)
        second = result.gates["block2.gate"]
        closed = alive & (second[-1] == 0)
        assert result.events["block2.gate"].sum("gate_closings") == closed.sum()

    def test_a_gate_that_opens_again_closes_again(self) -> None:
        graph = Adaptive(order="blocks", steps=5).build()
        result = run(graph, images_for(graph, 10))
        gate = result.gates["block2.gate"].astype(int)
        assert (np.diff(gate, axis=0) > 0).any()
        closings = (gate[0] == 0).sum() + (np.diff(gate, axis=0) < 0).sum()
        assert result.events is not None
        assert result.events["block2.gate"].sum("gate_closings") == closings

    def test_merging_counts_similarities_once_and_combining_at_every_step(self) -> None:
        graph = Adaptive(merge=2, fraction_bits=4, blocks=1).build()
        images = images_for(graph, 3)
        sops = 0
        for image in images:
            steps, _ = simulate(graph, image)
            gate = arriving(graph, steps[0], "block1.merge", "gate")
            stream = [arriving(graph, now, "block1.merge", "x") for now in steps]
            usable = [k for k in range(16) if gate[k] and stream[0][k].any()]
            odd = sum(k % 2 for k in usable)
            for k in usable:
                sops += np.count_nonzero(stream[0][k]) * (1 + (odd if k % 2 == 0 else 0))
            size = steps[0]["block1.merge", "size"]
            takers = np.flatnonzero(size > 1)
            gone = np.flatnonzero(size == 0)
            sops += sum(np.count_nonzero(x[[*takers, *gone]]) for x in stream)
        counted = events_of(graph, images)["block1.merge"]
        assert sum_of(counted, "sops", "macs") == (sops, sops)


def count_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, counts: dict) -> None:
    tokens, channels = q.shape
    scores = np.zeros((tokens, tokens), int)
    table = np.zeros((channels, channels), int)
    for n in range(tokens):
        for m in range(tokens):
            scores[n, m] = sum(1 for c in range(channels) if q[n, c] and k[m, c])
    for c in range(channels):
        for e in range(channels):
            table[c, e] = sum(1 for m in range(tokens) if k[m, c] and v[m, e])
    counts[SCORES_FIRST][0] += scores.sum()
    counts[TABLE_FIRST][0] += table.sum()
    for n in range(tokens):
        for m in range(tokens):
            counts[SCORES_FIRST][1] += v[m].sum() * (scores[n, m] > 0)
        for c in range(channels):
            counts[TABLE_FIRST][1] += np.count_nonzero(table[c]) * q[n, c]


class TestStaticImages:
    def test_pixels_are_sent_at_every_step_although_the_layer_is_computed_once(self) -> None:
        short, long = conv_network(steps=1), conv_network(steps=4)
        images = images_for(short, 2)
        assert events_of(long, images)["conv1"].sum("sops") == 4 * events_of(short, images)[
            "conv1"
        ].sum("sops")

    def test_a_reshaped_image_is_still_pixels(self) -> None:
        s = Sketch()
        s.node(Input("image", "", (1, 2, 2), 8))
        s.node(Reshape("flat", "", "flatten"), in_="image")
        s.node(Linear("dense", "", s.weights(3, 4), None), in_="flat")
        s.lif("lif", "dense", 50, 3)
        s.node(Output("output", ""), in_="lif")
        counted = events_of(s.graph(2), np.array([[[[1, 0], [7, 255]]]], np.uint8))["dense"]
        assert sum_of(counted, "messages", "sops", "macs", "acs") == (6, 18, 18, 0)
        assert counted.sum("unrolled_acs") == 2 * 3 * (1 + 7 + 255)


class TestDenseMacs:
    def test_of_a_network_worked_out_by_hand(self) -> None:
        events = events_of(conv_network(), images_for(conv_network(), 1))
        assert events["conv1"].dense_macs == 4 * 2 * 9 * 7 * 3
        assert events["conv2"].dense_macs == 6 * 2 * 4 * 4 * 1
        assert events["dense"].dense_macs == 5 * 24
        assert events["pool"].dense_macs == 0
        assert events.dense_macs == 1512 + 192 + 120

    def test_attention_is_two_products_over_all_pairs_of_tokens(self) -> None:
        graph = Adaptive().build()
        events = events_of(graph, images_for(graph, 1))
        assert events["block1.attention"].dense_macs == 2 * 16 * 16 * 8
        assert events["block1.fc1"].dense_macs == 16 * 8 * 16
        assert events["head"].dense_macs == 3 * 8


class TestAllTokens:
    def test_removes_gates_scores_and_merges_and_nothing_else(self) -> None:
        graph = Adaptive(merge=2, fraction_bits=4).build()
        dense = open_all_gates(graph)
        gone = {node.name for node in graph.nodes} - {node.name for node in dense.nodes}
        assert gone == {
            "stem.score", "block1.score", "block1.scores",
            "block1.gate", "block2.gate", "block1.merge", "block2.merge",
        }  # fmt: skip
        assert set(dense.blocks) <= {node.name for node in dense.nodes}

    def test_computes_what_the_network_without_gates_computes(self) -> None:
        """Gates that are all open: the adaptive graph with a threshold that is never reached."""
        graph, plain = Adaptive().build(), Adaptive(gates=False).build()
        images = images_for(graph, 4)
        assert np.array_equal(run(open_all_gates(graph), images).logits, run(plain, images).logits)

    def test_merges_in_a_row_are_all_gone_round(self) -> None:
        graph = Adaptive(merge=2, fraction_bits=4, blocks=1).build()
        second = Merge("again", "", 1, 0.0, "mean", "stream", "first")
        place = next(i for i, node in enumerate(graph.nodes) if node.name == "block1.fc1")
        edges = [
            replace(e, source="again") if e.source == "block1.merge" else e for e in graph.edges
        ]
        edges += [
            Edge("block1.merge", "again", port, "x" if port == "out" else port)
            for port in ("out", "gate", "alive", "size")
        ]
        nodes = (*graph.nodes[:place], second, *graph.nodes[place:])
        dense = open_all_gates(replace(graph, nodes=nodes, edges=tuple(edges)))
        (edge,) = dense.into("block1.fc1", "in")
        assert edge.source == "block1.after_attention"

    def test_a_graph_without_gates_stays_as_it_is(self) -> None:
        graph = conv_network()
        assert open_all_gates(graph).nodes == graph.nodes

    def test_costs_more_than_the_adaptive_form(self) -> None:
        graph = Adaptive().build()
        images = images_for(graph, 8)
        adaptive, dense = events_of(graph, images), events_of(open_all_gates(graph), images)
        assert adaptive["block2.fc1"].sum("sops") < 0.8 * dense["block2.fc1"].sum("sops")
        assert adaptive["stem.conv"].sum("sops") == dense["stem.conv"].sum("sops")


class TestReadout:
    def test_sums_tokens_first_and_multiplies_once(self) -> None:
        graph = Adaptive(gates=False, blocks=1).build()
        images = images_for(graph, 2)
        additions, products = 0, 0
        for image in images:
            steps, _ = simulate(graph, image)
            stream = np.stack([arriving(graph, now, "head", "x") for now in steps])
            additions += np.count_nonzero(stream)
            products += np.count_nonzero(stream.sum(axis=(0, 1))) * 3
        assert next(isinstance(n, Readout) for n in graph.nodes if n.name == "head")
        counted = events_of(graph, images)["head"]
        assert sum_of(counted, "acs", "macs") == (additions, products)


class TestTables:
    def test_json_has_means_sums_and_both_attention_orders(self) -> None:
        graph = Adaptive().build()
        events = events_of(graph, images_for(graph, 4))
        content = json.loads(json.dumps(events.as_json()))
        assert content["images"] == 4
        assert content["sum"]["sops"] == events.sum("sops")
        assert content["per_image"]["sops"] == pytest.approx(events.sum("sops") / 4)
        attention = next(n for n in content["nodes"] if n["name"] == "block1.attention")
        assert set(attention["attention"]["sops_per_image"]) == {SCORES_FIRST, TABLE_FIRST}

    def test_sops_are_acs_and_macs(self) -> None:
        graph = Adaptive(merge=2, fraction_bits=4).build()
        events = events_of(graph, images_for(graph, 3))
        for node in events.nodes:
            assert node.sum("sops") == node.sum("acs") + node.sum("macs"), node.name

    def test_groups_by_block_keep_the_total(self) -> None:
        graph = Adaptive().build()
        events = events_of(graph, images_for(graph, 2))
        blocks = events.group(lambda node: node.block)
        assert list(blocks)[:3] == ["stem", "block1", "block2"]
        assert sum(part.sum("sops") for part in blocks.values()) == events.sum("sops")

    def test_an_unknown_node_is_a_key_error(self) -> None:
        events = events_of(conv_network(), images_for(conv_network(), 1))
        with pytest.raises(KeyError, match="nowhere"):
            events["nowhere"]

"""Events after placement: the engine's to the last one; energy linear in its prices."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placed_networks import NETWORKS, spikes_for
from test_placement import GRAPHS, chip
from tiny_networks import Adaptive, Sketch, images_for

from atsnn.fixed_point import halting_table
from export.graph import Add, Gate, Graph, HaltingScore, Input, Linear, Output, Readout
from hardware.energy import ADAPTIVE, ALL_TOKENS
from hardware.engine import run
from hardware.events import FIELDS, SCORES_FIRST, EventCounts
from hardware.placement import measure, place, placed_cost
from hardware.placement.activity import measured
from hardware.placement.break_even import break_even, chip_model
from hardware.placement.energy import memory_traffic
from hardware.placement.layers import network_of
from hardware.placement.measure import LayerEvents, PlacedEvents
from hardware.placement.place import Placement
from hardware.placement.split import STRATEGIES, Strategy
from hardware.placement.table import HALTING, MERGING, forms, placed_table
from hardware.profile import EnergyPrices, Profile


def pixels_for(graph: Graph, count: int, seed: int = 0) -> np.ndarray:
    """Events for a 1-bit input, images for any other."""
    return (spikes_for if graph.input.bits == 1 else images_for)(graph, count, seed)


class TestSums:
    @settings(max_examples=30, deadline=None)
    @given(
        graph=GRAPHS,
        neurons=st.integers(8, 300),
        strategy=st.sampled_from(STRATEGIES),
        seed=st.integers(0, 100),
    )
    def test_equal_the_engine_s_events_exactly(
        self, graph: Graph, neurons: int, strategy: Strategy, seed: int
    ) -> None:
        """`measure` itself refuses otherwise; here its totals meet a run of their own."""
        images = pixels_for(graph, 3, seed)
        placement = place(graph, chip(neurons_per_core=neurons), strategy)
        events = measure(placement, images)
        fresh = run(graph, images, record="none").events
        assert fresh is not None
        for name in FIELDS:
            if name in ("sops", "acs", "unrolled_acs") and _other_order(fresh, events):
                continue  # placed for the other order of an attention; compared inside `measure`
            assert sum(layer.sum(name) for layer in events.layers) == fresh.sum(name), name

    def test_of_all_forms_of_an_adaptive_network(self) -> None:
        graph = Adaptive(channels=16, merge=2, fraction_bits=2).build()
        images = images_for(graph, 5)
        found = forms(graph)
        assert list(found) == [ALL_TOKENS, HALTING, MERGING, ADAPTIVE]
        for form in found.values():
            placement = place(form, chip(neurons_per_core=40), images=images)
            events = measure(placement, images)
            assert sum(events.engine.values()) > 0

    def test_every_message_that_a_core_sends_is_received(self) -> None:
        graph = Adaptive(channels=16, merge=1).build()
        images = images_for(graph, 4)
        placement = place(graph, chip(neurons_per_core=40), images=images)
        events = measure(placement, images)
        network = placement.network
        from_image = sum(
            layer.sum("received") for layer in events.layers
            if any(p.source == network.image for p in network.layers[layer.name].paths)
        )  # fmt: skip
        assert events.mean("received") - events.mean("sent") == from_image / 4

    def test_hops_are_those_that_the_placing_worked_with(self) -> None:
        graph = Adaptive(channels=16).build()
        images = images_for(graph, 6)
        placement = place(graph, chip(neurons_per_core=40), "token-major", images=images)
        control = sum(sum(layer.control_hops) for layer in measure(placement, images).layers) / 6
        data = sum(measure(placement, images).hops) - control
        planned = placement.hops
        assert data <= planned + 1e-6  # the placing takes a gate to send once an image

    def test_a_cut_attention_repeats_its_writes_and_says_so(self) -> None:
        graph = Adaptive(channels=8, gates=False).build()
        images = images_for(graph, 3)
        small = chip(neurons_per_core=8)  # half the tokens of a single channel
        events = measure(place(graph, small, "channel-major"), images)
        attention = next(layer for layer in events.layers if layer.kind == "Attention")
        assert attention.sum("repeats") > 0

    def test_the_order_by_scores_repeats_nothing_when_cut_by_tokens(self) -> None:
        graph = Adaptive(channels=8, gates=False).build()
        images = images_for(graph, 3)
        activity = measured(network_of(graph), images)
        orders = {layer.name: SCORES_FIRST for layer in network_of(graph).layers.values()}
        placement = place(
            graph, chip(neurons_per_core=32), activity=replace(activity, orders=orders)
        )
        events = measure(placement, images)
        for layer in events.layers:
            if layer.kind == "Attention":
                assert layer.tiles > 1
                assert layer.order == SCORES_FIRST
                assert layer.sum("repeats") == 0


def _other_order(fresh: EventCounts, events: PlacedEvents) -> bool:
    chosen = {n.name: n.order for n in fresh.nodes if n.order}
    return any(chosen.get(layer.name, layer.order) != layer.order for layer in events.layers)


def tokens_apart(threshold: int) -> Graph:
    """Tokens that never meet: what one does cannot change another's spikes."""
    s = Sketch(3)
    s.node(Input("image", "", (12, 8), 1))
    s.node(Linear("fc0", "", s.weights(8, 8), None), in_="image")
    s.lif("stem", "fc0", 40, 8)
    s.node(HaltingScore("score", "", 2.0, -1.5, halting_table(2.0, -1.5, 2, 0)), in_="stem")
    s.node(Gate("gate", "", threshold, True), score="score")
    s.node(Linear("fc1", "", s.weights(16, 8), None), in_="stem", gate="gate")
    s.lif("lif1", "fc1", 40, 16, "gate")
    s.node(Add("stream", "", (0,)), in_="lif1")
    s.node(Readout("head", "", s.weights(3, 16), s.weights(3), 7.0), x="stream")
    s.node(Output("output", ""), in_="head")
    return s.graph(5)


class TestGates:
    @settings(max_examples=20, deadline=None)
    @given(
        thresholds=st.lists(st.integers(1, 12_000), min_size=2, max_size=2, unique=True),
        seed=st.integers(0, 50),
        strategy=st.sampled_from(STRATEGIES),
    )
    def test_closing_more_gates_never_raises_any_count(
        self, thresholds: list[int], seed: int, strategy: Strategy
    ) -> None:
        """Behind the gate; the gate itself goes from active to idle and has more to tell."""
        low, high = sorted(thresholds)
        graph = tokens_apart(high)
        images = spikes_for(graph, 3, seed)
        placement = place(graph, chip(neurons_per_core=30), strategy)
        more_open = measure(placement, images)
        more_closed = measure(placement, images, graph=tokens_apart(low))
        for before, after in zip(more_open.layers, more_closed.layers, strict=True):
            names = ["sops", "acs", "macs", "unrolled_acs", "messages", "spikes", "merges"]
            if before.kind != "Gate":
                assert _updates(after) <= _updates(before)
            if before.kind not in ("Gate", "Add"):
                names.append("updates_idle")
            for name in (*names, "updates_active"):
                assert after.sum(name) <= before.sum(name), (before.name, name)
            assert _data(after) <= _data(before)
            assert after.east_west - after.control_hops[0] <= (
                before.east_west - before.control_hops[0]
            )
        assert more_closed.dark_share >= 0

    def test_a_core_whose_tokens_have_all_halted_is_dark(self) -> None:
        """Gates that close at once: after the first step no neuron behind them is updated."""
        graph = tokens_apart(1)
        images = np.ones((graph.steps, 2, 12, 8), np.uint8)
        placement = place(graph, chip(neurons_per_core=30), "token-major")
        events = measure(placement, images)
        lif = next(layer for layer in events.layers if layer.name == "lif1")
        assert lif.sum("updates_gated") > 0
        assert lif.sum("dark") > 0
        assert 0 < events.dark_share_gateable <= 1

    def test_nothing_is_dark_without_gates(self) -> None:
        graph = NETWORKS["dense"]()
        events = measure(place(graph, chip(neurons_per_core=30)), spikes_for(graph, 2))
        assert events.dark_share_gateable == 0


def _updates(layer: LayerEvents) -> int:
    return layer.sum("updates_active") + layer.sum("updates_idle")


def _data(layer: LayerEvents) -> int:
    return layer.sum("received") - layer.sum("control")


@pytest.fixture(scope="module")
def placed() -> tuple[Placement, PlacedEvents]:
    graph = Adaptive(channels=16, merge=1).build()
    images = images_for(graph, 4)
    placement = place(graph, chip("loihi1_calibrated", neurons_per_core=40), images=images)
    return placement, measure(placement, images)


def repriced(profile: Profile, factors: dict[str, float]) -> Profile:
    """A chip with some prices multiplied."""
    changed = {
        name: quantity.model_copy(update={"value": quantity.value * factors[name]})
        for name, quantity in profile.energy
        if quantity is not None and name in factors
    }
    return profile.model_copy(update={"energy": profile.energy.model_copy(update=changed)})


class TestEnergy:
    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_is_linear_in_every_price(
        self, placed: tuple[Placement, PlacedEvents], data: st.DataObject
    ) -> None:
        placement, events = placed
        names = [
            name for name in EnergyPrices.model_fields if getattr(placement.profile.energy, name)
        ]
        name = data.draw(st.sampled_from(names))
        factor = data.draw(st.floats(0, 100))
        at_0, at_1, at_f = (
            placed_cost(placement, events, repriced(placement.profile, {name: k})).total.low
            for k in (0.0, 1.0, factor)
        )
        assert at_f == pytest.approx(at_0 + factor * (at_1 - at_0), rel=1e-9)

    def test_causes_and_layers_add_up(self, placed: tuple[Placement, PlacedEvents]) -> None:
        cost = placed_cost(*placed)
        for cause in ("synapse", "neuron", "message", "idle"):
            layers = sum(costs[cause].low for costs in cost.layers.values())
            assert layers == pytest.approx(cost.causes[cause].low)
        assert cost.total.low == pytest.approx(cost.dynamic.low + cost.causes["static"].low)
        json.dumps(cost.as_json(), allow_nan=False)

    def test_by_hand(self, placed: tuple[Placement, PlacedEvents]) -> None:
        placement, events = placed
        cost = placed_cost(placement, events)
        messages = 111e-12 * events.mean("sent")
        messages += 3.0e-12 * events.hops[0] + 4.2e-12 * events.hops[1]
        assert cost.causes["message"].low == pytest.approx(messages)
        fired = sum(layer.fired for layer in events.layers) / 4
        neurons = 72.8e-12 * events.mean("updates_active") + 69.3e-12 * fired
        assert cost.causes["neuron"].low == pytest.approx(neurons)
        assert cost.causes["idle"].low == pytest.approx(51.2e-12 * events.mean("updates_idle"))
        low = 0.029 * placement.mesh.chips * events.times.seconds_per_image[0]
        assert cost.causes["static"].low == pytest.approx(low)

    def test_a_range_of_prices_gives_a_range_of_joules(self) -> None:
        graph = NETWORKS["conv"]()
        images = spikes_for(graph, 2)
        placement = place(graph, "loihi2", images=images)
        cost = placed_cost(placement, measure(placement, images))
        assert 0 < cost.total.low < cost.total.high
        assert cost.total.grade == "assumed"

    def test_memory_traffic_counts_weights_state_and_messages(
        self, placed: tuple[Placement, PlacedEvents]
    ) -> None:
        found = memory_traffic(*placed)
        assert found["bytes"] == found["weights"] + found["state"] + found["messages"]
        events = placed[1]
        assert found["messages"] == 4 * events.mean("received")


class TestTime:
    def test_a_step_is_slowest_core_network_and_barrier(
        self, placed: tuple[Placement, PlacedEvents]
    ) -> None:
        times = placed[1].times
        for side in (0, 1):
            parts = times.slowest_core[side] + times.network[side] + times.barrier[side]
            assert times.step[side] == pytest.approx(parts)
        assert times.barrier == (pytest.approx(0.6e-6), pytest.approx(1.8e-6))
        assert times.longest_step[1] >= times.step[1]

    def test_one_core_by_hand(self) -> None:
        """A dense network on one core: every step takes its operations, updates and messages."""
        graph = NETWORKS["dense"]()
        images = spikes_for(graph, 3)
        placement = place(graph, "loihi1")
        assert placement.cores == 1
        events = measure(placement, images)
        each = 3.5e-9 * events.mean("sops") + 8.4e-9 * events.mean("updates_active")
        each += 5.3e-9 * events.mean("updates_idle") + 2.1e-9 * events.mean("received")
        assert events.times.slowest_core[0] == pytest.approx(each / graph.steps)

    def test_images_stream_unless_a_gate_looks_back(self) -> None:
        streaming = Adaptive().build()
        looking_back = Adaptive(order="rectangle").build()
        for graph, pipelined in ((streaming, True), (looking_back, False)):
            images = images_for(graph, 2)
            times = measure(place(graph, "loihi1"), images).times
            assert times.pipelined is pipelined
            if pipelined:
                assert times.steps_per_image == graph.steps
            else:
                assert times.steps_per_image == times.image_steps


class TestComparison:
    @pytest.fixture(scope="class")
    def table(self):
        graph = Adaptive(channels=16, merge=1).build()
        return placed_table(graph, images_for(graph, 6), gpu="modelled")

    def test_has_all_forms_conventions_ann_gpu_and_cpu(self, table) -> None:
        assert [s.name for s in table.systems] == [ALL_TOKENS, HALTING, MERGING, ADAPTIVE]
        systems = " ".join(row.system for row in table.rivals)
        assert "on a GPU, batch 256" in systems
        assert "on a CPU, batch 1" in systems
        assert "quantised ANN" in systems
        json.dumps(table.as_json(), allow_nan=False)

    def test_every_line_says_whether_it_is_a_model(self, table) -> None:
        from io import StringIO

        from rich.console import Console

        from hardware.placement.report import energy_placed_table, rivals_table

        out = StringIO()
        console = Console(file=out, width=220)
        console.print(energy_placed_table(table))
        console.print(rivals_table(table.rivals))
        assert "a model in pJ, not a measurement" in out.getvalue()
        for row in table.rivals:
            assert row.grade != "measured"

    def test_break_even_is_where_the_energies_meet(self, table) -> None:
        system = table.systems[-1]
        model = chip_model(system)
        total = system.cost.total
        same = model.joules(model.firing, model.tokens)
        assert same == pytest.approx([total.low, total.high])
        for line in break_even(system):
            assert 0 <= line.firing_sure <= line.firing_may <= 1
            assert 0 <= line.tokens_sure <= line.tokens_may <= 1
            if 0 < line.firing_sure < 1:
                meets = model.joules(line.firing_sure, model.tokens)[1]
                assert meets == pytest.approx(line.rival_joules[0], rel=1e-6)

    def test_a_rival_of_break_even_costs_what_the_table_says(self, table) -> None:
        """All tokens: a GPU neither gates nor merges."""
        rows = {row.system: row for row in table.rivals}
        lines = {(line.rival, line.batch): line for line in break_even(table.systems[-1])}
        for what, name in (
            ("the same SNN", "SNN, all tokens, on a GPU, batch 256"),
            ("8-bit ANN", "quantised ANN of the same shape, on a GPU, batch 256"),
        ):
            found = lines[f"a100, {what}", 256].rival_joules
            assert found == pytest.approx((rows[name].joules_low, rows[name].joules_high))

    def test_more_firing_and_more_tokens_never_cost_less(self, table) -> None:
        model = chip_model(table.systems[-1])
        for side in (0, 1):
            by_rate = [model.joules(f, model.tokens)[side] for f in np.linspace(0, 1, 9)]
            by_tokens = [model.joules(model.firing, g)[side] for g in np.linspace(0, 1, 9)]
            assert by_rate == sorted(by_rate)
            assert by_tokens == sorted(by_tokens)

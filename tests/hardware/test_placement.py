"""Placement: every neuron once, no limit exceeded, short ways, refusals with both numbers."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placed_networks import NETWORKS
from tiny_networks import Adaptive, Sketch, conv_network, images_for

from export.graph import Conv, Edge, Graph, Input, Linear, Output, Reshape
from export.passes import Schedule
from hardware.errors import PlacementError
from hardware.placement import place, preset_graph, spikformer_shape, violations
from hardware.placement.layers import network_of, position_fan, window_reach
from hardware.placement.mesh import arrange, in_order, mesh_for, weighted_hops
from hardware.placement.packing import lower_bounds
from hardware.placement.split import STRATEGIES, core_limits, cut, needs, split_layer, worst_needs
from hardware.profile import Profile, load_profile


def chip(base: str = "loihi1", **limits: int) -> Profile:
    """A shipped chip with some limits changed."""
    profile = load_profile(base)
    changed = {
        name: getattr(profile.limits, name).model_copy(update={"value": value})
        for name, value in limits.items()
    }
    return profile.model_copy(update={"limits": profile.limits.model_copy(update=changed)})


def random_graph(kind: str, seed: int) -> Graph:
    if kind == "adaptive":
        rng = np.random.default_rng(seed)
        gates = bool(rng.integers(2))
        return Adaptive(
            seed,
            blocks=int(rng.integers(1, 3)),
            gates=gates,
            merge=int(rng.integers(0, 3)) if gates else 0,
            fraction_bits=int(rng.integers(0, 3)),
        ).build()
    if kind == "tiny conv":
        return conv_network(seed)
    return NETWORKS[kind](seed)


GRAPHS = st.builds(
    random_graph,
    st.sampled_from(["adaptive", "tiny conv", *NETWORKS]),
    st.integers(0, 1000),
)
CHIPS = st.builds(
    chip,
    neurons_per_core=st.integers(1, 400),
    in_axons_per_core=st.integers(4, 300),
    out_axons_per_core=st.integers(8, 600),
    synapse_memory_per_core=st.integers(1, 8),
    cores=st.sampled_from([8, 32, 128]),
)


class TestEveryNeuronOnceWithinEveryLimit:
    @settings(max_examples=40, deadline=None)
    @given(graph=GRAPHS, profile=CHIPS, strategy=st.sampled_from([*STRATEGIES, "auto"]))
    def test_for_random_graphs_and_random_profiles(
        self, graph: Graph, profile: Profile, strategy: Any
    ) -> None:
        try:
            placement = place(graph, profile, strategy)
        except PlacementError:
            return  # refused as a whole: nothing was placed
        assert violations(placement) == []
        used = np.zeros((placement.cores, 4), np.int64)
        for name, layer in placement.network.layers.items():
            split, cores = placement.splits[name], placement.packing.core_of[name]
            tile = split.row_of[:, None] * split.columns + split.column_of[None]
            assert tile.shape == (layer.grid.positions, layer.grid.channels)
            assert 0 <= tile.min() <= tile.max() < split.tiles
            assert len(set(cores.tolist())) == split.tiles  # no two tiles of a layer on one core
            np.add.at(
                used, cores, needs(split, placement.network, placement.splits, placement.limits)
            )
        assert (used == placement.packing.used).all()
        assert (used <= placement.limits.array).all()
        assert placement.cores >= max(placement.bounds.values())
        assert placement.hops <= placement.hops_in_order + 1e-6

    @settings(max_examples=25, deadline=None)
    @given(graph=GRAPHS, rows=st.integers(1, 6), columns=st.integers(1, 6))
    def test_the_worst_tile_is_the_largest_of_all(
        self, graph: Graph, rows: int, columns: int
    ) -> None:
        network, limits = network_of(graph), core_limits(load_profile("loihi1"))
        splits = {
            name: cut(
                layer, "channel-major",
                min(rows, layer.grid.positions), min(columns, layer.grid.channels),
            )
            for name, layer in network.layers.items()
        }  # fmt: skip
        for split in splits.values():
            each = needs(split, network, splits, limits)
            assert (worst_needs(split, network, splits, limits) == each.max(axis=0)).all()


class TestResourcesByHand:
    def test_a_convolution_stores_its_weights_once_whatever_its_positions(self) -> None:
        """3 channels of 2 inputs, 3 x 3, 8 bits: 2 lists of 27 bytes, 4 words each."""
        network = network_of(_conv_graph())
        limits = core_limits(load_profile("loihi1"))
        for rows in (1, 4):
            split = cut(network.layers["lif"], "channel-major", rows, 1)
            assert needs(split, network, {}, limits)[0, 1] == 2 * 4

    def test_in_axons_are_the_positions_in_the_receptive_field(self) -> None:
        """8 x 8 maps in two halves of 4 rows, 3 x 3: each reads 5 rows."""
        network = network_of(_conv_graph())
        split = cut(network.layers["lif"], "token-major", 2, 1)
        tiles = needs(split, network, {}, core_limits(load_profile("loihi1")))
        assert tiles[:, 2].tolist() == [40, 40]

    def test_out_axons_are_two_slots_for_each_position_and_reading_tile(self) -> None:
        """6 tokens read by a Linear in 3 columns and an Add in 1 that cuts nothing: 6 * (3 + 1)."""
        network = network_of(NETWORKS["residual"]())
        limits = core_limits(load_profile("loihi1"))
        readers = {"lif2": cut(network.layers["lif2"], "channel-major", 1, 3)}
        tiles = needs(cut(network.layers["lif1"], "channel-major", 1, 1), network, readers, limits)
        assert tiles[0, 3] == 2 * 6 * (3 + 1)

    def test_windows_reach_as_a_dense_convolution_does(self) -> None:
        graph = conv_network()
        network = network_of(graph)
        for layer in network.layers.values():
            for path in layer.paths:
                if path.kind != "conv":
                    continue
                reach = window_reach(path).toarray()
                ones = np.ones(path.grid.size)
                assert isinstance(path.synapse, Conv)
                assert reach.sum() == _taps_inside(path.synapse, ones)

    def test_the_bound_counts_weights_once_and_every_neuron(self) -> None:
        network = network_of(NETWORKS["dense"]())
        limits = core_limits(chip(neurons_per_core=16))
        assert lower_bounds(network, limits)["neurons"] == -(-(40 + 30 + 10) // 16)


def _conv_graph() -> Graph:
    s = Sketch()
    s.node(Input("image", "", (2, 8, 8), 1))
    s.node(Conv("conv", "net.conv", s.weights(3, 2, 3, 3), None, (1, 1), (1, 1)), in_="image")
    s.lif("lif", "conv", 40, 3)
    s.node(Reshape("flat", "", "flatten"), in_="lif")
    s.node(Linear("fc", "net.fc", s.weights(2, 192), None), in_="flat")
    s.lif("classes", "fc", 40, 2)
    s.node(Output("output", ""), in_="classes")
    return s.graph(2)


def _taps_inside(conv: Conv, ones: np.ndarray) -> int:
    total = 0
    height, width = ones.shape
    _, _, kernel_y, kernel_x = conv.weight.shape
    rows = (height + 2 * conv.padding[0] - conv.dilation[0] * (kernel_y - 1) - 1) // conv.stride[0]
    columns = width + 2 * conv.padding[1] - conv.dilation[1] * (kernel_x - 1) - 1
    columns //= conv.stride[1]
    for oy in range(rows + 1):
        for ox in range(columns + 1):
            for ky in range(kernel_y):
                for kx in range(kernel_x):
                    y = oy * conv.stride[0] - conv.padding[0] + ky * conv.dilation[0]
                    x = ox * conv.stride[1] - conv.padding[1] + kx * conv.dilation[1]
                    total += 0 <= y < height and 0 <= x < width
    return total


class TestStrategies:
    def test_channel_major_keeps_all_tokens_together_and_token_major_all_channels(self) -> None:
        graph = Adaptive(channels=16).build()
        profile = chip(neurons_per_core=64)
        channel = place(graph, profile, "channel-major").splits["block1.q_lif"]
        token = place(graph, profile, "token-major").splits["block1.q_lif"]
        assert (channel.rows, channel.columns) == (1, 4)
        assert (token.rows, token.columns) == (4, 1)

    def test_an_attention_is_cut_by_heads_or_by_tokens_as_its_order_needs(self) -> None:
        graph = Adaptive(channels=16).build()
        network, profile = network_of(graph), chip(neurons_per_core=64)
        limits, layer = core_limits(profile), network.layers["block1.attention"]
        for strategy in STRATEGIES:
            table = split_layer(layer, strategy, network, {}, profile, limits)
            scores = split_layer(layer, strategy, network, {}, profile, limits, order="(q k^T) v")
            assert (table.rows, scores.columns) == (1, 1)

    def test_auto_costs_no_more_than_the_better_one_on_its_own_images(self) -> None:
        from hardware.placement import measure, placed_cost

        graph = Adaptive(channels=16, merge=1).build()
        images, profile = images_for(graph, 8), chip("loihi1_calibrated", neurons_per_core=64)
        energy = {}
        for strategy in (*STRATEGIES, "auto"):
            placement = place(graph, profile, strategy, images=images)
            energy[strategy] = placed_cost(placement, measure(placement, images)).total.middle
        assert energy["auto"] <= min(energy[s] for s in STRATEGIES) * (1 + 1e-9)

    def test_tokens_that_halt_together_share_a_core(self) -> None:
        graph = Adaptive(channels=16).build()
        images = images_for(graph, 8)
        placement = place(graph, chip(neurons_per_core=64), "token-major", images=images)
        openness = sum(placement.activity.openness.values())
        rows = placement.splits["block1.q_lif"].row_of
        means = [openness[rows == row].mean() for row in range(rows.max() + 1)]
        assert means == sorted(means)


class TestMesh:
    def test_chips_continue_each_other(self) -> None:
        mesh = mesh_for(load_profile("loihi1"), 300)
        assert (mesh.chips, mesh.places) == (3, 384)
        assert (mesh.x[128], mesh.y[128]) == (8, 0)
        assert (mesh.x[256], mesh.y[256]) == (0, 4)

    def test_a_chain_of_cores_is_laid_along_the_mesh(self) -> None:
        """Each of 32 cores talks to the next: at best 4 share a tile and 7 hops are left.

        The search is a heuristic: it comes within half of that, where the order given has far more.
        """
        import scipy.sparse as sp

        mesh = mesh_for(load_profile("loihi1"), 32)
        order = np.random.default_rng(0).permutation(32)
        traffic = sp.csr_matrix((np.ones(31), (order[:-1], order[1:])), shape=(32, 32))
        entering = np.zeros(32)
        found = weighted_hops(mesh, arrange(mesh, traffic, entering), traffic, entering)
        assert 7 <= found <= 1.5 * 7
        assert weighted_hops(mesh, in_order(32), traffic, entering) > 5 * 7

    def test_no_two_cores_share_a_place(self) -> None:
        placement = place(Adaptive(channels=16).build(), chip(neurons_per_core=16))
        assert len(set(placement.place.tolist())) == placement.cores


class TestPresets:
    def test_are_wired_and_named_as_the_compiled_model(self) -> None:
        pytest.importorskip("torch")
        from atsnn.config import ModelConfig
        from atsnn.quantization import quantize_model
        from atsnn.spikformer import Spikformer
        from export import compile_spikformer

        config = ModelConfig(
            in_channels=3, image_size=(8, 8), classes=10, blocks=1, dim=16, heads=2
        )
        model = Spikformer(config).eval()
        compiled = compile_spikformer(quantize_model(model))
        shape = spikformer_shape(1, 16, 2, 8)
        ours, theirs = network_of(shape), network_of(compiled)
        assert list(ours.layers) == list(theirs.layers)
        for name, layer in ours.layers.items():
            other = theirs.layers[name]
            assert (layer.kind, layer.grid, layer.depth) == (other.kind, other.grid, other.depth)
            mine = [(p.source, p.kind, p.grid, p.delay) for p in layer.paths]
            assert mine == [(p.source, p.kind, p.grid, p.delay) for p in other.paths]

    def test_spikformer_4_384_on_loihi_2(self) -> None:
        """The bar: within 1.3 of the lower bound, nothing exceeded, a fifth of the hops saved."""
        placement = place(preset_graph("spikformer-4-384"), "loihi2", "channel-major")
        found = placement.as_json()
        assert found["violations"] == []
        assert found["cores_used"] <= 1.3 * found["cores_lower_bound"]
        assert found["traffic"]["hops"] <= 0.8 * found["traffic"]["hops_in_order"]
        assert set(found) >= {"profile", "chips", "cores_used", "cores_lower_bound", "layers"}

    def test_an_unknown_shape_is_refused_with_those_that_there_are(self) -> None:
        with pytest.raises(PlacementError, match=r"no shape named 'vit'.*spikformer-4-384"):
            preset_graph("vit")
        with pytest.raises(PlacementError, match="an image of 999 pixels; 4 to 512"):
            preset_graph("spikformer-4-384@999")


class TestRefusals:
    """Layer, both numbers, and what to do."""

    @pytest.mark.parametrize(
        ("limit", "value", "words"),
        [
            ("synapse_memory_per_core", 0, "1 synapse words, a core of loihi1 has 0; narrow"),
            ("in_axons_per_core", 7, "9 in-axons, a core of loihi1 has 7; pool the maps"),
            ("out_axons_per_core", 1, "out-axons, a core of loihi1 has 1; let fewer cores"),
        ],
    )
    def test_what_no_cut_can_mend(self, limit: str, value: int, words: str) -> None:
        graph = _conv_graph() if "in_" in limit else Adaptive().build()
        with pytest.raises(PlacementError) as refusal:
            place(graph, chip(**{limit: value}), "channel-major")
        if "in_" not in limit:
            assert words.split("; ")[1][:10] in str(refusal.value)
        assert f"a core of loihi1 has {value}" in str(refusal.value)
        assert "torch module" in str(refusal.value) or "Readout" in str(refusal.value)

    def test_a_message_that_must_wait_too_long(self) -> None:
        graph = Adaptive().build()
        first = graph.into("block1.after_attention")[0]
        edges = tuple(
            Edge(e.source, e.target, e.source_port, e.target_port, e.lag, 63) if e == first else e
            for e in Schedule()(graph).edges
        )
        late = Graph(graph.nodes, edges if any(e.delay == 63 for e in edges) else (
            *(e for e in graph.edges if e != first),
            Edge(first.source, first.target, first.source_port, first.target_port, 0, 63),
        ), graph.steps, True)  # fmt: skip
        with pytest.raises(
            PlacementError, match=r"wait 63 steps, loihi1 holds them for at most 62"
        ):
            place(late, "loihi1")

    def test_weights_wider_than_the_chip_holds(self) -> None:
        with pytest.raises(
            PlacementError, match=r"its weights reach \d+, .* holds up to 16 \(4 bits"
        ):
            place(Adaptive().build(), chip(weight_bits=4))

    def test_a_convention_has_no_cores(self) -> None:
        with pytest.raises(PlacementError, match="'45nm-int8' has no cores to place on"):
            place(Adaptive().build(), "45nm-int8")

    def test_an_unknown_strategy(self) -> None:
        with pytest.raises(PlacementError, match="strategy is 'best'; use one of channel-major"):
            place(Adaptive().build(), "loihi1", cast(Any, "best"))


class TestFans:
    def test_position_fans_add_up_to_all_targets(self) -> None:
        network = network_of(Adaptive(merge=1).build())
        for layer in network.layers.values():
            for path in layer.paths:
                rows = np.arange(layer.grid.positions) % 3
                fan = position_fan(path, rows, 3).toarray()
                whole = position_fan(path, np.zeros_like(rows), 1).toarray()
                assert (fan.sum(axis=0) == whole[0]).all()

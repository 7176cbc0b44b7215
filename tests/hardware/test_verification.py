"""Verification finds a single wrong spike and names it."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import Adaptive, conv_network, images_for

from export.graph import Graph
from hardware.engine import run
from hardware.errors import VerificationError
from hardware.verify import Stage, Trace, compare, verify

GRAPH = Adaptive().build()
IMAGES = images_for(GRAPH, 6)
SHAPES = {name: value.shape for name, value in run(GRAPH, IMAGES).trace.items() if name != "logits"}


def engine_trace(graph: Graph) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    return lambda images: dict(run(graph, images, count_events=False).trace)


def with_a_fault(node: str, image: int, t: int, neuron: tuple[int, ...]) -> Stage:
    """The engine, with one value of one node turned over in one image of the whole set."""

    def trace(images: np.ndarray) -> Trace:
        values = engine_trace(GRAPH)(images)
        for index, given_image in enumerate(images):
            if np.array_equal(given_image, IMAGES[image]):
                broken = values[node].copy()
                broken[(t, index, *neuron)] = 1 - broken[(t, index, *neuron)]
                values[node] = broken
        return values

    return Stage("broken", trace)


class TestEqualStages:
    def test_every_layer_step_and_image_is_compared(self) -> None:
        result = verify(GRAPH, IMAGES, ["engine"], reference=engine_trace(GRAPH))
        (stage,) = result.stages
        assert result.equal
        assert stage.equal
        assert stage.spikes_compared == sum(np.prod(shape) for shape in SHAPES.values())
        assert stage.nodes_compared == len(SHAPES)
        assert (stage.images, stage.spikes_differing, stage.first_difference) == (6, 0, None)

    def test_batches_change_nothing(self) -> None:
        broken = with_a_fault("block1.q_lif", 4, 1, (3, 2))
        whole = verify(GRAPH, IMAGES, [broken])
        split = verify(GRAPH, IMAGES, [broken], batch=4)
        assert whole == split
        assert not whole.equal

    def test_json_has_the_fixed_keys(self) -> None:
        result = verify(GRAPH, IMAGES, ["engine"], reference=engine_trace(GRAPH))
        (stage,) = json.loads(json.dumps(result.as_json()))["stages"]
        assert stage.items() >= {
            "from": "quantised torch", "to": "engine", "images": 6,
            "spikes_compared": result.stages[0].spikes_compared, "spikes_differing": 0,
            "first_difference": None,
        }.items()  # fmt: skip

    def test_progress_names_the_stage(self) -> None:
        told: list[tuple[str, int, int]] = []
        verify(
            GRAPH, IMAGES, ["engine"], reference=engine_trace(GRAPH), batch=4,
            progress=lambda *news: told.append(news),
        )  # fmt: skip
        assert told == [("engine", 4, 6), ("engine", 6, 6)]

    def test_a_slow_stage_tells_how_far_it_is_inside_a_batch(self) -> None:
        def watched(images: np.ndarray, tell: Callable[[float], None]) -> Trace:
            tell(0.5)
            return engine_trace(GRAPH)(images)

        told: list[tuple[str, int, int]] = []
        slow = Stage("slow", engine_trace(GRAPH), watched=watched)
        verify(GRAPH, IMAGES, [slow], batch=4, progress=lambda *news: told.append(news))
        assert told == [("slow", 2, 6), ("slow", 4, 6), ("slow", 5, 6), ("slow", 6, 6)]

    def test_events_over_time_have_their_images_on_the_second_axis(self) -> None:
        graph = conv_network(bits=1)
        events = np.random.default_rng(3).integers(0, 2, (graph.steps, 5, 2, 7, 6), dtype=np.uint8)
        broken = Stage(
            "broken",
            lambda part: {**engine_trace(graph)(part), "logits": np.zeros((part.shape[1], 5))},
        )
        result = verify(graph, events, ["engine", broken], reference=engine_trace(graph), batch=2)
        assert [stage.images for stage in result.stages] == [5, 5]
        assert [stage.equal for stage in result.stages] == [True, False]


class TestOneWrongSpike:
    @settings(max_examples=25)
    @given(data=st.data())
    def test_is_found_and_named_wherever_it_is(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(sorted(SHAPES)))
        steps, images, *shape = SHAPES[node]
        image, t = data.draw(st.integers(0, images - 1)), data.draw(st.integers(0, steps - 1))
        neuron = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        result = verify(GRAPH, IMAGES, [with_a_fault(node, image, t, neuron)], batch=4)
        (stage,) = result.stages
        assert not result.equal
        assert stage.spikes_differing == 1
        first = stage.first_difference
        assert first is not None
        assert (first.node, first.image, first.t, first.neuron) == (node, image, t, neuron)
        assert sorted(first.values) == [0, 1]
        right = engine_trace(GRAPH)(IMAGES)[node][(t, image, *neuron)]
        assert first.values == (right, 1 - right)

    def test_the_first_in_the_graph_is_reported_not_the_first_in_the_images(self) -> None:
        def trace(images: np.ndarray) -> Trace:
            values = engine_trace(GRAPH)(images)
            early, late = values["stem.lif"].copy(), values["block2.fc2_lif"].copy()
            if np.array_equal(images[0], IMAGES[0]):
                late[0, 0] ^= True
            else:
                early[2, 0] ^= True
            return {**values, "stem.lif": early, "block2.fc2_lif": late}

        (stage,) = verify(GRAPH, IMAGES, [Stage("broken", trace)], batch=3).stages
        assert stage.first_difference is not None
        assert stage.first_difference.node == "stem.lif"
        assert stage.first_difference.image == 3
        assert "stem.lif, image 3, t = 2, neuron [0, 0, 0]: " in str(stage.first_difference)

    def test_logits_that_differ_while_all_spikes_agree(self) -> None:
        def trace(images: np.ndarray) -> Trace:
            values = engine_trace(GRAPH)(images)
            values["logits"] = values["logits"] + np.array([0.0, 1e-9, 0.0])
            return values

        (stage,) = verify(GRAPH, IMAGES, [Stage("broken", trace)]).stages
        assert not stage.equal
        assert (stage.spikes_differing, stage.logits_differing) == (0, 6)
        assert stage.first_difference is not None
        assert stage.as_json()["first_difference"]["node"] == "logits"
        assert stage.first_difference.t is None


class TestPartialStages:
    """A stage of the user's own that shows only what leaves a block."""

    def test_what_is_missing_in_any_batch_counts_as_missing(self) -> None:
        calls = []

        def fading(images: np.ndarray) -> Trace:
            calls.append(len(images))
            values = engine_trace(GRAPH)(images)
            kept = ("stem.lif", "logits") if len(calls) > 1 else tuple(values)
            return {name: values[name] for name in kept}

        (stage,) = verify(GRAPH, IMAGES, [Stage("fading", fading, partial=True)], batch=3).stages
        assert stage.nodes_compared == 1
        assert "block1.q_lif" in stage.nodes_missing

    def test_say_which_layers_they_do_not_show(self) -> None:
        def outside(images: np.ndarray) -> Trace:
            values = engine_trace(GRAPH)(images)
            return {name: values[name] for name in ("stem.lif", "block2.fc2_lif", "logits")}

        (stage,) = verify(GRAPH, IMAGES, [Stage("blocks", outside, partial=True)]).stages
        assert stage.equal
        assert stage.nodes_compared == 2
        assert "block1.q_lif" in stage.nodes_missing

    def test_must_show_something(self) -> None:
        def nothing(images: np.ndarray) -> Trace:
            return {"logits": engine_trace(GRAPH)(images)["logits"]}

        with pytest.raises(
            VerificationError, match=r"'blocks' shows none of the \d+ spiking nodes"
        ):
            verify(GRAPH, IMAGES, [Stage("blocks", nothing, partial=True)])


class TestRefusals:
    def test_no_stage(self) -> None:
        with pytest.raises(VerificationError, match="name at least one stage"):
            verify(GRAPH, IMAGES, [])

    def test_traces_without_images(self) -> None:
        values = engine_trace(GRAPH)(IMAGES)
        none = {name: v[:0] if name == "logits" else v[:, :0] for name, v in values.items()}
        with pytest.raises(VerificationError, match="nothing to compare"):
            compare(GRAPH, none, none)

    def test_an_unknown_stage(self) -> None:
        with pytest.raises(VerificationError, match=r"'loihi'; choose from engine, lava-layers"):
            verify(GRAPH, IMAGES, ["loihi"])

    def test_no_images(self) -> None:
        with pytest.raises(VerificationError, match="no images to verify on"):
            verify(GRAPH, IMAGES[:0], ["engine"])

    def test_a_batch_of_nothing(self) -> None:
        with pytest.raises(VerificationError, match=r"batch is 0"):
            verify(GRAPH, IMAGES, ["engine"], batch=0)

    def test_a_layer_that_a_whole_stage_does_not_show(self) -> None:
        trace = engine_trace(GRAPH)(IMAGES)
        lacking = {name: value for name, value in trace.items() if name != "block1.q_lif"}
        with pytest.raises(VerificationError, match=r"'other' shows no values of block1\.q_lif"):
            compare(GRAPH, trace, lacking)

    def test_a_layer_of_another_shape(self) -> None:
        trace = engine_trace(GRAPH)(IMAGES)
        with pytest.raises(
            VerificationError, match=r"stem\.lif: .*\[3, 6, 8, 4, 4\].*\[2, 6, 8, 4, 4\]"
        ):
            compare(GRAPH, trace, {**trace, "stem.lif": trace["stem.lif"][:2]})


class TestAgainstTorch:
    @pytest.mark.parametrize("merge", [0, 3])
    @pytest.mark.parametrize("order", ["upstream", "blocks", "rectangle"])
    def test_the_engine_equals_the_graph_in_torch(self, merge: int, order: str) -> None:
        pytest.importorskip("torch")
        graph = Adaptive(merge=merge, order=order, fraction_bits=merge).build()  # pyright: ignore[reportArgumentType]
        assert verify(graph, images_for(graph, 9), ["engine"], batch=5).equal

    def test_and_so_does_a_convolutional_network(self) -> None:
        pytest.importorskip("torch")
        assert verify(conv_network(), images_for(conv_network(), 9), ["engine"]).equal


@pytest.mark.lava
class TestAgainstLava:
    def test_the_engine_equals_lava_at_both_grains(self) -> None:
        graph = Adaptive(merge=2, fraction_bits=4, blocks=1).build()
        result = verify(graph, images_for(graph, 2), ["lava-layers", "lava-blocks"])
        assert [stage.to_stage for stage in result.stages] == ["lava-layers", "lava-blocks"]
        assert result.equal

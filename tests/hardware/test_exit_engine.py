"""Images leave once they are sure, and are charged for the steps that they took."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spikformers import lively, small_config

from atsnn.config import ModelConfig
from atsnn.errors import ExitError
from atsnn.exits import first_steps
from atsnn.quantization import quantize_model
from atsnn.spikformer import Spikformer
from export.spikformer import compile_spikformer, model_trace
from export.torch_module import Trace
from hardware.engine import run
from hardware.errors import EngineError
from hardware.events import FIELDS, EventCounts, join
from hardware.exits import ExitEngine


def outspoken(config: ModelConfig) -> Spikformer:
    """A lively model whose logits differ by more than a few hundredths."""
    model = lively(config)
    model.readout.head.weight.data *= 30
    return model


CONFIG = small_config().model_copy(update={"steps": 4})
MODEL = quantize_model(outspoken(CONFIG))
MARGIN = 0.5
"""So large that images leave after every step."""
IMAGES = np.random.default_rng(0).integers(0, 256, (24, 1, 12, 12), dtype=np.uint8)
ENGINE = ExitEngine(MODEL)
PREFIXES = [run(compile_spikformer(first_steps(MODEL, t)), IMAGES) for t in (1, 2, 3, 4)]
"""What all images do in the networks for the first 1, 2, 3 and 4 steps."""
margins = st.floats(0.01, 4.0)


def sure(logits: np.ndarray) -> np.ndarray:
    """Largest minus second largest, written out."""
    ordered = np.sort(logits, axis=1)
    return ordered[:, -1] - ordered[:, -2]


def plain(config: ModelConfig) -> ModelConfig:
    """The same without gates."""
    values = {**config.model_dump(), "halting": {}, "merging": {}}
    return ModelConfig.model_validate(values)


def assert_same_events(ours: EventCounts, theirs: EventCounts) -> None:
    assert (ours.images, ours.steps) == (theirs.images, theirs.steps)
    for mine, other in zip(ours.nodes, theirs.nodes, strict=True):
        assert (mine.name, mine.order) == (other.name, other.order)
        for field in FIELDS:
            np.testing.assert_array_equal(mine.counts[field], other.counts[field], mine.name)


def in_own_order(events: EventCounts, node: int) -> dict[str, np.ndarray]:
    """Counts of a node that do not depend on which order is cheaper over all images."""
    found = events.nodes[node]
    if not found.orders:
        return {name: found.counts[name] for name in FIELDS}
    return {name: order.sops for name, order in found.orders.items()}


# --- which images leave ---


@settings(max_examples=10)
@given(margin=margins)
def test_an_image_leaves_at_the_first_step_at_which_it_is_sure(margin):
    result = ENGINE.run(IMAGES, margin)
    enough = np.array([sure(prefix.logits) >= margin for prefix in PREFIXES])
    enough[-1] = True
    np.testing.assert_array_equal(result.steps, enough.argmax(0) + 1)
    assert result.leaving.tolist() == np.bincount(result.steps, minlength=5)[1:].tolist()
    assert result.mean_steps == result.steps.mean()


@settings(max_examples=10)
@given(margin=margins, decay=st.floats(0.1, 1.0))
def test_a_margin_may_fall_from_step_to_step(margin, decay):
    result = ENGINE.run(IMAGES, margin, decay=decay)
    enough = np.array([sure(p.logits) >= margin * decay**t for t, p in enumerate(PREFIXES)])
    enough[-1] = True
    np.testing.assert_array_equal(result.steps, enough.argmax(0) + 1)


@settings(max_examples=10)
@given(first=margins, second=margins)
def test_a_larger_margin_never_leaves_earlier(first, second):
    small, large = sorted((first, second))
    assert (ENGINE.run(IMAGES, small).steps <= ENGINE.run(IMAGES, large).steps).all()


def test_a_difference_equal_to_the_margin_is_enough():
    margin = float(np.sort(sure(PREFIXES[0].logits))[12])
    assert ENGINE.run(IMAGES, margin).leaving[0] == 12
    assert ENGINE.run(IMAGES, np.nextafter(margin, np.inf)).leaving[0] == 11


# --- what they are charged for ---


@settings(max_examples=10)
@given(margin=margins)
def test_an_image_does_what_it_does_in_the_network_of_its_steps(margin):
    result = ENGINE.run(IMAGES, margin)
    for t, prefix in enumerate(PREFIXES, start=1):
        left = result.steps == t
        np.testing.assert_array_equal(result.logits[left], prefix.logits[left])
        np.testing.assert_array_equal(
            result.gates[:, :t, left], np.stack(list(prefix.gates.values()))[:, :, left]
        )
        assert not result.gates[:, t:, left].any()
        assert prefix.events is not None
        for node in range(len(prefix.events.nodes)):
            whole, ours = in_own_order(prefix.events, node), in_own_order(result.events, node)
            for name, counts in whole.items():
                np.testing.assert_array_equal(ours[name][left], counts[left])
    assert result.average_tokens == pytest.approx(result.gates.mean())


@pytest.mark.parametrize("margin", [np.inf, 1e9])
def test_where_no_image_is_sure_it_is_the_plain_run(margin):
    result, whole = ENGINE.run(IMAGES, margin), PREFIXES[-1]
    assert (result.steps == 4).all()
    np.testing.assert_array_equal(result.logits, whole.logits)
    np.testing.assert_array_equal(result.classes, whole.classes)
    np.testing.assert_array_equal(result.gates, np.stack(list(whole.gates.values())))
    assert result.average_tokens == pytest.approx(whole.average_tokens)
    assert whole.events is not None
    assert_same_events(result.events, whole.events)
    assert result.out_of_range == tuple(layer.node for layer in whole.out_of_range)


def test_attention_takes_the_order_that_is_cheaper_over_all_images():
    result = ENGINE.run(IMAGES, MARGIN)
    assert len(set(result.steps)) > 1
    attentions = [node for node in result.events.nodes if node.orders]
    assert attentions
    for node in attentions:
        sums = {name: int(order.sops.sum()) for name, order in node.orders.items()}
        assert sums[node.order] == min(sums.values()) == node.sum("sops")


def test_without_gates_every_token_is_processed_until_the_exit():
    model = quantize_model(outspoken(plain(CONFIG)))
    result = ExitEngine(model).run(IMAGES, MARGIN)
    assert len(set(result.steps)) > 1
    for image, steps in enumerate(result.steps):
        assert result.gates[:, :steps, image].all()
        assert not result.gates[:, steps:, image].any()
    assert result.average_tokens == pytest.approx(result.mean_steps / 4)


def test_the_stem_stops_with_the_rest():
    result, whole = ENGINE.run(IMAGES, MARGIN), PREFIXES[-1].events
    assert whole is not None
    stems = [e.group(lambda node: node.block)["stem"] for e in (result.events, whole)]
    ours, theirs = (stem.per_image("sops") for stem in stems)
    assert (ours[result.steps < 4] < theirs[result.steps < 4]).all()
    np.testing.assert_array_equal(ours[result.steps == 4], theirs[result.steps == 4])


def test_recordings_of_events_leave_too():
    config = small_config().model_copy(update={"in_channels": 2})
    still = outspoken(config)
    moving = type(still)(ModelConfig.model_validate({**config.model_dump(), "events": True,
                         "quantization": {"pixel_bits": 1}}))  # fmt: skip
    moving.load_state_dict(still.state_dict())
    model = quantize_model(moving.eval())
    frames = np.random.default_rng(3).integers(0, 2, (3, 16, 2, 12, 12), dtype=np.uint8)
    engine = ExitEngine(model)
    result = engine.run(frames, MARGIN)
    assert len(set(result.steps)) > 1
    two = run(compile_spikformer(first_steps(model, 2)), frames[:2])
    left = result.steps == 2
    np.testing.assert_array_equal(result.logits[left], two.logits[left])
    assert engine.verify(frames, MARGIN).equal
    with pytest.raises(EngineError, match=r"events over 4 time steps, but the model has 3"):
        engine.run(np.concatenate([frames, frames[:1]]), 0.15)


def test_progress_counts_the_images_that_have_left():
    told: list[tuple[int, int]] = []
    result = ENGINE.run(IMAGES, MARGIN, progress=lambda *news: told.append(news))
    assert told[-1] == (24, 24)
    assert [done for done, _ in told] == np.cumsum(result.leaving)[: len(told)].tolist()


# --- verification ---


def test_each_network_is_verified_on_the_images_still_in():
    result = ENGINE.verify(IMAGES, MARGIN)
    steps = ENGINE.run(IMAGES, MARGIN).steps
    assert result.equal
    assert (result.images, result.spikes_differing, result.first_difference) == (24, 0, None)
    per_image = [
        sum(v.size for name, v in prefix.trace.items() if name != "logits") // 24
        for prefix in PREFIXES
    ]
    assert result.spikes_compared == sum(per_image[t] * int((steps > t).sum()) for t in range(4))


def test_a_wrong_spike_is_found_and_named_by_its_image(monkeypatch):
    late = int(np.flatnonzero(ENGINE.run(IMAGES, MARGIN).steps > 1)[1])

    def broken(model: Spikformer, images: np.ndarray) -> Trace:
        trace = model_trace(model, images)
        if model.config.steps == 2:
            trace["blocks.1.fc1.neuron"][1, 1, 0, 3] ^= True
        return trace

    monkeypatch.setattr("hardware.exits.model_trace", broken)
    result = ENGINE.verify(IMAGES, MARGIN)
    assert not result.equal
    assert result.spikes_differing == 1
    assert result.first_difference is not None
    assert (result.first_difference.image, result.first_difference.t) == (late, 1)


# --- counts of several runs ---


def test_counts_are_joined_and_chosen_by_image():
    whole = PREFIXES[1].events
    assert whole is not None
    order = np.random.default_rng(1).permutation(24)
    parts = [whole.select(order[:10]), whole.select(order[10:])]
    assert_same_events(join(parts).select(np.argsort(order)), whole)
    np.testing.assert_array_equal(
        parts[0].per_image("spikes"), whole.per_image("spikes")[order[:10]]
    )


# --- refusals ---


@pytest.mark.parametrize("decay", [0.0, 1.5, float("nan")])
def test_a_decay_that_is_no_share_is_refused(decay):
    with pytest.raises(ExitError, match=rf"exit decay {decay:g}: the margin falls .* at most 1$"):
        ENGINE.run(IMAGES, 1.0, decay=decay)


@pytest.mark.parametrize("margin", [0.0, -1.0, float("nan")])
def test_a_margin_that_decides_nothing_is_refused(margin):
    with pytest.raises(ExitError) as error:
        ENGINE.run(IMAGES, margin)
    assert str(error.value) == (
        f"exit margin {margin:g}: it must be above 0, or every image would leave after one step; "
        "for that use a model of one step"
    )


def test_a_model_that_looks_ahead_is_refused():
    config = small_config(assignment="all")
    with pytest.raises(ExitError, match=r"assignment all chooses pairs from all time steps"):
        ExitEngine(quantize_model(lively(config)))


def test_images_of_another_size_are_refused():
    with pytest.raises(EngineError, match="images of size 1 x 8 x 8"):
        ENGINE.run(IMAGES[:, :, :8, :8], 1.0)
    with pytest.raises(EngineError, match="no images"):
        ENGINE.run(IMAGES[:0], 1.0)


def test_a_float_model_is_quantised():
    result = ExitEngine(outspoken(CONFIG)).run(IMAGES, MARGIN)
    np.testing.assert_array_equal(result.logits, ENGINE.run(IMAGES, MARGIN).logits)

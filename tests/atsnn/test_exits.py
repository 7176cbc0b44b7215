"""A model's first time steps are a model of their own, with the same spikes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikformers import lively, pixels, small_config

from atsnn.config import ModelConfig
from atsnn.errors import ExitError
from atsnn.exits import first_steps
from atsnn.quantization import quantize_model
from export.spikformer import model_trace

ORDERS = ("upstream", "blocks", "rectangle", "raster", "steps")


def changed(**changes: object) -> ModelConfig:
    values = small_config().model_dump(exclude_unset=True)
    return ModelConfig.model_validate({**values, **changes})


def raw_images(config: ModelConfig, count: int = 6) -> np.ndarray:
    """uint8 images, or events [T, B, ...] of 0 and 1."""
    shape = (count, config.in_channels, *config.image_size)
    rng = np.random.default_rng(1)
    if config.events:
        return rng.integers(0, 2, (config.steps, *shape), dtype=np.uint8)
    return rng.integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=12)
@given(
    order=st.sampled_from(ORDERS),
    blocks=st.sampled_from([None, (0, 2), (1,)]),
    readout=st.sampled_from(["size", "token"]),
    once=st.booleans(),
    seed=st.integers(0, 3),
)
def test_spikes_and_gates_are_those_of_the_first_steps_of_the_full_run(
    order, blocks, readout, once, seed
):
    config = changed(
        halting={"enabled": True, "order": order, "gamma": 3.0, "beta": -1.2},
        merging={"enabled": True, "count": 2, "blocks": blocks, "readout": readout},
        stem_once=once,
    )
    model = quantize_model(lively(config, seed))
    full = model_trace(model, raw_images(config))
    assert full["gates.1"].any()
    assert not full["gates.1"].all()
    for steps in (1, 2):
        trace = model_trace(first_steps(model, steps), raw_images(config))
        assert trace.keys() == full.keys()
        for name in trace.keys() - {"logits"}:
            np.testing.assert_array_equal(trace[name], full[name][:steps], err_msg=name)


def test_events_are_the_first_frames():
    config = changed(events=True, in_channels=2)
    torch.manual_seed(0)
    model = quantize_model(lively_events(config))
    frames = raw_images(config)
    full, two = model_trace(model, frames), model_trace(first_steps(model, 2), frames[:2])
    assert full["blocks.1.fc2.neuron"].any()
    for name in two.keys() - {"logits"}:
        np.testing.assert_array_equal(two[name], full[name][:2], err_msg=name)


def lively_events(config: ModelConfig):
    """`lively` of still images, which then takes events."""
    still = lively(config.model_copy(update={"events": False}))
    model = type(still)(config)
    model.load_state_dict(still.state_dict())
    return model.eval()


def test_all_steps_are_the_model_itself():
    model = lively(small_config())
    image = pixels(model.config, 3)
    assert torch.equal(first_steps(model, 3)(image).logits, model(image).logits)
    assert not torch.equal(first_steps(model, 1)(image).logits, model(image).logits)


def test_quantising_and_cutting_can_be_swapped():
    model = lively(small_config())
    images = raw_images(model.config)
    one = model_trace(quantize_model(first_steps(model, 2)), images)
    other = model_trace(first_steps(quantize_model(model), 2), images)
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_the_model_is_left_as_it_is():
    model = lively(small_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prefix = first_steps(model, 2)
    assert (prefix.config.steps, model.config.steps) == (2, 3)
    assert not prefix.training
    assert first_steps(model.train(), 1).training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for mine, theirs in zip(model.parameters(), prefix.parameters(), strict=True):
        assert mine is not theirs


@pytest.mark.parametrize("steps", [0, -1, 4])
def test_steps_that_there_are_not_are_refused(steps):
    with pytest.raises(ExitError) as error:
        first_steps(lively(small_config()), steps)
    assert str(error.value) == f"the first {steps} time steps of a model of 3: give 1 to 3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"merging": {"enabled": True, "count": 2, "assignment": "all"}},
            "merging.assignment all chooses pairs from all time steps, which an exit does not wait "
            "for; use assignment first",
        ),
        *(
            (
                {
                    "halting": {"enabled": False},
                    "merging": {"enabled": False},
                    "selection": {"method": method, "keep": [0.5, 0.5]},
                },
                f"selection.method {method} chooses tokens once for all time steps, which an exit "
                "does not wait for; use halting or merging in its place",
            )
            for method in ("sparse-spikformer", "tp-spikformer", "random")
        ),
    ],
)
def test_what_looks_ahead_is_refused(changes, message):
    with pytest.raises(ExitError) as error:
        first_steps(lively(changed(**changes)), 2)
    assert str(error.value) == message


def test_a_rule_that_is_switched_off_looks_at_nothing():
    config = changed(merging={"enabled": False, "assignment": "all"})
    assert first_steps(lively(config), 1).config.steps == 1

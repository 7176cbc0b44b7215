"""Recordings become one frame per time step, and a model takes another frame at every step."""

import numpy as np
import pytest
import torch
from event_recordings import encoded, write_listed
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from pydantic import ValidationError
from spikformers import small_config

from atsnn.augment import Augmentation
from atsnn.config import AugmentConfig, DataConfig, ModelConfig, parse
from atsnn.config import RunConfig as Run
from atsnn.data import load_dataset
from atsnn.data.loading import describe
from atsnn.data.recordings import bin_events
from atsnn.errors import ConfigError, DatasetError
from atsnn.spikformer import Spikformer

EVENTS = [(3, 5, 1, 0), (33, 0, 0, 99_999), (0, 33, 1, 200_000), (1, 1, 0, 399_999)]
MODEL = ModelConfig(
    in_channels=2, image_size=(34, 34), steps=4, blocks=1, dim=8, heads=1, events=True
)


@pytest.fixture
def listed(tmp_path) -> str:
    recordings = {"1.bs2": encoded(EVENTS), "2.bs2": encoded(EVENTS[:2]), "9.bs2": encoded(EVENTS)}
    return write_listed(
        tmp_path, recordings, "#sample #class\r\n1\t5\r\n2\t0\r\n", "#sample #class\n9 7\n"
    )


def test_each_step_takes_an_equal_part_of_the_time():
    frames = bin_events(encoded(EVENTS), 4, "test")
    assert_array_equal(
        np.argwhere(frames), [[0, 0, 0, 33], [0, 1, 5, 3], [2, 1, 33, 0], [3, 0, 1, 1]]
    )
    assert set(np.unique(frames)) == {0, 255}


@given(
    st.lists(
        st.tuples(
            st.integers(0, 33), st.integers(0, 33), st.integers(0, 1), st.integers(0, 2**23 - 1)
        ),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 9),
)
def test_no_event_is_lost_and_none_is_made(events, steps):
    frames = bin_events(encoded(events), steps, "test")
    places = {(p, y, x) for x, y, p, _ in events}
    assert {tuple(place) for place in np.argwhere(frames.max(0)).tolist()} == places
    assert 1 <= np.count_nonzero(frames) <= len(events)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are not whole events of 5 bytes"),
        (b"123456", "6 bytes are not whole events of 5 bytes"),
        (encoded([(34, 2, 0, 5)]), "column 34, row 2 lies outside of 34 x 34"),
    ],
)
def test_a_damaged_recording_is_refused(data, message):
    with pytest.raises(DatasetError, match=f"folder: 1.bs2: .*{message}"):
        bin_events(data, 4, "folder: 1.bs2")


def test_lists_name_the_recordings_and_their_classes(listed):
    dataset = load_dataset(listed, DataConfig(), MODEL)
    assert dataset.format == "nmnist"
    assert dataset.train.labels.tolist() == [5, 0]
    assert dataset.test.labels.tolist() == [7]
    batch = dataset.train.batch(torch.tensor([1, 0]))
    assert batch.shape == (2, 4, 2, 34, 34)
    assert_array_equal(batch[1].numpy(), bin_events(encoded(EVENTS), 4, ""))
    assert describe(listed)["size"] == "34 x 34"


def test_the_published_layout_is_read(tmp_path):
    for split, digit in (("Train", 3), ("Train", 1), ("Test", 2)):
        place = tmp_path / split / str(digit)
        place.mkdir(parents=True)
        (place / "00001.bin").write_bytes(encoded(EVENTS))
    dataset = load_dataset(str(tmp_path), DataConfig(), MODEL)
    assert dataset.train.labels.tolist() == [1, 3]
    assert dataset.test.labels.tolist() == [2]


def test_collapsed_time_shows_the_whole_recording_at_every_step(listed):
    kept = load_dataset(listed, DataConfig(), MODEL).train.batch(torch.arange(2))
    collapsed = load_dataset(listed, DataConfig(time="collapsed"), MODEL).train.batch(
        torch.arange(2)
    )
    assert torch.equal(collapsed, kept.amax(1, keepdim=True).expand_as(kept))
    assert not torch.equal(collapsed, kept)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("1\tx\n", r"train2.txt, line 1: '1\\tx' is not a recording's number and a class"),
        ("1 12\n", "is not a recording's number and a class 0 to 9"),
        ("7 1\n", "train2.txt lists 7.bs2, which is not there"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path, train, message):
    path = write_listed(tmp_path, {"1.bs2": encoded(EVENTS)}, train, "1 1\n")
    with pytest.raises(DatasetError, match=message):
        load_dataset(path, DataConfig(), MODEL)


def test_events_and_images_are_not_mixed_up(listed):
    images = MODEL.model_copy(update={"events": False})
    with pytest.raises(DatasetError, match="holds events, the model takes images"):
        load_dataset(listed, DataConfig(), images)
    with pytest.raises(DatasetError, match="holds images, the model takes events"):
        load_dataset("digits", DataConfig(format="digits"), MODEL)
    with pytest.raises(DatasetError, match="events are not scaled"):
        load_dataset(listed, DataConfig(resize=True), MODEL)


def test_all_steps_of_a_recording_move_together():
    events = torch.zeros(3, 4, 2, 34, 34, dtype=torch.uint8)
    events[:, :, :, 10, 20] = 255
    batch = Augmentation(AugmentConfig(shift=3, flip=True), 10, 0.1, 0)(
        events, torch.tensor([1, 2, 3]), 0, 0
    )
    assert batch.images.shape == events.shape
    assert torch.equal(batch.images, batch.images[:, :1, :1].expand_as(events))
    assert (batch.images.flatten(1).count_nonzero(1) == 8).all()
    assert not torch.equal(batch.images, events)


def test_a_model_of_events_sees_each_step():
    values = {
        **small_config().model_dump(exclude={"quantization"}),
        "events": True,
        "in_channels": 2,
    }
    config = ModelConfig.model_validate(values)
    assert config.quantization.pixel_bits == 1
    assert config.quantization.fraction_bits == 3
    torch.manual_seed(0)
    model = Spikformer(config)
    events = (torch.rand(4, 3, 2, 12, 12) < 0.3).float()
    with pytest.raises(DatasetError, match=r"\(time steps, channels, height, width\)"):
        model(events[:, 0])
    changed = events.clone()
    changed[:, 2] = 0
    before, after = model.stem.conv1.synapse(events[:, 2]), model.stem.conv1.synapse(changed[:, 2])
    assert not torch.equal(before, after)
    assert model(events).logits.shape == (4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem_once": True}, "stem_once needs an input that stands still"),
        ({"quantization": {"pixel_bits": 6}}, "pixel_bits 6: an event has 1 bit"),
    ],
)
def test_what_events_cannot_do_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({"events": True, **changes})


def test_augmentations_of_images_are_refused_for_events():
    with pytest.raises(ConfigError, match="events take shift and flip"):
        parse(Run, {"model": {"events": True}, "augment": {"mixup": 0.5}}, "test")

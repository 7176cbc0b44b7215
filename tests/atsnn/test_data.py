"""Data sets: each format as published, and each way in which one can be wrong."""

import contextlib
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import (
    cifar_rows,
    class_folder_files,
    idx_bytes,
    png,
    tiny_imagenet_files,
    write_cifar10_binary,
    write_cifar10_python,
    write_files,
    write_idx,
    write_zip,
)

from atsnn.config import DataConfig, ModelConfig
from atsnn.data import describe, detect, fingerprint, load_dataset, plain_pickle
from atsnn.errors import DatasetError

GREY = ModelConfig(in_channels=1, image_size=(8, 8), dim=8, heads=1, classes=10)
COLOUR = ModelConfig(in_channels=3, image_size=(8, 8), dim=8, heads=1, classes=10)
CIFAR = ModelConfig(dim=8, heads=1)
PLAIN = DataConfig()


def pixels(images) -> np.ndarray:
    return images.batch(torch.arange(len(images))).numpy()


# --- IDX ---


def test_idx_files_plain_and_gzipped(tmp_path):
    write_idx(tmp_path)
    dataset = load_dataset(tmp_path, PLAIN, GREY)
    assert dataset.format == detect(tmp_path) == "idx"
    assert pixels(dataset.train).shape == (6, 1, 8, 8)
    np.testing.assert_array_equal(pixels(dataset.train)[1, 0, 0], np.arange(64, 72))
    assert dataset.test.labels.tolist() == [0, 1, 2, 0]


def test_idx_labels_of_another_number_than_images(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(5)))
    with pytest.raises(DatasetError, match="6 images but 5 labels"):
        load_dataset(tmp_path, PLAIN, GREY)


def test_idx_without_images(tmp_path):
    write_idx(tmp_path, test=0)
    with pytest.raises(DatasetError, match=r"t10k-images-idx3-ubyte.gz: holds no images"):
        load_dataset(tmp_path, PLAIN, GREY)


def test_idx_with_a_missing_file_says_which_and_what_to_put(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DatasetError, match=r"t10k-labels-idx1-ubyte\(.gz\) is missing; put the"):
        load_dataset(tmp_path, PLAIN, GREY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(np.zeros((6, 8, 8)))[:-1], "promises 384 bytes, it holds 383"),
        (idx_bytes(np.zeros((6, 8, 8))) + b"x", "promises 384 bytes, it holds more"),
        (b"hello, this is text", "not an IDX file"),
        (b"\0\0\x0d\3" + bytes(12), "type 0x0d with 3 dimensions; needs type 0x08"),
        (idx_bytes(np.zeros(6)), "with 1 dimensions; needs type 0x08 .unsigned bytes. with 3"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 4), "claims 18446744073709551616 bytes"),
        (b"\0\0\x08", "not an IDX file"),
        (b"\0\0\x08\3\0\0\0", "damaged: ends after 7 bytes"),
    ],
    ids=["short", "long", "text", "floats", "labels", "huge", "stub", "torn header"],
)
def test_damaged_idx_files_are_refused_without_an_allocation(tmp_path, content, message):
    write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        load_dataset(tmp_path, PLAIN, GREY)


def test_a_truncated_gzip_is_refused(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DatasetError, match="cannot be read"):
        load_dataset(tmp_path, PLAIN, GREY)


# --- CIFAR ---


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar10_python_version(tmp_path, protocol):
    write_cifar10_python(tmp_path / "cifar-10-batches-py", protocol=protocol)
    dataset = load_dataset(tmp_path, PLAIN, CIFAR)
    assert dataset.format == "cifar10"
    assert len(dataset.train) == 20
    np.testing.assert_array_equal(
        pixels(dataset.train)[4:8], cifar_rows(4, 1).reshape(4, 3, 32, 32)
    )
    assert dataset.classes[:2] == ("class0", "class1")


def test_cifar10_python_version_as_python_2_wrote_it(tmp_path):
    """Byte strings of Python 2 have opcodes of their own: this is such a file, by hand."""
    write_cifar10_python(tmp_path)
    row = cifar_rows(1)
    raw = b"T" + struct.pack("<i", row.size) + row.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x03(cnumpy\nndarray\nq\x04K\x00\x85U\x01btRq\x05"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + raw + b"tb"
    )
    content = b"\x80\x02}q\x01(U\x06labelsq\x02]q\x07K\x05aU\x04data" + array + b"u."
    expected = pickle.loads(content, encoding="bytes")  # the test's own file: safe
    np.testing.assert_array_equal(expected[b"data"], row)
    (tmp_path / "test_batch").write_bytes(content)
    dataset = load_dataset(tmp_path, PLAIN, CIFAR)
    np.testing.assert_array_equal(pixels(dataset.test).reshape(1, -1), row)
    assert dataset.test.labels.tolist() == [5]


def test_cifar10_binary_version_holds_the_same_images(tmp_path):
    write_cifar10_python(tmp_path / "python")
    write_cifar10_binary(tmp_path / "binary")
    ours = load_dataset(tmp_path / "binary", PLAIN, CIFAR)
    theirs = load_dataset(tmp_path / "python", PLAIN, CIFAR)
    assert fingerprint(ours.train) == fingerprint(theirs.train)


def test_cifar100_takes_the_fine_labels(tmp_path):
    rows = np.concatenate([np.array([[3, 77], [4, 99]], np.uint8), cifar_rows(2)], axis=1).tobytes()
    write_files(tmp_path / "cifar-100-binary", {"train.bin": rows, "test.bin": rows})
    batch = {"fine_labels": [77, 99], "coarse_labels": [3, 4], "data": cifar_rows(2)}
    plain = pickle.dumps({k.encode(): v for k, v in batch.items()}, 2)
    write_files(tmp_path / "cifar-100-python", {"train": plain, "test": plain})
    model = CIFAR.model_copy(update={"classes": 100})
    for folder in ("cifar-100-binary", "cifar-100-python"):
        dataset = load_dataset(tmp_path / folder, PLAIN, model)
        assert (dataset.format, dataset.train.labels.tolist()) == ("cifar100", [77, 99])
        np.testing.assert_array_equal(pixels(dataset.train), cifar_rows(2).reshape(2, 3, 32, 32))


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_is_refused_and_nothing_of_it_runs(tmp_path, protocol):
    write_cifar10_python(tmp_path)
    marker = tmp_path / "was-here"
    hostile = pickle.dumps({b"data": Hostile(marker)}, protocol)
    (tmp_path / "test_batch").write_bytes(hostile)
    with pytest.raises(DatasetError, match=r"not a CIFAR batch: (refers to|holds the pickle)"):
        load_dataset(tmp_path, PLAIN, CIFAR)
    assert not marker.exists()
    pickle.loads(hostile)
    assert marker.exists(), "the file does harm where it is unpickled"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([1, 2]), "holds a list, not a dictionary"),
        (pickle.dumps({b"labels": [1]}), "needs an array data of N x 3072 bytes"),
        (pickle.dumps({b"data": np.zeros((2, 3072))}), "of another type than unsigned bytes"),
        (
            pickle.dumps({b"data": cifar_rows(2), b"labels": [1]}),
            "test_batch: 2 images but 1 labels",
        ),
        (
            pickle.dumps({b"data": cifar_rows(2), b"labels": [1, 10]}),
            "labels run from 1 to 10; cifar10 has 0 to 9",
        ),
        (pickle.dumps({b"data": cifar_rows(2), b"labels": [1, 2]})[:-2], "damaged pickle"),
        (b"", "damaged pickle"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged pickle"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "holds the pickle instruction|damaged pickle"),
    ],
    ids=[
        "list",
        "no data",
        "floats",
        "counts",
        "labels",
        "torn",
        "empty",
        "huge memo",
        "huge bytes",
    ],
)
def test_damaged_cifar_batches_are_refused(tmp_path, content, message):
    write_cifar10_python(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        load_dataset(tmp_path, PLAIN, CIFAR)


def nested_tuples(depth: int) -> bytes:
    """`{a: 0}` with a = (b, b), b = (c, c), ...: short, but its hash would take 2^depth steps."""
    return b"\x80\x02}K\x01\x85" + b"2\x86" * depth + b"K\x00s."


def test_a_pickle_that_would_take_for_ever_is_refused_at_once(tmp_path):
    write_cifar10_python(tmp_path)
    (tmp_path / "test_batch").write_bytes(nested_tuples(60))
    with pytest.raises(DatasetError, match="holds the pickle instruction DUP"):
        load_dataset(tmp_path, PLAIN, CIFAR)
    with_memo = b"\x80\x02}K\x01\x85" + b"q\x00h\x00\x86" * 60 + b"K\x00s."
    (tmp_path / "test_batch").write_bytes(with_memo)
    with pytest.raises(DatasetError, match="sets a key of type tuple"):
        load_dataset(tmp_path, PLAIN, CIFAR)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.binary()
)
PLAIN_DATA = st.dictionaries(
    st.binary() | st.text() | st.integers(-5, 2**40),
    st.recursive(LEAVES, lambda inner: st.lists(inner) | st.tuples(inner, inner), max_leaves=9),
)


@given(PLAIN_DATA, st.sampled_from([2, 3, 4, 5]))
def test_plain_data_reads_as_unpickling_would(value, protocol):
    assert plain_pickle.loads(pickle.dumps(value, protocol)) == value


@given(st.integers(0, 10**6), st.integers(1, 255), st.sampled_from([2, 4]))
def test_a_damaged_pickle_is_read_or_refused_but_nothing_else(place, change, protocol):
    labels = {b"data": np.zeros((2, 5), np.uint8), b"labels": [1, 300], b"names": [b"a", "b"]}
    damaged = bytearray(pickle.dumps(labels, protocol))
    damaged[place % len(damaged)] ^= change
    with contextlib.suppress(plain_pickle.PlainPickleError):
        assert isinstance(plain_pickle.loads(bytes(damaged)), dict)


def test_a_missing_batch_and_a_torn_binary_batch(tmp_path):
    write_cifar10_binary(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match="12291 bytes are no whole number of 3073-byte rows"):
        load_dataset(tmp_path, PLAIN, CIFAR)
    path.unlink()
    with pytest.raises(DatasetError, match=r"data_batch_3.bin is missing: unpack"):
        load_dataset(tmp_path, PLAIN, CIFAR)


# --- class folders and TinyImageNet ---


@pytest.mark.parametrize("kind", ["directory", "zip", "zip with a top folder"])
def test_class_folders(tmp_path, kind):
    files = class_folder_files()
    if kind == "directory":
        place = write_files(tmp_path / "d", files)
    else:
        place = write_zip(tmp_path / "d.zip", files, "top/" if "top" in kind else "")
    dataset = load_dataset(place, PLAIN, COLOUR)
    assert (dataset.format, dataset.classes) == ("folder", ("cat", "dog"))
    assert pixels(dataset.train)[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert dataset.train.labels.tolist() == [0, 0, 1]
    assert pixels(dataset.test)[:, 2, 7, 7].tolist() == [40, 50]


@pytest.mark.parametrize("zipped", [False, True])
def test_tiny_imagenet_in_its_own_layout(tmp_path, zipped):
    files = tiny_imagenet_files()
    if zipped:
        place = write_zip(tmp_path / "t.zip", files, "tiny-imagenet-200/")
    else:
        place = write_files(tmp_path, files)
    dataset = load_dataset(place, PLAIN, COLOUR)
    assert dataset.format == "tinyimagenet"
    assert pixels(dataset.train)[:, 0, 0, 0].tolist() == [10, 20]
    assert pixels(dataset.test)[:, 0, 0, 0].tolist() == [30, 40]
    assert dataset.test.labels.tolist() == [1, 0]


def test_grey_model_reads_colour_images_as_grey(tmp_path):
    place = write_files(tmp_path, class_folder_files())
    assert pixels(load_dataset(place, PLAIN, GREY).train).shape == (3, 1, 8, 8)


def test_images_of_another_size_are_refused_or_scaled(tmp_path):
    place = write_files(tmp_path, class_folder_files(size=9))
    with pytest.raises(DatasetError, match=r"cat/1.png is 9 x 9; the model takes 8 x 8"):
        load_dataset(place, PLAIN, COLOUR)
    scaled = load_dataset(place, DataConfig(resize=True), COLOUR)
    assert pixels(scaled.train).shape == (3, 3, 8, 8)


def test_one_damaged_image_is_named_when_it_is_used(tmp_path):
    files = {**class_folder_files(), "train/dog/1.png": png(1)[:40]}
    dataset = load_dataset(write_files(tmp_path, files), PLAIN, COLOUR)
    with pytest.raises(DatasetError, match=r"train/dog/1.png: damaged image"):
        pixels(dataset.train)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test/cat/1.png": None, "test/dog/1.png": None}, "but no test images; put them into"),
        ({"test/fox/1.png": png(1)}, "test/fox has no counterpart in train/"),
    ],
)
def test_class_folders_that_do_not_match(tmp_path, change, message):
    files = {k: v for k, v in (class_folder_files() | change).items() if v is not None}
    with pytest.raises(DatasetError, match=message):
        load_dataset(write_files(tmp_path, files), PLAIN, COLOUR)


def test_annotations_that_name_a_missing_image(tmp_path):
    files = tiny_imagenet_files()
    del files["val/images/val_1.JPEG"]
    with pytest.raises(DatasetError, match=r"line 2: no image 'val_1.JPEG' or class 'n01'"):
        load_dataset(write_files(tmp_path, files), PLAIN, COLOUR)


def test_a_damaged_zip(tmp_path):
    path = write_zip(tmp_path / "d.zip", class_folder_files())
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DatasetError, match="not a zip archive that can be read"):
        load_dataset(path, PLAIN, COLOUR)


# --- digits, and what holds for all ---


def test_digits_are_built_in_and_scaled_to_the_model():
    for place, data in (("digits", DataConfig(resize=True)), (None, DataConfig(format="digits"))):
        dataset = load_dataset(place, data, GREY)
        assert (len(dataset.train), len(dataset.test)) == (1438, 359)
        assert dataset.train.shape == (1, 8, 8)
    model = GREY.model_copy(update={"image_size": (16, 16)})
    assert load_dataset("digits", DataConfig(resize=True), model).train.shape == (1, 16, 16)


def test_a_missing_or_unknown_folder_says_what_can_be_put_there(tmp_path):
    with pytest.raises(DatasetError, match="no such data folder; put one of these there: IDX"):
        load_dataset(tmp_path / "none", PLAIN, GREY)
    with pytest.raises(DatasetError, match="holds no data set that is known here: IDX"):
        load_dataset(tmp_path, PLAIN, GREY)
    with pytest.raises(DatasetError, match="no data folder given"):
        load_dataset(None, PLAIN, GREY)
    with pytest.raises(DatasetError, match="so that it holds cifar-10-batches-py or cifar-10-"):
        load_dataset(tmp_path, DataConfig(format="cifar10"), CIFAR)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (COLOUR, "have 1 channels; the model takes 3"),
        (GREY.model_copy(update={"image_size": (8, 9)}), "are 8 x 8; the model takes 8 x 9"),
        (GREY.model_copy(update={"classes": 2}), "labels run to 2; the model has 2 classes"),
    ],
)
def test_a_data_set_that_does_not_fit_the_model(tmp_path, model, message):
    write_idx(tmp_path)
    with pytest.raises(DatasetError, match=message):
        load_dataset(tmp_path, PLAIN, model)


def test_only_the_first_images_are_used_when_asked(tmp_path):
    write_idx(tmp_path)
    dataset = load_dataset(tmp_path, DataConfig(train_images=2, test_images=99), GREY)
    assert (len(dataset.train), len(dataset.test)) == (2, 4)


class TestValidationImages:
    """Training images held out: none of them is trained on, and every run holds out the same."""

    def test_they_are_moved_from_the_training_images(self, tmp_path):
        write_idx(tmp_path)
        everything = load_dataset(tmp_path, PLAIN, GREY)
        split = load_dataset(tmp_path, DataConfig(validation_images=2), GREY)
        assert split.validation is not None
        parts = [
            images.batch(torch.arange(len(images))) for images in (split.train, split.validation)
        ]
        assert [len(part) for part in parts] == [len(everything.train) - 2, 2]
        ours = sorted(image.numpy().tobytes() for part in parts for image in part)
        all_images = everything.train.batch(torch.arange(len(everything.train)))
        assert ours == sorted(image.numpy().tobytes() for image in all_images)

    def test_they_are_the_same_in_every_run(self, tmp_path):
        write_idx(tmp_path)
        first, second = (
            load_dataset(tmp_path, DataConfig(validation_images=3), GREY) for _ in range(2)
        )
        assert first.validation is not None
        assert second.validation is not None
        assert torch.equal(
            first.validation.batch(torch.arange(3)), second.validation.batch(torch.arange(3))
        )

    def test_training_watches_them_in_place_of_the_test_images(self, tmp_path):
        write_idx(tmp_path)
        assert load_dataset(tmp_path, PLAIN, GREY).watched[0] == "test"
        name, images = load_dataset(tmp_path, DataConfig(validation_images=3), GREY).watched
        assert (name, len(images)) == ("validation", 3)

    def test_some_images_must_be_left_to_train_on(self, tmp_path):
        write_idx(tmp_path)
        with pytest.raises(DatasetError, match="leave none to train on; lower data"):
            load_dataset(tmp_path, DataConfig(validation_images=999), GREY)


def test_description_of_a_folder(tmp_path):
    place = write_files(tmp_path, class_folder_files())
    assert describe(place) == {
        "format": "folder",
        "location": str(tmp_path),
        "train_images": 3,
        "test_images": 2,
        "channels": 3,
        "size": "8 x 8",
        "classes": ["cat", "dog"],
    }


class TestHostileShapes:
    """Arrays in a pickle whose claimed shape is no tuple of sizes."""

    @staticmethod
    def array(shape):
        kind = plain_pickle._Built("numpy dtype", ("u1",))
        return plain_pickle._Built(
            "numpy.core.multiarray _reconstruct", (), (1, shape, kind, False, b"1234")
        )

    @pytest.mark.parametrize(
        "shape", [(2**40, b"a"), (-1,), ((2,), 2), [4], (1,) * 5, (True, 4), "4", (3,)]
    )
    def test_are_refused(self, shape):
        with pytest.raises(plain_pickle.PlainPickleError, match="holds an array"):
            plain_pickle._array(self.array(shape))

    def test_a_plain_shape_is_read(self):
        assert plain_pickle._array(self.array((2, 2))).shape == (2, 2)


def test_images_without_sides_are_damaged(tmp_path):
    write_idx(tmp_path)
    header = struct.pack(">HBB3I", 0, 8, 3, 6, 0, 0)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header)
    with pytest.raises(DatasetError, match=r"promises images of \[0, 0\]"):
        load_dataset(tmp_path, DataConfig(resize=True), GREY)

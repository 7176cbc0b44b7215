"""Class folders, in a directory or a zip: `train/<class>/*.jpg` and `test/<class>/*.jpg`.

TinyImageNet's own layout is read too: `train/<wnid>/images/*.JPEG`, `val/images/*.JPEG` with
`val/val_annotations.txt` (its `test` folder has no labels and is left alone).
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from atsnn.data.images import Dataset, DecodedImages
from atsnn.errors import DatasetError

SCALES = "data.resize: true, or `atsnn eval --resize`, scales images"
"""How images of another size get the model's."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp")
TEST_FOLDERS = ("test", "val", "validation", "valid")
LARGEST_FILE = 64 * 2**20
LARGEST_IMAGE = 2**26
"""Pixels in one image; a header that claims more is refused before anything is decoded."""
ANNOTATIONS = "val/val_annotations.txt"


class Files(Protocol):
    """Named files of a directory or an archive; names are relative and use slashes."""

    location: str

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...


class DirectoryFiles:
    """Files below a directory."""

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._folder = folder

    def names(self) -> list[str]:
        paths = (p.relative_to(self._folder).as_posix() for p in self._folder.rglob("*.*"))
        return sorted(paths)

    def read(self, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise DatasetError(f"{self._folder / name}: cannot be read ({error})") from None


class ZipFiles:
    """Files in a zip archive; one folder that holds everything is left out of the names."""

    def __init__(self, path: Path) -> None:
        self.location = str(path)
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DatasetError(f"{path}: not a zip archive that can be read ({error})") from None
        infos = [info for info in self._archive.infolist() if not info.is_dir()]
        top = _common_top([info.filename for info in infos])
        self._members = {info.filename.removeprefix(top): info for info in infos}

    def names(self) -> list[str]:
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        info = self._members[name]
        if info.file_size > LARGEST_FILE:
            raise DatasetError(
                f"{self.location}: {name} claims {info.file_size} bytes, more than {LARGEST_FILE}"
            )
        try:
            return self._archive.read(info)
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
            raise DatasetError(f"{self.location}: {name} cannot be read ({error})") from None
        except Exception as error:  # zlib.error and lzma.LZMAError, by the member's compression
            raise DatasetError(f"{self.location}: {name} is damaged ({error})") from None


def _common_top(names: list[str]) -> str:
    tops = {name.split("/", 1)[0] for name in names}
    inner = all("/" in name for name in names)
    splits = {"train", *TEST_FOLDERS}
    return f"{tops.pop()}/" if inner and len(tops) == 1 and not tops & splits else ""


def open_files(path: Path) -> Files:
    """A directory or a zip archive as `Files`."""
    return ZipFiles(path) if path.is_file() else DirectoryFiles(path)


def layout(names: list[str]) -> str | None:
    """`tinyimagenet` or `folder` if the names look like one of them."""
    if ANNOTATIONS in names:
        return "tinyimagenet"
    return "folder" if any(_is_image(n) and n.startswith("train/") for n in names) else None


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


@dataclass(frozen=True)
class _Labelled:
    names: list[str]
    labels: list[int]


def load(path: Path, format: str, shape: tuple[int, int, int], resize: bool) -> Dataset:
    """Find the images of a directory or a zip; they are decoded when they are first used.

    Args:
        shape: channels (1: grey, 3: colour), height and width that the model takes.
        resize: scale images of another size instead of refusing them.
    """
    if shape[0] not in (1, 3):
        raise DatasetError(f"{path}: image files have 1 or 3 channels; the model takes {shape[0]}")
    files = open_files(path)
    names = [name for name in files.names() if _is_image(name) or name == ANNOTATIONS]
    classes = sorted({PurePosixPath(n).parts[1] for n in names if _has_class(n, "train")})
    if not classes:
        raise DatasetError(_what_to_put(path))
    train = _class_folders(names, "train", classes, path)
    if format == "tinyimagenet":
        test = _annotated(files, names, classes)
    else:
        test = _class_folders(names, _test_folder(names, path), classes, path)
    train_images, test_images = (_decoded(files, part, shape, resize) for part in (train, test))
    return Dataset(format, files.location, train_images, test_images, tuple(classes))


def first_shape(path: Path) -> tuple[int, int, int]:
    """Channels, height and width of the first training image (others are read on use)."""
    files = open_files(path)
    name = next((n for n in files.names() if _has_class(n, "train")), None)
    if name is None:
        raise DatasetError(_what_to_put(path))
    try:
        with Image.open(io.BytesIO(files.read(name))) as image:
            return 1 if image.mode == "L" else 3, image.height, image.width
    except DatasetError:
        raise
    except Exception as error:  # whatever the decoder of the format raises
        raise DatasetError(f"{files.location}: {name}: damaged image ({error})") from None


def _has_class(name: str, split: str) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) >= 3 and parts[0] == split and _is_image(name)


def _what_to_put(path: Path) -> str:
    return (
        f"{path}: no class folders there; put images into train/<class>/ and test/<class>/ "
        f"({', '.join(SUFFIXES)})"
    )


def _test_folder(names: list[str], path: Path) -> str:
    for split in TEST_FOLDERS:
        if any(_has_class(name, split) for name in names):
            return split
    raise DatasetError(
        f"{path}: has train/<class>/ but no test images; put them into test/<class>/"
    )


def _class_folders(names: list[str], split: str, classes: list[str], path: Path) -> _Labelled:
    number = {name: label for label, name in enumerate(classes)}
    chosen = [name for name in names if _has_class(name, split)]
    folders = [PurePosixPath(name).parts[1] for name in chosen]
    unknown = sorted(set(folders) - set(classes))
    if unknown:
        raise DatasetError(f"{path}: {split}/{unknown[0]} has no counterpart in train/")
    if not chosen:
        raise DatasetError(_what_to_put(path))
    return _Labelled(chosen, [number[folder] for folder in folders])


def _annotated(files: Files, names: list[str], classes: list[str]) -> _Labelled:
    number = {name: label for label, name in enumerate(classes)}
    present = set(names)
    chosen, labels = [], []
    for row, line in enumerate(files.read(ANNOTATIONS).decode("utf-8", "replace").splitlines(), 1):
        image, _, rest = line.partition("\t")
        wnid = rest.split("\t", 1)[0]
        if wnid not in number or f"val/images/{image}" not in present:
            raise DatasetError(
                f"{files.location}: {ANNOTATIONS}, line {row}: no image {image!r} or class {wnid!r}"
            )
        chosen.append(f"val/images/{image}")
        labels.append(number[wnid])
    if not chosen:
        raise DatasetError(f"{files.location}: {ANNOTATIONS} lists no images")
    return _Labelled(chosen, labels)


def _decoded(
    files: Files, part: _Labelled, shape: tuple[int, int, int], resize: bool
) -> DecodedImages:
    def decode(index: int) -> np.ndarray:
        name = part.names[index]
        return decode_image(files.read(name), f"{files.location}: {name}", shape, resize)

    decode(0)  # an image of the wrong size should be noticed now, not in the middle of a run
    return DecodedImages(decode, torch.tensor(part.labels, dtype=torch.int64), shape)


def decode_image(data: bytes, origin: str, shape: tuple[int, int, int], resize: bool) -> np.ndarray:
    """Decode one image file to uint8 [C, H, W].

    Raises:
        DatasetError: damaged, too large, or of another size without `resize`.
    """
    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise DatasetError(f"{origin}: {image.width} x {image.height} pixels are too many")
            if image.size != (width, height) and not resize:
                raise DatasetError(
                    f"{origin} is {image.height} x {image.width}; the model takes {height} x "
                    f"{width} ({SCALES})"
                )
            converted = image.convert("L" if channels == 1 else "RGB")
            if converted.size != (width, height):
                converted = converted.resize((width, height), Image.Resampling.BILINEAR)
    except DatasetError:
        raise
    except Exception as error:  # whatever the decoder of the format raises
        raise DatasetError(f"{origin}: damaged image ({error})") from None
    pixels = np.asarray(converted, np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

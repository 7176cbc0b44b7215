"""Recordings of event cameras in N-MNIST's format, binned into one frame per time step.

An event is five bytes: column, row, then a bit of polarity and 23 bits of microseconds (Orchard et
al. 2015). Two layouts are read, in a directory or a zip: as published (`Train/<digit>/*.bin` and
`Test/<digit>/*.bin`), and numbered recordings beside two lists `train*.txt` and `test*.txt`, whose
lines hold a number and a class (`<number>.bs2`).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from atsnn.data.folders import Files, open_files
from atsnn.data.images import Dataset, ImageSet, stored
from atsnn.errors import DatasetError

SIZE = 34
"""Rows and columns of N-MNIST's sensor window."""
POLARITIES = 2
EVENT_BYTES = 5
SEEN = 255
"""Value of a pixel in which an event fell."""
_PUBLISHED = re.compile(r"^(Train|Test)/(\d)/[^/]+\.bin$")
_LIST = re.compile(r"^(train|test)[^/]*\.txt$")


def layout(names: list[str]) -> str | None:
    """`nmnist` if the names look like it."""
    listed = any(_LIST.match(n) for n in names) and any(n.endswith(".bs2") for n in names)
    return "nmnist" if listed or any(_PUBLISHED.match(n) for n in names) else None


def load(path: Path, steps: int, collapsed: bool) -> Dataset:
    """Read all recordings.

    Args:
        steps: frames T per recording; each takes an equal part of the time up to its last event.
        collapsed: every frame holds the events of the whole recording instead.

    Raises:
        DatasetError: a missing or damaged recording or list; names the file.
    """
    files = open_files(path)
    named = _published(files) or _listed(files)
    splits = {split: _frames(files, named[split], steps, collapsed) for split in ("train", "test")}
    names = tuple(str(digit) for digit in range(10))
    return Dataset("nmnist", files.location, splits["train"], splits["test"], names)


def _published(files: Files) -> dict[str, list[tuple[str, int]]] | None:
    found: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for name in files.names():
        match = _PUBLISHED.match(name)
        if match:
            found[match[1].lower()].append((name, int(match[2])))
    return found if any(found.values()) else None


def _listed(files: Files) -> dict[str, list[tuple[str, int]]]:
    names = files.names()
    found: dict[str, list[tuple[str, int]]] = {}
    for split in ("train", "test"):
        lists = [n for n in names if (match := _LIST.match(n)) and match[1] == split]
        if len(lists) != 1:
            raise DatasetError(
                f"{files.location}: {len(lists)} lists {split}*.txt of recordings; it needs one"
            )
        found[split] = _entries(files, lists[0], set(names))
    return found


def _entries(files: Files, name: str, known: set[str]) -> list[tuple[str, int]]:
    entries = []
    for number, line in enumerate(files.read(name).decode("ascii", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split()
        if len(words) != 2 or not all(word.isdecimal() for word in words) or len(words[1]) > 1:
            raise DatasetError(
                f"{files.location}: {name}, line {number}: {line[:40]!r} is not a recording's "
                "number and a class 0 to 9"
            )
        recording = f"{words[0]}.bs2"
        if recording not in known:
            raise DatasetError(f"{files.location}: {name} lists {recording}, which is not there")
        entries.append((recording, int(words[1])))
    return entries


def _frames(files: Files, entries: list[tuple[str, int]], steps: int, collapsed: bool) -> ImageSet:
    frames = np.zeros((len(entries), steps, POLARITIES, SIZE, SIZE), np.uint8)
    for frame, (name, _) in zip(frames, entries, strict=True):
        frame[:] = bin_events(files.read(name), steps, f"{files.location}: {name}")
        if collapsed:
            frame[:] = frame.max(axis=0)
    return stored(frames, [label for _, label in entries], files.location)


def steps_first(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Frames as they are stored, [B, T, C, H, W] of 0 and 255 -> events of 0 and 1, [T, B, ...]."""
    return np.ascontiguousarray(np.swapaxes(frames, 0, 1) > 0).astype(np.uint8)


def bin_events(data: bytes, steps: int, origin: str) -> npt.NDArray[np.uint8]:
    """Frames [T, 2, 34, 34] of one recording, 255 where at least one event fell.

    Raises:
        DatasetError: not whole events, none, or outside of the sensor's window.
    """
    if not data or len(data) % EVENT_BYTES:
        raise DatasetError(
            f"{origin}: {len(data)} bytes are not whole events of {EVENT_BYTES} bytes each"
        )
    events = np.frombuffer(data, np.uint8).reshape(-1, EVENT_BYTES).astype(np.int64)
    column, row, polarity = events[:, 0], events[:, 1], events[:, 2] >> 7
    time = ((events[:, 2] & 127) << 16) | (events[:, 3] << 8) | events[:, 4]
    if max(column.max(), row.max()) >= SIZE:
        raise DatasetError(
            f"{origin}: an event at column {column.max()}, row {row.max()} lies outside of "
            f"{SIZE} x {SIZE}"
        )
    step = time * steps // (time.max() + 1)
    frames = np.zeros((steps, POLARITIES, SIZE, SIZE), np.uint8)
    frames[step, polarity, row, column] = SEEN
    return frames

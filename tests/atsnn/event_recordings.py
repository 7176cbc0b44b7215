"""Small N-MNIST archives for tests."""

import zipfile
from pathlib import Path


def encoded(events: list[tuple[int, int, int, int]]) -> bytes:
    """Events (column, row, polarity, microseconds) in N-MNIST's five bytes."""
    return b"".join(bytes([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255]) for x, y, p, t in events)


def write_listed(folder: Path, recordings: dict[str, bytes], train: str, test: str) -> str:
    """A zip with recordings by name and the two lists of their numbers and classes."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "small.zip", "w") as archive:
        archive.writestr("top/train2.txt", train)
        archive.writestr("top/test1.txt", test)
        for name, data in recordings.items():
            archive.writestr(f"top/{name}", data)
    return str(folder / "small.zip")

"""Answers kept under their question's digest, in a file that several processes may use at once.

What a run computes from images and fixed weights alone is the same for every run that is shown the
same images: the cells of a sweep with one seed. It is computed once, and asking again is cheap.
"""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WAIT_FOR_OTHERS = 60.0
"""Seconds in which another process has to finish writing an answer."""


class Answers:
    """Bytes by key.

    Args:
        path: of the file; what is written to it is there whole or not at all. None, or a file that
            cannot be used (which is said once): nothing is kept.
        whose: whose answers they are, for that message.
    """

    def __init__(self, path: Path | None, whose: str) -> None:
        self.path = path
        self.whose = whose

    def remembered(self, key: bytes, compute: Callable[[], bytes]) -> bytes:
        """The answer under `key`; computed, and kept, where there is none."""
        if self.path is None:
            return compute()
        try:
            known = self._find(self.path, key)
        except (sqlite3.Error, OSError) as error:
            return self._unkept(compute(), error)
        if known is not None:
            return known
        value = compute()
        try:
            self._keep(self.path, key, value)
        except (sqlite3.Error, OSError) as error:
            return self._unkept(value, error)
        return value

    def _find(self, path: Path, key: bytes) -> bytes | None:
        with _table(path) as table:
            row = table.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def _keep(self, path: Path, key: bytes, value: bytes) -> None:
        with _table(path) as table:
            table.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, value))

    def _unkept(self, value: bytes, error: Exception) -> bytes:
        warnings.warn(
            f"{self.path}: the answers of {self.whose} are not kept ({error}), which costs a "
            "forward pass for each batch; delete the file",
            stacklevel=3,
        )
        self.path = None
        return value


@contextmanager
def _table(path: Path) -> Iterator[sqlite3.Connection]:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=WAIT_FOR_OTHERS)
    try:
        with connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, value BLOB)"
            )
            yield connection
    finally:
        connection.close()

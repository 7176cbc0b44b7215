"""Files of a sweep, whole or not at all, and what is said if they cannot be read or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atsnn.errors import ConfigError
from atsnn.files import write_atomically


def write_file(path: Path, content: bytes) -> None:
    """Write a file, and the folders it lies in.

    Raises:
        ConfigError: the file system does not let it.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror or error}); choose another place"
        ) from None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """`write_file` of JSON."""
    write_file(path, json.dumps(values, indent=1).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file says; None if it is not there.

    Raises:
        ConfigError: damaged, or the file system does not let it be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({error}); remove it and run the sweep again") from None

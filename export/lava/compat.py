"""The one way to Lava: says clearly when it is missing, and makes it load where it would not.

* Lava sets the start method of `multiprocessing` on import, and raises if anything has asked for
  that method before; here it may.
* Lava 0.10.0 declares Python 3.10 only. On 3.11 and 3.12 one dataclass default is all that stops it
  (`lava/magma/compiler/var_model.py`: a mutable default, refused since 3.11: it has no hash).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import multiprocessing
import sys
from typing import Any

from export.errors import LavaUnavailableError

NEWEST_PYTHON = (3, 12)
_NEEDED = ("lava", "scipy", "networkx", "asteval")


def check_lava() -> None:
    """See whether Lava can be there, without importing it.

    Raises:
        LavaUnavailableError: this Python is too new for Lava, or a package is missing.
    """
    version = "{}.{}".format(*sys.version_info[:2])
    if sys.version_info[:2] > NEWEST_PYTHON:
        raise LavaUnavailableError(
            f"Lava does not run on Python {version}, only on 3.10, 3.11 and 3.12: "
            "make PYTHON=python3.10 installs the project with Lava"
        )
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        way = (
            "pip install 'atsnn[lava]'"
            if sys.version_info[:2] == (3, 10)
            else "make install (Lava declares Python 3.10 only, the Makefile knows the way round)"
        )
        raise LavaUnavailableError(
            f"Lava is not installed for Python {version} ({', '.join(missing)} missing): "
            f"{way}, or make PYTHON=python3.10"
        )


def require_lava() -> None:
    """Import Lava, so that `import lava...` works from here on.

    Raises:
        LavaUnavailableError: Lava cannot be imported; says what is missing and how to get it.
    """
    check_lava()
    try:
        if sys.version_info >= (3, 11):
            _import_with_hashable_defaults("lava.magma.compiler.var_model")
        _import_after_others("lava.magma.runtime.message_infrastructure.multiprocessing")
        importlib.import_module("lava.magma.core.process.process")
    except ImportError as error:
        version = "{}.{}".format(*sys.version_info[:2])
        raise LavaUnavailableError(
            f"Lava is installed for Python {version} but does not import ({error}): "
            "make clean install, or make PYTHON=python3.10"
        ) from error


def _import_after_others(module: str) -> None:
    original = multiprocessing.set_start_method

    def set_start_method(method: str | None, force: bool = True) -> None:
        original(method, force)

    multiprocessing.set_start_method = set_start_method
    try:
        importlib.import_module(module)
    finally:
        multiprocessing.set_start_method = original


def _import_with_hashable_defaults(module: str) -> None:
    original = dataclasses.dataclass

    def hashable(cls: Any = None, /, **options: Any) -> Any:
        if cls is None:
            return lambda c: hashable(c, **options)
        if cls.__module__.startswith("lava."):
            options.setdefault("unsafe_hash", True)
        return original(cls, **options)

    dataclasses.dataclass = hashable
    try:
        importlib.import_module(module)
    finally:
        dataclasses.dataclass = original

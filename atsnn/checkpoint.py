"""Checkpoints: one safetensors file, with configuration and notes as JSON in its header.

No pickle. A file is written beside its place and renamed, and carries a digest of everything in it,
so that a damaged one is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atsnn.config import ModelConfig, differences, parse
from atsnn.errors import CheckpointError, ConfigError
from atsnn.files import write_atomically

if TYPE_CHECKING:
    from atsnn.spikformer import Spikformer

MODEL_FILE = "model.safetensors"
_GRAPH = b"ATSNN GRAPH"
"""How files of `export.formats.hdf5` begin."""
VERSION = 1
_MODEL = "atsnn-model"


@dataclass(frozen=True)
class Checkpoint:
    """A model file as read: configuration, weights, and what the writer noted about it."""

    path: Path
    config: ModelConfig
    quantized: bool
    tensors: dict[str, Tensor]
    extra: dict[str, Any]


def save_checkpoint(
    path: Path, model: Spikformer, config: ModelConfig, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write a model's weights and configuration; returns the file (`path`, or one in the folder).

    Args:
        path: a `.safetensors` file, or a folder that gets `model.safetensors`.
        extra: notes in JSON types, such as how the model was trained.

    Raises:
        CheckpointError: the disk is full or not writable; the old file is left as it was.
    """
    path = _file(path)
    header = {"model": config.model_dump(mode="json"), "quantized": model.quantized}
    write_tensors(path, _MODEL, {**header, "extra": dict(extra or {})}, model.state_dict())
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a model file (or `model.safetensors` in a folder).

    Raises:
        CheckpointError: missing, damaged, or of another version.
    """
    path = _file(path)
    header, tensors = read_tensors(path, _MODEL)
    try:
        config = parse(ModelConfig, header["model"], str(path))
        return Checkpoint(path, config, bool(header["quantized"]), tensors, header["extra"])
    except (KeyError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: its configuration does not fit this version: {error}"
        ) from None


def load_model(path: Path, expected: ModelConfig | None = None) -> Spikformer:
    """The model of a checkpoint, in evaluation mode.

    Args:
        expected: configuration that the model must have.

    Raises:
        CheckpointError: missing, damaged, or of another configuration (names both values).
    """
    checkpoint = read_checkpoint(path)
    if expected is not None:
        require_same(checkpoint, expected)
    return model_of(checkpoint)


def require_same(checkpoint: Checkpoint, expected: ModelConfig) -> None:
    """`CheckpointError` that lists each difference between the checkpoint and `expected`."""
    found = differences(checkpoint.config, expected)
    if found:
        raise CheckpointError(f"{checkpoint.path} is of another configuration: {'; '.join(found)}")


def model_of(checkpoint: Checkpoint) -> Spikformer:
    """Build the model that a checkpoint holds."""
    from atsnn.spikformer import build_model  # its module imports torch.nn, norse and the rest

    model = build_model(checkpoint.config, checkpoint.quantized)
    load_tensors(model, checkpoint.tensors, str(checkpoint.path))
    return model.eval()


def load_tensors(model: torch.nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy weights into a model; every name and shape must agree.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown or of another shape.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors:
            raise CheckpointError(f"{origin}: lacks {name}, which its configuration needs")
        if name not in own:
            raise CheckpointError(f"{origin}: holds {name}, which its configuration does not know")
        if own[name].shape != tensors[name].shape:
            raise CheckpointError(
                f"{origin}: {name} has shape {list(tensors[name].shape)}; "
                f"its configuration needs {list(own[name].shape)}"
            )
    model.load_state_dict(dict(tensors))


def write_tensors(
    path: Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors and a JSON header as one safetensors file.

    Raises:
        CheckpointError: the disk is full or not writable; the old file is left as it was.
    """
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps({"kind": kind, "version": VERSION, **header}, sort_keys=True)
    data = safetensors.torch.save(held, {"atsnn": text, "digest": _digest(text, held)})
    try:
        write_atomically(path, data)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); "
            f"{'the old file is untouched' if path.exists() else 'nothing was left behind'}"
        ) from None


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file of `write_tensors`.

    Raises:
        CheckpointError: missing, damaged, of another kind or a newer version.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no iterator)
        header = json.loads(metadata["atsnn"])
        intact = metadata["digest"] == _digest(metadata["atsnn"], tensors)
    except KeyError:
        raise CheckpointError(f"{path}: a safetensors file, but not written by atsnn") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {_what_is_wrong(path, error)}") from None
    if not intact or not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged: its contents do not match its digest")
    if header.get("kind") != kind:
        raise CheckpointError(f"{path}: holds {header.get('kind')}, not {kind}")
    if header.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version {header.get('version')}; this atsnn reads version {VERSION}"
        )
    return header, tensors


def _what_is_wrong(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as stream:
            begin = stream.read(len(_GRAPH))
    except OSError:
        begin = b""
    if begin == _GRAPH:
        return "a graph file, no checkpoint: run it with `atsnn-export`, named *.h5"
    return f"damaged, or no safetensors file ({error})"


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file(path: Path) -> Path:
    path = Path(path)
    return path / MODEL_FILE if path.is_dir() or not path.suffix else path

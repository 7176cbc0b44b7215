"""A graph as an HDF5 file: one text of structure, one contiguous data set per array, one digest.

Layout (format 1), described for other readers in `docs/graph_format.md`:

* bytes 0 ... 511, the HDF5 user block: magic, format number, length and SHA-256 of what follows.
  It is checked before HDF5 sees a byte, so that a truncated or altered file never loads.
* root attributes `format` and `version`;
* data set `structure`: UTF-8 JSON as uint8 [bytes], all nodes and edges without their arrays;
* group `arrays`: one contiguous, uncompressed data set `<node index>.<field>` per array.

Nothing is pickled. Loading allocates no more than the file is long.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from atsnn.files import write_atomically
from export.errors import GraphError, GraphFormatError
from export.formats._structure import Arrays, graph_from_structure, graph_to_structure
from export.graph import Graph
from export.validation import validate

FORMAT = b"atsnn graph"
VERSION = 1
USER_BLOCK = 512
MAX_FILE = 2**31
MAX_DIMENSIONS = 4
_MAGIC = b"ATSNN GRAPH\r\n\x1a\n\x00"
_HEADER = struct.Struct("<16sIQ32s")
_PIECE = 2**20
_DTYPES = frozenset({"int16", "int32", "int64", "uint8", "float32", "float64"})


def save(graph: Graph, path: str | os.PathLike[str]) -> Path:
    """Write a valid graph to `path`, whole or not at all: an older file there stays until the end.

    Raises:
        GraphError: the graph is not valid.
        GraphFormatError: the file cannot be written (not permitted, disk full).
    """
    target = Path(path)
    content = encode(validate(graph))
    try:
        write_atomically(target, content)
    except OSError as error:
        raise GraphFormatError(
            f"{target}: cannot write {len(content)} bytes ({error.strerror or error}); "
            "the file that was there before is unchanged; free some space or choose another place"
        ) from error
    return target


def load(path: str | os.PathLike[str]) -> Graph:
    """Read and validate a graph.

    Raises:
        GraphFormatError: no such file, truncated, altered, hostile, or of another version.
    """
    source = Path(path)
    try:
        size = source.stat().st_size
        if size > MAX_FILE:
            raise GraphFormatError(f"{source}: {size} bytes, at most {MAX_FILE} are read")
        with source.open("rb") as stream:
            return _decode(stream, size, str(source))
    except OSError as error:
        raise GraphFormatError(f"{source}: cannot be read ({error.strerror or error})") from error


def encode(graph: Graph) -> bytes:
    """The whole file of a graph, as bytes."""
    structure, arrays = graph_to_structure(graph)
    payload = _encode_payload(structure, arrays)
    digest = hashlib.sha256(payload).digest()
    header = _HEADER.pack(_MAGIC, VERSION, len(payload), digest)
    return header.ljust(USER_BLOCK, b"\0") + payload


def decode(content: bytes, name: str = "graph file") -> Graph:
    """Read a graph from the bytes of its file; `name` begins every message.

    Raises:
        GraphFormatError: see `load`.
    """
    return _decode(io.BytesIO(content), len(content), name)


def _decode(stream: BinaryIO, size: int, name: str) -> Graph:
    """Read a file of `size` bytes piece by piece, so that only the graph itself is in memory."""
    _check_content(stream, size, name)
    try:
        with h5py.File(stream, "r") as file:
            structure, arrays = _decode_payload(file, size, name)
            graph = graph_from_structure(structure, arrays, name)
    except GraphFormatError:
        raise
    except Exception as error:  # h5py and json raise whatever a hostile file makes them raise
        detail = f"{type(error).__name__}: {error}".splitlines()[0]
        raise GraphFormatError(f"{name}: not a readable graph file ({detail})") from error
    try:
        return validate(graph)
    except GraphError as error:
        raise GraphFormatError(f"{name}: holds an invalid graph: {error}") from error


def content_digest(graph: Graph) -> str:
    """SHA-256 of all that a graph holds, in hexadecimal: equal digests mean equal graphs."""
    structure, arrays = graph_to_structure(graph)
    digest = hashlib.sha256(_dump(structure, sort_keys=True))
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key}:{array.dtype.str}:{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def identical(first: Graph, second: Graph) -> bool:
    """True if two graphs hold the same nodes, edges and numbers, to the bit."""
    return content_digest(first) == content_digest(second)


# --- writing ---


def _dump(structure: dict[str, Any], sort_keys: bool = False) -> bytes:
    text = json.dumps(structure, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys)
    return text.encode()


def _encode_payload(structure: dict[str, Any], arrays: Arrays) -> bytes:
    with h5py.File("graph", "w", driver="core", backing_store=False) as file:
        file.attrs["format"] = np.bytes_(FORMAT)
        file.attrs["version"] = np.int64(VERSION)
        file.create_dataset("structure", data=np.frombuffer(_dump(structure), np.uint8))
        group = file.create_group("arrays")
        for key, array in arrays.items():
            group.create_dataset(key, data=np.ascontiguousarray(array))
        file.flush()
        return file.id.get_file_image()


# --- reading ---


def _check_content(stream: BinaryIO, size: int, name: str) -> None:
    if size < USER_BLOCK:
        raise GraphFormatError(
            f"{name}: {size} bytes are too few for a graph file (its header alone has "
            f"{USER_BLOCK}); the file is truncated or no graph file"
        )
    header = stream.read(USER_BLOCK)
    magic, version, length, digest = _HEADER.unpack_from(header)
    if magic != _MAGIC:
        raise GraphFormatError(
            f"{name}: does not begin as a graph file; write one with `atsnn-export graph`"
        )
    if version != VERSION:
        raise GraphFormatError(
            f"{name}: is of format version {version}, this program reads version {VERSION}; "
            "write it again with this program"
        )
    if any(header[_HEADER.size :]):
        raise GraphFormatError(f"{name}: its header is damaged; get the file again")
    if size - USER_BLOCK != length:
        raise GraphFormatError(
            f"{name}: holds {size - USER_BLOCK} bytes behind its header, which announces {length}; "
            "the file is truncated or overwritten, get it again"
        )
    found = hashlib.sha256()
    while piece := stream.read(_PIECE):
        found.update(piece)
    if found.digest() != digest:
        raise GraphFormatError(
            f"{name}: its content does not have the SHA-256 {digest.hex()[:12]}... that its header "
            "announces; the file is damaged, get it again"
        )
    stream.seek(0)


def _decode_payload(file: h5py.File, size: int, name: str) -> tuple[dict[str, Any], Arrays]:
    _expect(set(file.attrs) == {"format", "version"}, name, "its root attributes are not ours")
    _expect_attribute(file, "format", "S", name)
    _expect_attribute(file, "version", "i", name)
    version = file.attrs["version"]
    _expect(file.attrs["format"] == np.bytes_(FORMAT), name, "its format attribute is not ours")
    _expect(version == VERSION, name, f"its version attribute is {version}, not {VERSION}")
    _expect(set(file) == {"structure", "arrays"}, name, "its root does not hold what it should")
    text = _read(file, "structure", size, name)
    _expect(text.dtype == np.uint8 and text.ndim == 1, name, "structure is not a text")
    _expect(_is_hard(file, "arrays"), name, "arrays is a link to elsewhere")
    group = file["arrays"]
    if not isinstance(group, h5py.Group):
        raise GraphFormatError(f"{name}: arrays is not a group")
    remaining = size
    arrays: Arrays = {}
    for key in map(str, group):
        arrays[key] = _read(group, key, remaining, name)
        remaining -= arrays[key].nbytes
    structure = json.loads(text.tobytes().decode(), parse_constant=_refuse_constant)
    _expect(isinstance(structure, dict), name, "structure is not an object")
    return structure, arrays


def _refuse_constant(word: str) -> None:
    raise GraphFormatError(f"structure holds the number {word}")


def _expect(condition: bool, name: str, problem: str) -> None:
    if not condition:
        raise GraphFormatError(f"{name}: {problem}; it was not written by this program")


def _expect_attribute(file: h5py.File, label: str, kind: str, name: str) -> None:
    attribute = file.attrs.get_id(label)
    fits = attribute.shape == () and attribute.dtype.kind == kind and attribute.dtype.itemsize <= 64
    _expect(fits, name, f"attribute {label} has another type")


def _is_hard(group: h5py.Group, key: str) -> bool:
    return isinstance(group.get(key, getlink=True), h5py.HardLink)


def _read(group: h5py.Group, key: str, limit: int, name: str) -> np.ndarray:
    """Read one data set of at most `limit` bytes after checking that it is what we write."""
    _expect(_is_hard(group, key), name, f"{key} is a link to elsewhere")
    dataset = group[key]
    if not isinstance(dataset, h5py.Dataset):
        raise GraphFormatError(f"{name}: {key} is not a data set")
    dtype = dataset.dtype
    _expect(
        dtype.name in _DTYPES and dtype.isnative and dtype.subdtype is None,
        name,
        f"{key} has type {dtype}",
    )
    shape: tuple[int, ...] | None = dataset.shape
    if shape is None or len(shape) > MAX_DIMENSIONS:
        raise GraphFormatError(f"{name}: {key} has shape {shape}, at most 4 axes are read")
    wanted = dtype.itemsize
    for length in shape:
        wanted *= int(length)
    if wanted > limit:
        raise GraphFormatError(
            f"{name}: {key} claims shape {list(shape)}, {wanted} bytes, and the file has room for "
            f"{limit}; it is damaged or hostile, get it again"
        )
    plist = dataset.id.get_create_plist()
    _expect(
        plist.get_layout() == h5py.h5d.CONTIGUOUS
        and plist.get_nfilters() == 0
        and plist.get_external_count() == 0
        and (wanted == 0 or dataset.id.get_storage_size() == wanted),
        name,
        f"{key} is chunked, filtered, external or incomplete",
    )
    return dataset[()]

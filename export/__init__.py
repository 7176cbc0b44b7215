"""Torch models as graphs: captured, quantised, scheduled, and written for other tools.

Names are imported when they are first used, so that what needs no torch does not import it.
`capture` is in the module of its name: `from export.capture import capture`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.built_in import load_images, load_subject
    from export.converters import Call, Value, register_converter, register_function
    from export.formats.hdf5 import load, save
    from export.formats.netx import save_netx
    from export.formats.onnx import save_onnx, to_onnx
    from export.graph import Edge, Graph, Node
    from export.lava.run import run_lava
    from export.passes import FoldNorm, LayerRounding, Quantize, Schedule
    from export.spikformer import capture_spikformer, compile_spikformer
    from export.torch_module import graph_to_torch, torch_trace
    from export.validation import validate

_HOME = {
    "register_converter": "export.converters",
    "register_function": "export.converters",
    "Call": "export.converters",
    "Value": "export.converters",
    "capture_spikformer": "export.spikformer",
    "compile_spikformer": "export.spikformer",
    "Graph": "export.graph",
    "Node": "export.graph",
    "Edge": "export.graph",
    "validate": "export.validation",
    "FoldNorm": "export.passes",
    "Quantize": "export.passes",
    "Schedule": "export.passes",
    "LayerRounding": "export.passes",
    "save": "export.formats.hdf5",
    "load": "export.formats.hdf5",
    "to_onnx": "export.formats.onnx",
    "save_onnx": "export.formats.onnx",
    "save_netx": "export.formats.netx",
    "graph_to_torch": "export.torch_module",
    "torch_trace": "export.torch_module",
    "run_lava": "export.lava.run",
    "load_subject": "export.built_in",
    "load_images": "export.built_in",
}

__all__ = [
    "register_converter",
    "register_function",
    "Call",
    "Value",
    "capture_spikformer",
    "compile_spikformer",
    "Graph",
    "Node",
    "Edge",
    "validate",
    "FoldNorm",
    "Quantize",
    "Schedule",
    "LayerRounding",
    "save",
    "load",
    "to_onnx",
    "save_onnx",
    "save_netx",
    "graph_to_torch",
    "torch_trace",
    "run_lava",
    "load_subject",
    "load_images",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'export' has no attribute {name!r}")

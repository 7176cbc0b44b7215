"""From a torch model to a float graph: torch.fx traces one time step, converters do the rest.

`capture` runs the model's `forward` once with symbolic values, so that branches, residuals and
containers of any shape come out as they are; whatever depends on the data cannot be traced and is
refused. Modules stop the trace where a converter is registered (`export.converters`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import norse.torch as norse
import numpy as np
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

import export.spikformer_converters  # noqa: F401  (registers the converters of our own model)
from export.converters import (
    OUTPUT_NAME,
    Builder,
    Call,
    Value,
    function_converter,
    is_leaf,
    module_converter,
    refuse_unknown,
)
from export.errors import AtsnnError, GraphError, UnsupportedModuleError
from export.graph import LIF, Edge, Graph, Input, Linear, Node, Output, Readout
from export.validation import validate

_ROOT = "model"
IN_PLACE = frozenset({"add_", "__iadd__", operator.iadd})
"""Additions that change their first operand; captured where nobody reads it afterwards."""


def capture(
    model: nn.Module,
    example: Tensor,
    steps: int,
    *,
    method: str = "forward",
    time_first: bool = False,
    events: bool = False,
    blocks: Callable[[str], str] | None = None,
) -> Graph:
    """Capture a model as a float graph.

    Args:
        model: computes one time step, `forward(image)` or `forward(image, state)`.
        example: a batch of images [B, C, H, W] or [B, D] ([T, B, ...] with `time_first`).
        steps: time steps per image.
        method: name of the method to trace.
        time_first: the model takes and returns all time steps at once (norse's `Lift`, `LIF`).
        events: the input is spikes, not pixels.
        blocks: block label of a node name, the grain of the coarser Lava network; by default the
            whole network is one block.

    Raises:
        UnsupportedModuleError: a module or operation without converter, or one that no target can
            hold; names it, its type and what to do.
        GraphError: shapes that do not fit.
    """
    axis = 1 if time_first else 0
    builder = Builder(batch=example.shape[axis])
    shape = tuple(example.shape[axis + 1 :])
    builder.nodes.append(Input("image", "", shape, bits=0))
    with _evaluating(model):
        trace = _trace(model, method)
        result = _Interpreter(model, trace, builder, time_first, events).run()
    _finish(builder, result)
    label = blocks or (lambda name: "network")
    graph = Graph(
        tuple(builder.nodes),
        tuple(builder.edges),
        steps,
        blocks={node.name: label(node.name) for node in builder.nodes},
        metadata={"model": type(model).__qualname__},
    )
    return validate(_reachable(graph))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# --- tracing ---


class _Root(nn.Module):
    """Calls one method of the model with an image only; other arguments keep their defaults."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, image: Tensor) -> Any:
        if self.method == "forward":
            return self.model(image)
        return getattr(self.model, self.method)(image)


class _Tracer(fx.Tracer):
    """Stops at modules that have a converter; walks through `Lift`; remembers who called what."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[str, str] = {}
        self.lifted: set[str] = set()
        self._lifts = 0

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if isinstance(m, norse.Lift):
            inner = m.lifted_module
            self._lifts += 1
            result = self.call_module(inner, inner.forward, args, kwargs)
            self._lifts -= 1
            return result
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        stack = list(self.module_stack.values())
        self.owners[node.name] = _plain_name(str(stack[-1][0])) if stack else ""
        if self._lifts:
            self.lifted.add(node.name)
        return node


@dataclass(frozen=True)
class _Trace:
    """An fx graph, the module that made each of its nodes, and the nodes inside `Lift`."""

    graph: fx.Graph
    owners: dict[str, str]
    lifted: set[str]


def _trace(model: nn.Module, method: str) -> _Trace:
    tracer = _Tracer()
    try:
        return _Trace(tracer.trace(_Root(model, method)), tracer.owners, tracer.lifted)
    except AtsnnError:
        raise
    except Exception as error:  # whatever the traced forward raises
        where = _deepest(error)
        raise UnsupportedModuleError(
            f"{type(model).__qualname__}.{method} cannot be traced ({where}{_first_line(error)}); "
            "a captured forward may not depend on the data: no Python conditions, loops or indices "
            "over tensors. Move that part into a module of its own and register a converter for it "
            "with export.register_converter"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _deepest(error: Exception) -> str:
    """File and line in the user's code where tracing failed."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "torch" not in code.co_filename.split("/") and code.co_filename != __file__:
            found = f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}, "
        trace = trace.tb_next
    return found


def _plain_name(qualified: str) -> str:
    if qualified == _ROOT:
        return ""
    return qualified.removeprefix(f"{_ROOT}.")


# --- reading the trace ---


class _Interpreter:
    """Walks an fx graph and calls the converter of each of its nodes."""

    def __init__(
        self,
        model: nn.Module,
        trace: _Trace,
        builder: Builder,
        time_first: bool,
        events: bool,
    ) -> None:
        self.modules = dict(_Root(model, "forward").named_modules())
        self.trace = trace
        self.builder = builder
        self.time_first = time_first
        self.events = events
        self.values: dict[fx.Node, Any] = {}

    def run(self) -> Any:
        """Returns what the model returns, with values for tensors."""
        for node in self.trace.graph.nodes:
            if node.op == "output":
                return self._resolved(node.args[0])
            self.values[node] = self._value(node)
        raise GraphError("the trace has no output")

    def _resolved(self, argument: Any) -> Any:
        return map_arg(argument, lambda node: self.values[node])

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            image = self.builder.nodes[0]
            assert isinstance(image, Input)
            return Value(image.name, "out", image.shape, "spikes" if self.events else "value")
        args, kwargs = self._resolved(node.args), self._resolved(node.kwargs)
        if node.op == "call_module":
            return self._module(node, args, kwargs)
        if node.op == "get_attr":
            self._parameter(node)
        return self._function(node, args, kwargs)

    def _module(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        module = self.modules[str(node.target)]
        source = _plain_name(str(node.target)) or type(module).__name__
        call = self._call(node, source, _type_name(module))
        convert = module_converter(module)
        if convert is None:
            refuse_unknown(call, module)
        if args and isinstance(args[0], tuple):
            call.refuse(
                "it is given a tuple, as norse's neurons return (spikes, state)",
                "pass the spikes alone, as norse's SequentialState does and torch's does not",
            )
        return self._convert(call, convert, (module, *args), kwargs)

    def _parameter(self, node: fx.Node) -> NoReturn:
        holder, _, label = _plain_name(str(node.target)).rpartition(".")
        module = self.modules[f"{_ROOT}.{holder}" if holder else _ROOT]
        self._call(node, holder or type(module).__name__, _type_name(module)).refuse(
            f"its forward uses {label} outside of a layer that has a converter",
            "register a converter for this module with export.register_converter",
        )

    def _function(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        label = node.target if isinstance(node.target, str) else node.target.__name__
        owner = self.trace.owners.get(node.name, "")
        source = f"{owner}.{label}" if owner else str(label)
        call = self._call(node, source, f"{node.op} {label}")
        convert = function_converter(node.target)
        if node.target in IN_PLACE and _seen_again(node):
            call.refuse(
                "it changes its first operand in place, which is read again afterwards",
                "write x = x + y",
            )
        if convert is None:
            call.refuse(
                "this operation has no converter",
                "put it into a module of its own and register one with export.register_converter",
            )
        return self._convert(call, convert, args, kwargs)

    def _call(self, node: fx.Node, source: str, label: str) -> Call:
        over_time = self.time_first and node.name not in self.trace.lifted
        return Call(self.builder, self.builder.unique(source), source, label, over_time)

    def _convert(self, call: Call, convert: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return convert(call, *args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise
            call.refuse(
                f"it is called with arguments it cannot take here ({error})", "see the docs"
            )


def _seen_again(node: fx.Node) -> bool:
    """True if the result is dropped or the changed operand has a reader behind `node`."""
    changed = node.args[0]
    if not isinstance(changed, fx.Node) or not node.users:
        return True
    order = {other: place for place, other in enumerate(node.graph.nodes)}
    return any(order[user] > order[node] for user in changed.users)


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__.split('.')[0]}.{type(module).__qualname__}"


# --- the end of the network ---


def _finish(builder: Builder, result: Any) -> None:
    value = result
    while isinstance(value, tuple | list) and value:
        value = value[0]
    if not isinstance(value, Value):
        raise UnsupportedModuleError(
            f"the model returns {type(value).__name__}, not a tensor that comes from the image; "
            "return logits or spikes (first, if it returns a tuple)"
        )
    last = next(node for node in builder.nodes if node.name == value.node)
    if isinstance(last, Linear) and len(value.shape) == 1:
        _replace(builder, last, _as_readout(last))
    elif not isinstance(last, LIF | Readout) or len(value.shape) != 1:
        raise UnsupportedModuleError(
            f"{last.source or last.name} ({last.kind}): the network ends in it with shape "
            f"{list(value.shape)}; end with a Linear layer of one feature per class (its mean over "
            "time becomes the logits), or with spiking neurons behind it"
        )
    builder.nodes.append(Output(OUTPUT_NAME, ""))
    builder.edges.append(Edge(value.node, OUTPUT_NAME, value.port))


def _as_readout(node: Linear) -> Readout:
    bias = np.zeros(len(node.weight), np.float32) if node.bias is None else node.bias
    return Readout(node.name, node.source, node.weight, bias)


def _replace(builder: Builder, old: Node, new: Node) -> None:
    builder.nodes[builder.nodes.index(old)] = new
    builder.edges[:] = [
        replace(edge, target_port="x") if edge.target == old.name else edge
        for edge in builder.edges
    ]


def _reachable(graph: Graph) -> Graph:
    """Without nodes whose value never reaches the output."""
    needed = {OUTPUT_NAME, "image"}
    for _ in graph.nodes:
        more = {edge.source for edge in graph.edges if edge.target in needed} - needed
        if not more:
            break
        needed |= more
    return replace(
        graph,
        nodes=tuple(node for node in graph.nodes if node.name in needed),
        edges=tuple(edge for edge in graph.edges if edge.target in needed),
        blocks={name: label for name, label in graph.blocks.items() if name in needed},
    )

"""One small function per kind of torch module: how it becomes nodes of a graph.

A converter gets the `Call` (where nodes are added and what to say when it must refuse), the module
and its arguments as `Value`s, and returns a `Value` (or a tuple for modules that return one). Users
add their own with `register_converter`. What cannot be held exactly is refused, never approximated.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, TypeVar

import norse.torch as norse
import numpy as np
import numpy.typing as npt
import torch
from norse.torch.functional.reset import reset_value
from norse.torch.module.snn import SNN, SNNCell, SNNRecurrent, SNNRecurrentCell
from torch import Tensor, nn
from torch.nn import functional as F

from atsnn.fixed_point import NeuronModel
from export.errors import UnsupportedModuleError
from export.graph import (
    LIF,
    RESERVED_NAMES,
    Add,
    Conv,
    Edge,
    Linear,
    Node,
    Norm,
    OrPool,
    Reshape,
    Shape,
)
from export.shapes import output_shapes

ValueKind = Literal["spikes", "value", "current", "final"]


@dataclass(frozen=True)
class Value:
    """What a tensor of the traced module stands for: an output port of a node of the graph.

    Attributes:
        node, port: where it comes from.
        shape: per time step and image.
        kind: `spikes` (0 or 1), `value` (pixels, sums of spikes), `current` (what a synapse
            delivers) or `final` (reduced over time, nothing can follow).
    """

    node: str
    port: str
    shape: Shape
    kind: ValueKind


OUTPUT_NAME = "output"
"""Name of the Output node of a captured graph."""


@dataclass
class Builder:
    """The graph under construction."""

    batch: int
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    stateful: dict[str, int] = field(default_factory=dict)

    def unique(self, wanted: str) -> str:
        taken = {node.name for node in self.nodes} | {OUTPUT_NAME} | RESERVED_NAMES
        name, count = wanted, 1
        while name in taken:
            count += 1
            name = f"{wanted}_{count}"
        return name


@dataclass(frozen=True)
class Call:
    """One call of a module or function while a graph is captured.

    Attributes:
        name: unique node name for this call; more nodes take `name + ".part"`.
        source: qualified name in the user's model.
        label: type of the module, or the function.
        over_time: the call takes all time steps at once, [T, B, ...], not [B, ...].
    """

    builder: Builder
    name: str
    source: str
    label: str
    over_time: bool = False

    @property
    def leading(self) -> int:
        """Axes in front of a value's own: batch, and time for a call over all steps."""
        return 2 if self.over_time else 1

    def refuse(self, problem: str, mend: str) -> NoReturn:
        """Raise `UnsupportedModuleError` naming this module, its type, the problem and the mend."""
        raise UnsupportedModuleError(f"{self.source} ({self.label}): {problem}; {mend}")

    def add(
        self,
        node: Node,
        kind: ValueKind,
        *inputs: Value,
        **ports: Value | Sequence[Value] | None,
    ) -> Value:
        """Add a node; `inputs` go to its port `in`, keyword arguments to the ports they name.

        Returns the value of its first output port.

        Raises:
            GraphError: the node cannot take these shapes.
        """
        wired = {"in": inputs, **{k: _listed(v) for k, v in ports.items()}}
        arriving: dict[str, list[Shape]] = {}
        for port, values in wired.items():
            for value in values:
                if not isinstance(value, Value):
                    self.refuse(
                        f"it is given {type(value).__name__} {str(value)[:40]}",
                        "only tensors that come from the image can be captured",
                    )
                if value.kind == "final":
                    self.refuse("it follows a reduction over time", "make that the last operation")
                arriving.setdefault(port, []).append(value.shape)
                self.builder.edges.append(Edge(value.node, node.name, value.port, port))
        shapes = output_shapes(node, arriving)
        self.builder.nodes.append(node)
        first = node.outputs[0]
        return Value(node.name, first, shapes[first], kind)

    def part(self, label: str) -> str:
        """Name for an additional node of this call."""
        return self.builder.unique(f"{self.name}.{label}")

    def once(self) -> None:
        """Refuse a second call of a stateful module."""
        count = self.builder.stateful.get(self.source, 0) + 1
        self.builder.stateful[self.source] = count
        if count > 1:
            self.refuse(
                f"a module with state is called {count} times in one time step",
                "capture one time step: give capture the module without its loop over time and "
                "pass steps=T, and give every layer a neuron of its own",
            )


def _listed(value: Value | Sequence[Value] | None) -> Sequence[Value]:
    if value is None:
        return ()
    return (value,) if isinstance(value, Value) else value


# --- the registry ---

Converter = Callable[..., Any]
ConverterT = TypeVar("ConverterT", bound=Converter)
_MODULES: dict[type[nn.Module], Converter] = {}
_FUNCTIONS: dict[Callable[..., Any], Converter] = {}
_METHODS: dict[str, Converter] = {}


def register_converter(*kinds: type[nn.Module]) -> Callable[[ConverterT], ConverterT]:
    """Decorator: `converter(call, module, *values)` converts modules of these types.

    It also serves subclasses that inherit `forward` unchanged. A later registration replaces an
    earlier one.
    """

    def register(converter: ConverterT) -> ConverterT:
        for kind in kinds:
            _MODULES[kind] = converter
        return converter

    return register


def register_function(
    *functions: Callable[..., Any], methods: Sequence[str] = ()
) -> Callable[[ConverterT], ConverterT]:
    """Decorator: `converter(call, *values)` converts calls of these functions and methods."""

    def register(converter: ConverterT) -> ConverterT:
        _FUNCTIONS.update(dict.fromkeys(functions, converter))
        _METHODS.update(dict.fromkeys(methods, converter))
        return converter

    return register


def module_converter(module: nn.Module) -> Converter | None:
    """The converter of a module: of its own type, or of the base whose `forward` it inherits."""
    for base in type(module).__mro__:
        if base in _MODULES and base.forward is type(module).forward:
            return _MODULES[base]
    return None


def function_converter(target: Callable[..., Any] | str) -> Converter | None:
    """The converter of a function, or of a tensor method given by name."""
    return _METHODS.get(target) if isinstance(target, str) else _FUNCTIONS.get(target)


def is_leaf(module: nn.Module) -> bool:
    """True if tracing stops at this module: it has a converter, or it is a library's own layer."""
    if module_converter(module) is not None:
        return True
    if isinstance(module, nn.Sequential | norse.Lift):
        return False
    return type(module).__module__.split(".")[0] in ("torch", "norse")


# --- synapses and normalisation ---


def to_numpy(tensor: Tensor) -> npt.NDArray:
    """A copy of a tensor's numbers, detached and on the CPU."""
    return tensor.detach().cpu().numpy().copy()


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


@register_converter(nn.Conv2d)
def convert_conv2d(call: Call, module: nn.Conv2d, x: Value) -> Value:
    """Conv2d with zero padding, any stride, dilation and groups."""
    if module.padding_mode != "zeros":
        call.refuse(f"padding_mode is {module.padding_mode}", "use padding_mode='zeros'")
    node = Conv(
        call.name,
        call.source,
        to_numpy(module.weight),
        None if module.bias is None else to_numpy(module.bias),
        _pair(module.stride),
        _conv_padding(call, module),
        _pair(module.dilation),
        module.groups,
    )
    return call.add(node, "current", x)


def _conv_padding(call: Call, module: nn.Conv2d) -> tuple[int, int]:
    if module.padding == "valid":
        return (0, 0)
    if module.padding != "same":
        assert not isinstance(module.padding, str)
        return _pair(module.padding)
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(n % 2 for n in total):
        call.refuse(
            f"padding 'same' with kernel {list(module.kernel_size)} pads unevenly",
            "use an odd kernel or give the padding in numbers",
        )
    return total[0] // 2, total[1] // 2


@register_converter(nn.Linear)
def convert_linear(call: Call, module: nn.Linear, x: Value) -> Value:
    """Linear over the last axis of [D] or [N, D]."""
    bias = None if module.bias is None else to_numpy(module.bias)
    node = Linear(call.name, call.source, to_numpy(module.weight), bias)
    return call.add(node, "current", x)


@register_converter(nn.BatchNorm1d, nn.BatchNorm2d)
def convert_batch_norm(call: Call, module: nn.BatchNorm1d | nn.BatchNorm2d, x: Value) -> Value:
    """Batch normalisation with its running statistics."""
    if len(x.shape) == 2:
        call.refuse(
            f"it would normalise over the token axis of {list(x.shape)}",
            "normalise tokens over their last axis (atsnn.layers.TokenNorm)",
        )
    return call.add(batch_norm_node(call, module, call.name), "current", x)


def batch_norm_node(
    call: Call, module: nn.modules.batchnorm._BatchNorm, name: str, source: str = ""
) -> Norm:
    """The Norm node of a batch normalisation."""
    if module.running_mean is None or module.running_var is None:
        call.refuse("it keeps no running statistics", "use track_running_stats=True")
    ones = np.ones(module.num_features, np.float32)
    return Norm(
        name,
        source or call.source,
        to_numpy(module.running_mean),
        to_numpy(module.running_var),
        to_numpy(module.weight) if module.affine else ones,
        to_numpy(module.bias) if module.affine else 0 * ones,
        module.eps,
    )


# --- pooling and reshaping ---


def _or_pool(
    call: Call,
    x: Value,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    if x.kind != "spikes":
        call.refuse(
            f"it pools a {x.kind}, the target can only pool spikes",
            "put it behind the neuron: the maximum of spikes is their OR",
        )
    if _pair(dilation) != (1, 1) or ceil_mode or return_indices:
        call.refuse(
            f"dilation {dilation}, ceil_mode {ceil_mode}, return_indices {return_indices}",
            "use dilation 1 without ceil_mode and indices",
        )
    node = OrPool(
        call.name,
        call.source,
        _pair(kernel_size),
        _pair(stride or kernel_size),
        _pair(padding),
    )
    return call.add(node, "spikes", x)


@register_converter(nn.MaxPool2d)
def convert_max_pool2d(call: Call, module: nn.MaxPool2d, x: Value) -> Value:
    """Max pooling of spikes: a pooled neuron fires if any in its window did."""
    return _or_pool(
        call,
        x,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.ceil_mode,
        module.return_indices,
    )


@register_function(F.max_pool2d, torch.max_pool2d)
def convert_max_pool2d_function(call: Call, x: Value, *args: Any, **kwargs: Any) -> Value:
    return _or_pool(call, x, *args, **kwargs)


def _average_pool(
    call: Call,
    x: Value,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    padded = _pair(padding) != (0, 0)
    if ceil_mode or divisor_override or (padded and not count_include_pad):
        call.refuse(
            f"ceil_mode {ceil_mode}, divisor_override {divisor_override}, "
            f"count_include_pad {count_include_pad}",
            "use count_include_pad=True without ceil_mode and divisor_override",
        )
    if len(x.shape) != 3:
        call.refuse(f"it pools shape {list(x.shape)}", "pool feature maps [C, H, W]")
    kernel, channels = _pair(kernel_size), x.shape[0]
    weight = np.full((channels, 1, *kernel), 1.0 / math.prod(kernel), np.float32)
    node = Conv(
        call.name,
        call.source,
        weight,
        None,
        _pair(stride or kernel_size),
        _pair(padding),
        groups=channels,
    )
    return call.add(node, "current", x)


@register_converter(nn.AvgPool2d)
def convert_avg_pool2d(call: Call, module: nn.AvgPool2d, x: Value) -> Value:
    """Average pooling: a depthwise convolution with equal weights."""
    return _average_pool(
        call,
        x,
        module.kernel_size,
        module.stride,
        module.padding,
        module.ceil_mode,
        module.count_include_pad,
        module.divisor_override,
    )


@register_function(F.avg_pool2d)
def convert_avg_pool2d_function(call: Call, x: Value, *args: Any, **kwargs: Any) -> Value:
    return _average_pool(call, x, *args, **kwargs)


@register_function(F.adaptive_avg_pool2d)
def convert_adaptive_avg_pool2d_function(
    call: Call, x: Value, output_size: int | tuple[int | None, ...] | None
) -> Value:
    """Adaptive average pooling where the output size divides the map."""
    if len(x.shape) != 3:
        call.refuse(f"it pools shape {list(x.shape)}", "pool feature maps [C, H, W]")
    wanted = output_size if isinstance(output_size, tuple) else (output_size, output_size)
    sizes = [n if w is None else w for n, w in zip(x.shape[1:], wanted, strict=True)]
    if any(n % w for n, w in zip(x.shape[1:], sizes, strict=True)):
        call.refuse(
            f"the map {list(x.shape[1:])} does not divide into {sizes}",
            "choose an output size that divides the map",
        )
    return _average_pool(call, x, (x.shape[1] // sizes[0], x.shape[2] // sizes[1]))


@register_converter(nn.AdaptiveAvgPool2d)
def convert_adaptive_avg_pool2d(call: Call, module: nn.AdaptiveAvgPool2d, x: Value) -> Value:
    return convert_adaptive_avg_pool2d_function(call, x, module.output_size)


def _flatten(call: Call, x: Value, start: int = 0, end: int = -1) -> Value:
    rank = len(x.shape) + call.leading
    first = start % rank
    if end % rank != rank - 1 or first != call.leading:
        call.refuse(
            f"it flattens axes {start} to {end} of {rank}",
            f"flatten everything from axis {call.leading} on",
        )
    if len(x.shape) == 1:
        return x
    return call.add(Reshape(call.name, call.source, "flatten"), x.kind, x)


@register_converter(nn.Flatten)
def convert_flatten(call: Call, module: nn.Flatten, x: Value) -> Value:
    """Flatten everything behind the batch axis."""
    return _flatten(call, x, module.start_dim, module.end_dim)


@register_function(torch.flatten, methods=("flatten",))
def convert_flatten_function(call: Call, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    return _flatten(call, x, start_dim, end_dim)


@register_function(torch.reshape, methods=("view", "reshape"))
def convert_reshape(call: Call, x: Value, *sizes: Any) -> Value:
    """`view` and `reshape` that keep the batch axis and flatten the rest."""
    wanted = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    kept, rest = wanted[: call.leading], wanted[call.leading :]
    if kept != (call.builder.batch,) * call.leading or rest not in ((-1,), (math.prod(x.shape),)):
        call.refuse(
            f"it reshapes {[call.builder.batch, *x.shape]} to {list(wanted)}",
            "only flattening behind the batch axis is captured: x.flatten(1)",
        )
    return _flatten(call, x, call.leading)


@register_function(methods=("unsqueeze",))
def convert_unsqueeze(call: Call, x: Value, dim: int) -> Value:
    """`unsqueeze(0)`: a time axis in front, which a graph has in any case."""
    if dim != 0:
        call.refuse(f"it adds axis {dim}", "only a time axis 0 can be added")
    return x


@register_function(methods=("contiguous", "detach", "clone", "float"))
def convert_same(call: Call, x: Value) -> Value:
    """Tensor methods that leave the numbers as they are."""
    return x


@register_converter(nn.Identity, nn.Dropout, nn.Dropout2d)
def convert_nothing(call: Call, module: nn.Module, x: Value) -> Value:
    """Modules that do nothing in evaluation."""
    return x


@register_function(F.dropout, F.dropout2d)
def convert_dropout_function(
    call: Call, x: Value, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Value:
    if training and p > 0:
        call.refuse("it drops in evaluation too", "pass training=self.training")
    return x


@register_function(
    operator.add, operator.iadd, torch.add, methods=("add", "add_", "__add__", "__iadd__")
)
def convert_add(call: Call, x: Value, y: Value, *, alpha: float = 1) -> Value:
    """Sum of two branches."""
    for part in (x, y):
        if not isinstance(part, Value):
            call.refuse(f"it adds the number {part}", "put it into the bias of a layer")
    if alpha != 1:
        call.refuse(f"alpha is {alpha}", "scale the weights of that branch instead")
    kind = "current" if "current" in (x.kind, y.kind) else "value"
    return call.add(Add(call.name, call.source, (0, 0)), kind, x, y)


@register_function(torch.mean, methods=("mean",))
def convert_mean(call: Call, x: Value, dim: int | None = None, **_: Any) -> Value:
    """Mean over the time axis, the last operation of a module that takes all steps at once."""
    if x.kind == "spikes":
        call.refuse("it takes the mean of spikes", "take their sum: a graph counts class spikes")
    if not call.over_time or dim != 0:
        call.refuse(
            f"it takes the mean over axis {dim}",
            "end with a Linear (its mean over time becomes the logits) or pool with AvgPool2d",
        )
    return replace(x, kind="final")


@register_function(torch.sum, methods=("sum",))
def convert_sum(call: Call, x: Value, dim: int | None = None, **_: Any) -> Value:
    """Sum of the last layer's spikes over the time axis."""
    if not call.over_time or dim != 0 or x.kind != "spikes":
        call.refuse(
            f"it sums a {x.kind} over axis {dim}", "sum only the last layer's spikes over time"
        )
    return replace(x, kind="final")


@register_function(operator.getitem)
def convert_getitem(call: Call, x: Any, index: Any) -> Any:
    """Item of a tuple (spikes of `(spikes, state)`), or of a shape."""
    if not isinstance(x, tuple | list) or not isinstance(index, int | slice):
        call.refuse(f"it takes item {index} of a tensor", "the target indexes no tensors")
    return x[index]


@register_function(getattr)
def convert_getattr(call: Call, x: Any, name: str) -> Any:
    """`x.shape`."""
    if not isinstance(x, Value) or name != "shape":
        call.refuse(f"it reads attribute {name}", "only .shape is known while capturing")
    return (*(call.builder.batch,) * call.leading, *x.shape)


@register_function(methods=("size",))
def convert_size(call: Call, x: Value, dim: int | None = None) -> Any:
    """`x.size()` and `x.size(dim)`."""
    shape = convert_getattr(call, x, "shape")
    return shape if dim is None else shape[dim]


# --- norse neurons ---


def _scalar(call: Call, parameters: Any, label: str) -> float:
    tensor = torch.as_tensor(getattr(parameters, label)).detach().reshape(-1).cpu()
    if tensor.numel() == 0 or not bool((tensor == tensor[0]).all()):
        call.refuse(
            f"{label} holds {tensor.numel()} different values, {float(tensor.min()):g} to "
            f"{float(tensor.max()):g}",
            "a layer's neurons share their constants: use one value, or one module per value",
        )
    return float(tensor[0])


def _rate(call: Call, dt: float, parameters: Any, label: str) -> float:
    _scalar(call, parameters, label)
    tensor = torch.as_tensor(getattr(parameters, label)).detach().reshape(-1)[:1].cpu()
    rate = float((dt * tensor)[0])
    if not 0 < rate <= 1:
        call.refuse(
            f"dt * {label} is {rate:g}", "it must lie in (0, 1]: the state would grow or oscillate"
        )
    return rate


def _threshold(call: Call, parameters: Any, resting: float) -> float:
    threshold = _scalar(call, parameters, "v_th") - resting
    if threshold <= 0:
        call.refuse(
            f"v_th lies {-threshold:g} below the resting potential {resting:g}",
            "it must be above it",
        )
    return threshold


def _resting(call: Call, parameters: Any) -> float:
    """Common value of v_leak and v_reset, where the membrane starts, rests and is reset to."""
    leak, reset = _scalar(call, parameters, "v_leak"), _scalar(call, parameters, "v_reset")
    if leak != reset:
        call.refuse(
            f"v_leak is {leak:g} and v_reset is {reset:g}",
            "make them equal: a core's membrane starts, rests and is reset at one potential",
        )
    return leak


def box_model(call: Call, parameters: Any, dt: float) -> NeuronModel:
    """LIFBox: v += dt * tau_mem_inv * (x + v_leak - v)."""
    if getattr(parameters, "reset_method", reset_value) is not reset_value:
        call.refuse(
            f"reset_method is {getattr(parameters.reset_method, '__name__', 'unknown')}",
            "the core resets to a value: use norse.torch.functional.reset.reset_value",
        )
    rate = _rate(call, dt, parameters, "tau_mem_inv")
    return NeuronModel(rate, 1.0, _threshold(call, parameters, _resting(call, parameters)))


def current_model(call: Call, parameters: Any, dt: float) -> NeuronModel:
    """LIF with a synaptic current: i += x; v += rate * (v_leak - v + i); i -= syn * i."""
    mem = _rate(call, dt, parameters, "tau_mem_inv")
    syn = _rate(call, dt, parameters, "tau_syn_inv")
    return NeuronModel(mem, syn, _threshold(call, parameters, _resting(call, parameters)))


def integrating_model(call: Call, parameters: Any, dt: float) -> NeuronModel:
    """IAF: v += x."""
    resting = _scalar(call, parameters, "v_reset")
    return NeuronModel(0.0, 1.0, _threshold(call, parameters, resting))


_NEURONS: dict[type[nn.Module], Callable[[Call, Any, float], NeuronModel]] = {
    norse.LIFBoxCell: box_model,
    norse.LIFCell: current_model,
    norse.LIF: current_model,
    norse.IAFCell: integrating_model,
    norse.IAF: integrating_model,
}


@register_converter(*_NEURONS)
def convert_neuron(
    call: Call, module: SNNCell | SNN, x: Value, state: Any = None
) -> tuple[Value, None]:
    """norse neurons; the graph's node owns the state, which starts from zero."""
    call.once()
    if isinstance(module, SNN) and not call.over_time:
        call.refuse(
            "it runs over a time axis",
            "use the cell (one time step), or capture with time_first=True",
        )
    if isinstance(module, SNNCell) and call.over_time:
        call.refuse("it computes one time step and is given all of them", "wrap it in norse's Lift")
    if isinstance(state, Value):
        call.refuse("its state is computed from the image", "let it start from zero")
    make = next(make for kind, make in _NEURONS.items() if isinstance(module, kind))
    node = LIF(call.name, call.source, make(call, module.p, module.dt))
    return call.add(node, "spikes", x), None


@register_converter(norse.LI, norse.LICell, norse.LIBoxCell, norse.LILinearCell)
def refuse_leaky_integrator(call: Call, module: nn.Module, *_: Any) -> NoReturn:
    call.refuse(
        "a leaky integrator has no spikes to send",
        "remove it: the mean over time of the last Linear becomes the logits; train with that "
        "read-out, or end with a spiking neuron",
    )


def refuse_unknown(call: Call, module: nn.Module) -> NoReturn:
    """Refuse a module that no converter serves."""
    if isinstance(module, SNNRecurrentCell | SNNRecurrent):
        call.refuse("recurrent synapses are not captured", "use the neuron without recurrence")
    call.refuse(
        "no converter is registered for this type",
        "replace it, or register one with export.register_converter",
    )


__all__ = [
    "Builder",
    "Call",
    "Value",
    "is_leaf",
    "module_converter",
    "register_converter",
    "register_function",
]

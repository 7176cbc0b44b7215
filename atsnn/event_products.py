"""Event-driven convolutions for training on the CPU: products with what is not zero alone.

The inputs of most layers are spikes, nearly all of them 0. `y = x W` and the gradient of W then
need one row of W, or of the gradient of y, for each event (an input that is not 0), and any input
values are allowed. The gradient of x has no such zeros and stays dense (oneDNN).

Both are one sum, `into[m] += value * base[place]` over the events of m: of an output pixel over the
weights that its window meets; of a weight over the gradients at the places where its input was not
0. Outputs are taken in tiles of a few vector registers, which hold the sum while rows stream by;
what streams ("slab") stays in the cache. Each sum is taken by one thread in an order that depends
on shapes alone, so bits do not depend on the number of threads.

Shapes: maps [M, H, W, I] with contiguous channels, kernels of K x K, K = 1 or 3 at stride 1 and
padding K // 2. A linear map of tokens is the case K = 1. float32 or float64. Values are finite: a
zero times infinity, NaN in a dense product, is left out here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor, nn

from atsnn.llvm import I32, I64, broadcast, choose, constant, load, repeat, store
from atsnn.threads import KERNELS, use_torch_threads

WORTH_EVENTS = 0.36
"""Share of inputs that are not 0 up to which events win where each meets very many weights."""
BOOKKEEPING = 170
"""Weights that take as long to add as an event takes to be found, sorted and read."""
FEWEST_CHANNELS = 24
"""Inputs and outputs below which a row is too short for its bookkeeping."""
VECTOR = 64
"""Bytes of a vector register."""
WIDEST = 6
"""Vectors of a tile."""
WEIGHT_SLAB, GRADIENT_SLAB = 160 * 1024, 512 * 1024
"""Bytes of a tile's weights, or gradients, that a pass reads again and again; they fit into L2."""
ROWS = 256
"""Pixels that a pass takes with the same weights."""
BLOCK = 64
"""Values that are compared with 0 at once."""


# --- instructions ---


def _multiply_add(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    kind = a.type
    name = f"llvm.fma.v{kind.count}f{8 * VECTOR // kind.count}"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind, kind, kind]), name
    )
    return builder.call(function, [a, b, c])


def _float_type(number: Any) -> tuple[Any, int]:
    """LLVM's type of a numba float, and its bytes."""
    return (ir.DoubleType(), 8) if number == types.float64 else (ir.FloatType(), 4)


def _accumulate() -> Any:
    @intrinsic
    def accumulate(context, zero, width, start, count, base, places, values, into):
        """Sums of a tile over `count` events, in registers.

        Args:
            zero: of the type of all values.
            width: vectors of the tile, 1 to `WIDEST`.
            start, into: addresses of the tile before and after, [width * lanes].
            base: address of rows [., width * lanes], aligned to a vector.
            places: address of int32 [count]: the row of each event.
            values: address of its values [count].
        """
        number, size = _float_type(zero)
        kind = ir.VectorType(number, VECTOR // size)

        def code(backend, builder, signature, arguments):
            _, width, start, count, base, places, values, into = arguments

            def build(vectors: int) -> None:
                def event(e: Any, held: list[Any]) -> list[Any]:
                    at = builder.add(places, builder.mul(e, constant(I32.width // 8)))
                    place = builder.sext(load(builder, at, I32), I64)
                    row = builder.add(base, builder.mul(place, constant(VECTOR * vectors)))
                    at = builder.add(values, builder.mul(e, constant(size)))
                    value = broadcast(builder, load(builder, at, number), kind.count)
                    return [
                        _multiply_add(builder, value, load(builder, row, kind, VECTOR * j), sums)
                        for j, sums in enumerate(held)
                    ]

                sums = [load(builder, start, kind, VECTOR * j) for j in range(vectors)]
                for j, total in enumerate(repeat(builder, count, sums, event)):
                    store(builder, total, into, VECTOR * j)

            cases = [(n, lambda n=n: build(n)) for n in range(1, WIDEST + 1)]
            choose(builder, width, cases)
            return backend.get_dummy_value()

        return types.void(zero, *(types.int64,) * 7), code

    return accumulate


def _nonzero_bits() -> Any:
    @intrinsic
    def nonzero_bits(context, zero, values):
        """One bit for each of the `BLOCK` values at an address, set where it is not 0."""
        number, _ = _float_type(zero)
        kind = ir.VectorType(number, BLOCK)

        def code(backend, builder, signature, arguments):
            given = load(builder, arguments[1], kind)
            differs = builder.fcmp_unordered("!=", given, ir.Constant(kind, [0.0] * BLOCK))
            return builder.bitcast(differs, ir.IntType(BLOCK))

        return types.uint64(zero, types.int64), code

    return nonzero_bits


def _bit_function(build: Callable[[ir.IRBuilder, Any], Any]) -> Any:
    @intrinsic
    def function(context, bits):
        def code(backend, builder, signature, arguments):
            return build(builder, arguments[0])

        return types.int64(types.uint64), code

    return function


accumulate, nonzero_bits = _accumulate(), _nonzero_bits()
bit_count = _bit_function(lambda builder, bits: builder.ctpop(bits))
first_bit = _bit_function(lambda builder, bits: builder.cttz(bits, ir.Constant(ir.IntType(1), 1)))


@numba.njit(error_model="numpy")
def _bits_from(x, first, stop):
    """Bits of x[first : stop], at most `BLOCK` values of a flat array."""
    zero = x.dtype.type(0)
    if first + BLOCK <= x.size:
        bits = nonzero_bits(zero, np.int64(x.ctypes.data) + first * x.itemsize)
    else:
        bits = np.uint64(0)
        for j in range(first, min(x.size, stop)):
            if x[j] != zero:
                bits |= np.uint64(1) << np.uint64(j - first)
    if stop - first < BLOCK:
        bits &= (np.uint64(1) << np.uint64(stop - first)) - np.uint64(1)
    return bits


# --- kernels ---


@numba.njit(parallel=True, cache=True, error_model="numpy")
def count_events(x, size, counts):
    """Values of x [n] that are not 0 in each stretch of `size`: counts [ceil(n / size)]."""
    for c in numba.prange(counts.size):
        found = 0
        for first in range(c * size, min(x.size, (c + 1) * size), BLOCK):
            stop = min(first + BLOCK, x.size, (c + 1) * size)
            found += bit_count(_bits_from(x, first, stop))
        counts[c] = found


@numba.njit(parallel=True, cache=True, error_model="numpy")
def gather_events(x, length, columns, size, before, starts, places, values):
    """Events of x [n] in order.

    Args:
        length: values of a run, for whose events `starts` [runs + 1] says where they begin.
        columns: runs in a line: a place counts from the start of its line.
        size: values of a stretch, whole lines, with `before` [stretches] events in front of it.
    """
    line = length * columns
    for c in numba.prange(before.size):
        n = before[c]
        for offset in range(c * size, min(x.size, (c + 1) * size), line):
            run = offset // length
            for first in range(offset, offset + line, BLOCK):
                stop = min(first + BLOCK, offset + line)
                bits = _bits_from(x, first, stop)
                while run * length < stop:
                    earlier = (np.uint64(1) << np.uint64(run * length - first)) - np.uint64(1)
                    starts[run] = n + bit_count(bits & earlier)
                    run += 1
                while bits:
                    j = first + first_bit(bits)
                    places[n] = j - offset
                    values[n] = x[j]
                    n += 1
                    bits &= bits - np.uint64(1)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def pack_weights(weight, width, packed):
    """weight [O, I, K, K] -> packed [tiles, K, K, I, width], 0 beyond O."""
    outputs, inputs, side = weight.shape[:3]
    for ti in numba.prange(packed.shape[0] * side):
        tile, r = ti // side, ti % side
        for c in range(side):
            for i in range(inputs):
                for j in range(width):
                    o = tile * width + j
                    packed[tile, r, c, i, j] = weight[o, i, r, c] if o < outputs else 0


@numba.njit(parallel=True, cache=True, error_model="numpy")
def multiply_rows(starts, places, values, parts, packed, vectors, bias, shape, out):
    """Convolution of the events: out [pixels, tiles * width].

    Args:
        parts: runs of a pixel; 1 if the kernel is wider than a pixel.
        packed: [tiles, K, K, I, width]. bias: [tiles * width].
        shape: M, H, W.
    """
    tiles, side, _, inputs, width = packed.shape
    height, columns = shape[1], shape[2]
    pixels, reach = out.shape[0], side // 2
    blocks = (pixels + ROWS - 1) // ROWS
    zero = out.dtype.type(0)
    places_at, values_at = np.int64(places.ctypes.data), np.int64(values.ctypes.data)
    packed_at, bias_at = np.int64(packed.ctypes.data), np.int64(bias.ctypes.data)
    out_at, size = np.int64(out.ctypes.data), out.itemsize
    for tb in numba.prange(tiles * blocks):
        tile, block = tb // blocks, tb % blocks
        for part in range(side * parts):
            r, p = part // parts, part % parts
            taps = packed_at + (tile * side + r) * side * inputs * width * size
            for pixel in range(block * ROWS, min(pixels, (block + 1) * ROWS)):
                w, h = pixel % columns, (pixel // columns) % height
                into = out_at + (pixel * tiles + tile) * width * size
                start = bias_at + tile * width * size if part == 0 else into
                first = count = 0
                if 0 <= h + r - reach < height:
                    seen = pixel + (r - reach) * columns
                    first = starts[(seen - min(w, reach)) * parts + p]
                    stop = (seen + min(columns - 1 - w, reach)) * parts + p + 1
                    count = starts[stop] - first
                if part == 0 or count > 0:
                    row = taps + (reach - w) * inputs * width * size
                    accumulate(
                        zero, vectors, start, count, row,
                        places_at + 4 * first, values_at + size * first, into,
                    )  # fmt: skip


@numba.njit(parallel=True, cache=True, error_model="numpy")
def sort_by_input(
    starts, places, values, parts, shape, reach, lines, heads, sorted_places, sorted_values
):
    """Events of each chunk of lines, input after input.

    Lines of all maps stand in a column, `reach` empty ones around each map; a chunk is `lines` of
    them. A place counts pixels from the first of the line before the chunk, if kernels reach there,
    in lines that are `reach` wider than those of a map.

    Args:
        heads: [chunks, I + 1], where the events of an input begin, written.
    """
    maps, height, columns = shape
    inputs = heads.shape[1] - 1
    for c in numba.prange(heads.shape[0]):
        head = heads[c]
        head[:] = 0
        first = np.int64(-1)
        for line in range(c * lines, (c + 1) * lines):
            m, h = line // (height + reach), line % (height + reach) - reach
            if m < maps and h >= 0:
                run = (m * height + h) * columns * parts
                first = starts[run] if first < 0 else first
                for w in range(columns):
                    for e in range(starts[run + w * parts], starts[run + (w + 1) * parts]):
                        head[places[e] - w * inputs + 1] += 1
        head[0] = max(first, 0)
        for i in range(inputs):
            head[i + 1] += head[i]
        free = head[:-1].copy()
        for line in range(c * lines, (c + 1) * lines):
            m, h = line // (height + reach), line % (height + reach) - reach
            if m < maps and h >= 0:
                run = (m * height + h) * columns * parts
                for w in range(columns):
                    place = (line - c * lines + reach) * (columns + reach) + w + reach
                    for e in range(starts[run + w * parts], starts[run + (w + 1) * parts]):
                        i = places[e] - w * inputs
                        sorted_places[free[i]] = place
                        sorted_values[free[i]] = values[e]
                        free[i] += 1


@numba.njit(error_model="numpy")
def _copy(x, into):
    for j in range(x.size):
        into[j] = x[j]


@numba.njit(error_model="numpy")
def _pack_line(grad, shape, reach, line, slabs, n):
    """A line of the column of maps into rows n, n + 1, .. of slabs [tiles, ., width]."""
    maps, height, columns = shape
    tiles, _, width = slabs.shape
    outputs = grad.shape[1]
    m, h = line // (height + reach), line % (height + reach) - reach
    inside = line >= 0 and m < maps and h >= 0
    for w in range(-reach, columns):
        for tile in range(tiles):
            into = slabs[tile, n]
            if inside and w >= 0:
                begin, stop = tile * width, min(outputs, (tile + 1) * width)
                _copy(grad[(m * height + h) * columns + w, begin:stop], into)
                into[stop - begin :] = 0
            else:
                into[:] = 0
        n += 1


@numba.njit(parallel=True, cache=True, error_model="numpy")
def multiply_columns(heads, places, values, grad, shape, lines, vectors, ranges, slabs, result):
    """Gradient of the weights: result [tiles, I, K, K, width], 0 at first.

    Args:
        heads, places, values: as `sort_by_input` leaves them.
        grad: [pixels, O].
        ranges: of inputs, to occupy threads.
        slabs: [tiles, rows, width], for the gradients of a chunk.
    """
    tiles, inputs, side, _, width = result.shape
    reach = side // 2
    pitch = shape[2] + reach
    zero, size = grad.dtype.type(0), grad.itemsize
    places_at, values_at = np.int64(places.ctypes.data), np.int64(values.ctypes.data)
    result_at, slabs_at = np.int64(result.ctypes.data), np.int64(slabs.ctypes.data)
    slabs[:, (lines + 2 * reach) * pitch :] = 0
    for c in range(heads.shape[0]):
        for line in numba.prange(lines + 2 * reach):
            _pack_line(grad, shape, reach, c * lines + line - reach, slabs, line * pitch)
        for tr in numba.prange(tiles * ranges):
            tile, part = tr // ranges, tr % ranges
            slab_at = slabs_at + tile * slabs.shape[1] * width * size
            for i in range(part * inputs // ranges, (part + 1) * inputs // ranges):
                begin, events = heads[c, i], heads[c, i + 1] - heads[c, i]
                if events > 0:
                    into = result_at + (tile * inputs + i) * side * side * width * size
                    for k in range(side * side):
                        shift = (k // side - reach) * pitch + k % side - reach
                        accumulate(
                            zero, vectors, into, events, slab_at - shift * width * size,
                            places_at + 4 * begin, values_at + size * begin, into,
                        )  # fmt: skip
                        into += width * size


@numba.njit(parallel=True, cache=True, error_model="numpy")
def sum_rows(x, result):
    """Sums over rows of x [R, C] into float64 [C]."""
    for c in numba.prange((result.size + BLOCK - 1) // BLOCK):
        for r in range(x.shape[0]):
            for j in range(c * BLOCK, min(result.size, (c + 1) * BLOCK)):
                result[j] += x[r, j]


# --- autograd ---


@dataclass(frozen=True)
class Events:
    """What is not 0 in maps [M, H, W, I].

    Attributes:
        shape: M, H, W of the kernels: a linear map has one long column of pixels.
        parts: runs of a pixel.
        starts: int32 [runs + 1], first event of each run.
        places: int32 [events], index of the input from the start of its line [W, I].
        values: [events].
    """

    shape: tuple[int, int, int]
    parts: int
    starts: Tensor
    places: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Tiles:
    """Outputs in tiles of equal width."""

    count: int
    vectors: int
    width: int


def _tiles(outputs: int, itemsize: int) -> _Tiles:
    lanes = VECTOR // itemsize
    needed = -(-outputs // lanes)
    count = -(-needed // WIDEST)
    vectors = -(-needed // count)
    return _Tiles(count, vectors, vectors * lanes)


def fits(synapse: nn.Conv2d) -> bool:
    """True for a convolution whose kernel slides by one pixel and keeps the size of the map."""
    side = synapse.kernel_size[0]
    return (
        synapse.kernel_size in ((1, 1), (3, 3))
        and synapse.stride == (1, 1)
        and synapse.dilation == (1, 1)
        and synapse.groups == 1
        and synapse.padding == (side // 2, side // 2)
        and synapse.padding_mode == "zeros"
    )


def find_events(maps: Tensor, weight: Tensor) -> Events | None:
    """Events of maps [M, H, W, I] for a kernel [O, I, K, K], or None where dense products win.

    None as well for what the kernels do not compute: other devices, types and kernels, and mixed
    precision.
    """
    outputs, inputs, *sides = weight.shape
    if (
        maps.device.type != "cpu"
        or maps.dtype not in (torch.float32, torch.float64)
        or maps.dtype != weight.dtype
        or sides not in ([1, 1], [3, 3])
        or min(inputs, outputs) < FEWEST_CHANNELS
        or maps.numel() == 0
        or maps.numel() >= 2**31
        or autocast_on_cpu()
    ):
        return None
    return gather(maps, weight, most_events(weight))


def most_events(weight: Tensor) -> float:
    """Share of inputs that are not 0 up to which events win (fitted: docs/training.md)."""
    met = weight.numel() / weight.shape[1]
    return WORTH_EVENTS * met / (met + BOOKKEEPING)


def autocast_on_cpu() -> bool:
    """True under `torch.autocast("cpu")`."""
    try:
        return torch.is_autocast_enabled("cpu")  # pyright: ignore[reportCallIssue] since torch 2.4
    except TypeError:
        return torch.is_autocast_cpu_enabled()


def gather(maps: Tensor, weight: Tensor, most: float) -> Events | None:
    """Events of maps [M, H, W, I], or None if more than a share `most` of the values are events."""
    inputs, side = weight.shape[1:3]
    flat = maps.detach().contiguous().view(-1)
    pixels = flat.numel() // inputs
    shape = cast("tuple[int, int, int]", (1, pixels, 1) if side == 1 else tuple(maps.shape[:3]))
    parts = _parts(inputs, _tiles(len(weight), flat.element_size()).vectors) if side == 1 else 1
    size = inputs * shape[2] * max(1, 2**15 // (inputs * shape[2]))
    counts = np.empty(-(-flat.numel() // size), np.int64)
    with KERNELS:
        use_torch_threads()
        count_events(flat.numpy(), size, counts)
    total = int(counts.sum())
    if total > most * flat.numel():
        return None
    starts = torch.empty(pixels * parts + 1, dtype=torch.int32)
    starts[-1] = total
    places, values = torch.empty(total, dtype=torch.int32), flat.new_empty(total)
    columns = parts if side == 1 else shape[2]
    with KERNELS:
        use_torch_threads()
        gather_events(
            flat.numpy(),
            inputs // parts,
            columns,
            size,
            counts.cumsum() - counts,
            starts.numpy(),
            places.numpy(),
            values.numpy(),
        )
    return Events(shape, parts, starts, places, values)


def _parts(inputs: int, vectors: int) -> int:
    """Equal runs of a pixel whose weights fit into a slab, if there are such."""
    wanted = -(-inputs * vectors * VECTOR // WEIGHT_SLAB)
    fitting = (n for n in range(wanted, 2 * wanted + 1) if inputs % n == 0)
    return next(fitting, 1)


def multiply(maps: Tensor, weight: Tensor, bias: Tensor | None, events: Events) -> Tensor:
    """Convolution [M, H, W, O] of maps [M, H, W, I] by a kernel [O, I, K, K], from their events."""
    return cast("Tensor", _Multiply.apply(maps, weight, bias, events))


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None, events: Events
    ) -> Tensor:
        outputs, inputs, side = weight.shape[:3]
        tiles = _tiles(outputs, maps.element_size())
        packed = weight.new_empty((tiles.count, side, side, inputs, tiles.width))
        out = maps.new_empty((maps.numel() // inputs, tiles.count * tiles.width))
        start = weight.new_zeros(out.shape[1])
        if bias is not None:
            start[:outputs] = bias.detach()
        with KERNELS:
            use_torch_threads()
            pack_weights(weight.detach().contiguous().numpy(), tiles.width, packed.numpy())
            multiply_rows(
                events.starts.numpy(),
                events.places.numpy(),
                events.values.numpy(),
                events.parts,
                packed.numpy(),
                tiles.vectors,
                start.numpy(),
                events.shape,
                out.numpy(),
            )
        ctx.save_for_backward(weight, events.starts, events.places, events.values)
        ctx.shape, ctx.events_shape, ctx.parts = maps.shape, events.shape, events.parts
        return out[:, :outputs].contiguous().view(*maps.shape[:-1], outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        weight, starts, places, values = ctx.saved_tensors
        events = Events(ctx.events_shape, ctx.parts, starts, places, values)
        grad = grads[0].contiguous()
        grad_maps = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_maps = _grad_of_maps(grad, weight, ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = gradient_of_weight(grad, weight, events)
        if ctx.needs_input_grad[2]:
            sums = np.zeros(len(weight))
            with KERNELS:
                use_torch_threads()
                sum_rows(grad.view(-1, len(weight)).numpy(), sums)
            grad_bias = torch.from_numpy(sums).to(grad.dtype)
        return grad_maps, grad_weight, grad_bias, None


def _grad_of_maps(grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    """Dense; torch asks for maps [M, I, H, W] but reads their shape and strides alone."""
    like = grad.new_empty(shape).permute(0, 3, 1, 2)
    reach = weight.shape[2] // 2
    aten: Any = torch.ops.aten
    found, _, _ = aten.convolution_backward(
        grad.permute(0, 3, 1, 2), like, weight, None,
        [1, 1], [reach, reach], [1, 1], False, [0, 0], 1, (True, False, False),
    )  # fmt: skip
    return found.permute(0, 2, 3, 1)


def gradient_of_weight(grad: Tensor, weight: Tensor, events: Events) -> Tensor:
    outputs, inputs, side = weight.shape[:3]
    maps, height, columns = events.shape
    reach = side // 2
    tiles = _tiles(outputs, grad.element_size())
    lines_there = maps * (height + reach)
    lines = min(lines_there, max(1, GRADIENT_SLAB // (tiles.vectors * VECTOR * (columns + reach))))
    heads = np.empty((-(-lines_there // lines), inputs + 1), np.int32)
    places, values = torch.empty_like(events.places), torch.empty_like(events.values)
    result = grad.new_zeros((tiles.count, inputs, side, side, tiles.width))
    rows = (lines + 2 * reach) * (columns + reach) + reach
    with KERNELS:
        use_torch_threads()
        threads = numba.get_num_threads()
        slabs = grad.new_empty((tiles.count, rows, tiles.width))
        sort_by_input(
            events.starts.numpy(),
            events.places.numpy(),
            events.values.numpy(),
            events.parts,
            events.shape,
            reach,
            lines,
            heads,
            places.numpy(),
            values.numpy(),
        )
        multiply_columns(
            heads,
            places.numpy(),
            values.numpy(),
            grad.view(-1, outputs).numpy(),
            events.shape,
            lines,
            tiles.vectors,
            -(-threads // tiles.count),
            slabs.numpy(),
            result.numpy(),
        )
    whole = result.permute(0, 4, 1, 2, 3).reshape(-1, *weight.shape[1:])
    return whole[:outputs].contiguous()

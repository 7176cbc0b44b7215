"""Random norse networks with branches: captured, quantised, and equal in every executor."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norse.torch import IAFCell, LIFBoxCell, LIFBoxParameters, LIFCell, LIFParameters
from torch import Tensor, nn

from export.capture import capture
from export.formats import hdf5
from export.formats.onnx import onnx_trace, to_onnx
from export.passes import FoldNorm, Quantize, Schedule
from export.torch_module import graph_to_torch, torch_trace
from hardware.engine import run


class RandomNet(nn.Module):
    """Blocks of conv, perhaps normalisation, neurons, perhaps a pool; each may be residual."""

    def __init__(self, seed: int, blocks: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.neurons, self.pools = nn.ModuleList(), nn.ModuleList()
        self.skips: list[bool] = []
        channels = 1
        for index in range(blocks):
            wide = int(self.rng.integers(1, 5))
            self.skips.append(index > 0 and bool(self.rng.integers(2)))
            wide = channels if self.skips[-1] else wide
            self.convs.append(self._conv(channels, wide))
            self.norms.append(self._norm(wide))
            self.neurons.append(self._neuron())
            self.pools.append(self._pool() if index < 2 else nn.Identity())
            channels = wide
        self.head = nn.Linear(channels, 3)

    def _conv(self, channels: int, wide: int) -> nn.Conv2d:
        kernel = int(self.rng.choice([1, 3]))
        bias = bool(self.rng.integers(2))
        conv = nn.Conv2d(channels, wide, kernel, padding=kernel // 2, bias=bias)
        conv.weight.data.mul_(float(self.rng.uniform(2, 8)))
        return conv

    def _norm(self, channels: int) -> nn.Module:
        if self.rng.integers(2):
            return nn.Identity()
        norm = nn.BatchNorm2d(channels)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.2, 1.5)
        norm.bias.data.uniform_(0, 0.6)
        return norm

    def _neuron(self) -> nn.Module:
        rate, syn = (torch.tensor(float(x)) for x in self.rng.uniform(0.2, 1.0, 2))
        kinds = (
            lambda: LIFBoxCell(LIFBoxParameters(tau_mem_inv=rate), dt=1.0),
            lambda: LIFCell(LIFParameters(tau_mem_inv=rate, tau_syn_inv=syn), dt=1.0),
            lambda: IAFCell(),
        )
        return kinds[self.rng.integers(3)]()

    def _pool(self) -> nn.Module:
        pools = (nn.Identity(), nn.Identity(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2))
        return pools[self.rng.integers(4)]

    def forward(self, x: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        state = state if state is not None else [None] * len(self.convs)
        after = []
        for index, skip in enumerate(self.skips):
            current = self.norms[index](self.convs[index](x))
            spikes, new = self.neurons[index](current, state[index])
            after.append(new)
            pool = self.pools[index]
            joined = skip and isinstance(pool, nn.Identity) and self._same_scale(index)
            x = spikes + x if joined else pool(spikes)
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        return self.head(torch.flatten(pooled, 1)), after

    def _same_scale(self, index: int) -> bool:
        """An average counts in another unit than a spike, so the two are not added here."""
        return not isinstance(self.pools[index - 1], nn.AvgPool2d)


@given(seed=st.integers(0, 2**32 - 1), blocks=st.integers(1, 4), steps=st.integers(1, 6))
@settings(max_examples=25)
def test_every_executor_fires_the_same_spikes(seed: int, blocks: int, steps: int) -> None:
    model = RandomNet(seed, blocks).eval()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 1, 9, 9), dtype=np.uint8)
    captured = capture(model, torch.zeros(1, 1, 9, 9), steps)
    graph = Schedule()(Quantize(pixel_bits=6)(FoldNorm()(captured)))
    ours = torch_trace(graph, pixels)
    engine = run(graph, pixels, count_events=False).trace
    onnx = onnx_trace(to_onnx(graph, spikes=True), pixels)
    assert ours.keys() == engine.keys() == onnx.keys()
    for name, values in ours.items():
        assert np.array_equal(values, engine[name]), name
        assert np.array_equal(values, onnx[name]), name
    assert hdf5.identical(graph, hdf5.decode(hdf5.encode(graph)))


@given(seed=st.integers(0, 2**32 - 1), blocks=st.integers(1, 4), steps=st.integers(1, 6))
@settings(max_examples=25)
def test_the_float_graph_computes_what_the_model_computes(
    seed: int, blocks: int, steps: int
) -> None:
    model = RandomNet(seed, blocks).eval()
    image = torch.rand(6, 1, 9, 9)
    graph = graph_to_torch(capture(model, image, steps))
    state, expected = None, torch.zeros(6, 3)
    with torch.no_grad():
        for _ in range(steps):
            out, state = model(image, state)
            expected += out / steps
        torch.testing.assert_close(graph(image), expected, atol=1e-5, rtol=1e-4)

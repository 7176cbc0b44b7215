"""Event-driven products: values and gradients of torch's dense convolution, for any input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikformers import pixels, small_config
from torch import Tensor, nn
from torch.nn import functional

from atsnn import event_products
from atsnn.config import ModelConfig
from atsnn.event_products import (
    BOOKKEEPING,
    FEWEST_CHANNELS,
    GRADIENT_SLAB,
    ROWS,
    VECTOR,
    WEIGHT_SLAB,
    WIDEST,
    WORTH_EVENTS,
    autocast_on_cpu,
    find_events,
    fits,
    gather,
    most_events,
    multiply,
)
from atsnn.layers import StreamAdd, convolve, pointwise
from atsnn.spikformer import Spikformer

ALL_THREADS = torch.get_num_threads()
LANES = VECTOR // 8
"""Values of a vector in float64."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sparse(shape: tuple[int, ...], density: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random values, a share of them not 0."""
    return (torch.rand(shape) < density).to(dtype) * torch.randn(shape, dtype=dtype)


def observed(product: Any, maps: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The product and its gradients."""
    inputs = [v.detach().requires_grad_() for v in (maps, weight, bias) if v is not None]
    out = product(*inputs, *([None] if bias is None else []))
    slope = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return [out, *torch.autograd.grad((out * slope).sum(), inputs)]


def by_events(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    events = gather(maps, weight, 1.0)
    assert events is not None
    return multiply(maps, weight, bias, events)


def dense(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = weight.shape[2] // 2
    return functional.conv2d(maps.permute(0, 3, 1, 2), weight, bias, padding=padding).permute(
        0, 2, 3, 1
    )


def assert_same(maps: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    ours, theirs = observed(by_events, maps, weight, bias), observed(dense, maps, weight, bias)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class TestAgainstDense:
    @settings(max_examples=60, deadline=None)
    @given(
        maps=st.integers(1, 4),
        height=st.integers(1, 9),
        width=st.integers(1, 9),
        inputs=st.integers(1, 130),
        outputs=st.integers(1, 2 * WIDEST * LANES + 3),
        side=st.sampled_from([1, 3]),
        density=st.sampled_from([0.0, 0.01, 0.2, 0.7, 1.0]),
        has_bias=st.booleans(),
    )
    def test_values_and_gradients_at_any_shape_and_density(
        self,
        maps: int,
        height: int,
        width: int,
        inputs: int,
        outputs: int,
        side: int,
        density: float,
        has_bias: bool,
    ) -> None:
        x = sparse((maps, height, width, inputs), density)
        weight = torch.randn(outputs, inputs, side, side, dtype=torch.float64)
        assert_same(x, weight, torch.randn(outputs, dtype=torch.float64) if has_bias else None)

    def test_more_weights_than_a_slab(self) -> None:
        inputs = 2 * WEIGHT_SLAB // VECTOR
        assert_same(sparse((1, 1, 7, inputs), 0.1), torch.randn(9, inputs, 1, 1).double())

    def test_inputs_that_do_not_divide_into_slabs(self) -> None:
        inputs = 2609  # a prime
        assert inputs * VECTOR > WEIGHT_SLAB
        assert_same(sparse((1, 1, 3, inputs), 0.1), torch.randn(9, inputs, 1, 1).double())

    @pytest.mark.parametrize("side", [1, 3])
    def test_more_gradients_than_a_slab(self, side: int) -> None:
        places = 2 * GRADIENT_SLAB // VECTOR + 1
        maps, height, width = (1, places, 1) if side == 1 else (5, places // 5 // 40 + 1, 40)
        assert places > 2 * ROWS
        assert_same(sparse((maps, height, width, 3), 0.2), torch.randn(2, 3, side, side).double())

    def test_a_line_wider_than_a_slab(self) -> None:
        width = GRADIENT_SLAB // VECTOR + 1
        assert_same(sparse((1, 2, width, 2), 0.2), torch.randn(2, 2, 3, 3).double())

    def test_inputs_and_gradients_that_are_not_contiguous(self) -> None:
        x = sparse((3, 6, 5, 20), 0.3).transpose(1, 2).contiguous().transpose(1, 2)
        weight = torch.randn(3, 3, 24, 20).double().permute(2, 3, 0, 1)
        assert not x.is_contiguous()
        assert not weight.is_contiguous()

        def turned(product: Any) -> Any:
            return lambda *inputs: product(*inputs).permute(0, 3, 2, 1)

        ours = observed(turned(by_events), x, weight, None)
        theirs = observed(turned(dense), x, weight, None)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    def test_float32_is_as_close_to_float64_as_torch_is(self) -> None:
        x, weight = sparse((2, 16, 16, 48), 0.15), torch.randn(96, 48, 3, 3).double()
        exact = observed(dense, x, weight, None)
        ours = observed(by_events, x.float(), weight.float(), None)
        theirs = observed(dense, x.float(), weight.float(), None)
        for a, b, c in zip(ours, theirs, exact, strict=True):
            assert (a - c).abs().max() <= 2 * (b - c).abs().max()

    def test_an_input_without_a_gradient_gets_none(self) -> None:
        x, weight = sparse((1, 4, 4, 16), 0.2), torch.randn(16, 16, 3, 3).double().requires_grad_()
        by_events(x, weight, None).sum().backward()
        assert x.grad is None
        assert weight.grad is not None


def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, weight = sparse((4, 16, 16, 40), 0.2, torch.float32), torch.randn(70, 40, 3, 3)
    rows, matrix = x.view(1, 1, -1, 40), torch.randn(70, 40, 1, 1)
    bias = torch.randn(70)
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = observed(by_events, x, weight, bias) + observed(by_events, rows, matrix, bias)
            del found[1], found[4]  # torch's own dense gradient of the input
            results.append(found)
    finally:
        torch.set_num_threads(ALL_THREADS)
    assert len(results[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_more_is_kept_for_the_backward_pass_than_the_input() -> None:
    x = sparse((4, 8, 8, 64), 0.3, torch.float32)
    weight = torch.randn(128, 64, 3, 3, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        events = find_events(x, weight)
        assert events is not None
        multiply(x, weight, None, events)
    others = [tensor for tensor in kept if tensor is not weight]
    assert sum(t.numel() * t.element_size() for t in others) < x.numel() * x.element_size()


class TestChoice:
    weight = torch.zeros(FEWEST_CHANNELS, FEWEST_CHANNELS, 3, 3)

    @staticmethod
    def spikes(share: float, channels: int = FEWEST_CHANNELS) -> Tensor:
        """Maps of which this share is 1, to the last value."""
        flat = torch.zeros(100 * channels)
        flat[: int(share * flat.numel())] = 1.0
        return flat.view(1, 10, 10, channels)

    def test_few_events_are_counted_exactly(self) -> None:
        share = most_events(self.weight)
        events = find_events(self.spikes(share), self.weight)
        assert events is not None
        assert len(events.values) == int(share * 100 * FEWEST_CHANNELS)

    def test_more_are_left_to_dense_products(self) -> None:
        share = most_events(self.weight)
        assert find_events(self.spikes(share + 0.01), self.weight) is None

    def test_the_more_weights_an_event_meets_the_more_events_are_worth_it(self) -> None:
        matrix = torch.zeros(BOOKKEEPING, 20, 1, 1)
        assert most_events(matrix) == WORTH_EVENTS / 2
        kernel = torch.zeros(BOOKKEEPING, 20, 3, 3)
        assert most_events(kernel) == pytest.approx(WORTH_EVENTS * 0.9)

    @pytest.mark.parametrize("axis", [0, 1])
    def test_narrow_layers_stay_dense(self, axis: int) -> None:
        shape = [FEWEST_CHANNELS, FEWEST_CHANNELS, 3, 3]
        shape[axis] -= 1
        assert find_events(self.spikes(0.0, shape[1]), torch.zeros(shape)) is None

    def test_mixed_precision_stays_dense(self) -> None:
        assert not autocast_on_cpu()
        with torch.autocast("cpu", torch.bfloat16):
            assert autocast_on_cpu()
            assert find_events(self.spikes(0.0), self.weight) is None

    def test_other_types_and_devices_stay_dense(self) -> None:
        maps = self.spikes(0.0)
        assert find_events(maps.bfloat16(), self.weight.bfloat16()) is None
        assert find_events(maps.double(), self.weight) is None
        assert find_events(maps.to("meta"), self.weight.to("meta")) is None
        assert find_events(maps[:0], self.weight) is None

    def test_only_kernels_that_keep_the_size_of_a_map(self) -> None:
        assert fits(nn.Conv2d(16, 16, 3, padding=1))
        assert fits(nn.Conv2d(16, 16, 1))
        assert not fits(nn.Conv2d(16, 16, 3))
        assert not fits(nn.Conv2d(16, 16, 5, padding=2))
        assert not fits(nn.Conv2d(16, 16, 3, padding=1, stride=2))
        assert not fits(nn.Conv2d(16, 16, 3, padding=1, groups=2))
        assert not fits(nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"))
        assert not fits(nn.Conv2d(16, 16, 3, padding="same"))

    def test_layers_take_the_path_that_was_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        used: list[int] = []
        product = event_products.multiply
        monkeypatch.setattr(event_products, "multiply", lambda *a: used.append(1) or product(*a))
        synapse, matrix = nn.Conv2d(24, 30, 3, padding=1), torch.randn(30, 24)
        for density, calls in ((0.02, 2), (0.9, 0)):
            used.clear()
            x = sparse((2, 4, 9, 24), density, torch.float32)
            expected = functional.linear(x, matrix)
            torch.testing.assert_close(pointwise(x, matrix, None), expected)
            maps = x.permute(0, 3, 1, 2)
            rows = convolve(synapse, maps)
            assert rows.is_contiguous()
            torch.testing.assert_close(rows.permute(0, 3, 1, 2), synapse(maps))
            assert len(used) == calls


def trained(model: Spikformer, image: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Spikes of every layer; gradients by name."""
    model = copy.deepcopy(model).double().train()
    spikes: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        spikes.append(output[0] if isinstance(output, tuple) else output)

    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("conv2", "conv3", "conv4", "position", "q", "fc1", "fc2"):
            module.register_forward_hook(note)
    output = model(image.double())
    (output.logits.square().sum() + output.gates.mean()).backward()
    return spikes, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(image_size=(16, 16), blocks=2, dim=64, heads=2, steps=4),
        small_config().model_copy(update={"dim": 64}),
        small_config("raster").model_copy(update={"dim": 64}),
    ],
    ids=["all tokens", "halting and merging", "raster"],
)
def test_a_training_step_fires_the_same_spikes(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where another order of sums moves no spike."""
    model = Spikformer(config)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 2.5)
            nn.init.uniform_(module.bias, -0.5, 0.6)
    image = pixels(config, 6)
    used: list[int] = []
    product = event_products.multiply
    monkeypatch.setattr(event_products, "multiply", lambda *a: used.append(1) or product(*a))
    monkeypatch.setattr(event_products, "most_events", lambda _: 1.0)
    spikes, gradients = trained(model, image)
    assert len(used) > 8
    monkeypatch.setattr(event_products, "most_events", lambda _: -1.0)
    expected, expected_gradients = trained(model, image)
    assert len(spikes) > 8
    assert all(torch.equal(a, b) for a, b in zip(spikes, expected, strict=True))
    assert gradients.keys() == expected_gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(
            value, expected_gradients[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("unit", [1.0, 8.0])
def test_a_spike_joins_the_stream_with_its_unit(unit: float) -> None:
    spikes = (torch.rand(2, 3, 4, 5) < 0.3).float()
    stream = torch.randint(0, 40, (2, 3, 4, 5)).float()
    assert torch.equal(StreamAdd(unit)(spikes, stream), spikes * unit + stream)

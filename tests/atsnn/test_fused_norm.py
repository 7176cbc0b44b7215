"""Normalisation and neurons in one operation: spikes and gradients of torch's and norse's own."""

from __future__ import annotations

import copy

import pytest
import torch
from spikformers import pixels, small_config
from torch import Tensor, nn

from atsnn import fused_norm
from atsnn.config import ModelConfig
from atsnn.fused_norm import CHUNK, TILE, normalize_and_fire
from atsnn.layers import ConvLayer, TokenLayer, TokenNorm
from atsnn.neurons import SpikingNeuron, run_steps
from atsnn.spikformer import Spikformer

NEURON = SpikingNeuron(2.0, 1.0)


def norm_of(channels: int, training: bool = True) -> TokenNorm:
    norm = TokenNorm(channels).double()
    nn.init.uniform_(norm.weight, 0.5, 3.0)
    nn.init.uniform_(norm.bias, -0.5, 1.0)
    assert norm.running_mean is not None
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    return norm.train(training)


def defined(current: Tensor, norm: TokenNorm, neuron: SpikingNeuron, steps: int, gate=None):
    """torch's batch norm, then norse's own step: current [Tx, R, C], gate [T, R]."""
    normalised = norm(current[:, None], None if gate is None else gate[:, None])
    spikes, state = run_steps(
        neuron.step,
        normalised.expand(steps, *normalised.shape[1:]),
        None if gate is None else gate[:, None],
        None,
    )
    return spikes[:, 0], state[0]


def fused(current: Tensor, norm: TokenNorm, neuron: SpikingNeuron, steps: int, gate=None):
    return normalize_and_fire(current, norm, neuron.fused, steps, gate)


def observed(run, current: Tensor, norm: TokenNorm, neuron: SpikingNeuron, steps: int, gate=None):
    """Spikes, and what is within tolerance: state, statistics and all gradients."""
    norm = copy.deepcopy(norm)
    spikes, state = run(current, norm, neuron, steps, gate)
    weight = torch.sin(torch.arange(spikes.numel(), dtype=spikes.dtype)).view_as(spikes)
    loss = (spikes * weight).sum() + state.square().sum()
    inputs = [current, norm.weight, norm.bias, *([] if gate is None else [gate])]
    gradients = torch.autograd.grad(loss, inputs)
    return spikes, [state, norm.running_mean, norm.running_var, *gradients]


def assert_same(current: Tensor, norm: TokenNorm, steps: int, gate=None, tau: float = 2.0) -> None:
    """In float64 a rounding that differs moves no spike, so spikes are equal one by one."""
    neuron = SpikingNeuron(tau, 1.0)
    spikes, others = observed(fused, current, norm, neuron, steps, gate)
    expected, expected_others = observed(defined, current, norm, neuron, steps, gate)
    assert 0.02 < expected.mean() < 0.9
    assert torch.equal(spikes, expected)
    for ours, theirs in zip(others, expected_others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def currents(steps: int, rows: int, channels: int) -> Tensor:
    return (torch.randn(steps, rows, channels, dtype=torch.float64) * 2 + 0.7).requires_grad_()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class TestAgainstTorchAndNorse:
    @pytest.mark.parametrize("channels", [1, 3, 16, 48, TILE + 5])
    @pytest.mark.parametrize("tau", [1.5, 2.0])
    def test_same_spikes_and_gradients(self, channels: int, tau: float) -> None:
        assert_same(currents(4, 101, channels), norm_of(channels), 4, tau=tau)

    def test_more_rows_than_a_chunk_of_tiles(self) -> None:
        rows = 2 * CHUNK * (TILE // 16) + 7
        assert_same(currents(2, rows, 16), norm_of(16), 2)

    def test_one_current_for_all_steps(self) -> None:
        assert_same(currents(1, 50, 12), norm_of(12), 4)

    def test_running_statistics(self) -> None:
        assert_same(currents(4, 50, 12), norm_of(12, training=False), 4)

    @pytest.mark.parametrize("training", [True, False])
    def test_gates(self, training: bool) -> None:
        gate = (torch.rand(4, 60) > 0.4).double()
        gate[:, :5] = 0.0
        assert_same(currents(4, 60, 24), norm_of(24, training), 4, gate.requires_grad_())

    @pytest.mark.parametrize("opened", [0, 1, 2])
    def test_few_open_rows_take_the_running_statistics(self, opened: int) -> None:
        gate = torch.zeros(2, 6, dtype=torch.float64)
        gate[0, :opened] = 1.0
        current, norm = currents(2, 6, 4), norm_of(4)
        ours = observed(fused, current, norm, NEURON, 2, gate.requires_grad_())
        theirs = observed(defined, current, norm, NEURON, 2, gate)
        assert torch.equal(ours[0], theirs[0])
        for a, b in zip(ours[1], theirs[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

    def test_float32_is_at_least_as_close_to_float64_as_torch_is(self) -> None:
        norm = norm_of(32).float()
        current = currents(4, 5000, 32).float().detach().requires_grad_()
        spikes, ours = observed(fused, current, norm, NEURON, 4)
        expected, theirs = observed(defined, current, norm, NEURON, 4)
        wide = current.detach().double().requires_grad_()
        _, exact = observed(defined, wide, copy.deepcopy(norm).double(), NEURON, 4)
        assert torch.equal(spikes, expected)
        for a, b, c in zip(ours, theirs, exact, strict=True):
            assert (a - c).abs().max() <= (b - c).abs().max()

    def test_statistics_of_values_far_from_zero(self) -> None:
        current = (torch.randn(4, 3000, 8) * 0.1 + 50.0).requires_grad_()
        norm = nn.BatchNorm1d(8, momentum=1.0)
        normalize_and_fire(current, norm, NEURON.fused, 4)
        exact = current.detach().double().flatten(0, 1)
        torch.testing.assert_close(norm.running_mean.double(), exact.mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(norm.running_var.double(), exact.var(0), rtol=1e-4, atol=0)

    def test_any_number_of_threads_gives_the_same_bits(self) -> None:
        norm = norm_of(16).float()
        current = currents(2, 5000, 16).float().detach().requires_grad_()
        before = torch.get_num_threads()
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            spikes, others = observed(fused, current, norm, NEURON, 2)
            results.append([spikes, *others])
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norm, "fits", lambda *_: False)


def trained(model: Spikformer, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, buffers and gradients by name; those of biases in front of a batch norm are 0."""
    model = copy.deepcopy(model).double().train()
    output = model(image.double())
    (output.logits.square().sum() + output.gates.mean()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gradients = {n: g for n, g in gradients.items() if not n.endswith("synapse.bias")}
    return output.logits, {**gradients, **dict(model.named_buffers())}


class TestInTheModel:
    @pytest.mark.parametrize(
        "config",
        [
            ModelConfig(image_size=(16, 16), blocks=2, dim=32, heads=2, steps=4),
            small_config(),
            small_config("raster"),
            small_config("steps", merging=False),
        ],
        ids=["all tokens", "halting and merging", "raster", "steps"],
    )
    def test_training_step_is_that_of_torch_and_norse(
        self, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(1)
        model = Spikformer(config)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 2.5)
                nn.init.uniform_(module.bias, -0.5, 1.0)
        image = pixels(config, 6)
        logits, gradients = trained(model, image)
        step_by_step(monkeypatch)
        expected, expected_gradients = trained(model, image)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        assert gradients.keys() == expected_gradients.keys()
        for name, value in gradients.items():
            assert torch.allclose(value, expected_gradients[name], rtol=1e-6, atol=1e-8), name

    def test_layers_under_other_norms_run_step_by_step(self) -> None:
        layer = TokenLayer(nn.Linear(3, 4), nn.Identity(), NEURON)
        assert not fused_norm.fits(torch.zeros(1), layer.norm)
        assert layer(torch.randn(2, 3, 5, 3))[0].shape == (2, 3, 5, 4)
        conv = ConvLayer(nn.Conv2d(3, 4, 3), nn.Identity(), NEURON)
        assert conv(torch.randn(2, 3, 3, 5, 5)).shape == (2, 3, 4, 3, 3)


class TestLeavingOut:
    """Tokens that are closed at every step, without a gradient of the gate."""

    @staticmethod
    def observed(layer: TokenLayer, x: Tensor, gate: Tensor) -> list[Tensor]:
        layer = copy.deepcopy(layer)
        spikes, state = layer(x, gate)
        weight = torch.sin(torch.arange(spikes.numel(), dtype=x.dtype)).view_as(spikes)
        loss = (spikes * weight).sum() + state.square().sum()
        norm = layer.norm
        assert isinstance(norm, TokenNorm)
        inputs = [x, layer.synapse.weight, norm.weight, norm.bias]
        running = [norm.running_mean, norm.running_var]
        return [spikes, state, *torch.autograd.grad(loss, inputs), *running]

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
    @pytest.mark.parametrize("training", [True, False])
    def test_equals_masking(
        self, share: float, training: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer = TokenLayer(nn.Linear(6, 8).double(), norm_of(8, training), NEURON)
        x = torch.randint(0, 3, (3, 4, 9, 6)).double().requires_grad_()
        gate = (torch.rand(3, 4, 9) < 0.8).double() * (torch.rand(4, 9) < share)
        called = []
        without = TokenLayer._fused_without
        monkeypatch.setattr(
            TokenLayer, "_fused_without", lambda *a: called.append(1) or without(*a)
        )
        left_out = self.observed(layer, x, gate)
        monkeypatch.setattr("atsnn.layers.WORTH_LEAVING_OUT", -1.0)
        masked = self.observed(layer, x, gate)
        assert called == ([1] if share else [])
        assert torch.equal(left_out[0], masked[0])
        for ours, theirs in zip(left_out, masked, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

    def test_a_gate_that_learns_is_masked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(TokenLayer, "_fused_without")
        layer = TokenLayer(nn.Linear(6, 8).double(), norm_of(8), NEURON)
        gate = torch.zeros(2, 2, 5, dtype=torch.float64)
        gate[:, :, 0] = 1.0
        spikes, _ = layer(torch.ones(2, 2, 5, 6, dtype=torch.float64), gate.requires_grad_())
        assert spikes.requires_grad

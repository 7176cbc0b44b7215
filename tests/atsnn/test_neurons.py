"""The neuron is norse's LIFBox; its fused form fires the same spikes and has the same gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norse.torch import LIFBoxCell, LIFBoxParameters
from torch import Tensor

from atsnn.neurons import SpikingNeuron, run_steps


def eighths(shape: tuple[int, ...], seed: int) -> Tensor:
    """Currents in multiples of 1/8: with tau = 2, potentials often meet the threshold exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 25, shape, generator=generator) / 8


class TestAgainstPeers:
    @given(seed=st.integers(0, 10_000), tau=st.sampled_from([1.5, 2.0, 4.0]))
    @settings(max_examples=25)
    def test_fires_as_norse_lif_box_cell(self, seed: int, tau: float) -> None:
        current = eighths((12, 2, 3, 5), seed)
        cell = LIFBoxCell(
            LIFBoxParameters(tau_mem_inv=torch.tensor(1 / tau), v_th=torch.tensor(1.0)), dt=1.0
        )
        state, expected = None, []
        for step in current:
            spikes, state = cell(step, state)
            expected.append(spikes)
        spikes, voltage = SpikingNeuron(tau, 1.0)(current)
        assert state is not None
        assert spikes.sum() > 0
        assert torch.equal(spikes, torch.stack(expected))
        assert torch.equal(voltage, state.v)

    def test_fires_as_spikingjelly_up_to_strictness(self) -> None:
        """SpikingJelly fires at v >= v_th, norse at v > v_th: ours with the next lower v_th."""
        from spikingjelly.activation_based.neuron import LIFNode

        current = eighths((40, 4, 4, 16), seed=1)
        theirs = LIFNode(tau=2.0, v_threshold=1.0, v_reset=0.0, step_mode="m")(current)
        just_below = float(np.nextafter(np.float32(1.0), np.float32(0.0)))
        assert not torch.equal(SpikingNeuron(2.0, 1.0)(current)[0], theirs)
        assert torch.equal(SpikingNeuron(2.0, just_below)(current)[0], theirs)


class TestGate:
    def test_closed_gate_holds_the_potential_and_fires_nothing(self) -> None:
        current = torch.full((3, 1, 1, 1), 1.5)
        gate = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
        spikes, voltage = SpikingNeuron(2.0, 1.0)(current, gate)
        assert spikes.flatten().tolist() == [0.0, 0.0, 1.0]
        assert voltage.item() == 0.0

    def test_rows_left_out_fire_as_masked_ones(self) -> None:
        neuron = SpikingNeuron(2.0, 1.0)
        current = eighths((4, 3, 6, 5), seed=2)
        gate = (torch.rand(4, 3, 6) > 0.4).float()
        masked, _ = neuron(current, gate)
        opened = gate > 0
        rows, _ = neuron.forward_rows(current[opened], opened)
        assert rows.sum() > 0
        assert torch.equal(masked[opened], rows)

    def test_state_carries_over_between_chunks_of_steps(self) -> None:
        neuron = SpikingNeuron(2.0, 1.0)
        current = eighths((6, 2, 4, 3), seed=4)
        whole, _ = neuron(current)
        first, voltage = neuron(current[:2])
        rest, _ = neuron(current[2:], None, voltage)
        assert torch.equal(whole, torch.cat([first, rest]))


class TestFused:
    @pytest.mark.parametrize(
        ("shape", "gated"), [((4, 3, 5, 7), True), ((4, 3, 5, 7), False), ((4, 3, 2, 6, 6), False)]
    )
    def test_equals_norse_step_in_spikes_state_and_gradients(
        self, shape: tuple[int, ...], gated: bool
    ) -> None:
        neuron = SpikingNeuron(2.0, 1.0)
        current = (torch.randn(shape) * 2).requires_grad_()
        gate = (torch.rand(shape[:3]) > 0.3).float().requires_grad_() if gated else None
        weight = torch.randn(shape)
        inputs = [current] if gate is None else [current, gate]

        def observe(result: tuple[Tensor, Tensor]) -> list[Tensor]:
            spikes, voltage = result
            loss = (spikes * weight).sum() + voltage.square().sum()
            return [spikes, voltage, *torch.autograd.grad(loss, inputs)]

        expected = observe(run_steps(neuron.step, current, gate, None))
        found = observe(neuron(current, gate))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_constant_current_may_be_given_once(self) -> None:
        neuron = SpikingNeuron(2.0, 1.0)
        image = eighths((1, 2, 3, 4, 4), seed=6).requires_grad_()
        spikes, _ = neuron(image.expand(4, *image.shape[1:]))
        copied, _ = neuron(image.detach().repeat(4, 1, 1, 1, 1))
        assert torch.equal(spikes, copied)
        (gradient,) = torch.autograd.grad(spikes.sum(), image)
        assert gradient.shape == image.shape

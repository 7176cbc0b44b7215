"""Spiking neurons over time steps: norse's LIFBox, with a gate per token.

Update (norse `lif_box_feed_forward_step` with dt * tau_mem_inv = 1/tau):
`v += (x - v) / tau; s = v > threshold; v = 0 where s`. A neuron whose token's gate is closed keeps
its membrane potential and fires nothing.
"""

from __future__ import annotations

import torch
from norse.torch.functional.lif_box import (
    LIFBoxFeedForwardState,
    LIFBoxParameters,
    lif_box_feed_forward_step,
)
from torch import Tensor, nn

from atsnn.fixed_point import NeuronModel
from atsnn.fused import FusedNeuron, fits, float_forward, gate_like, run_fused

SURROGATE = "triangle"
SURROGATE_SLOPE = 1.0


class SpikingNeuron(nn.Module):
    """A layer of norse LIFBox neurons, hard reset to 0, zero at the first step.

    Args:
        tau: membrane time constant in time steps.
        threshold: v_th; the neuron fires when the potential is strictly above it.
    """

    def __init__(self, tau: float, threshold: float) -> None:
        super().__init__()
        self.tau = tau
        self.threshold = threshold
        self._parameters_norse = LIFBoxParameters(
            tau_mem_inv=torch.tensor(1.0 / tau),
            v_leak=torch.tensor(0.0),
            v_th=torch.tensor(threshold),
            v_reset=torch.tensor(0.0),
            method=SURROGATE,
            alpha=SURROGATE_SLOPE,
        )

    @property
    def model(self) -> NeuronModel:
        """The neuron as the fixed-point arithmetic describes it."""
        return NeuronModel(1.0 / self.tau, 1.0, self.threshold)

    def step(self, current: Tensor, voltage: Tensor) -> tuple[Tensor, Tensor]:
        """One step on tensors of any one shape; returns spikes and the new membrane potential."""
        spikes, state = lif_box_feed_forward_step(
            current, LIFBoxFeedForwardState(v=voltage), self._parameters_norse, dt=1.0
        )
        return spikes, state.v

    def forward(
        self, current: Tensor, gate: Tensor | None = None, voltage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run all steps of `current` [T, B, ...] under `gate` [T, B, N] (1 = open).

        Returns spikes [T, B, ...] and the membrane potential [B, ...] after the last step.
        """
        if fits(current, voltage):
            return run_fused(self.fused, current, None, gate, voltage)
        return run_steps(self.step, current, gate, voltage)

    @property
    def fused(self) -> FusedNeuron:
        """Constants of the fused form of `step`."""
        rate = 1.0 / self.tau
        return FusedNeuron(
            kernel=float_forward,
            keep=1.0 - rate,
            gain=rate,
            threshold=self.threshold,
            unit=1.0,
            slope=SURROGATE_SLOPE,
            limit=float("inf"),
        )

    def forward_rows(
        self, current: Tensor, gate: Tensor, voltage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run all steps for open tokens only: `current` [R, D], the rows where `gate` is true."""
        return run_rows(self.step, current, gate, voltage)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, threshold={self.threshold}"


def run_steps(step, current: Tensor, gate: Tensor | None, voltage: Tensor | None):
    """Iterate `step` over axis 0 of `current`; closed gates hold the state and mask spikes."""
    state = torch.zeros_like(current[0]) if voltage is None else voltage
    fired = []
    for t in range(current.shape[0]):
        spikes, new_state = step(current[t], state)
        if gate is not None:
            opened = gate_like(gate[t], spikes)
            spikes = spikes * opened
            new_state = torch.where(opened.detach() > 0, new_state, state)
        state = new_state
        fired.append(spikes)
    return torch.stack(fired), state


def run_rows(step, current: Tensor, gate: Tensor, voltage: Tensor | None):
    """Iterate `step` over the rows of `current` [R, D] that `gate` [T, B, N] lets through."""
    width = current.shape[-1]
    state = current.new_zeros((*gate.shape[1:], width)) if voltage is None else voltage.clone()
    fired = []
    for t, rows in enumerate(current.split([int(n) for n in gate.flatten(1).sum(1)])):
        spikes, state[gate[t]] = step(rows, state[gate[t]])
        fired.append(spikes)
    return torch.cat(fired), state

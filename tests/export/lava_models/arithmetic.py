"""Lava's own process models, stepped without a runtime; run in a child by `test_lava_models`.

In a folder of its own: Lava executes every file beside the module that defines a process.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
from lava.proc.conv.models import PyConvModelFixed
from lava.proc.dense.models import PyDenseModelBitAcc
from lava.proc.lif.models import PyLifResetModelBitAcc
from lava.utils.weightutils import SignMode

from atsnn.fixed_point import NeuronConstants
from export.lava.conv_model import PyConvModelMatmul
from export.lava.kernels import WRAPS_ONCE, neurons

STEPS, INTERVAL, OFFSET, NEURONS = 64, 5, 3, 50


class Port:
    """Stands for a connected port: gives what is put in, keeps what is sent."""

    def __init__(self, values=()):
        self.values, self.sent = list(values), []

    def recv(self):
        return self.values.pop(0)

    def send(self, value):
        self.sent.append(np.array(value))


def lif_reset_model(constants, activations):
    model = PyLifResetModelBitAcc({"reset_interval": INTERVAL, "reset_offset": OFFSET})
    model.u = np.zeros(NEURONS, np.int32)
    model.v = np.zeros(NEURONS, np.int32)
    model.du, model.dv = np.array([constants.du]), np.array([constants.dv])
    model.vth = np.array([constants.threshold])
    model.bias_mant = constants.bias_mantissa.astype(np.int16)
    model.bias_exp = np.array([constants.bias_exponent])
    model.a_in, model.s_out = Port(activations), Port()
    return model


def stepped(model, steps):
    for _ in range(steps):
        model.time_step += 1
        model.run_spk()


def lif(du: int, dv: int, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Spikes and voltages [2, STEPS, NEURONS] of Lava's LIFReset and of `kernels.neurons`."""
    rng = np.random.default_rng(du + dv)
    mantissa = rng.integers(-4095, 4096, NEURONS, dtype=np.int32)
    constants = NeuronConstants(du, dv, 500, mantissa, 3)
    activations = rng.integers(-largest, largest + 1, (STEPS, NEURONS), dtype=np.int32)
    model = lif_reset_model(constants, activations)
    u, v = np.zeros(NEURONS, np.int32), np.zeros(NEURONS, np.int32)
    ours, our_voltages, lava_voltages = [], [], []
    for time_step, activation in enumerate(activations, start=1):
        if time_step % INTERVAL == OFFSET:
            u[:], v[:] = 0, 0
        ours.append(neurons(u, v, activation, constants, constants.bias))
        our_voltages.append(v.copy())
        stepped(model, 1)
        lava_voltages.append(model.v.copy())
    return np.stack([model.s_out.sent, lava_voltages]), np.stack([ours, our_voltages])


def conv(groups: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Results of Lava's own model of Conv and of ours."""
    rng = np.random.default_rng(groups)
    weight = 2 * rng.integers(-128, 128, (6, 2, 3, 4 // groups), dtype=np.int32)
    frames = rng.integers(0, 2**bits if bits else 2, (4, 7, 9, 4), dtype=np.int32)
    sent = []
    for kind in (PyConvModelFixed, PyConvModelMatmul):
        model = kind({})
        model.weight, model.groups = weight, np.array([groups])
        model.kernel_size, model.stride = np.array([2, 3]), np.array([2, 1])
        model.padding, model.dilation = np.array([1, 2]), np.array([1, 2])
        model.num_message_bits = np.array([bits])
        model.a_buf = np.zeros((4, 9, 6), np.int32)
        model.s_in, model.a_out = Port(frames), Port()
        stepped(model, 4)
        sent.append(np.stack(model.a_out.sent))
    return sent[0], sent[1]


def dense(**options: SignMode) -> tuple[np.ndarray, np.ndarray]:
    """What Lava's Dense makes of weights that are all negative, -256 among them."""
    model = PyDenseModelBitAcc(options)
    model.weights = np.array([[-256, -2], [-4, -254]], np.int32)
    model.num_message_bits = np.array([6])
    model.a_buff = np.zeros(2, np.int32)
    model.s_in, model.a_out = Port([np.array([1, 0])] * 2), Port()
    stepped(model, 2)
    return model.a_out.sent[1], np.array([-256, -4])


CASES = {
    "lif, no current memory": lambda: lif(4095, 2048, 2**17 - 1),
    "lif, no leak": lambda: lif(4095, 0, 2**17 - 1),
    "lif, both memories": lambda: lif(2047, 1024, 2**15),
    "lif, wraps once": lambda: lif(0, 4096, WRAPS_ONCE),
    "lif, wraps twice": lambda: lif(0, 4096, 2 * WRAPS_ONCE),
    "conv, spikes": lambda: conv(1, 0),
    "conv, graded": lambda: conv(1, 6),
    "conv, groups": lambda: conv(2, 6),
    "dense, mixed signs": lambda: dense(sign_mode=SignMode.MIXED),
    "dense, guessed signs": lambda: dense(),
}


def compare(work: Path) -> None:
    """Results of all cases: `<case>/lava`, `<case>/ours`; and whether torch came along."""
    importlib.import_module("export.lava.run")
    importlib.import_module("export.lava.layers")
    results = {}
    for name, case in CASES.items():
        results[f"{name}/lava"], results[f"{name}/ours"] = case()
    np.savez(work / "result.npz", torch="torch" in sys.modules, **results)

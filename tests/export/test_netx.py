"""Feed-forward chains as netx HDF5: what is written, what is refused, and equality on lava-dl."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from norse.torch import LIFBoxCell, LIFBoxParameters, LIFCell, LIFParameters, SequentialState
from torch import Tensor, nn

from export.capture import capture
from export.errors import UnsupportedTargetError
from export.formats.netx import encode_netx, netx_trace, save_netx
from export.graph import Graph
from export.passes import Quantize
from hardware.engine import run

BOX = LIFBoxParameters(tau_mem_inv=torch.tensor(500.0))
CURRENT = LIFParameters(tau_mem_inv=torch.tensor(400.0), tau_syn_inv=torch.tensor(600.0))
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), dtype=np.uint8)


class ConvChain(SequentialState):
    """Two convolutions and a dense layer with current memory, a read-out at the end."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1),
            LIFBoxCell(BOX),
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1)),
            LIFBoxCell(BOX),
            nn.Flatten(),
            nn.Linear(126, 20),
            LIFCell(CURRENT),
            nn.Linear(20, 5),
        )


class DenseChain(SequentialState):
    """Dense layers only, on flattened pixels, ending in spikes."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(64, 16, bias=False),
            LIFBoxCell(BOX),
            nn.Linear(16, 5),
            LIFBoxCell(BOX),
        )


def quantised(model: nn.Module, **options) -> Graph:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
            module.weight.data.mul_(6.0)
    graph = capture(model, torch.zeros(1, 1, 8, 8), steps=4)
    return Quantize(**{"bias_exponent": 6, **options})(graph)


@pytest.mark.lava
@pytest.mark.parametrize("net", [ConvChain, pytest.param(DenseChain, marks=pytest.mark.slow)])
def test_lava_dl_fires_the_spikes_of_the_engine(net: type[nn.Module]) -> None:
    pytest.importorskip("lava.lib.dl", reason="lava-dl is not installed")
    graph = quantised(net())
    ours, theirs = run(graph, PIXELS, count_events=False).trace, netx_trace(graph, PIXELS)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.any()
        assert np.array_equal(values, theirs[name]), name


class TestFile:
    def test_layers_and_neurons(self, tmp_path: Path) -> None:
        graph = quantised(ConvChain())
        with h5py.File(save_netx(graph, tmp_path / "chain.net"), "r") as file:
            kinds = [file[f"layer/{i}/type"][()].decode() for i in range(len(file["layer"]))]
            assert kinds == ["input", "conv", "conv", "flatten", "dense"]
            assert file["layer/0/shape"][()].tolist() == [1, 8, 8]
            assert file["layer/2/stride"][()].tolist() == [2, 1]
            assert file["layer/4/neuron/iDecay"][()] == round(4096 * 0.6)
            assert file["readout/weight"].shape == (5, 20)

    def test_is_written_whole_or_not_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UnsupportedTargetError, match="cannot be written"):
            save_netx(quantised(DenseChain()), tmp_path / "file" / "chain.net")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)
        self.lif_a, self.lif_b = LIFBoxCell(BOX), LIFBoxCell(BOX)
        self.head = nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lif_a(self.a(x))
        y, _ = self.lif_b(self.b(x))
        return self.head((x + y).flatten(1))


def box() -> LIFBoxCell:
    return LIFBoxCell(BOX)


def chain(features: int, *layers: nn.Module) -> nn.Module:
    return SequentialState(*layers, nn.Flatten(), nn.Linear(features, 3))


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "options", "message"),
        [
            (Residual(), {}, r"LIF lif_a .*read by 2 nodes \(b, add\), netx holds no branches"),
            (
                chain(18, nn.Conv2d(1, 2, 3), box(), nn.MaxPool2d(2)),
                {},
                "OrPool 2 .*netx holds Conv and Linear layers only",
            ),
            (
                chain(32, nn.Conv2d(1, 2, 3), box(), nn.Conv2d(2, 2, 3, groups=2), box()),
                {},
                "Conv 2 .*it has 2 groups",
            ),
            (
                DenseChain(),
                {"bias_exponent": 2},
                r"exponent 2, netx holds multiples of 64; quantise",
            ),
        ],
    )
    def test_by_name(self, model: nn.Module, options: dict, message: str) -> None:
        with pytest.raises(UnsupportedTargetError, match=message):
            encode_netx(quantised(model, **options))

    def test_a_float_graph(self) -> None:
        with pytest.raises(UnsupportedTargetError, match="float graph"):
            encode_netx(capture(DenseChain(), torch.zeros(1, 1, 8, 8), 4))

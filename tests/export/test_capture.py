"""Capture: the graph of a norse network computes what the network computes, or says why not."""

import norse.torch as norse
import numpy as np
import pytest
import torch
from norse.torch import (
    IAFCell,
    IAFParameters,
    LIFBoxCell,
    LIFBoxParameters,
    LIFCell,
    LIFParameters,
    SequentialState,
)
from norse.torch.functional.reset import reset_subtract
from torch import Tensor, nn
from torch.nn import functional as F

from export.capture import capture
from export.converters import Call, Value, register_converter
from export.errors import GraphError, UnsupportedModuleError
from export.graph import LIF, Add, Conv, Graph, Linear, OrPool, Output, Readout
from export.passes import FoldNorm, Quantize, Schedule
from export.torch_module import graph_to_torch, torch_trace
from hardware.engine import run

STEPS = 4
BOX = LIFBoxParameters(tau_mem_inv=torch.tensor(500.0))
CURRENT = LIFParameters(tau_mem_inv=torch.tensor(400.0), tau_syn_inv=torch.tensor(600.0))


def unrolled(model: nn.Module, image: Tensor) -> Tensor:
    """Mean over time of what a norse model returns step by step, its state carried along."""
    model.eval()
    state, total = None, torch.zeros(())
    with torch.no_grad():
        for _ in range(STEPS):
            out, state = model(image, state)
            total = total + out
    return total / STEPS


def lively(model: nn.Module) -> nn.Module:
    """Weights and statistics under which every layer fires."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.mul_(5.0)
            if module.bias is not None:
                module.bias.data.fill_(0.3)
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.3, 1.0)
    return model


def images(*shape: int) -> tuple[np.ndarray, Tensor]:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return pixels, torch.from_numpy(pixels).float() / 255


class Chain(SequentialState):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            LIFBoxCell(BOX),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(64, 12),
            LIFCell(CURRENT),
            nn.Linear(12, 3),
        )


class Residual(nn.Module):
    """Branches, a nested container, functional pools, a strided and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding="same")
        self.lif = LIFBoxCell(BOX)
        self.branch = SequentialState(
            nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), LIFCell(CURRENT)
        )
        self.down = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2))
        self.iaf = IAFCell(IAFParameters())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        state = state if state is not None else [None] * 3
        spikes, first = self.lif(self.stem(x), state[0])
        branch, second = self.branch(spikes, state[1])
        y = F.max_pool2d(spikes, 3, 1, 1) + branch
        y, third = self.iaf(self.down(y), state[2])
        y = F.adaptive_avg_pool2d(y, 1)
        return self.head(torch.flatten(y, 1)), [first, second, third]


class JoinedCurrents(nn.Module):
    """Two synapses into one layer of neurons, and spikes that join a current."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)
        self.lif_a, self.lif_b = LIFBoxCell(BOX), LIFBoxCell(BOX)
        self.c = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        state = state if state is not None else [None] * 2
        y, s = self.lif_a(self.a(x) + self.b(x), state[0])
        z, t = self.lif_b(self.c(y) + y, state[1])
        return self.head(z), [s, t]


class Averaging(SequentialState):
    """Average pooling between layers and neurons that receive pixels directly."""

    def __init__(self) -> None:
        super().__init__(
            LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(500.0), v_th=torch.tensor(0.3))),
            nn.AvgPool2d(2),
            nn.Conv2d(1, 4, 3),
            LIFBoxCell(BOX),
            nn.AdaptiveAvgPool2d((1, 2)),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


NETS = [
    (Chain, (1, 8, 8)),
    (Residual, (1, 8, 8)),
    (JoinedCurrents, (6,)),
    (Averaging, (1, 8, 8)),
]


def captured(net: type[nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Graph]:
    torch.manual_seed(3)
    model = lively(net())
    return model, capture(model, torch.zeros(2, *shape), STEPS)


@pytest.mark.parametrize(("net", "shape"), NETS, ids=lambda v: getattr(v, "__name__", ""))
class TestEquality:
    def test_the_float_graph_equals_the_model(
        self, net: type[nn.Module], shape: tuple[int, ...]
    ) -> None:
        model, graph = captured(net, shape)
        _, image = images(16, *shape)
        expected, got = unrolled(model, image), graph_to_torch(graph)(image)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert expected.std(0).min() > 0  # the network tells images apart

    def test_folding_keeps_almost_every_spike(
        self, net: type[nn.Module], shape: tuple[int, ...]
    ) -> None:
        _, graph = captured(net, shape)
        _, image = images(16, *shape)
        before, after = (
            torch_trace(graph, image.numpy()),
            torch_trace(FoldNorm()(graph), image.numpy()),
        )
        for name, spikes in before.items():
            assert (spikes != after[name]).mean() < 1e-3 or name == "logits"

    def test_the_quantised_graph_equals_the_engine(
        self, net: type[nn.Module], shape: tuple[int, ...]
    ) -> None:
        _, graph = captured(net, shape)
        quantised = Schedule()(Quantize(pixel_bits=8)(FoldNorm()(graph)))
        pixels, image = images(16, *shape)
        ours = torch_trace(quantised, pixels)
        theirs = run(quantised, pixels, count_events=False).trace
        assert ours.keys() == theirs.keys()
        for name, spikes in ours.items():
            assert np.array_equal(spikes, theirs[name]), name
        spiking = [node.name for node in quantised.of_kind(LIF)]
        assert all(ours[name].any() for name in spiking)
        floats = torch_trace(graph, image.numpy())
        agreement = [np.mean(ours[name] == floats[name]) for name in spiking]
        assert min(agreement) > 0.9


class TestWhatIsCaptured:
    def test_names_are_the_modules_of_the_model(self) -> None:
        _, graph = captured(Residual, (1, 8, 8))
        assert [node.name for node in graph.nodes] == [
            "image",
            "stem",
            "lif",
            "branch.0",
            "branch.1",
            "branch.2",
            "max_pool2d",
            "add",
            "down",
            "iaf",
            "adaptive_avg_pool2d",
            "flatten",
            "head",
            "output",
        ]
        assert graph["branch.2"].source == "branch.2"

    def test_a_last_linear_becomes_the_readout(self) -> None:
        _, graph = captured(Chain, (1, 8, 8))
        assert isinstance(graph["8"], Readout)
        assert not list(graph.of_kind(Add))

    def test_a_network_may_end_in_spikes(self) -> None:
        model = SequentialState(nn.Linear(4, 3), LIFBoxCell(BOX))
        graph = capture(model, torch.zeros(1, 4), STEPS)
        assert isinstance(graph.nodes[-1], Output)
        assert graph_to_torch(graph)(torch.ones(5, 4)).shape == (5, 3)

    def test_neuron_constants(self) -> None:
        _, graph = captured(Chain, (1, 8, 8))
        box, current = graph.of_kind(LIF)
        assert isinstance(box, LIF)
        assert isinstance(current, LIF)
        assert (box.model.membrane_rate, box.model.current_rate) == (0.5, 1.0)
        assert current.model.membrane_rate == pytest.approx(0.4)
        assert current.model.current_rate == pytest.approx(0.6)

    def test_a_resting_potential_moves_the_threshold(self) -> None:
        potentials = {"v_leak": -1.0, "v_reset": -1.0, "v_th": 0.5}
        p = LIFBoxParameters(
            tau_mem_inv=torch.tensor(500.0),
            **{key: torch.tensor(value) for key, value in potentials.items()},
        )
        model = SequentialState(nn.Linear(4, 3, bias=False), LIFBoxCell(p), nn.Linear(3, 2))
        lively(model)
        graph = capture(model, torch.zeros(1, 4), STEPS)
        lif = graph["1"]
        assert isinstance(lif, LIF)
        assert lif.model.threshold == 1.5
        image = torch.rand(64, 4)
        torch.testing.assert_close(graph_to_torch(graph)(image), unrolled(model, image))

    def test_the_model_keeps_its_training_mode(self) -> None:
        model = Chain()
        model[1].eval()
        capture(model, torch.zeros(1, 1, 8, 8), STEPS)
        assert model.training
        assert not model[1].training

    def test_a_module_over_all_time_steps(self) -> None:
        model = SequentialState(
            norse.Lift(nn.Conv2d(1, 3, 3)),
            norse.LIF(CURRENT),
            nn.Flatten(2),
            nn.Linear(48, 4),
            norse.IAF(),
        )
        lively(model)
        graph = capture(model, torch.zeros(STEPS, 2, 1, 6, 6), STEPS, time_first=True)
        image = torch.rand(8, 1, 6, 6)
        with torch.no_grad():
            spikes, _ = model(image.expand(STEPS, *image.shape))
        torch.testing.assert_close(graph_to_torch(graph)(image), spikes.sum(0))
        assert spikes.mean() > 0

    def test_events_instead_of_pixels(self) -> None:
        layers = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5), LIFBoxCell(BOX)
        model = lively(SequentialState(*layers))
        graph = capture(model, torch.zeros(1, 1, 8, 8), STEPS, events=True)
        assert isinstance(graph.nodes[1], OrPool)
        quantised = Quantize(events=True)(graph)
        events = np.random.default_rng(0).integers(0, 2, (STEPS, 5, 1, 8, 8), dtype=np.uint8)
        ours = torch_trace(quantised, events)
        theirs = run(quantised, events, count_events=False).trace
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)

    def test_events_quantised_as_pixels_are_refused_where_they_are_pooled(self) -> None:
        model = SequentialState(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5), LIFBoxCell(BOX))
        graph = capture(lively(model), torch.zeros(1, 1, 8, 8), STEPS, events=True)
        with pytest.raises(GraphError, match=r"pools values up to 63, .* Quantize\(events=True\)"):
            Quantize()(graph)

    def test_names_that_results_bear_are_given_to_no_layer(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.logits, self.images = nn.Linear(4, 4), LIFBoxCell(BOX)
                self.output = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.output(self.images(self.logits(x))[0])

        graph = capture(Named(), torch.zeros(1, 4), STEPS)
        names = [node.name for node in graph.nodes]
        assert names == ["image", "logits_2", "images_2", "output_2", "output"]
        assert graph["output_2"].source == "output"

    def test_mean_of_spikes_is_refused_since_a_graph_counts_them(self) -> None:
        class Mean(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc, self.lif = norse.Lift(nn.Linear(4, 3)), norse.LIF(CURRENT)

            def forward(self, x: Tensor) -> Tensor:
                return self.lif(self.fc(x))[0].mean(0)

        with pytest.raises(UnsupportedModuleError, match="mean of spikes; take their sum"):
            capture(Mean(), torch.zeros(STEPS, 1, 4), STEPS, time_first=True)

    def test_addition_in_place_where_nobody_reads_the_old_value(self) -> None:
        class InPlace(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
                self.lif1, self.lif2 = LIFBoxCell(BOX), LIFBoxCell(BOX)

            def forward(self, x: Tensor) -> Tensor:
                y = self.lif1(self.a(x))[0]
                y += self.lif2(self.b(x))[0]
                return self.c(y)

        graph = capture(InPlace(), torch.zeros(1, 4), STEPS)
        assert len(list(graph.of_kind(Add))) == 1

    @pytest.mark.parametrize("dropped", [True, False])
    def test_addition_in_place_that_would_be_lost_is_refused(self, dropped: bool) -> None:
        class InPlace(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
                self.lif1, self.lif2 = LIFBoxCell(BOX), LIFBoxCell(BOX)

            def forward(self, x: Tensor) -> Tensor:
                y = self.lif1(self.a(x))[0]
                z = y.add_(self.lif2(self.b(x))[0])
                return self.c(y) if dropped else self.c(z + y)

        with pytest.raises(UnsupportedModuleError, match="in place, which is read again"):
            capture(InPlace(), torch.zeros(1, 4), STEPS)

    def test_dead_branches_are_left_out(self) -> None:
        class Dead(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.dead = nn.Linear(4, 3), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                self.dead(x)
                return self.used(x)

        graph = capture(Dead(), torch.zeros(1, 4), STEPS)
        assert [node.name for node in graph.nodes] == ["image", "used", "output"]


class TestUsersOwnConverter:
    def test_serves_the_users_own_module(self) -> None:
        class Halved(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return 0.5 * super().forward(input)

        model = SequentialState(Halved(4, 3), LIFBoxCell(BOX), nn.Linear(3, 2))
        with pytest.raises(
            UnsupportedModuleError, match=r"0 \(.*Halved\): its forward uses weight"
        ):
            capture(model, torch.zeros(1, 4), STEPS)

        @register_converter(Halved)
        def convert_halved(call: Call, module: Halved, x: Value) -> Value:
            weight = 0.5 * module.weight.detach().numpy()
            bias = 0.5 * module.bias.detach().numpy()
            return call.add(Linear(call.name, call.source, weight, bias), "current", x)

        graph = capture(lively(model), torch.zeros(1, 4), STEPS)
        image = torch.rand(32, 4)
        torch.testing.assert_close(graph_to_torch(graph)(image), unrolled(model, image))


def box(**changes) -> LIFBoxCell:
    values = {key: torch.as_tensor(v) if not callable(v) else v for key, v in changes.items()}
    return LIFBoxCell(LIFBoxParameters(**{"tau_mem_inv": torch.tensor(500.0), **values}))


class Loop(nn.Module):
    """The usual way to write a norse model: it loops over time itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(4, 3), LIFBoxCell(BOX)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for _ in range(3):
            spikes, state = self.lif(self.fc(x), state)
        return spikes


class Concatenating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(x), x], 1)


class Conditional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


VECTOR, MAP = (4,), (2, 6, 6)
REFUSED = [
    ([nn.Linear(4, 3), nn.ReLU()], VECTOR, r"1 \(torch.ReLU\): no converter .*register one"),
    ([nn.Linear(4, 3), nn.Sigmoid(), box()], VECTOR, r"1 \(torch.Sigmoid\)"),
    ([nn.Linear(4, 3), norse.LIFRecurrentCell(3, 3)], VECTOR, "recurrent synapses"),
    ([nn.Linear(4, 3), norse.LIBoxCell()], VECTOR, "mean over time of the last Linear"),
    ([nn.Linear(4, 3), norse.LICell()], VECTOR, "leaky integrator has no spikes"),
    ([nn.Linear(4, 3), norse.LIF()], VECTOR, "capture with time_first=True"),
    ([nn.Linear(4, 3), box(reset_method=reset_subtract)], VECTOR, "reset_method is reset_subtract"),
    ([nn.Linear(4, 3), box(v_reset=0.5)], VECTOR, "v_leak is 0 and v_reset is 0.5"),
    ([nn.Linear(4, 3), box(v_th=-1.0)], VECTOR, "v_th lies 1 below"),
    ([nn.Linear(4, 3), box(v_th=[1.0, 2.0, 3.0])], VECTOR, "v_th holds 3 different values, 1 to 3"),
    ([nn.Linear(4, 3), box(tau_mem_inv=3000.0)], VECTOR, r"dt \* tau_mem_inv is 3"),
    ([nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)], VECTOR, "running statistics"),
    ([nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), box()], MAP, "put it behind the neuron"),
    ([nn.Conv2d(2, 3, 3), box(), nn.MaxPool2d(2, ceil_mode=True)], MAP, "ceil_mode True"),
    (
        [nn.Conv2d(2, 3, 3), box(), nn.AvgPool2d(3, padding=1, count_include_pad=False)],
        MAP,
        "count",
    ),
    ([nn.Conv2d(2, 3, 3), box(), nn.AdaptiveAvgPool2d(3)], MAP, r"\[4, 4\] does not divide into"),
    ([nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")], MAP, "padding_mode is circular"),
    ([nn.Conv2d(2, 3, 2, padding="same")], MAP, "pads unevenly"),
    ([nn.Conv2d(2, 3, 3), box(), nn.Flatten(2)], MAP, "flattens axes 2 to -1"),
    ([nn.Conv2d(2, 3, 3)], MAP, r"0 \(Conv\): the network ends in it"),
    ([nn.Conv2d(2, 3, 3), box()], MAP, r"1 \(LIF\): the network ends in it .* \[3, 4, 4\]"),
]


class TestRefusals:
    @pytest.mark.parametrize(("layers", "shape", "message"), REFUSED)
    def test_name_the_module_and_what_to_do(
        self, layers: list[nn.Module], shape: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(UnsupportedModuleError, match=message):
            capture(SequentialState(*layers), torch.zeros(2, *shape), STEPS)

    def test_a_loop_over_time(self) -> None:
        with pytest.raises(UnsupportedModuleError, match=r"lif .*called 2 times.*pass steps=T"):
            capture(Loop(), torch.zeros(1, 4), STEPS)

    def test_a_sequential_that_passes_states_on(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), LIFBoxCell(BOX), nn.Linear(3, 2))
        with pytest.raises(
            UnsupportedModuleError, match=r"2 \(torch.Linear\): it is given a tuple"
        ):
            capture(model, torch.zeros(1, 4), STEPS)

    def test_a_function_without_converter(self) -> None:
        with pytest.raises(UnsupportedModuleError, match=r"cat \(call_function cat\)"):
            capture(Concatenating(), torch.zeros(1, 4), STEPS)

    def test_a_forward_that_depends_on_the_data(self) -> None:
        with pytest.raises(
            UnsupportedModuleError, match=r"Conditional.forward cannot be traced \(test_capture.py:"
        ):
            capture(Conditional(), torch.zeros(1, 4), STEPS)

    def test_a_number_that_is_added(self) -> None:
        class Shifted(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + 1

        with pytest.raises(UnsupportedModuleError, match="adds the number 1; put it into the bias"):
            capture(Shifted(), torch.zeros(1, 4), STEPS)

    def test_shapes_that_do_not_fit_name_the_module(self) -> None:
        model = SequentialState(nn.Linear(5, 3), LIFBoxCell(BOX))
        with pytest.raises(GraphError, match=r"torch module 0\): it receives 4 features"):
            capture(model, torch.zeros(1, 4), STEPS)


def test_average_pooling_is_a_depthwise_convolution() -> None:
    _, graph = captured(Averaging, (1, 8, 8))
    pool = graph["1"]
    assert isinstance(pool, Conv)
    assert pool.groups == 1
    assert np.all(pool.weight == 0.25)

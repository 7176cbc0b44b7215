"""The benchmark of a training step: peers that train the same network, and its output."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from atsnn.config import ModelConfig
from atsnn.spikformer import Spikformer
from benchmarks import training
from benchmarks.errors import BenchmarkError
from benchmarks.side_by_side import ClockName
from benchmarks.training_peers import (
    JELLY,
    NORSE,
    OURS,
    check_same,
    peer,
    spikes_and_gradients,
)

TINY = ModelConfig(image_size=(16, 16), blocks=1, dim=32, heads=4, steps=3)


@pytest.fixture(scope="module")
def model() -> Spikformer:
    return training.lively_model(TINY)


@pytest.mark.parametrize("name", [NORSE, JELLY])
def test_a_peer_trains_the_same_network(model: Spikformer, name: str) -> None:
    note = check_same(model, [name], *training.batch(TINY, 2))
    assert name in note
    assert "all gradients" in note


def test_every_layer_of_neurons_is_compared(model: Spikformer) -> None:
    images, labels = training.batch(TINY, 2)
    spikes, gradients = spikes_and_gradients(peer(model, OURS), images, labels)
    theirs, _ = spikes_and_gradients(peer(model, NORSE), images, labels)
    assert spikes.keys() == theirs.keys()
    assert len(spikes) == 5 + 7
    assert all(fired.sum() > 0 for name, fired in spikes.items() if name.startswith("stem"))
    names = {n for n, _ in model.named_parameters() if not n.endswith("synapse.bias")}
    assert gradients.keys() == names


def test_a_peer_that_fires_otherwise_is_refused(
    model: Spikformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(nn.Module):
        def forward(self, current: torch.Tensor) -> torch.Tensor:
            return current * 0.0

    monkeypatch.setattr("benchmarks.training_peers.NorseNeuron", lambda neuron: Silent())
    with pytest.raises(BenchmarkError, match=r"norse eager: [\d,]+ spikes of stem.conv1 are not"):
        check_same(model, [NORSE], *training.batch(TINY, 2))


def test_a_peer_with_other_gradients_is_refused(
    model: Spikformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.training_peers.SURROGATE_SLOPE", 0.5)
    with pytest.raises(BenchmarkError, match=r"the gradient of .* differs by"):
        check_same(model, [NORSE], *training.batch(TINY, 2))


def test_models_that_halt_have_no_training_peers() -> None:
    config = TINY.model_copy(update={"halting": TINY.halting.model_copy(update={"enabled": True})})
    with pytest.raises(BenchmarkError, match="leave halting and merging out"):
        peer(Spikformer(config), NORSE)


def test_each_peer_is_timed_with_both_ways_of_memory() -> None:
    section = training.compare("tiny", TINY, 2, 1, ClockName.wall, Console(quiet=True))
    assert [c.peer for c in section.comparisons] == [
        "norse eager",
        "SpikingJelly",
        "norse eager, freed memory kept",
        "SpikingJelly, freed memory kept",
    ]
    assert all(c.ours > 0 and c.theirs > 0 for c in section.comparisons)


class TestCommand:
    def test_json_is_a_list_of_comparisons(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(training, "SHAPES", {"tiny": (TINY, 2)})
        result = CliRunner().invoke(training.app, ["tiny", "--turns", "1", "--json"])
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout[result.stdout.index("[\n") :])
        assert set(rows[0]) == {"what", "ours_s", "peer", "peer_s", "ratio"}

    def test_an_unknown_shape_is_refused_with_the_known_ones(self) -> None:
        result = CliRunner().invoke(training.app, ["9-99"])
        assert result.exit_code == 2
        assert "choose of 2-64, 2-96, 4-384" in result.output

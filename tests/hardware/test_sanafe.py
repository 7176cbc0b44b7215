"""SANA-FE as a second opinion: spikes, events and joules of four placed networks, by cause."""

from __future__ import annotations

import numpy as np
import pytest
from placed_networks import NETWORKS, spikes_for
from test_placement import chip
from tiny_networks import Adaptive, images_for

from hardware.errors import PlacementError
from hardware.placement import place
from hardware.placement.sanafe_check import compare, missing
from hardware.placement.split import STRATEGIES, Strategy

needs_sanafe = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@needs_sanafe
@pytest.mark.parametrize("neurons", [60, 200])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_events_are_equal_and_energy_within_a_percent(
    name: str, strategy: Strategy, neurons: int
) -> None:
    graph = NETWORKS[name]()
    images = spikes_for(graph, 2)
    profile = chip("loihi1_calibrated", neurons_per_core=neurons)
    found = compare(place(graph, profile, strategy, images=images), images)
    assert found.spikes_differ == 0
    for event, (ours, theirs) in found.counts.items():
        assert ours == theirs, event
    assert found.counts["spikes"][0] > 0
    assert found.relative < 0.01
    for cause in ("synapse", "message"):
        ours, theirs = found.joules[cause]
        assert ours == pytest.approx(theirs, rel=1e-9)


@needs_sanafe
def test_what_differs_is_explained_from_our_side_alone() -> None:
    """SANA-FE visits neurons behind closed gates, and updates those whose inputs cancel."""
    graph = NETWORKS["gated"]()
    images = spikes_for(graph, 3)
    profile = chip("loihi1_calibrated", neurons_per_core=60)
    found = compare(place(graph, profile, images=images), images)
    visits, joules = found.explained["visits behind closed gates"]
    assert visits > 0
    assert joules == pytest.approx(visits * 51.2e-12)
    soma = found.joules["soma"]
    explained = sum(joules for _, joules in found.explained.values())
    assert soma[0] < soma[1]
    assert soma[0] + explained == pytest.approx(soma[1], rel=1e-9)
    assert found.left_out == ("score", "gate")


@needs_sanafe
class TestRefusals:
    def test_values_above_one(self) -> None:
        graph = Adaptive(gates=False).build()
        images = images_for(graph, 1)
        with pytest.raises(
            PlacementError, match=r"sends values up to \d+, SANA-FE has unit spikes"
        ):
            compare(place(graph, "loihi1_calibrated"), images)

    def test_more_than_one_chip(self) -> None:
        graph = NETWORKS["dense"]()
        profile = chip("loihi1_calibrated", neurons_per_core=8, cores=8)
        with pytest.raises(PlacementError, match=r"takes 2 chips, SANA-FE's Loihi is one"):
            compare(place(graph, profile), spikes_for(graph, 1))

    def test_a_core_that_would_be_too_full(self) -> None:
        graph = NETWORKS["conv"]()
        with pytest.raises(
            PlacementError, match=r"neurons and senders, SANA-FE's Loihi holds 1,024"
        ):
            compare(place(graph, "loihi1_calibrated"), np.zeros_like(spikes_for(graph, 1)))


def test_without_it_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sanafe", None)
    assert missing() == "SANA-FE is not installed (pip install sanafe, extra `sanafe`)"
    graph = NETWORKS["dense"]()
    with pytest.raises(PlacementError, match="SANA-FE is not installed"):
        compare(place(graph, "loihi1_calibrated"), spikes_for(graph, 1))

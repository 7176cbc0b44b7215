"""Energy: golden figures of the literature, and what the table prints."""

from __future__ import annotations

import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from tiny_networks import Adaptive, conv_network, images_for

from hardware import energy, gpu
from hardware.energy import (
    ADAPTIVE,
    ALL_TOKENS,
    ANN,
    PLAIN,
    EnergyTable,
    ann_row,
    by_layer,
    cost_of,
    energy_table,
    price,
    spiking_row,
    total,
)
from hardware.engine import run
from hardware.errors import GpuMeasurementError, ProfileError
from hardware.events import FIELDS, EventCounts, NodeEvents
from hardware.profile import load_profile
from hardware.report import (
    energy_rich_table,
    format_count,
    format_joules,
    layers_rich_table,
    tokens_rich_table,
    verify_rich_table,
)
from hardware.verify import verify


def events(dense_macs: int = 0, **counts: float) -> EventCounts:
    """One image, one layer."""
    filled = {name: np.array([round(counts.get(name, 0))]) for name in FIELDS}
    return EventCounts((NodeEvents("layer", "Conv", "", "", dense_macs, filled),), 1, 1)


class TestGoldenFigures:
    """Published numbers, to the last digit that they are printed with."""

    @pytest.mark.parametrize(
        ("acs", "macs", "millijoules"),
        [
            (0.10e9, 0.14e9, "0.734"),
            (0.50e9, 2.75e9, "13.10"),
            (1.69e9, 0.20e9, "2.44"),
            (0.0, 1.82e9, "8.372"),
        ],
    )
    def test_syops_readme(self, acs: float, macs: float, millijoules: str) -> None:
        row = spiking_row("SNN", events(acs=acs, macs=macs), load_profile("45nm-fp32"))
        digits = len(millijoules.partition(".")[2])
        assert f"{1e3 * row.joules_per_image:.{digits}f}" == millijoules

    def test_the_dense_resnet_of_syops_as_an_ann(self) -> None:
        row = ann_row(events(dense_macs=round(1.82e9)), load_profile("45nm-fp32"))
        assert f"{1e3 * row.joules_per_image:.3f}" == "8.372"

    def test_spikformer_4_384_on_cifar_10_as_a_user_counted_it(self) -> None:
        counted = events(acs=0.2458512465306023e9, macs=0.005312266e9)
        row = spiking_row("SNN", counted, load_profile("45nm-fp32"))
        assert row.joules_per_image == pytest.approx(0.24570254547754208e-3, rel=1e-6)

    def test_spikformer_8_384_under_the_early_convention(self) -> None:
        """6.82 G SOPs at 77 fJ: 0.525 mJ; at 0.9 pJ the same operations are 12 times that."""
        counted = events(sops=6.82e9, acs=6.82e9)
        early = spiking_row("SNN", counted, load_profile("spikformer-77fj"))
        assert f"{1e3 * early.joules_per_image:.3f}" == "0.525"
        usual = spiking_row("SNN", counted, load_profile("45nm-fp32"))
        assert usual.joules_per_image / early.joules_per_image == pytest.approx(0.9 / 0.077)

    @pytest.mark.parametrize(
        ("watts", "rate", "joules"),
        [
            (22.86, 770.39, "0.0297"),
            (11.47, 1813.63, "0.0063"),
            (0.081, 296, "0.00027"),
            (14.97 + 22.86, 770.39, "0.0491"),
            (0.029 + 0.081, 296, "0.000372"),
        ],
    )
    def test_blouw_2019_energy_is_power_over_rate(
        self, watts: float, rate: float, joules: str
    ) -> None:
        """Power of GPU, CPU and Loihi above an idle board, through the arithmetic of a trace."""
        idle = 15.0
        moments = np.arange(-101, 1010) * 0.1
        millijoules = 1e3 * (idle * moments + watts * np.maximum(moments, 0))
        trace = gpu.PowerTrace("board", moments, millijoules, 0 * moments)
        images = round(rate * 100)
        result = gpu.evaluate(trace, gpu.Window(-10, 0), [gpu.Window(0, 100, images)])
        digits = len(joules.partition(".")[2])
        assert f"{result.dynamic_joules_per_image:.{digits}f}" == joules
        total = result.dynamic_joules_per_image + idle * 100 / images
        assert result.total_joules_per_image == pytest.approx(total)


class TestPrices:
    def test_loihi_prices_operations_and_neuron_updates(self) -> None:
        counted = events(sops=1000, acs=900, macs=100, updates_active=10, updates_idle=20)
        costs = price(counted, load_profile("loihi1"))
        assert costs["synaptic operations"].low == pytest.approx(1000 * 23.6e-12)
        assert costs["active neuron updates"].low == pytest.approx(10 * 81e-12)
        assert costs["idle neuron updates"].low == pytest.approx(20 * 52e-12)
        assert total(costs.values()).grade == "simulated"

    def test_sana_fe_prices_convolutions_and_spikes_apart(self) -> None:
        graph = conv_network()
        counted = run(graph, images_for(graph, 2)).events
        assert counted is not None
        costs = price(counted, load_profile("loihi1_calibrated"))
        convolved = counted["conv1"].mean("sops") + counted["conv2"].mean("sops")
        others = counted.mean("sops") - convolved
        assert costs["convolution operations"].low == pytest.approx(convolved * 24.0e-12)
        assert costs["synaptic operations"].low == pytest.approx(others * 35.5e-12)
        assert costs["spikes"].low == pytest.approx(counted.mean("spikes") * 69.3e-12)

    def test_conventions_price_additions_and_multiplications_only(self) -> None:
        counted = events(sops=1000, acs=900, macs=100, updates_active=10)
        costs = price(counted, load_profile("45nm-int8"))
        assert set(costs) == {"additions", "multiplications"}
        assert total(costs.values()).middle == pytest.approx((900 * 0.03 + 100 * 0.23) * 1e-12)

    def test_a_chip_without_graded_spikes_pays_a_spike_for_every_unit(self) -> None:
        counted = events(sops=1000, unrolled_acs=1500)
        once = price(counted, load_profile("loihi1"))["synaptic operations"]
        unrolled = price(counted, load_profile("loihi1"), "unrolled")["synaptic operations"]
        assert unrolled.low / once.low == pytest.approx(1.5)

    def test_rows_show_the_counts_that_they_price(self) -> None:
        counted = events(sops=1000, macs=100, unrolled_acs=1500)
        chip = load_profile("loihi1")
        once = spiking_row("SNN", counted, chip)
        unrolled = spiking_row("SNN", counted, chip, "unrolled")
        assert (once.sops, once.macs) == (1000, 100)
        assert (unrolled.sops, unrolled.macs) == (1500, 0)
        assert unrolled.convention == f"{once.convention}, graded spikes as unit spikes"

    def test_layers_add_up(self) -> None:
        graph = Adaptive().build()
        counted = run(graph, images_for(graph, 3)).events
        assert counted is not None
        chip = load_profile("loihi1")
        layers = by_layer(counted, chip)
        assert sum(c.middle for c in layers.values()) == pytest.approx(
            total(price(counted, chip).values()).middle
        )

    def test_an_ann_needs_a_price_of_a_mac(self) -> None:
        with pytest.raises(ProfileError, match="'loihi1' has no price for multiply_accumulate"):
            ann_row(events(dense_macs=1), load_profile("loihi1"))

    def test_ranges_stay_ranges(self) -> None:
        utilisation = load_profile("a100").gpu
        assert utilisation is not None
        cost = cost_of(2.0, utilisation.busy_power)
        assert (cost.low, cost.high, cost.grade) == (400, 800, "assumed")


@pytest.fixture(scope="module")
def table() -> EnergyTable:
    graph = Adaptive().build()
    return energy_table(graph, images_for(graph, 6), gpu="modelled")


class TestTable:
    def test_every_row_has_convention_and_grade(self, table: EnergyTable) -> None:
        rows = json.loads(json.dumps(table.as_json()))
        keys = {"system", "convention", "grade", "joules_per_image", "sops", "macs"}
        for row in rows:
            assert keys <= row.keys()
            assert row["convention"]
            assert row["grade"] in ("measured", "simulated", "derived", "assumed")
            assert 0 < row["joules_low"] <= row["joules_per_image"] <= row["joules_high"]

    def test_all_tokens_adaptive_ann_and_gpu_stand_side_by_side(self, table: EnergyTable) -> None:
        systems = list(dict.fromkeys(row.system for row in table.rows))
        assert systems == [
            ALL_TOKENS,
            ADAPTIVE,
            ANN,
            f"{ALL_TOKENS}, on a GPU, batch 1",
            f"{ALL_TOKENS}, on a GPU, batch 256",
            f"{ANN}, on a GPU, batch 256",
        ]

    def test_the_adaptive_network_costs_less_under_every_convention(
        self, table: EnergyTable
    ) -> None:
        dense = {r.convention: r for r in table.rows if r.system == ALL_TOKENS}
        adaptive = {r.convention: r for r in table.rows if r.system == ADAPTIVE}
        assert dense.keys() == adaptive.keys()
        assert len(dense) == 5
        for convention, row in adaptive.items():
            assert row.joules_per_image < dense[convention].joules_per_image
        assert table.average_tokens < 1

    def test_modelled_rows_say_so(self, table: EnergyTable) -> None:
        for row in table.rows:
            if "GPU" in row.system:
                assert "(modelled)" in row.convention
                assert row.note.startswith("modelled")

    def test_a_network_without_gates_has_no_adaptive_rows(self) -> None:
        plain = energy_table(conv_network(), images_for(conv_network(), 2), gpu="none")
        assert {row.system for row in plain.rows} == {PLAIN, ANN}
        assert plain.average_tokens == 1.0
        assert plain.adaptive is plain.all_tokens

    def test_without_a_gpu_the_model_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "gpu_problem", lambda: "no GPU measured: none here")
        rows = energy_table(conv_network(), images_for(conv_network(), 1)).rows
        assert [r.note for r in rows if "GPU" in r.system] == [
            "modelled: no GPU measured: none here"
        ] * 3

    def test_a_measured_gpu_gives_its_windows_as_the_range(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moments = np.arange(-1, 1010) * 0.1
        trace = gpu.PowerTrace("board", moments, 100e3 * moments, 0 * moments)
        windows = [gpu.Window(10, 50, 100), gpu.Window(50, 90, 200)]
        measured = gpu.evaluate(trace, gpu.Window(0, 10), windows)
        monkeypatch.setattr(energy, "measure_graph", lambda graph, images, batch: measured)
        rows = energy_table(conv_network(), images_for(conv_network(), 1)).rows
        first, second, ann = (row for row in rows if "GPU" in row.system)
        assert ann.system.startswith(ANN)
        assert "modelled" in ann.note
        assert first.system.endswith("batch 1")
        assert second.system.endswith("batch 256")
        assert first.grade == "measured"
        assert first.joules_per_image == pytest.approx(30)
        assert (first.joules_low, first.joules_high) == (pytest.approx(20), pytest.approx(40))
        assert "idle 100.0 W" in first.note

    def test_a_measurement_that_is_insisted_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "gpu_problem", lambda: "no GPU measured: none here")
        with pytest.raises(GpuMeasurementError, match="none here"):
            energy_table(conv_network(), images_for(conv_network(), 1), gpu="measured")

    def test_an_unknown_way_to_get_gpu_rows(self) -> None:
        with pytest.raises(GpuMeasurementError, match="gpu is 'nope'; use auto, modelled"):
            energy_table(conv_network(), images_for(conv_network(), 1), gpu="nope")  # pyright: ignore[reportArgumentType] that is the point

    def test_a_convention_as_profile_is_not_shown_twice(self) -> None:
        table = energy_table(
            conv_network(), images_for(conv_network(), 1), profile="45nm-fp32", gpu="none"
        )
        shown = [(row.system, row.convention) for row in table.rows]
        assert len(shown) == len(set(shown))

    def test_events_over_time_are_counted_by_their_second_axis(self) -> None:
        graph = conv_network(bits=1)
        events = np.ones((graph.steps, 4, 2, 7, 6), np.uint8)
        counted = energy_table(graph, events, gpu="none")
        assert counted.images == 4
        assert counted.all_tokens["conv1"].sum("macs") == 0

    def test_profiles_of_the_wrong_kind(self) -> None:
        with pytest.raises(ProfileError, match="'a100' is a gpu, but a chip or convention"):
            energy_table(conv_network(), images_for(conv_network(), 1), profile="a100")
        with pytest.raises(ProfileError, match="'loihi1' is a chip, but a gpu or cpu is wanted"):
            energy_table(conv_network(), images_for(conv_network(), 1), gpu_profile="loihi1")

    def test_progress_counts_both_runs(self) -> None:
        graph, told = Adaptive().build(), []
        energy_table(graph, images_for(graph, 5), gpu="none", progress=lambda *n: told.append(n))
        assert told[-1] == (10, 10)
        assert [done for done, _ in told] == sorted(done for done, _ in told)


def printed(renderable: object) -> str:
    console = Console(width=200, file=StringIO(), color_system=None)
    console.print(renderable)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


class TestReports:
    @pytest.mark.parametrize(
        ("joules", "text"),
        [
            (1.824, "1.82 J"),
            (0.000734, "734 uJ"),
            (9.999e-4, "1 mJ"),
            (2.5e-13, "0.25 pJ"),
            (0, "0 pJ"),
            (1824.0, "1820 J"),
        ],
    )
    def test_joules(self, joules: float, text: str) -> None:
        assert format_joules(joules) == text

    @pytest.mark.parametrize(
        ("count", "text"), [(4_682_000, "4.68 M"), (12.5, "12.5"), (999_900, "1 M"), (3e9, "3 G")]
    )
    def test_counts(self, count: float, text: str) -> None:
        assert format_count(count) == text

    def test_the_energy_table_warns_of_comparing_conventions(self, table: EnergyTable) -> None:
        text = printed(energy_rich_table(table))
        assert "must not be compared" in text
        assert "Chip rows are without traffic between cores" in text
        assert "Modelled" in text
        assert "Average tokens" in text
        assert "(modelled)" in text
        assert "Loihi 1, Davies 2018 table 2" in text

    def test_the_layer_table_shows_both_forms_and_the_attention_order(
        self, table: EnergyTable
    ) -> None:
        text = printed(layers_rich_table(table.all_tokens, table.adaptive))
        assert "SOPs, adaptive" in text
        assert "block1.fc1" in text
        assert "Attention, q (k^T v)" in text or "Attention, (q k^T) v" in text
        assert "all layers" in text

    def test_the_layer_table_of_a_network_without_gates_has_one_column_of_sops(self) -> None:
        plain = energy_table(conv_network(), images_for(conv_network(), 2), gpu="none")
        text = printed(layers_rich_table(plain.all_tokens, plain.adaptive))
        assert "SOPs, adaptive" not in text
        assert "conv1" in text

    def test_the_token_table_has_a_line_per_gate(self) -> None:
        graph = Adaptive().build()
        text = printed(tokens_rich_table(run(graph, images_for(graph, 2))))
        assert "block2.gate" in text
        assert "t = 2" in text

    def test_the_verification_table_has_a_line_per_stage(self) -> None:
        graph = conv_network()
        result = verify(
            graph, images_for(graph, 2), ["engine"], reference=lambda i: run(graph, i).trace
        )
        text = printed(verify_rich_table(result))
        assert "quantised torch" in text
        assert "none: equal" in text

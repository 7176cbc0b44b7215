"""No number without value, unit, source and grade."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hardware.errors import ProfileError
from hardware.profile import GRADES, Quantity, load_profile, profile_names, weakest

NUMBER = "{value: 5, unit: pJ, grade: assumed, source: nowhere}"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "chip.yaml"
    path.write_text(text)
    return path


def chip(number: str, field: str = "synaptic_operation") -> str:
    return f"name: chip\nkind: chip\nconvention: test\nenergy:\n  {field}: {number}\n"


class TestShippedProfiles:
    @pytest.mark.parametrize("name", profile_names())
    def test_load_and_are_named_like_their_file(self, name: str) -> None:
        assert load_profile(name).name == name

    def test_are_these(self) -> None:
        assert profile_names("chip") == ("loihi1", "loihi1_calibrated", "loihi2")
        assert profile_names("convention") == ("45nm-fp32", "45nm-int8", "spikformer-77fj")
        assert profile_names("gpu") == ("a100", "h100", "jetson-orin-nano")
        assert profile_names("cpu") == ("xeon-8380",)

    def test_loihi_1_is_table_2_of_davies_2018(self) -> None:
        energy = load_profile("loihi1").energy
        table = {name: quantity.value for name, quantity in energy if quantity}
        assert table == {
            "synaptic_operation": 23.6,
            "neuron_update_active": 81,
            "neuron_update_idle": 52,
            "spike_within_tile": 1.7,
            "hop_east_west": 3.0,
            "hop_north_south": 4.0,
        }
        assert {quantity.grade for _, quantity in energy if quantity} == {"simulated"}

    def test_loihi_1_of_sana_fe_is_its_architecture_file(self) -> None:
        """Access 51.2 pJ at every step; update 21.6 pJ on top where something changes."""
        energy = load_profile("loihi1_calibrated").energy
        table = {name: quantity.value for name, quantity in energy if quantity}
        assert table == {
            "synaptic_operation": 35.5,
            "convolution_operation": 24.0,
            "neuron_update_active": 72.8,
            "neuron_update_idle": 51.2,
            "spike": 69.3,
            "message_out": 111,
            "hop_east_west": 3.0,
            "hop_north_south": 4.2,
        }

    def test_loihi_1_limits(self) -> None:
        limits = {name: q.middle for name, q in load_profile("loihi1").limits if q}
        assert limits["cores"] == 128
        assert limits["synapse_memory_per_core"] == 16384 * 8
        assert limits["graded_spike_bits"] == 0


class TestQuantities:
    def test_are_in_si_units(self) -> None:
        number = Quantity(value=23.6, unit="pJ", source="s", grade="simulated")
        assert number.range == (pytest.approx(23.6e-12), pytest.approx(23.6e-12))

    def test_may_be_a_range_whose_middle_is_geometric(self) -> None:
        number = Quantity(low=1, high=4, unit="nJ", source="s", grade="assumed")
        assert number.range == (pytest.approx(1e-9), pytest.approx(4e-9))
        assert number.middle == pytest.approx(2e-9)

    def test_grades_from_the_strongest_to_the_weakest(self) -> None:
        assert GRADES == ("measured", "simulated", "derived", "assumed")
        assert weakest(["simulated", "derived"]) == "derived"
        assert weakest([]) == "measured"


class TestRefusals:
    @pytest.mark.parametrize("missing", ["unit", "grade", "source"])
    def test_a_number_without_unit_grade_or_source(self, tmp_path: Path, missing: str) -> None:
        parts = {"value": "5", "unit": "pJ", "grade": "assumed", "source": "nowhere"}
        number = ", ".join(f"{key}: {value}" for key, value in parts.items() if key != missing)
        path = written(tmp_path, chip(f"{{{number}}}"))
        message = rf"chip\.yaml: energy\.synaptic_operation\.{missing}: Field required"
        with pytest.raises(ProfileError, match=message):
            load_profile(path)

    @pytest.mark.parametrize(
        ("number", "problem"),
        [
            ("5", "energy.synaptic_operation: Input should be a valid dictionary"),
            ("{unit: pJ, grade: assumed, source: s}", "give either value, or both low and high"),
            ("{low: 1, unit: pJ, grade: assumed, source: s}", "give either value, or both"),
            ("{value: 1, low: 1, high: 2, unit: pJ, grade: assumed, source: s}", "give either"),
            ("{low: 3, high: 2, unit: pJ, grade: assumed, source: s}", "low 3.0 is above high 2.0"),
            ("{value: -1, unit: pJ, grade: assumed, source: s}", "greater than or equal to 0"),
            ("{value: .nan, unit: pJ, grade: assumed, source: s}", "finite number"),
            ("{value: .inf, unit: pJ, grade: assumed, source: s}", "finite number"),
            ("{value: 1, unit: pJ, grade: guessed, source: s}", "'measured', 'simulated', 'deriv"),
            ("{value: 1, unit: pJ, grade: assumed, source: ''}", "source: String should have at"),
            ("{value: 1, unit: cal, grade: assumed, source: s}", "unknown unit 'cal'"),
            ("{value: 1, unit: W, grade: assumed, source: s}", "synaptic_operation has unit 'W'"),
        ],
    )
    def test_a_number_that_is_none(self, tmp_path: Path, number: str, problem: str) -> None:
        with pytest.raises(ProfileError) as error:
            load_profile(written(tmp_path, chip(number)))
        assert problem in str(error.value)
        assert "chip.yaml" in str(error.value)

    def test_a_misspelt_field(self, tmp_path: Path) -> None:
        with pytest.raises(ProfileError, match=r"energy\.synaptic_operatoin: Extra inputs"):
            load_profile(written(tmp_path, chip(NUMBER, "synaptic_operatoin")))

    def test_a_chip_that_prices_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ProfileError, match="prices no event"):
            load_profile(written(tmp_path, "name: a\nkind: chip\nconvention: c\n"))

    def test_a_gpu_without_figures(self, tmp_path: Path) -> None:
        with pytest.raises(ProfileError, match="kind gpu has a section gpu"):
            load_profile(written(tmp_path, "name: a\nkind: gpu\nconvention: c\n"))

    def test_an_unknown_name(self) -> None:
        with pytest.raises(ProfileError, match="no profile named 'loihi9'; there are 45nm-fp32, "):
            load_profile("loihi9")

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ProfileError, match=r"absent\.yaml: cannot be read"):
            load_profile(tmp_path / "absent.yaml")

    def test_a_file_that_is_not_yaml(self, tmp_path: Path) -> None:
        with pytest.raises(ProfileError, match=r"chip\.yaml: not valid YAML"):
            load_profile(written(tmp_path, "name: [\n"))

    def test_a_file_that_is_no_mapping(self, tmp_path: Path) -> None:
        with pytest.raises(ProfileError, match="mapping of fields, not list"):
            load_profile(written(tmp_path, "- 1\n"))


NUMBER = {"value": 1, "unit": "pJ", "grade": "measured", "source": "bench"}


class TestPricesOfOperations:
    """Whatever a network does is priced, once."""

    @pytest.mark.parametrize(
        "fields",
        [
            ("hop_east_west",),
            ("convolution_operation",),
            ("accumulate",),
            ("synaptic_operation", "accumulate", "multiply_accumulate"),
        ],
    )
    def test_a_profile_that_would_price_them_in_part_is_refused(self, tmp_path, fields) -> None:
        content = {
            "name": "chip",
            "kind": "chip",
            "convention": "Chip",
            "energy": dict.fromkeys(fields, NUMBER),
        }
        (tmp_path / "chip.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ProfileError, match=r"synaptic_operation"):
            load_profile(tmp_path / "chip.yaml")

    @pytest.mark.parametrize("text", ["name: 2024-13-45", "[" * 5000])
    def test_yaml_that_cannot_be_read(self, tmp_path, text) -> None:
        (tmp_path / "chip.yaml").write_text(text)
        with pytest.raises(ProfileError, match=r"chip\.yaml: not valid YAML"):
            load_profile(tmp_path / "chip.yaml")

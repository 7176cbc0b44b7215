"""Configurations: what is refused, with which words, and what comes out resolved."""

import pytest
import yaml

from atsnn.config import (
    MergingConfig,
    ModelConfig,
    RunConfig,
    apply_changes,
    differences,
    load_config,
    load_preset,
    parse,
    preset_names,
    to_yaml,
)
from atsnn.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model": {"halting": {"gama": 1}}},
            "unknown key model.halting.gama; known here: beta, block_scores, enabled, epsilon,",
        ),
        ({"modell": {}}, "unknown key modell; known here: augment, data, model, stages, train"),
        ({"train": {"lr": "fast"}}, "train.lr = 'fast': input should be a valid number"),
        ({"train": {"lr": 0}}, "train.lr = 0: input should be greater than 0"),
        ({"model": {"dim": 100}}, "model.dim = 100: input should be a multiple of 8"),
        ({"model": {"dim": 64, "heads": 5}}, "model: dim 64 does not divide into 5 heads"),
        ({"model": {"image_size": [3, 9]}}, r"image_size \[3, 9\]: needs at least 4 x 4 pixels"),
        (
            {"model": {"blocks": 2, "merging": {"blocks": [0, 3]}}},
            r"merging.blocks \[3\]: the model has blocks 1 to 2, and 0 for the stem",
        ),
        (
            {"model": {"merging": {"enabled": True, "count": 0}}},
            "would merge every pair: set a count or a minimum_similarity",
        ),
        (
            {"model": {"merging": {"enabled": True, "blocks": [0], "similarity": "keys"}}},
            "merging.blocks 0: the stem has no keys; use similarity stream",
        ),
        ({"model": {"halting": {"order": "up"}}}, "model.halting.order = 'up': input should be"),
        (
            {"stages": [{"name": "a"}, {"name": "a"}]},
            "stages: two are named a",
        ),
        (
            {"stages": [{"name": "fine", "train": {"lrr": 1}}]},
            "stage fine: unknown key train.lrr; known here: accumulate, batch, ",
        ),
        ({"train": {"lr": -1, "epochs": 0}}, r"\(and 1 more mistake\)"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_is_allowed(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(RunConfig, values, "run.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_one_that_is_no_mapping_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds no mapping of keys"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "torn.yaml").write_text("model: {dim: 64\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "torn.yaml")


def test_the_resolved_configuration_reads_back_as_itself():
    run = parse(RunConfig, {"model": {"merging": {"enabled": True}}}, "x")
    assert parse(RunConfig, yaml.safe_load(to_yaml(run)), "x") == run


def test_merging_by_the_mean_gets_fraction_bits_unless_they_are_given():
    assert ModelConfig().quantization.fraction_bits == 0
    assert ModelConfig(merging=MergingConfig(enabled=True)).quantization.fraction_bits == 3
    assert (
        ModelConfig(merging=MergingConfig(enabled=True, combine="max")).quantization.fraction_bits
        == 0
    )
    given = {"merging": {"enabled": True}, "quantization": {"fraction_bits": 2}}
    assert parse(ModelConfig, given, "x").quantization.fraction_bits == 2


def test_token_grid_of_sizes_that_do_not_divide_by_four():
    assert ModelConfig(image_size=(28, 28)).tokens == 49
    assert ModelConfig(image_size=(30, 33)).grid == (8, 9)


def test_blocks_that_merge_are_counted_from_one():
    merging = MergingConfig(enabled=True, blocks=(2,))
    model = ModelConfig(blocks=3, merging=merging)
    assert [model.merges_at(i) for i in range(3)] == [False, True, False]


def test_changes_set_dotted_keys_and_read_yaml_values():
    changes = ["train.lr=1e-3", "model.halting.enabled=true", "model.image_size=[8, 8]"]
    assert apply_changes({"train": {"lr": 1, "batch": 2}}, changes) == {
        "train": {"lr": 0.001, "batch": 2},
        "model": {"halting": {"enabled": True}, "image_size": [8, 8]},
    }


def test_changes_reach_a_stage_by_its_name():
    values = {"stages": [{"name": "a"}, {"name": "b", "train": {"epochs": 1}}]}
    changed = apply_changes(values, ["stages.b.train.epochs=7"])
    assert changed["stages"][1] == {"name": "b", "train": {"epochs": 7}}
    assert values["stages"][1]["train"] == {"epochs": 1}


@pytest.mark.parametrize("change", ["train.lr", "=1", "train.lr.x=1"])
def test_a_change_that_is_none_is_refused(change):
    with pytest.raises(ConfigError, match="change "):
        apply_changes({"train": {"lr": 1}}, [change])


def test_each_stage_starts_from_the_settings_of_the_one_before():
    stages = [
        {"name": "a", "train": {"epochs": 3}},
        {"name": "b", "model": {"halting": {"enabled": True}}},
    ]
    run = parse(RunConfig, {"train": {"batch": 4}, "stages": stages}, "x")
    first, second = run.stage_configs().values()
    assert (first.train.epochs, first.train.batch, first.model.halting.enabled) == (3, 4, False)
    assert (second.train.epochs, second.train.batch, second.model.halting.enabled) == (3, 4, True)


def test_differences_name_both_values():
    assert differences(ModelConfig(dim=64, heads=4), ModelConfig(dim=128, heads=4)) == [
        "dim: 64, not 128"
    ]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid(name):
    for stage in load_preset(name).stage_configs().values():
        assert stage.train.epochs >= 1


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tinyimagenet"])
def test_the_reference_presets_follow_the_published_recipe(name):
    run = load_preset(f"spikformer-4-384-{name}")
    model, train, augment = run.model, run.train, run.augment
    assert (model.blocks, model.dim, model.heads, model.steps) == (4, 384, 12, 4)
    assert (train.epochs, train.batch, train.warmup_epochs) == (300, 128, 20)
    assert (train.lr, train.min_lr, train.weight_decay) == (5e-4, 1e-5, 0.06)
    assert (augment.randaugment, augment.magnitude, augment.mixup) == (1, 9, 0.5)
    assert (augment.random_erase, train.label_smoothing) == (0.25, 0.1)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="no preset 'x'; there are: demo-fashion, "):
        load_preset("x")


def test_an_unknown_key_of_a_stage_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown key stages.0.trian; known here: augment, "):
        parse(RunConfig, {"stages": [{"name": "a", "trian": {}}]}, "file")


def test_a_stage_starts_from_the_one_before_and_from_nowhere_else():
    stage = {"name": "a", "train": {"initial": "elsewhere"}}
    with pytest.raises(ConfigError, match=r"train\.initial belongs to the run"):
        parse(RunConfig, {"stages": [stage]}, "file")


def test_a_change_of_a_stage_that_is_not_there_names_the_stages():
    with pytest.raises(ConfigError, match="stages: a, b"):
        apply_changes({"stages": [{"name": "a"}, {"name": "b"}]}, ["stages.c.train.lr=1"])


def test_a_change_of_the_run_does_not_reach_a_stage_of_that_name():
    changed = apply_changes({"stages": [{"name": "train"}]}, ["train.lr=1e-3"])
    assert changed == {"stages": [{"name": "train"}], "train": {"lr": 0.001}}


@pytest.mark.parametrize("text", ["1e--3", "--1e5", "2024-02-30"])
def test_a_value_that_is_no_number_is_text(text):
    assert apply_changes({}, [f"train.initial={text}"]) == {"train": {"initial": text}}


def test_merging_needs_two_tokens():
    values = {"image_size": [4, 4], "merging": {"enabled": True}}
    with pytest.raises(ConfigError, match="merging needs at least 2 tokens"):
        parse(ModelConfig, values, "file")

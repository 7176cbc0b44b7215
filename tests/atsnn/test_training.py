"""Training: resume to the same bits, logs, stages, losses, and runs that cannot go on."""

import csv
import random

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import STEPS_PER_EPOCH, run_python, run_tiny, tiny_config, tiny_dataset

from atsnn.augment import (
    Augmentation,
    derived_beta,
    epoch_order,
    mix,
    random_shift,
    to_input,
)
from atsnn.checkpoint import load_model, read_checkpoint
from atsnn.config import AugmentConfig, TrainConfig, load_config
from atsnn.errors import CheckpointError, ConfigError, DatasetError, TrainingError
from atsnn.evaluation import compare, evaluate
from atsnn.fixed_point import pixels_to_integers
from atsnn.losses import cell_prior, prior_divergence, total_loss
from atsnn.spikformer import SCORE_OFF, ModelOutput, Spikformer
from atsnn.training import Run, learning_rate, train

KILLED_RUN = """
import os, signal
from pathlib import Path
from tiny_runs import run_tiny
import atsnn.files, atsnn.training, torch

folder, phase, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
calls = 0

def dying(function, after=False):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if phase == "before a step":
    atsnn.training.Run._step = dying(atsnn.training.Run._step)
elif phase == "after the optimizer":
    torch.optim.AdamW.step = dying(torch.optim.AdamW.step, after=True)
elif phase == "before a rename":
    atsnn.files.os.replace = dying(os.replace)
elif phase == "after a rename":
    atsnn.files.os.replace = dying(os.replace, after=True)
run_tiny(folder)
"""
TOTAL_STEPS = 2 * STEPS_PER_EPOCH
RENAMES = 1 + 2 * (2 + 3)
"""config; per epoch two states after steps 2 and 4, then log, model and state."""


def killed_moments(count: int) -> list[tuple[str, int]]:
    """Random moments, the same in every session of tests."""
    draw = random.Random(7)
    steps = [(phase, TOTAL_STEPS) for phase in ("before a step", "after the optimizer")]
    renames = [(phase, RENAMES) for phase in ("before a rename", "after a rename")]
    choices = [draw.choice(steps + renames) for _ in range(count)]
    return [(phase, draw.randint(2, most)) for phase, most in choices]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The model file of a run that nothing disturbed."""
    return run_tiny(tmp_path_factory.mktemp("whole"))


def assert_same_bits(ours, theirs) -> None:
    first, second = load_file(ours), load_file(theirs)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def check_resume(folder, moment, uninterrupted) -> None:
    phase, count = moment
    killed = run_python(KILLED_RUN, folder, phase, str(count))
    assert killed.returncode == -9, killed.stderr
    resumed = run_tiny(folder, resume=True)
    assert_same_bits(resumed, uninterrupted)
    logs = [
        (model.parent / "log.csv").read_text().splitlines() for model in (resumed, uninterrupted)
    ]
    assert logs[0][0] == logs[1][0]  # columns in the same order
    assert without_time(folder / "log.csv") == without_time(uninterrupted.parent / "log.csv")


def without_time(log) -> list[dict[str, str]]:
    with log.open() as stream:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(stream)]


def test_a_run_killed_within_an_epoch_resumes_to_the_same_bits(tmp_path, uninterrupted):
    check_resume(tmp_path, ("after the optimizer", STEPS_PER_EPOCH + 4), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("moment", killed_moments(5), ids=lambda m: f"{m[0]} {m[1]}")
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(tmp_path, moment, uninterrupted):
    check_resume(tmp_path, moment, uninterrupted)


def test_two_runs_with_one_seed_are_equal_and_with_two_are_not(tmp_path, uninterrupted):
    again = run_tiny(tmp_path / "again")
    assert_same_bits(again, uninterrupted)
    other = run_tiny(tmp_path / "other", tiny_config(train={"seed": 1}))
    assert not torch.equal(
        load_file(other)["readout.head.weight"], load_file(again)["readout.head.weight"]
    )


def test_global_random_numbers_do_not_matter(tmp_path, uninterrupted):
    torch.manual_seed(99)
    torch.rand(5)
    assert_same_bits(run_tiny(tmp_path), uninterrupted)


def test_resuming_a_finished_run_changes_nothing(tmp_path, uninterrupted):
    folder = uninterrupted.parent
    before = uninterrupted.read_bytes()
    run_tiny(folder, resume=True)
    assert uninterrupted.read_bytes() == before


def test_a_run_is_not_overwritten_and_not_resumed_as_another(tmp_path, uninterrupted):
    folder = uninterrupted.parent
    with pytest.raises(TrainingError, match="holds a run already: go on with --resume, or"):
        run_tiny(folder)
    with pytest.raises(ConfigError, match=r"another configuration: train.lr: 0.003, not 0.5$"):
        run_tiny(folder, tiny_config(train={"lr": 0.5}), resume=True)


def test_a_run_is_not_resumed_on_other_images(uninterrupted):
    from rich.console import Console

    other = tiny_dataset(seed=5)
    with pytest.raises(DatasetError, match="was trained on other images"):
        Run(tiny_config(), other, uninterrupted.parent, None, Console(), None)


def test_the_log_has_a_row_per_epoch_with_rates_of_every_layer(uninterrupted):
    rows = without_time(uninterrupted.parent / "log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    rates = {key: float(value) for key, value in rows[-1].items() if key.startswith("rate/")}
    assert len(rates) == 5 + 7  # stem; q, k, v, attention, proj, fc1, fc2
    assert all(0 <= rate <= 1 for rate in rates.values())
    assert float(rows[-1]["test_tokens"]) <= 1


def test_the_log_agrees_with_an_evaluation_of_the_saved_model(uninterrupted):
    last = without_time(uninterrupted.parent / "log.csv")[-1]
    result = evaluate(load_model(uninterrupted), tiny_dataset().test)
    assert float(last["test_accuracy"]) == result.accuracy
    assert float(last["test_tokens"]) == pytest.approx(result.average_tokens, abs=1e-12)
    assert float(last["rate/blocks.0.fc1"]) == result.rates["blocks.0.fc1"]


def test_training_learns(tmp_path):
    changes = {"epochs": 12, "lr": 0.01, "gate_weight": 0.0, "checkpoint_steps": 0, "seed": 1}
    plain = {"mixup": 0.0, "flip": False}  # a mirror image of `left` would be `right`
    model = run_tiny(tmp_path, tiny_config(model={"dim": 16}, augment=plain, train=changes))
    assert evaluate(load_model(model), tiny_dataset().test).accuracy > 0.6


# --- stages and checkpoints to start from ---


def test_stages_run_one_after_another_and_end_in_a_quantised_model(tmp_path):
    stages = [
        {"name": "float", "model": {"halting": {"enabled": False}}},
        {"name": "adaptive", "model": {"halting": {"enabled": True}}, "train": {"epochs": 1}},
        {"name": "quantized", "train": {"epochs": 1, "quantized": True}},
    ]
    path = run_tiny(tmp_path, tiny_config(stages=stages))
    assert path == tmp_path / "model.safetensors"
    assert [read_checkpoint(tmp_path / s["name"]).quantized for s in stages] == [False, False, True]
    assert not read_checkpoint(tmp_path / "float").config.halting.enabled
    comparison = compare(load_model(path), tiny_dataset().test)
    assert comparison.model.images == int(comparison.agreement.sum()) == 16


def test_a_stage_that_was_finished_is_not_trained_again(tmp_path):
    stages = [{"name": "a"}, {"name": "b", "train": {"epochs": 1}}]
    run_tiny(tmp_path, tiny_config(stages=stages))
    written = (tmp_path / "a" / "state.safetensors").stat().st_mtime_ns
    run_tiny(tmp_path, tiny_config(stages=stages), resume=True)
    assert (tmp_path / "a" / "state.safetensors").stat().st_mtime_ns == written


def test_quantised_training_needs_weights_to_start_from(tmp_path):
    with pytest.raises(ConfigError, match=r"train.quantized needs trained weights to start from"):
        run_tiny(tmp_path, tiny_config(train={"quantized": True}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dim": 16}, CheckpointError, "is of another configuration: dim: 8, not 16$"),
        ({"classes": 4}, CheckpointError, "is of another configuration: classes: 3, not 4$"),
    ],
)
def test_a_start_from_a_model_of_another_shape(tmp_path, uninterrupted, changes, error, message):
    config = tiny_config(model=changes, train={"initial": str(uninterrupted)})
    with pytest.raises(error, match=message):
        run_tiny(tmp_path, config)


def test_learned_scores_are_kept_unless_the_configuration_asks_for_others(tmp_path, uninterrupted):
    from atsnn.training import initial_model

    gamma = "scores.0.gamma"
    learned = load_file(uninterrupted)[gamma]
    kept = initial_model(tiny_config(), uninterrupted, tiny_dataset().train)
    assert torch.equal(kept.state_dict()[gamma], learned)
    other = tiny_config(model={"halting": {"gamma": 2.5}})
    changed = initial_model(other, uninterrupted, tiny_dataset().train)
    assert float(changed.state_dict()[gamma]) == 2.5


def test_a_score_switched_off_leaves_the_learned_ones_of_other_blocks(tmp_path):
    from atsnn.training import initial_model

    config = tiny_config(model={"blocks": 2}, train={"epochs": 1})
    start = run_tiny(tmp_path, config)
    learned = load_file(start)
    without = tiny_config(model={"blocks": 2, "halting": {"stem_score": False}})
    found = initial_model(without, start, tiny_dataset().train).state_dict()
    assert float(found["scores.0.beta"]) == SCORE_OFF
    assert float(learned["scores.1.beta"]) != config.model.halting.beta
    assert torch.equal(found["scores.1.beta"], learned["scores.1.beta"])


# --- runs that cannot go on ---


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_do(tmp_path):
    config = tiny_config(train={"lr": 1e30, "warmup_epochs": 0})
    with pytest.raises(TrainingError, match=r"loss is nan in epoch \d, step \d+: lower train.lr"):
        run_tiny(tmp_path, config)


def test_fewer_images_than_one_batch(tmp_path):
    with pytest.raises(DatasetError, match="40 training images are less than one batch of 64"):
        run_tiny(tmp_path, tiny_config(train={"batch": 64}))


@pytest.mark.parametrize(("most", "steps"), [(2, 2), (STEPS_PER_EPOCH + 1, STEPS_PER_EPOCH)])
def test_an_epoch_may_be_cut_short_on_images_of_its_own(tmp_path, monkeypatch, most, steps):
    seen: list[tuple[int, list[int]]] = []
    step = Run._step

    def kept(run: Run, indices):
        seen.append((run.state.epoch, indices.tolist()))
        return step(run, indices)

    monkeypatch.setattr(Run, "_step", kept)
    run_tiny(tmp_path, tiny_config(train={"epoch_steps": most}))
    assert [epoch for epoch, _ in seen] == [0] * steps + [1] * steps
    assert seen[0][1] != seen[steps][1]


def test_a_gpu_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    with pytest.raises(ConfigError, match=r"train.device is cuda, but torch finds no CUDA GPU"):
        run_tiny(tmp_path, tiny_config(train={"device": "cuda"}))


# --- schedule, losses, augmentation ---


def test_learning_rate_warms_up_then_falls_along_a_cosine():
    config = TrainConfig(epochs=10, warmup_epochs=2, lr=1.0, min_lr=0.1)
    rates = [learning_rate(config, 5, e, s) for e in range(10) for s in range(5)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == max(rates) == 1.0
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[30] == pytest.approx(0.55)
    assert 0.1 < rates[-1] < 0.11


def output(gates: float = 1.0) -> ModelOutput:
    cells = torch.full((2, 3, 4, 5), gates)
    scores = torch.full((3, 3, 4, 5), 0.5)
    return ModelOutput(torch.zeros(4, 3), cells, torch.full((4, 5), 7.0), scores)


def test_total_loss_adds_ponder_gate_above_its_target_and_prior():
    targets = torch.full((4, 3), 1 / 3)
    task = float(torch.tensor(3.0).log())
    config = TrainConfig(ponder_weight=0.01, gate_weight=2.0, gate_target=0.75)
    assert float(total_loss(output(), targets, config, adaptive=False)) == pytest.approx(task)
    loss = total_loss(output(1.0), targets, config, adaptive=True)
    assert float(loss) == pytest.approx(task + 0.07 + 2 * 0.25)
    loss = total_loss(output(0.5), targets, config, adaptive=True)
    assert float(loss) == pytest.approx(task + 0.07)
    with_prior = config.model_copy(update={"prior_weight": 1.0})
    more = total_loss(output(0.5), targets, with_prior, adaptive=True)
    assert float(more) > float(loss)


def test_the_prior_is_a_distribution_and_diverges_from_anything_else():
    prior = cell_prior(3, 4, 0.5)
    assert float(prior.sum()) == pytest.approx(1.0)
    assert float(prior.max()) == float(prior[0, 3]) == pytest.approx(float(prior[2, 0]))
    scores = prior[:, :, None, None].expand(3, 4, 2, 2) * 0.3
    assert float(prior_divergence(scores, 0.5)) == pytest.approx(0.0, abs=1e-5)
    assert float(prior_divergence(scores.flip(0), 0.9)) > 0.1


def test_each_epoch_has_an_order_of_its_own():
    first, second = epoch_order(50, 3, 0), epoch_order(50, 3, 1)
    assert torch.equal(first, epoch_order(50, 3, 0))
    assert not torch.equal(first, second)
    assert torch.equal(second.sort().values, torch.arange(50))


def test_a_shift_moves_whole_images_and_fills_with_zero():
    images = torch.zeros(64, 2, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 200
    moved = random_shift(images, 2)
    assert moved.shape == images.shape
    assert (moved.flatten(1).sum(1, dtype=torch.int64) == 400).all()
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert len(moved[:, 0].flatten(1).argmax(1).unique()) > 10


def test_mixed_images_stay_whole_numbers_and_targets_sum_to_one():
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    augmentation = Augmentation(AugmentConfig(mixup=0.5), 3, 0.1, seed=4)
    batch = augmentation(images, labels, 0, 0)
    share = derived_beta(0.5, 4, 0, 0)
    assert torch.equal(batch.images, mix(images, share))
    assert batch.images.dtype == torch.uint8
    torch.testing.assert_close(batch.targets.sum(1), torch.ones(6))
    off = Augmentation(AugmentConfig(mixup=0.5, mixup_epochs=1), 3, 0.0, seed=4)
    assert torch.equal(off(images, labels, 1, 0).images, images)


def test_the_published_augmentation_is_the_same_for_the_same_step():
    config = AugmentConfig(flip=True, randaugment=1, random_erase=0.5, mixup=0.5)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0])
    make = Augmentation(config, 3, 0.1, seed=0)
    before = torch.get_rng_state()
    first, again = make(images, labels, 2, 3), make(images, labels, 2, 3)
    assert torch.equal(first.images, again.images)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.images, make(images, labels, 2, 4).images)


@pytest.mark.parametrize("bits", [1, 6, 8])
def test_the_model_sees_exactly_the_integers_of_the_chip(bits):
    pixels = torch.arange(256, dtype=torch.uint8)
    integers = torch.from_numpy(pixels_to_integers(pixels.numpy(), bits))
    assert torch.equal(torch.round(to_input(pixels, bits) * (2**bits - 1)), integers.float())


def test_evaluation_restores_the_mode_and_counts_confusions():
    model = Spikformer(tiny_config().model).train()
    result = evaluate(model, tiny_dataset().test, batch=5)
    assert model.training
    assert result.confusion.sum() == result.images == 16
    assert result.confusion.diagonal().sum() / 16 == pytest.approx(result.accuracy)
    assert result.open_gates.shape == (1, 2)


MERGING = {
    "model": {"image_size": [8, 8], "merging": {"enabled": True, "count": 1}},
    "train": {"epochs": 1},
}


def test_a_run_of_stages_resumes_from_its_own_file(tmp_path):
    """Fractional bits are left open by the run and settled by the stage that merges."""
    stages = [
        {"name": "plain"},
        {"name": "merging", "model": {"merging": MERGING["model"]["merging"]}},
    ]
    config = tiny_config(stages=stages, train={"epochs": 1})
    run_tiny(tmp_path, config)
    found = load_config(tmp_path / "config.yaml")
    bits = [s.model.quantization.fraction_bits for s in found.stage_configs().values()]
    assert bits == [0, 3]
    run_tiny(tmp_path, found, resume=True)


def test_a_model_that_only_merges_does_not_halt_as_its_start_did(tmp_path):
    start = run_tiny(tmp_path / "start")
    merge_only = {"halting": {"enabled": False}, **MERGING["model"]}
    changes = {"model": merge_only, "train": {"epochs": 1, "initial": str(start)}}
    model = load_model(run_tiny(tmp_path / "next", tiny_config(**changes)))
    assert [float(score.beta.detach()) for score in model.score_list] == [SCORE_OFF]


def test_a_start_that_failed_leaves_the_folder_free(tmp_path):
    wrong = tiny_config(train={"initial": str(tmp_path / "nowhere")})
    with pytest.raises(CheckpointError):
        run_tiny(tmp_path / "run", wrong)
    assert run_tiny(tmp_path / "run", tiny_config(train={"epochs": 1})).is_file()


def test_the_log_names_held_out_images_as_validation(tmp_path):
    from dataclasses import replace

    from rich.console import Console

    tiny = tiny_dataset()
    held_out = replace(tiny, validation=tiny.train.first(8))
    train(tiny_config(train={"epochs": 1}), held_out, tmp_path, console=Console(quiet=True))
    row = without_time(tmp_path / "log.csv")[-1]
    assert row["validation_images"] == "8"
    assert "test_accuracy" not in row

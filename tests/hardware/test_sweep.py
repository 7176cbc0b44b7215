"""A sweep ends in one tidy table, whatever kills it on the way."""

import csv
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import tiny_config
from tiny_sweeps import FEW, SWEEP, sweep, tiny_job, write_images
from typer.testing import CliRunner

from atsnn.cli import app
from atsnn.data import load_dataset
from atsnn.errors import ConfigError
from atsnn.teacher import TEACHER_FILE
from hardware.sweep.cell import Job, load_job
from hardware.sweep.config import DeployConfig, cells_of, load_sweep
from hardware.sweep.measure import PROFILES
from hardware.sweep.page import write_page
from hardware.sweep.runner import TIMES, deploy_on_test, read_table, row_id, run_sweep
from hardware.sweep.start import start_run
from hardware.sweep.summary import operation_claim, points, standard_error, token_claims

Rows = list[dict[str, str]]
EXAMPLES = Path(__file__).parents[2] / "examples" / "sweeps"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def finished(work: Path) -> Job:
    job = tiny_job(work)
    run_sweep(job, workers=2)
    return job


def without_times(rows: Rows) -> Rows:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


# --- the grid ---


def test_the_grid_is_methods_by_budgets_by_seeds():
    grid = sweep(seeds=[0, 1], methods=[*SWEEP["methods"][:2], {"name": "once", "seeds": [5]}])
    assert [cell.id for cell in cells_of(grid)] == [
        "all-tokens@all-s0",
        "all-tokens@all-s1",
        "halting@low-s0",
        "halting@low-s1",
        "halting@high-s0",
        "halting@high-s1",
        "once@all-s5",
    ]
    assert [cell.run.train.seed for cell in cells_of(grid)] == [0, 1, 0, 1, 0, 1, 5]


def test_a_budget_lies_over_its_method_and_a_source_below_both():
    ablation = {
        "name": "max",
        "source": {"method": "halting", "budget": "low"},
        "model": {"merging": {"enabled": True, "count": 1, "combine": "max"}},
    }
    cells = {c.id: c for c in cells_of(sweep(methods=[*SWEEP["methods"][:2], ablation]))}
    low = cells["halting@low-s0"].run
    assert low.train.gate_target == 0.2
    assert low.model.halting.enabled
    over = cells["max@all-s0"]
    assert over.source == "halting@low-s0"
    assert over.run.model.halting.enabled
    assert over.run.model.merging.combine == "max"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": [{"name": "a"}, {"name": "a"}]}, "two are named a"),
        (
            {"methods": [{"name": "a", "source": {"method": "b"}}]},
            "no method b to take weights from; there are: a",
        ),
        (
            {"methods": [{"name": "a"}, {"name": "b", "source": {"method": "a", "budget": "x"}}]},
            "method a has no budget x; there are: all",
        ),
        (
            {"methods": [{"name": "a"}, {"name": "b", "source": {"method": "a"}, "seeds": [7]}]},
            "its source a@all-s7 is no trained cell of this sweep; there are: a@all-s0",
        ),
        ({"run": {**SWEEP["run"], "stages": []}}, "end with a stage that has train.quantized"),
        (
            {"methods": [{"name": "a", "model": {"heads": 3}}]},
            "cell a@all-s0: model: dim 8 does not divide into 3 heads",
        ),
        (
            {"run": {**SWEEP["run"], "train": {**SWEEP["run"]["train"], "initial": "x"}}},
            "every cell starts from the checkpoint that the sweep is given",
        ),
        ({"methods": [{"name": "Bad Name"}]}, "name"),
        ({"methods": [{"name": "a", "budgets": {"../up": {}}}]}, "budgets"),
        (
            {"methods": [{"name": "a", "budgets": {"low": {"modle": {}}}}]},
            r"unknown key methods\.0\.budgets\.low\.modle; known here: augment, data, ",
        ),
        ({"seeds": [0, 1, 0]}, r"seeds \[0, 1, 0\]: one stands there twice"),
        ({"methods": [{"name": "a", "seeds": [2, 2]}]}, r"seeds \[2, 2\]: one stands there twice"),
    ],
)
def test_a_grid_that_cannot_run_is_refused_before_it_starts(changes, message):
    with pytest.raises(ConfigError, match=message):
        sweep(**changes)


# --- the table ---


def test_every_cell_is_a_row_with_its_numbers(finished):
    rows = read_table(finished.folder / "table.csv")
    assert [(row["method"], row["budget"]) for row in rows] == [
        ("all-tokens", "all"),
        ("halting", "low"),
        ("halting", "high"),
        ("sparse-spikformer", "all"),
        ("tp-spikformer", "half"),
        ("tome", "all"),
    ]
    for row in rows:
        assert row["status"] == "done"
        assert row["error"] == ""
        assert row["images"] == "12"
        assert row["verified_images"] == "5"
        assert int(row["spikes_compared"]) > 0
        assert row["spikes_differing"] == "0"
        assert 0 < float(row["average_tokens"]) <= 1
        assert row["mean_steps"] == "2.0"
        assert 0 < float(row["stem_sops"]) < float(row["sops"])
        for name in PROFILES:
            assert float(row[f"joules/{name}"]) > 0
    by_method = {row["method"]: row for row in rows}
    assert float(by_method["all-tokens"]["average_tokens"]) == 1
    assert float(by_method["tp-spikformer"]["average_tokens"]) == 0.5
    assert float(by_method["sparse-spikformer"]["average_tokens"]) == 0.5
    assert float(by_method["sparse-spikformer"]["selector_macs"]) == 4 * (8 * 4 + 4 * 2)
    assert float(by_method["tp-spikformer"]["selector_macs"]) == 3 * 2 * 4 * 8
    assert float(by_method["all-tokens"]["selector_macs"]) == 0
    assert by_method["tp-spikformer"]["epochs"] == "0"
    assert by_method["halting"]["epochs"] == "2"


def test_cells_share_what_the_teacher_answered(finished):
    with sqlite3.connect(finished.folder / TEACHER_FILE) as connection:
        (answers,) = connection.execute("SELECT count(*) FROM answers").fetchone()
    assert answers == 4  # one epoch of 32 images in batches of 8, the same in both stages


def test_a_cell_keeps_what_pictures_need(finished):
    place = finished.place("tome@all-s0")
    with np.load(place / "details.npz") as details:
        assert details["open"].shape == (1, 2, 4)
        assert details["class_steps"].shape == (3, 1)
        assert details["examples"].shape == (1, 2, 12, 4)
        assert details["images"].shape == (12, 1, 8, 8)
        partner = details["partner"]
    merged = partner >= 0
    assert merged.sum(2).max() <= 1
    assert (partner[merged] % 2 == 1).all()  # even tokens join odd ones
    assert not merged[:, :, 1::2].any()


def test_pictures_are_kept_only_where_the_licence_allows(work):
    job = tiny_job(work, "no-pictures", show_images=False, methods=SWEEP["methods"][:1])
    run_sweep(job)
    with np.load(job.place("all-tokens@all-s0") / "details.npz") as details:
        assert "images" not in details.files


def test_a_finished_sweep_runs_nothing_again(finished):
    before = (finished.folder / "table.csv").read_bytes()
    ended: list[str] = []
    run_sweep(finished, report=lambda name, row: ended.append(name))
    assert ended == []
    assert (finished.folder / "table.csv").read_bytes() == before


RUN = """
import sys
from pathlib import Path
from tiny_sweeps import FEW, tiny_job
from hardware.sweep.runner import run_sweep
run_sweep(tiny_job(Path(sys.argv[1]), "killed", methods=FEW))
"""


def test_a_killed_sweep_goes_on_and_yields_the_same_table(work, finished):
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, str(Path(here).parent / "atsnn"), *sys.path])
    command = [sys.executable, "-c", RUN, str(work)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    killed = work / "killed"
    second = killed / "cells" / "halting@low-s0" / "float" / "state.safetensors"
    deadline = time.monotonic() + 120
    while not second.exists() and time.monotonic() < deadline and process.poll() is None:
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert second.exists()
    assert not (killed / "cells" / "tome@all-s0" / "result.json").exists()
    ended: list[str] = []
    job = tiny_job(work, "killed", methods=FEW)
    table = run_sweep(job, report=lambda name, row: ended.append(name))
    assert "halting@low-s0" in ended
    assert "all-tokens@all-s0" not in ended
    names = [method["name"] for method in FEW]
    whole = without_times(read_table(finished.folder / "table.csv"))
    expected = [row for row in whole if row["method"] in names]
    assert without_times(read_table(table)) == expected


# --- exits over time steps ---

EXIT = {
    "name": "exit",
    "group": "ours",
    "source": {"method": "halting", "budget": "low"},
    "deploy": {"exit_margin": 1e-9},
    "budgets": {"at-once": {}, "never": {"deploy": {"exit_margin": 1000.0}}},
}


@pytest.fixture(scope="module")
def with_exits(finished, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The finished sweep with two more cells that only run what `halting@low` has trained."""
    out = tmp_path_factory.mktemp("exits") / "exits"
    shutil.copytree(finished.folder, out, ignore=shutil.ignore_patterns("test.*"))
    job = replace(finished, folder=out, sweep=sweep(methods=[*SWEEP["methods"], EXIT]))
    ended: list[str] = []
    run_sweep(job, report=lambda name, row: ended.append(name))
    assert ended == ["exit@at-once-s0", "exit@never-s0"]
    return job


def test_a_budget_sets_another_exit_and_a_source_hands_none_on():
    unsure = {
        "name": "unsure",
        "source": {"method": "halting", "budget": "low"},
        "budgets": {"none": {}, "off": {"deploy": {"exit_margin": None}}},
    }
    halting = {**SWEEP["methods"][1], "deploy": {"exit_margin": 0.5}}
    cells = cells_of(sweep(methods=[SWEEP["methods"][0], halting, EXIT, unsure]))
    assert {cell.id: cell.deploy.exit_margin for cell in cells} == {
        "all-tokens@all-s0": None,
        "halting@low-s0": 0.5,
        "halting@high-s0": 0.5,
        "exit@at-once-s0": 1e-9,
        "exit@never-s0": 1000.0,
        "unsure@none-s0": None,
        "unsure@off-s0": None,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"deploy": {"margin": 1}},
            "unknown key methods.1.deploy.margin; known here: exit_decay, exit_margin",
        ),
        (
            {"budgets": {"low": {"deploy": {"margin": 1}}}},
            "unknown key methods.1.budgets.low.deploy.margin; known here: exit_decay, exit_margin",
        ),
        (
            {"deploy": {"exit_margin": 0}},
            "methods.1.deploy.exit_margin = 0: input should be greater than 0",
        ),
        (
            {"deploy": {"exit_margin": float("inf")}},
            "methods.1.deploy.exit_margin = inf: input should be a finite number",
        ),
        (
            {"model": {"merging": {"enabled": True, "count": 1, "assignment": "all"}}},
            "cell x@all-s0: deploy.exit_margin: merging.assignment all chooses pairs from all time "
            "steps, which an exit does not wait for; use assignment first",
        ),
        (
            {"model": {"selection": {"method": "random", "keep": [0.5]}}},
            "cell x@all-s0: deploy.exit_margin: selection.method random chooses tokens once for "
            "all time steps, which an exit does not wait for; use halting or merging in its place",
        ),
    ],
)
def test_an_exit_that_cannot_be_is_refused_when_the_sweep_is_read(changes, message):
    method = {
        "name": "x",
        "source": {"method": "all-tokens"},
        "deploy": {"exit_margin": 1.0},
        **changes,
    }
    with pytest.raises(ConfigError) as error:
        sweep(methods=[SWEEP["methods"][0], method])
    assert str(error.value).removeprefix("tiny sweep: ") == message


def test_an_image_that_left_is_charged_for_its_steps_alone(with_exits):
    rows = {row_id(row): row for row in read_table(with_exits.folder / "table.csv")}
    whole, sure = rows["halting@low-s0"], rows["exit@at-once-s0"]
    assert sure["mean_steps"] == "1.0"
    assert sure["spikes_differing"] == "0"
    assert sure["verified_images"] == "5"
    assert 2 * int(sure["spikes_compared"]) == int(whole["spikes_compared"])
    for column in ("average_tokens", "sops", "stem_sops", "spikes", "joules/loihi1"):
        assert float(sure[column]) < float(whole[column])
    with np.load(with_exits.place("exit@at-once-s0") / "details.npz") as details:
        assert details["examples"][:, 0].any()
        assert not details["examples"][:, 1].any()
        assert details["class_steps"].max() <= 1


def test_an_exit_that_nobody_takes_changes_no_number(with_exits):
    rows = {row_id(row): row for row in read_table(with_exits.folder / "table.csv")}
    whole, unsure = rows["halting@low-s0"], rows["exit@never-s0"]
    own = {"method", "budget", "epochs", "seconds", "spikes_compared"}
    assert {k: v for k, v in whole.items() if k not in own} == {
        k: v for k, v in unsure.items() if k not in own
    }
    # both networks are verified: the one for the first step, and that for two
    assert 2 * int(unsure["spikes_compared"]) == 3 * int(whole["spikes_compared"])


def test_the_test_images_leave_by_the_same_margin(with_exits):
    (row,) = read_table(deploy_on_test(with_exits, ["exit@at-once-s0"]))
    assert (row["images"], row["mean_steps"]) == ("10", "1.0")


def test_the_page_shows_the_steps_and_what_was_changed(with_exits, tmp_path):
    page = write_page([with_exits.folder], tmp_path / "results.md")[0].read_text()
    lines = page.splitlines()
    heads = next(line for line in lines if line.startswith("| method | budget ")).split("|")
    shown = {
        tuple(cells[1:3]): cells[heads.index(" steps ")].strip()
        for line in lines
        if len(cells := line.split("|")) == len(heads)
    }
    assert shown[" halting ", " low "] == "2"
    assert shown[" exit ", " at-once "] == "1"
    changes = "`weights of halting`; `deploy: {exit_margin: 1.0e-09}`; `never: {deploy: {exit_"
    assert f"| exit | {changes}" in page
    assert "An exit over time steps leaves out whole steps, the stem's as well." in page


def test_cells_of_before_there_were_exits_are_known_and_shown(finished, tmp_path):
    out = tmp_path / "old"
    shutil.copytree(finished.folder, out)
    job = replace(finished, folder=out)
    cell = job.cell("halting@low-s0")
    run = cell.run.model_dump(mode="json", exclude_defaults=True)
    start = hashlib.sha256(job.start.read_bytes()).hexdigest()
    values = json.dumps([run, None, start, 5, None], sort_keys=True).encode()
    assert job.fingerprint(cell) == hashlib.sha256(values).hexdigest()[:16]
    other = replace(cell, deploy=DeployConfig(exit_margin=1.0))
    falling = replace(cell, deploy=DeployConfig(exit_margin=1.0, exit_decay=0.5))
    assert len({job.fingerprint(each) for each in (cell, other, falling)}) == 3
    rows = read_table(out / "table.csv")
    with (out / "table.csv").open("w", newline="") as stream:
        columns = [name for name in rows[0] if name != "mean_steps"]
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    text = write_page([out], tmp_path / "results.md")[0].read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| halting | low |"))
    assert line.split("|")[8].strip() == "2"
    assert CliRunner().invoke(app, ["sweep", "show", str(out)]).exit_code == 0


# --- failures ---


def test_a_failure_is_a_row_and_leaves_the_others_alone(work):
    methods = [
        {"name": "diverges", "train": {"lr": 1e30}},
        {
            "name": "after-it",
            "source": {"method": "diverges"},
            "model": {"merging": {"enabled": True, "count": 1}},
        },
        SWEEP["methods"][0],
    ]
    job = tiny_job(work, "failing", methods=methods)
    rows = {row["method"]: row for row in read_table(run_sweep(job))}
    assert rows["diverges"]["status"] == "failed"
    assert "lower train.lr" in rows["diverges"]["error"]
    assert rows["diverges"]["accuracy"] == ""
    assert rows["after-it"]["status"] == "failed"
    assert "its source diverges@all-s0 failed" in rows["after-it"]["error"]
    assert rows["all-tokens"]["status"] == "done"
    ended: list[str] = []
    run_sweep(job, report=lambda name, row: ended.append(name))
    assert ended == []
    run_sweep(job, retry=True, report=lambda name, row: ended.append(name))
    assert ended == ["diverges@all-s0", "after-it@all-s0"]


def test_a_folder_of_another_sweep_is_refused(finished):
    other = Job(
        finished.folder, sweep(verify_images=3), finished.data, finished.start, finished.threads
    )
    with pytest.raises(ConfigError, match="was made with another configuration or checkpoint"):
        run_sweep(other)


def test_a_missing_start_is_refused(finished, tmp_path):
    job = Job(tmp_path, finished.sweep, finished.data, tmp_path / "none.safetensors", None)
    with pytest.raises(ConfigError, match="no such checkpoint to start from"):
        run_sweep(job)
    assert not (tmp_path / "sweep.json").exists()


def test_a_start_that_has_seen_the_images_it_is_measured_on_is_refused(finished, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(finished.start.parent, start)
    seen = tiny_config(data={"validation_images": 11})
    (start / "config.yaml").write_text(seen.model_dump_json(exclude_unset=True))
    job = replace(finished, folder=tmp_path / "out", start=start / finished.start.name)
    message = "trained with 11 images held out, this sweep measures on 12, .* or lower it here"
    with pytest.raises(ConfigError, match=message):
        run_sweep(job)
    assert not job.folder.exists()


def test_a_folder_that_cannot_be_written_is_refused(finished, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/out/.*: cannot be (read|written) \(Not a dir"):
        run_sweep(replace(finished, folder=tmp_path / "file" / "out"))


def one_cell(folder: Path, start: dict) -> tuple[Path, list[str]]:
    """A sweep of all tokens alone, and the words of the command that runs it."""
    write_images(folder / "data")
    config = folder / "sweep.yaml"
    config.write_text(json.dumps({**SWEEP, **start, "methods": SWEEP["methods"][:1]}))
    out = folder / "out"
    words = ["sweep", "run", str(config), "--out", str(out), "--data", str(folder / "data")]
    return out, [*words, "--threads", "1"]


def test_one_command_trains_the_start_and_goes_on_with_it(tmp_path):
    run = {key: SWEEP["run"][key] for key in ("model", "data", "train")}
    out, words = one_cell(tmp_path, {"start": {"run": run}})
    assert CliRunner().invoke(app, words).exit_code == 0
    start = out / "start" / "model.safetensors"
    assert load_job(out).start == start
    before = start.stat().st_mtime_ns
    assert CliRunner().invoke(app, words).exit_code == 0
    assert start.stat().st_mtime_ns == before
    assert len(read_table(out / "table.csv")) == 1
    page = tmp_path / "results.md"
    written = write_page([out], page)
    assert tmp_path / "results" / "out-curve.png" in written
    copy = tmp_path / "results" / "out-table.csv"
    assert copy in written
    assert copy.read_bytes() == (out / "table.csv").read_bytes()
    assert "[results/out-table.csv](results/out-table.csv)." in page.read_text()
    assert "Every cell starts from one model of all tokens, trained for 1 epoch" in page.read_text()


def test_a_folder_begun_with_a_checkpoint_goes_on_with_it(finished, tmp_path):
    run = {key: SWEEP["run"][key] for key in ("model", "data", "train")}
    out, words = one_cell(tmp_path, {"start": {"run": run}})
    begun = CliRunner().invoke(app, [*words, "--start", str(finished.start)])
    assert begun.exit_code == 0, begun.output
    assert CliRunner().invoke(app, words).exit_code == 0
    assert load_job(out).start == finished.start
    assert not (out / "start").exists()


def test_a_start_is_a_preset_and_what_it_changes():
    start = {"preset": "small-cifar10", "run": {"train": {"seed": 3}}}
    run = start_run(sweep(start=start))
    assert run.train.seed == 3
    assert [stage.train.epochs for stage in run.stage_configs().values()] == [24, 8]


def test_a_sweep_without_a_start_is_refused(tmp_path):
    out, words = one_cell(tmp_path, {})
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "Tiny: says nothing of its start; give a checkpoint (--start FILE)" in str(
        result.exception
    )
    assert not out.exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_example_sweeps_say_how_they_start(path):
    example = load_sweep(path)
    run = example.run["model"]
    *_, last = start_run(example).stage_configs().values()
    assert last.model.model_dump(include=set(run), mode="json") == run


def test_without_held_out_images_nothing_can_be_chosen():
    with pytest.raises(ConfigError, match=r"all-tokens@all-s0: no images are held out, and every"):
        sweep(run={**SWEEP["run"], "data": {}}, methods=SWEEP["methods"][:1])


def test_a_start_that_holds_fewer_images_out_is_refused_before_it_is_trained():
    start = {"preset": "small-cifar10", "run": {"data": {"validation_images": 5}}}
    with pytest.raises(ConfigError, match=r"start holds 5 images out, the sweep measures on 12"):
        start_run(sweep(start=start))


def test_the_folder_of_a_training_run_is_refused(finished, tmp_path):
    (tmp_path / "config.yaml").write_text("model: {}")
    with pytest.raises(ConfigError, match=r"holds a run of `atsnn train`; choose another folder"):
        run_sweep(replace(finished, folder=tmp_path))


def test_a_cluster_without_dask_is_refused_by_name(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask", None)
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(ConfigError, match=r"Dask does not import here .*install atsnn\[cluster\]"):
        run_sweep(finished, cluster="tcp://127.0.0.1:1")


def test_cells_run_on_a_cluster(work, finished):
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    job = tiny_job(work, "cluster", methods=[SWEEP["methods"][0], SWEEP["methods"][4]])
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        table = run_sweep(job, cluster=cluster.scheduler_address)
    expected = [
        row
        for row in without_times(read_table(finished.folder / "table.csv"))
        if row["method"] in ("all-tokens", "tome")
    ]
    assert without_times(read_table(table)) == expected


# --- test images ---


def test_test_images_are_used_once_and_by_command_only(finished):
    table = deploy_on_test(finished, ["all-tokens@all-s0", "tome@all-s0"])
    rows = read_table(table)
    assert [row["method"] for row in rows] == ["all-tokens", "tome"]
    assert {row["images"] for row in rows} == {"10"}
    assert {row["spikes_differing"] for row in rows} == {"0"}
    before = table.read_bytes()
    with pytest.raises(ConfigError, match="test images are used once"):
        deploy_on_test(finished, ["halting@low-s0", "tome@all-s0"])
    assert table.read_bytes() == before
    with pytest.raises(ConfigError, match="has no cell nothing@all-s0"):
        deploy_on_test(finished, ["nothing@all-s0"])


def test_a_test_run_that_fails_says_so_and_uses_nothing_up(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.folder, out, ignore=shutil.ignore_patterns("test.*"))
    replace(finished, folder=out, data=str(tmp_path / "gone")).save()
    words = ["sweep", "test", str(out), "--cell", "all-tokens@all-s0"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 1
    assert "all-tokens@all-s0: failed: " in result.output
    assert "gone: no such data folder" in result.output
    assert read_table(out / "test.csv") == []
    replace(finished, folder=out).save()
    assert CliRunner().invoke(app, words).exit_code == 0
    assert len(read_table(out / "test.csv")) == 1


# --- the command line ---


def test_commands_print_the_table_and_machines_read_json(finished, work):
    result = CliRunner().invoke(app, ["sweep", "show", str(finished.folder)])
    assert result.exit_code == 0
    assert "halting" in result.output
    result = CliRunner().invoke(app, ["sweep", "show", str(finished.folder), "--json"])
    assert len(json.loads(result.output)) == 6
    config = work / "sweep.yaml"
    config.write_text(json.dumps(SWEEP))
    options = {"--out": finished.folder, "--data": finished.data, "--start": finished.start}
    given = [str(word) for pair in options.items() for word in pair]
    again = CliRunner().invoke(app, ["sweep", "run", str(config), *given, "--threads", "1"])
    assert again.exit_code == 0, again.output


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no sweep \(sweep.json is missing\)"):
        load_job(tmp_path)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        load_job(tmp_path)


def test_the_tables_are_plain_csv(finished):
    with (finished.folder / "table.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header[:7] == ["method", "group", "family", "budget", "seed", "status", "error"]
    assert all(len(row) == len(header) for row in rows)


def test_the_tiny_data_set_is_what_it_says(tmp_path):
    folder = write_images(tmp_path / "images")
    run = cells_of(sweep())[0].run
    dataset = load_dataset(str(folder), run.data, run.model)
    assert (len(dataset.train), len(dataset.test)) == (32, 10)


# --- the results page ---


def test_one_command_draws_the_page_from_the_table(finished, tmp_path):
    page = tmp_path / "docs" / "results.md"
    result = CliRunner().invoke(
        app, ["sweep", "report", str(finished.folder), "--page", str(page), "--json"]
    )
    assert result.exit_code == 0, result.output
    written = [Path(path) for path in json.loads(result.output)]
    assert written[0] == page
    text = page.read_text()
    assert "## Tiny" in text
    assert "6 of 6 cells ended well, 0 failed; 12 validation images per cell" in text
    changes = "`model: {halting: {enabled: true, learn: true}}`; `low: {train: {gate_weight: 1.0"
    assert f"| halting | {changes}" in text
    assert "45nm-fp32 (derived)," in text
    (base,) = (r for r in read_table(finished.folder / "table.csv") if r["method"] == "all-tokens")
    stem = float(base["stem_sops"]) / float(base["sops"])
    assert f"at most {1 - stem:.0%} can be saved" in text
    assert "### Tokens at a rival's accuracy" in text
    assert "what counts as one" in text
    assert "(energy.md)" not in text  # no such page lies beside it
    assert "differing: 0." in text
    for path in written[1:]:
        table = path.suffix == ".csv"
        assert path.read_bytes().startswith(b"method," if table else b"\x89PNG")
        assert f"results/{path.name}" in text
    names = {path.name.split("-", 1)[1] for path in written[1:]}
    assert "table.csv" in names
    assert {name for name in names if name.endswith(".png")} == {
        "costs.png",
        "open.png",
        "maps.png",
        "classes.png",
    }
    (row,) = (r for r in read_table(finished.folder / "table.csv") if r["method"] == "tome")
    shown = next(line for line in text.splitlines() if line.startswith("| tome |"))
    assert f"{float(row['accuracy']) * 100:.2f} %" in shown
    again = page.read_bytes()
    CliRunner().invoke(app, ["sweep", "report", str(finished.folder), "--page", str(page)])
    assert page.read_bytes() == again


def test_a_page_without_a_table_is_refused(finished, tmp_path):
    job = Job(tmp_path, finished.sweep, finished.data, finished.start, None)
    job.save()
    with pytest.raises(ConfigError, match="holds no table with rows yet; run the sweep first"):
        write_page([tmp_path], tmp_path / "results.md")
    assert not (tmp_path / "results.md").exists()


def test_the_page_says_what_an_ablation_differs_from(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.folder, out)
    rows = read_table(out / "table.csv")
    for row in rows:
        if row["method"] == "tome":
            row.update(group="ablation", family="similarity")
    with (out / "table.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = write_page([out], tmp_path / "results.md")[0].read_text()
    table = text.split("**similarity**")[1].split("\n\n")[1].splitlines()
    base, variant = (line.split("|") for line in table[2:])
    assert base[1].strip() == "all-tokens (as trained)"
    assert variant[1].strip() == "tome"
    accuracy = {row["method"]: float(row["accuracy"]) for row in rows}
    gained = (accuracy["tome"] - accuracy["all-tokens"]) * 100
    assert variant[5].strip() == f"{gained:+.2f}"
    assert base[5].strip() == ""


def test_a_page_that_cannot_be_written_is_an_error_of_one_line(finished, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\); choose another"):
        write_page([finished.folder], tmp_path / "file" / "results.md")


def test_a_page_of_someone_else_is_left_alone(finished, tmp_path):
    page = tmp_path / "results.md"
    page.write_text("# My results")
    with pytest.raises(ConfigError, match=r"was not written by this command; choose another"):
        write_page([finished.folder], page)
    assert page.read_text() == "# My results"


def test_a_sweep_that_has_not_ended_says_what_is_left(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.folder, out)
    table = (out / "table.csv").read_text().splitlines(keepends=True)
    (out / "table.csv").write_text("".join(table[:4]))
    text = write_page([out], tmp_path / "results.md")[0].read_text()
    assert "3 of 6 cells ended well, 0 failed, **3 have not run yet**;" in text


def test_cells_of_an_older_grid_are_left_out(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.folder, out)
    fewer = replace(finished, folder=out, sweep=sweep(methods=SWEEP["methods"][:1]))
    fewer.save()
    text = write_page([out], tmp_path / "results.md")[0].read_text()
    assert "1 of 1 cells ended well, 0 failed; 12" in text
    assert "| halting |" not in text
    assert "### Tokens at a rival's accuracy" not in text  # all tokens alone: nothing to compare
    assert "### Operations at half a point lost" not in text
    assert len(read_table(run_sweep(fewer))) == 1


def test_a_page_of_a_cell_without_its_details_says_which(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.folder, out)
    for details in out.glob("cells/*/details.npz"):
        details.write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"details.npz: cannot be read .* run the sweep again"):
        write_page([out], tmp_path / "results.md")


def test_pictures_of_two_folders_of_one_name_are_refused(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "sweep")
    with pytest.raises(ConfigError, match=r"two folders are named sweep, .* rename one of them"):
        write_page([finished.folder, tmp_path / "sweep"], tmp_path / "results.md")


# --- what a table says ---


def row(method: str, group: str, budget: str, seed: int, **numbers: float) -> dict[str, str]:
    given = {"accuracy": 0.8, "average_tokens": 1.0, "sops": 100.0, **numbers}
    return {
        **{key: str(value) for key, value in given.items()},
        "method": method,
        "group": group,
        "family": "",
        "budget": budget,
        "seed": str(seed),
        "status": "done",
        "images": "100",
    }


TABLE = [
    row("all-tokens", "reference", "all", 0, accuracy=0.800),
    row("all-tokens", "reference", "all", 1, accuracy=0.810),
    row("ours", "ours", "low", 0, accuracy=0.790, average_tokens=0.3, sops=40),
    row("ours", "ours", "high", 0, accuracy=0.802, average_tokens=0.45, sops=60),
    row("rival", "rival", "half", 0, accuracy=0.795, average_tokens=0.5, sops=70),
    row("rival", "rival", "most", 0, accuracy=0.801, average_tokens=0.8, sops=90),
    {**row("broken", "rival", "all", 0), "status": "failed"},
]


def test_points_are_means_over_the_seeds_that_ended_well():
    found = points(TABLE, {"ours": "halting"})
    assert [(p.method, p.budget, p.seeds) for p in found] == [
        ("all-tokens", "all", 2),
        ("ours", "low", 1),
        ("ours", "high", 1),
        ("rival", "half", 1),
        ("rival", "most", 1),
    ]
    assert found[0].mean("accuracy") == pytest.approx(0.805)
    assert found[0].spread("accuracy") == (0.800, 0.810)
    assert found[1].name == "halting, low"


def test_tokens_are_compared_at_the_rivals_accuracy():
    best, other = token_claims(points(TABLE, {}))
    assert (best.rival.budget, best.ours and best.ours.budget) == ("most", "high")
    assert best.fewer == pytest.approx(1 - 0.45 / 0.8)
    assert best.candidates == 2
    assert (other.rival.budget, other.ours and other.ours.budget) == ("half", "high")
    alone = [r for r in TABLE if r["budget"] not in ("high", "half")]
    (claim,) = token_claims(points(alone, {}))
    assert claim.ours is None
    assert claim.fewer is None


def test_operations_are_compared_at_half_a_point_lost():
    found = points(TABLE, {})
    ours = operation_claim(found, "ours")
    assert ours is not None
    assert ours.point.budget == "high"  # low loses a point
    assert ours.fewer == pytest.approx(0.4)
    assert ours.lost == pytest.approx(-0.002)
    rival = operation_claim(found, "rival")
    assert rival is not None
    assert rival.point.budget == "half"  # loses exactly half a point on the seed of both
    assert operation_claim(found[1:], "ours") is None


def test_points_are_compared_on_the_seeds_that_both_have():
    table = [
        row("all-tokens", "reference", "all", 0, accuracy=0.79),
        row("all-tokens", "reference", "all", 1, accuracy=0.81),
        row("ours", "ours", "low", 0, accuracy=0.79, average_tokens=0.5, sops=50),
        row("rival", "rival", "all", 0, accuracy=0.78, average_tokens=0.8),
        row("rival", "rival", "all", 1, accuracy=0.82, average_tokens=0.8),
        row("rival", "rival", "late", 1, accuracy=0.70, average_tokens=0.8),
    ]
    found = points(table, {})
    claim = operation_claim(found, "ours")
    assert claim is not None
    assert claim.lost == pytest.approx(0)
    assert claim.fewer == pytest.approx(0.5)
    first, late = token_claims(found)
    assert (first.rival.seeds, first.rival.mean("accuracy")) == (1, 0.78)
    assert first.fewer == pytest.approx(1 - 0.5 / 0.8)
    assert (late.ours, late.candidates) == (None, 0)


def test_the_error_of_an_accuracy_is_that_of_so_many_images():
    (point,) = points([row("ours", "ours", "all", 0, accuracy=0.8)], {})
    assert standard_error(point) == pytest.approx(0.04)

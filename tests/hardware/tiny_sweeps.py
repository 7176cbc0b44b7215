"""A sweep whose cells take seconds: 8 x 8 pixels, 4 tokens, an IDX folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from spikformers import lively
from tiny_runs import TINY, idx_bytes, tiny_config

from atsnn.checkpoint import save_checkpoint
from hardware.sweep.cell import Job
from hardware.sweep.config import SweepConfig, parse_sweep

PLAIN = {**TINY["model"], "halting": {"enabled": False}}
SWEEP: dict[str, Any] = {
    "title": "Tiny",
    "run": {
        "model": PLAIN,
        "data": {"validation_images": 12},
        "train": {"batch": 8, "epochs": 1, "lr": 0.001, "warmup_epochs": 0, "checkpoint_steps": 1},
        "stages": [{"name": "float"}, {"name": "quantized", "train": {"quantized": True}}],
    },
    "verify_images": 5,
    "show_images": True,
    "methods": [
        {"name": "all-tokens", "group": "reference"},
        {
            "name": "halting",
            "group": "ours",
            "model": {"halting": {"enabled": True, "learn": True}},
            "budgets": {
                "low": {"train": {"gate_weight": 1.0, "gate_target": 0.2}},
                "high": {"train": {"gate_weight": 0.1, "gate_target": 0.7}},
            },
        },
        {
            "name": "sparse-spikformer",
            "model": {"selection": {"method": "sparse-spikformer", "keep": [0.5]}},
            "train": {"distill_weight": 0.5},
        },
        {
            "name": "tp-spikformer",
            "source": {"method": "all-tokens"},
            "model": {"selection": {"method": "tp-spikformer"}},
            "budgets": {"half": {"model": {"selection": {"keep": [0.5]}}}},
        },
        {
            "name": "tome",
            "source": {"method": "all-tokens"},
            "model": {"merging": {"enabled": True, "count": 1, "similarity": "keys"}},
        },
    ],
}

FEW = [SWEEP["methods"][index] for index in (0, 1, 4)]
"""Trained with and without gates, and not trained."""


def sweep(**changes: Any) -> SweepConfig:
    """`SWEEP` with other entries."""
    return parse_sweep({**SWEEP, **changes}, "tiny sweep")


def write_images(folder: Path) -> Path:
    """44 training and 10 test images of three classes that differ in which third is bright."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 44), ("t10k", 10)):
        labels = rng.integers(0, 3, count)
        images = rng.integers(0, 60, (count, 8, 8))
        for image, label in zip(images, labels, strict=True):
            image[:, label * 8 // 3 : (label + 1) * 8 // 3] += 190
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder


def tiny_job(folder: Path, out: str = "sweep", **changes: Any) -> Job:
    """A job with data and a start whose neurons fire below `folder`."""
    start = folder / "start"
    if not start.exists():
        config = tiny_config(model={"halting": {"enabled": False}}).model
        save_checkpoint(start, lively(config), config)
        write_images(folder / "data")
    model = start / "model.safetensors"
    return Job(folder / out, sweep(**changes), str(folder / "data"), model, threads=1)

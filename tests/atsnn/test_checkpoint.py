"""Checkpoints: read back as written, or refused in one line; never half a file."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import run_python, tiny_config

from atsnn.checkpoint import load_model, read_checkpoint, save_checkpoint
from atsnn.errors import CheckpointError
from atsnn.quantization import quantize_model
from atsnn.spikformer import Spikformer

CONFIG = tiny_config().model


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(3)
    model = Spikformer(CONFIG)
    return save_checkpoint(tmp_path / "m.safetensors", model, CONFIG, {"note": "here"})


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_reads_back_as_itself(tmp_path, quantized):
    model = Spikformer(CONFIG).eval()
    model = quantize_model(model) if quantized else model
    path = save_checkpoint(tmp_path, model, CONFIG, {"epochs": 3})
    again = load_model(path)
    assert again.quantized == quantized
    assert again.config == CONFIG
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    image = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(image).logits, model(image).logits)
    assert read_checkpoint(path).extra == {"epochs": 3}


def test_a_folder_stands_for_the_model_in_it(tmp_path):
    assert save_checkpoint(tmp_path, Spikformer(CONFIG), CONFIG) == tmp_path / "model.safetensors"
    assert load_model(tmp_path).config == CONFIG


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"none.safetensors: no such checkpoint"):
        load_model(tmp_path / "none.safetensors")


def test_a_checkpoint_of_another_configuration_names_both_values(saved):
    expected = CONFIG.model_copy(update={"dim": 16, "steps": 9})
    with pytest.raises(CheckpointError, match="configuration: steps: 2, not 9; dim: 8, not 16"):
        load_model(saved, expected)


def test_a_truncated_checkpoint_is_refused_wherever_it_ends(saved, rng):
    content = saved.read_bytes()
    for length in [0, 1, 8, *rng.integers(0, len(content), 30)]:
        saved.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load_model(saved)


def test_a_flipped_byte_is_noticed_wherever_it_is(saved, rng):
    content = saved.read_bytes()
    for place in rng.integers(0, len(content), 100):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_model(saved)


def test_a_header_that_claims_a_huge_tensor_is_refused(tmp_path):
    claimed = {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    header = json.dumps(claimed).encode()
    path = tmp_path / "huge.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match="damaged, or no safetensors file"):
        load_model(path)


def test_a_file_of_another_writer_is_refused(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not written by atsnn"):
        load_model(tmp_path / "other.safetensors")


def test_a_training_state_is_no_model(tmp_path):
    from atsnn.checkpoint import write_tensors

    write_tensors(tmp_path / "s.safetensors", "atsnn-training", {}, {"w": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="holds atsnn-training, not atsnn-model"):
        load_model(tmp_path / "s.safetensors")


FULL_DISK = """
import resource
from pathlib import Path
from tiny_runs import run_tiny, tiny_config
from atsnn.checkpoint import save_checkpoint
from atsnn.errors import AtsnnError
from atsnn.spikformer import Spikformer

config = tiny_config().model
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    save_checkpoint(path, Spikformer(config), config)
except AtsnnError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(saved):
    assert saved.stat().st_size > 2000
    before = saved.read_bytes()
    result = run_python(FULL_DISK, saved)
    assert "cannot be written (File too large); the old file is untouched" in result.stdout
    assert result.stderr == ""
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "m.safetensors", Spikformer(CONFIG), CONFIG)

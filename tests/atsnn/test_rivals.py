"""Rivals choose the tokens that their papers say, keep as many as asked, drop the rest whole."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from pydantic import ValidationError
from spikformers import lively, pixels, small_config
from tiny_runs import run_tiny, tiny_config

from atsnn.checkpoint import load_model
from atsnn.config import ModelConfig, SelectionConfig, TrainConfig, parse
from atsnn.errors import ConfigError
from atsnn.losses import selection_loss, teacher_loss
from atsnn.rivals import RandomDrop, SpikingTokenSelector, TokenPreference, build_selection
from atsnn.rivals.selection import kept_tokens, top_tokens
from atsnn.spikformer import ModelOutput, Spikformer

METHODS = ("sparse-spikformer", "tp-spikformer", "random")
NESTED = ("sparse-spikformer", "random")


def config(method: str, keep: tuple[float, ...] = (0.7, 0.4), **changes: object) -> ModelConfig:
    """9 tokens, 2 blocks, 3 steps, gates decided by a rival."""
    values = small_config().model_dump()
    values.pop("quantization")
    return ModelConfig.model_validate(
        {
            **values,
            "halting": {"enabled": False},
            "merging": {"enabled": False},
            "selection": {"method": method, "keep": keep},
            **changes,
        }
    )


def stream(seed: int, steps: int = 3, images: int = 4, tokens: int = 12, dim: int = 8):
    """Small whole numbers, as the residual stream carries them; some tokens are zero."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 3, (steps, images, tokens, dim)).astype(np.float32)
    x[:, rng.random((images, tokens)) < 0.2] = 0
    return x


# --- numpy references ---


def numpy_top(score: np.ndarray, count: int, allowed: np.ndarray) -> np.ndarray:
    mask = np.zeros_like(allowed)
    for b, row in enumerate(score):
        order = sorted(np.flatnonzero(allowed[b]), key=lambda n: (-row[n], n))
        mask[b, order[:count]] = 1
    return mask


def numpy_preference(x: np.ndarray, grid: tuple[int, int], side: int) -> np.ndarray:
    steps, images, tokens, _ = x.shape
    rows, columns = grid
    spatial = np.zeros((images, tokens))
    for t in range(steps):
        for b in range(images):
            maps = x[t, b].reshape(rows, columns, -1)
            for r in range(rows):
                for c in range(columns):
                    reach = side // 2
                    square = maps[
                        max(0, r - reach) : r + reach + 1, max(0, c - reach) : c + reach + 1
                    ]
                    mean = square.reshape(-1, maps.shape[2]).mean(0)
                    token = maps[r, c]
                    size = np.linalg.norm(token) * np.linalg.norm(mean)
                    if size:
                        cosine = token @ mean / size
                    else:
                        cosine = 1.0 if not token.any() and not mean.any() else 0.0
                    spatial[b, r * columns + c] += (1 - cosine) / steps
    temporal = np.abs(np.diff(x, axis=0)).mean(3).mean(0)

    def scaled(score: np.ndarray) -> np.ndarray:
        low, high = score.min(1, keepdims=True), score.max(1, keepdims=True)
        return (score - low) / np.maximum(high - low, 1e-12)

    return scaled(spatial) + scaled(temporal)


def test_tp_spikformer_scores_space_and_time():
    x = stream(0)
    layer = TokenPreference(12, 0.5, 8, (3, 4), 3)
    expected = numpy_preference(x.astype(np.float64), (3, 4), 3)
    assert_allclose(layer.score(torch.from_numpy(x)).numpy(), expected, atol=1e-12)


def test_tp_spikformer_keeps_the_tokens_of_highest_score_at_every_step():
    x = stream(1)
    gate = TokenPreference(12, 0.5, 8, (3, 4), 5)(torch.from_numpy(x)).numpy()
    score = numpy_preference(x.astype(np.float64), (3, 4), 5)
    kept = gate[0] > 0
    assert_array_equal(gate, np.broadcast_to(gate[:1], gate.shape))
    assert (kept.sum(1) == 6).all()
    for b in range(len(score)):  # last bits may part scores that are equal on paper
        assert score[b, kept[b]].min() >= score[b, ~kept[b]].max() - 1e-12


def test_a_zero_token_among_zero_tokens_is_like_its_neighbours():
    score = TokenPreference(9, 0.5, 4, (3, 3), 3).spatial(torch.zeros(2, 1, 9, 4))
    assert (score == 0).all()


def test_the_selector_keeps_the_tokens_whose_keep_logit_is_most_ahead():
    torch.manual_seed(0)
    x = stream(2)
    layer = SpikingTokenSelector(12, 0.25, 8, 5).eval()
    w1, b1 = layer.fc1.weight.detach().numpy(), layer.fc1.bias.detach().numpy()
    w2, b2 = layer.fc2.weight.detach().numpy(), layer.fc2.bias.detach().numpy()
    hidden = x.mean(0) @ w1.T + b1
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    logits = hidden @ w2.T + b2
    ahead = logits[..., 0] - logits[..., 1]
    ahead = np.round(ahead, 6)  # zero tokens are equal: the lower index wins
    layer.logits = lambda x: torch.from_numpy(np.stack([ahead, np.zeros_like(ahead)], 2))  # type: ignore[method-assign]
    gate = layer(torch.from_numpy(x)).numpy()
    assert_array_equal(gate[0], numpy_top(ahead, 3, np.ones((4, 12))))
    assert_array_equal(gate[0], gate[2])


def test_the_selector_draws_in_training_and_its_mask_carries_a_gradient():
    torch.manual_seed(0)
    layer = SpikingTokenSelector(12, 0.5, 8, 5).train()
    x = torch.from_numpy(stream(3))
    first, second = layer(x), layer(x)
    assert set(first.unique().tolist()) <= {0.0, 1.0}
    assert not torch.equal(first, second)
    first.sum().backward()
    assert layer.fc1.weight.grad is not None
    assert layer.fc1.weight.grad.abs().sum() > 0


def test_random_drop_depends_on_the_image_not_on_its_batch():
    layer = RandomDrop(12, 0.5, 0).eval()
    x = torch.from_numpy(stream(4))
    together = layer(x)
    alone = torch.cat([layer(x[:, b : b + 1]) for b in range(4)], dim=1)
    assert torch.equal(together, alone)
    assert len(together[0].unique(dim=0)) > 1
    layer.train()
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("method", METHODS)
def test_quantised_stream_makes_the_same_choice(method):
    torch.manual_seed(0)
    layer = build_selection(config(method), 0).eval()
    x = torch.from_numpy(stream(5, tokens=9, dim=16))
    expected = layer(x)
    layer.unit = 8.0
    assert torch.equal(layer(x * 8), expected)


# --- budgets ---


@given(tokens=st.integers(1, 200), keep=st.floats(0.001, 1.0))
def test_the_number_of_kept_tokens_is_the_nearest(tokens, keep):
    kept = kept_tokens(tokens, keep)
    assert 1 <= kept <= tokens
    assert abs(kept - keep * tokens) <= 0.5 or kept == 1


@given(st.integers(0, 2**16), st.integers(1, 12))
def test_top_tokens_break_ties_by_index(seed, count):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 4, (3, 12)).astype(np.float64)
    allowed = (rng.random((3, 12)) < 0.7).astype(np.float64)
    found = top_tokens(torch.from_numpy(score), count, torch.from_numpy(allowed)).numpy()
    assert_array_equal(found, numpy_top(score, count, allowed))


@pytest.mark.parametrize("method", METHODS)
def test_blocks_keep_their_share(method):
    model = lively(config(method, (0.7, 0.4)))
    gates = model(pixels(model.config, 6)).gates
    assert (gates[0].sum(2) == 6).all()  # 0.7 * 9 = 6.3
    assert (gates[1].sum(2) == 4).all()  # 0.4 * 9 = 3.6
    assert (gates == gates[:, :1]).all()


@pytest.mark.parametrize("method", NESTED)
def test_a_dropped_token_stays_out(method):
    model = lively(config(method, (0.5, 0.4)))
    gates = model(pixels(model.config, 6)).gates
    assert (gates[1] <= gates[0]).all()


def test_tp_spikformer_chooses_anew_in_every_block():
    model = lively(config("tp-spikformer", (0.5, 0.5)))
    gates = model(pixels(model.config, 16)).gates
    assert (gates[1] > gates[0]).any()


@pytest.mark.parametrize("method", METHODS)
def test_keeping_all_is_the_plain_model(method):
    model = lively(config(method, (1.0, 1.0)))
    plain = Spikformer(config("none", ()))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "selections" not in k})
    image = pixels(model.config, 4)
    assert torch.equal(model(image).logits, plain.eval()(image).logits)
    assert all(layer.macs_per_image(3, 9) == 0 for layer in model.selection_list)


# --- masking and leaving out ---


@settings(max_examples=12, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    keep=st.tuples(st.floats(0.1, 1.0), st.floats(0.1, 1.0)),
    once=st.booleans(),
    seed=st.integers(0, 100),
)
def test_masking_equals_leaving_the_rows_out(method, keep, once, seed):
    model = lively(config(method, keep, stem_once=once), seed)
    image = pixels(model.config, 5, seed)
    masked, rows = model(image), model.forward_rows(image)
    assert torch.equal(masked.gates, rows.gates)
    assert_allclose(masked.logits.detach(), rows.logits, atol=1e-5)


def test_a_stem_that_runs_once_brings_the_same_at_every_step():
    model = lively(config("none", (), stem_once=True))
    tokens = model.stem(pixels(model.config, 3))
    assert tokens.shape == (3, 3, 9, 16)
    assert (tokens == tokens[:1]).all()
    assert tokens.sum() > 0


def test_without_the_stems_score_every_token_enters_the_first_block():
    values = small_config(merging=False).model_dump()
    values["halting"].update(gamma=3.0, beta=0.0)
    with_score = lively(ModelConfig.model_validate(values))
    values["halting"]["stem_score"] = False
    without = lively(ModelConfig.model_validate(values))
    image = pixels(without.config, 4)
    assert with_score(image).gates[0].mean() < 1
    assert (without(image).gates[0] == 1).all()
    assert without(image).gates[1].mean() < 1


# --- losses ---


def output(gates: torch.Tensor, logits: torch.Tensor) -> ModelOutput:
    return ModelOutput(logits, gates, gates.sum((0, 1)), gates[:1])


def test_the_ratio_loss_is_the_squared_difference_to_the_wanted_share():
    gates = torch.zeros(2, 3, 2, 4)
    gates[0, :, 0, :3] = gates[0, :, 1, :2] = 1  # 0.75 and 0.5 kept
    gates[1, :, :, :1] = 1  # 0.25 and 0.25
    selection = SelectionConfig(method="sparse-spikformer", keep=(0.5, 0.5))
    loss = selection_loss(output(gates, torch.zeros(2, 3)), selection, TrainConfig())
    assert float(loss) == pytest.approx(2.0 * (0.0625 + 0 + 0.0625 + 0.0625) / 4)
    fixed = SelectionConfig(method="random", keep=(0.5, 0.5))
    assert selection_loss(output(gates, torch.zeros(2, 3)), fixed, TrainConfig()) == 0


def test_the_teacher_loss_is_zero_for_the_teacher_itself():
    model = lively(config("none", ()))
    image = pixels(model.config, 3)
    own = model(image)
    assert float(teacher_loss(own, own.logits).detach()) == pytest.approx(0, abs=1e-6)
    other = output(own.gates, own.logits.detach() + torch.arange(4.0))
    p = torch.softmax(own.logits.detach().double(), 1)
    q = torch.softmax(other.logits.double(), 1)
    expected = (p * (p / q).log()).sum(1).mean()
    assert float(teacher_loss(other, own.logits)) == pytest.approx(float(expected), rel=1e-5)


# --- training ---


SPARSE = {
    "halting": {"enabled": False, "learn": False},
    "selection": {"method": "sparse-spikformer", "keep": [0.5]},
}


def test_a_selector_is_trained_from_a_plain_model_with_its_teacher(tmp_path):
    plain = run_tiny(tmp_path / "plain", tiny_config(model={"halting": {"enabled": False}}))
    trained = run_tiny(
        tmp_path / "sparse",
        tiny_config(model=SPARSE, train={"initial": str(plain), "distill_weight": 0.5}),
    )
    fresh = build_selection(load_model(trained).config, 0)
    model = load_model(trained)
    assert isinstance(model.selection_list[0], SpikingTokenSelector)
    assert not torch.equal(model.selection_list[0].fc1.weight, fresh.state_dict()["fc1.weight"])
    quantized = run_tiny(
        tmp_path / "quantised",
        tiny_config(model=SPARSE, train={"initial": str(trained), "quantized": True, "lr": 1e-9}),
    )
    again = load_model(quantized)
    assert_allclose(  # the stage before it trained the selector: it is kept, not drawn anew
        again.selection_list[0].state_dict()["fc1.weight"],
        model.selection_list[0].state_dict()["fc1.weight"],
        atol=1e-4,
    )


def test_a_teacher_needs_a_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"distill_weight is 0\.5, but there is no teacher"):
        run_tiny(tmp_path, tiny_config(model=SPARSE, train={"distill_weight": 0.5}))


# --- what the configuration refuses ---


@pytest.mark.parametrize(
    ("selection", "others", "message"),
    [
        ({"method": "random", "keep": [0.5]}, {}, "keep has 1 shares, the model 2 blocks"),
        ({"method": "random", "keep": [0.5, 1.5]}, {}, r"keep \[1.5\]: a share of tokens"),
        (
            {"method": "tp-spikformer", "keep": [0.5, 0.5], "neighbourhood": 4},
            {},
            "neighbourhood 4: it must be odd",
        ),
        (
            {"method": "random", "keep": [0.5, 0.5]},
            {"merging": {"enabled": True}},
            "decides every gate by itself: switch halting and merging off",
        ),
    ],
)
def test_configurations_that_make_no_sense_are_refused(selection, others, message):
    values = {**config("none", ()).model_dump(), "selection": selection, **others}
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(values)
    with pytest.raises(ConfigError):
        parse(ModelConfig, values, "test")

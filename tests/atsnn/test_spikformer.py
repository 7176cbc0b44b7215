"""The adaptive Spikformer: masked equals rows left out, gates close for good, shapes and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikformers import lively, pixels, small_config

from atsnn.config import HaltingConfig, ModelConfig, load_preset
from atsnn.errors import ConfigError, DatasetError, QuantizationError
from atsnn.layers import TokenNorm
from atsnn.quantization import float_twin, quantize_model
from atsnn.spikformer import Spikformer, build_model

ORDERS = ["upstream", "rectangle", "raster", "blocks", "steps"]
COMBINATIONS = ["mean", "max", "keep"]


class TestRowsLeftOut:
    @given(
        seed=st.integers(0, 1000),
        order=st.sampled_from(ORDERS),
        combine=st.sampled_from(COMBINATIONS),
        similarity=st.sampled_from(["stream", "keys"]),
        quantized=st.booleans(),
    )
    @settings(max_examples=20)
    def test_equal_the_masked_form(
        self, seed: int, order: str, combine: str, similarity: str, quantized: bool
    ) -> None:
        config = small_config(order, combine=combine, similarity=similarity)
        model = lively(config, seed)
        model = quantize_model(model).eval() if quantized else model
        image = pixels(config, 6, seed)
        with torch.no_grad():
            masked = model(image)
        rows = model.forward_rows(image)
        assert torch.equal(masked.gates, rows.gates)
        assert torch.equal(masked.scores, rows.scores)
        assert torch.allclose(masked.logits, rows.logits, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("blocks", [(0,), (0, 1, 2)])
    def test_equal_the_masked_form_behind_a_merged_stem(
        self, order: str, blocks: tuple[int, ...]
    ) -> None:
        config = small_config(order, blocks=blocks)
        model = quantize_model(lively(config)).eval()
        image = pixels(config, 6)
        with torch.no_grad():
            masked = model(image)
        rows = model.forward_rows(image)
        assert torch.equal(masked.gates, rows.gates)
        assert torch.equal(masked.logits, rows.logits)

    def test_some_tokens_halt_and_some_do_not(self) -> None:
        config = small_config()
        share = float(lively(config)(pixels(config, 8)).average_tokens)
        assert 0.05 < share < 0.95


class TestGates:
    @pytest.mark.parametrize("order", ["upstream", "rectangle", "raster"])
    def test_once_closed_stay_closed_in_later_steps_and_blocks(self, order: str) -> None:
        config = small_config(order)
        gates = lively(config)(pixels(config, 8)).gates
        assert torch.all(gates[1:] <= gates[:-1])
        assert torch.all(gates[:, 1:] <= gates[:, :-1])

    def test_by_blocks_may_open_again_at_the_next_step(self) -> None:
        config = small_config("blocks", merging=False)
        gates = lively(config)(pixels(config, 32)).gates
        assert torch.any(gates[:, 1:] > gates[:, :-1])

    def test_task_loss_reaches_the_halting_scores(self) -> None:
        config = small_config()
        model = lively(config).train()
        for score in model.scores:
            score.gamma.requires_grad_(True)
        model(pixels(config, 16)).logits.square().sum().backward()
        assert all(score.gamma.grad.abs() > 0 for score in model.scores)

    def test_ponder_is_active_cells_plus_remainder(self) -> None:
        config = small_config()
        found = lively(config)(pixels(config, 8))
        cells = found.gates.sum((0, 1))
        assert torch.all((found.ponder >= cells) & (found.ponder <= cells + 1))


class TestWithoutAdaptation:
    CONFIG = ModelConfig(in_channels=1, image_size=(12, 12), blocks=1, dim=16, heads=2)

    def test_every_token_is_processed(self) -> None:
        found = Spikformer(self.CONFIG).eval()(pixels(self.CONFIG, 2))
        assert float(found.average_tokens) == 1.0
        assert found.gates.shape == (1, 4, 2, 9)

    def test_merging_alone_closes_only_merged_tokens(self) -> None:
        config = small_config()
        config = config.model_copy(
            update={"halting": config.halting.model_copy(update={"enabled": False})}
        )
        gates = lively(config)(pixels(config, 4)).gates
        assert torch.all(gates[0] == 1)
        closed = (gates[1] == 0).sum(-1)
        assert closed.max() > 0
        assert closed.max() <= 2


class TestMergingBehindTheStem:
    """Pairs join in front of the first gate."""

    CONFIG = small_config(blocks=(0,)).model_copy(update={"halting": HaltingConfig()})

    def test_tokens_merged_away_never_enter_a_block(self) -> None:
        gates = lively(self.CONFIG)(pixels(self.CONFIG, 4)).gates  # [L, T, B, N]
        closed = (gates == 0).sum(-1)
        assert torch.all(closed == 2)  # two pairs, in both blocks and at every step
        assert torch.all(gates[..., 1::2] == 1)  # even tokens join odd ones

    def test_partner_holds_the_mean_weighted_by_size(self) -> None:
        model = lively(self.CONFIG)
        assert model.stem_merging is not None
        x = torch.rand(3, 2, 9, 16)
        merged, alive, size = model.stem_merging(x)
        for image in range(2):
            for odd in range(1, 9, 2):
                inside = [odd, *_joined(model, x)[image].get(odd, [])]
                assert int(size[image, odd]) == len(inside)
                expected = x[:, image, inside].mean(1)
                assert torch.allclose(merged[:, image, odd], expected, atol=1e-6)
        assert torch.all(alive.sum(1) == 7)

    def test_halting_looks_at_the_merged_tokens(self) -> None:
        config = small_config(blocks=(0,))
        model = lively(config)
        assert model.stem_merging is not None
        image = pixels(config, 4)
        merged, _, _ = model.stem_merging(model.stem(image))
        assert torch.equal(model(image).scores[0], model.score_list[0](merged))


def _joined(model: Spikformer, x: torch.Tensor) -> list[dict[int, list[int]]]:
    """Per image, the even tokens that join each odd one."""
    assert model.stem_merging is not None
    gate = torch.ones(x.shape[:3])
    pairs = model.stem_merging.merging(x, gate)[4].pairs
    found: list[dict[int, list[int]]] = [{} for _ in pairs]
    for image, odd, even in pairs.nonzero().tolist():
        found[image].setdefault(2 * odd + 1, []).append(2 * even)
    return found


class TestStartOfTheScores:
    def test_stem_may_have_a_beta_of_its_own(self) -> None:
        config = small_config()
        halting = config.halting.model_copy(update={"gamma": 3.0, "beta": -4.0, "stem_beta": -1.0})
        scores = Spikformer(config.model_copy(update={"halting": halting})).score_list
        assert [(float(s.gamma), float(s.beta)) for s in scores] == [(3.0, -1.0), (3.0, -4.0)]


class TestTokenNorm:
    def test_halted_tokens_stay_out_of_the_statistics(self) -> None:
        norm, reference = TokenNorm(3), TokenNorm(3)
        x = torch.randn(2, 4, 5, 3)
        gate = (torch.rand(2, 4, 5) > 0.5).float()
        polluted = torch.where(gate[..., None] > 0, x, 1e6)
        out = norm(polluted, gate)
        expected = reference(x[gate > 0].view(1, 1, -1, 3))
        assert torch.allclose(out[gate > 0], expected.view(-1, 3), atol=1e-5)
        assert torch.allclose(norm.running_var, reference.running_var, atol=1e-5)


class TestQuantized:
    def test_gradients_reach_every_parameter(self) -> None:
        config = small_config()
        model = quantize_model(lively(config)).train()
        out = model(pixels(config, 8))
        (out.logits.square().sum() + out.gates.mean()).backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert [n for n, p in trained.items() if p.grad is None] == []
        first = trained["stem.stem.conv1.synapse.weight"].grad
        assert first is not None
        assert first.abs().sum() > 0

    def test_state_dict_fits_a_freshly_built_structure(self) -> None:
        config = small_config()
        model = quantize_model(lively(config)).eval()
        rebuilt = build_model(config, quantized=True)
        rebuilt.load_state_dict(model.state_dict())
        image = pixels(config, 4)
        assert torch.equal(model(image).logits, rebuilt.eval()(image).logits)

    def test_float_twin_has_the_folded_weights(self) -> None:
        config = small_config()
        model = lively(config)
        twin = float_twin(quantize_model(model))
        image = pixels(config, 16)
        agree = (model(image).gates == twin(image).gates).float().mean()
        assert agree > 0.98

    def test_one_layer_in_fixed_point_fires_as_the_float_one_but_for_rounding(self) -> None:
        """One layer only: through several, a random network amplifies each flipped spike."""
        config = small_config()
        model = lively(config)
        fixed = quantize_model(model).eval().stem.stem
        image = pixels(config, 64).unsqueeze(0)
        float_spikes = model.stem.conv1(image, config.steps)
        fixed_spikes = fixed.conv1(torch.round(image * 63), config.steps)
        assert float_spikes.mean() > 0.05
        assert (float_spikes == fixed_spikes).float().mean() > 0.98


class TestReferenceSize:
    def test_spikformer_4_384_has_the_published_number_of_parameters(self) -> None:
        model = Spikformer(load_preset("spikformer-4-384-cifar10").model)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(9.32e6, rel=0.01)


class TestErrors:
    def test_image_of_another_size(self) -> None:
        model = Spikformer(small_config())
        with pytest.raises(
            DatasetError, match=r"shape \[1, 28, 28\], the model takes \[1, 12, 12\]"
        ):
            model(torch.zeros(1, 1, 28, 28))

    def test_attention_that_could_wrap_a_current(self) -> None:
        config = ModelConfig(in_channels=1, image_size=(512, 512), blocks=1, dim=16, heads=1)
        with pytest.raises(QuantizationError, match="16384 tokens times 16 channels"):
            quantize_model(Spikformer(config))

    def test_assignment_from_all_steps_with_an_order_that_runs_step_by_step(self) -> None:
        with pytest.raises(ConfigError, match="order raster runs step by step"):
            Spikformer(small_config("raster", assignment="all"))

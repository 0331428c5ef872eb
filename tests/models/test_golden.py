"""MAEAST against tensors of the paper's own code: predictions, losses, statistics, gradients, features."""

from __future__ import annotations

import pytest
import torch
from goldens import MAE_AST, Golden
from kernel_checks import DEVICE
from policy import assert_golden, assert_golden_zero

from mae_ast_fast import MAEAST
from mae_ast_fast.checkpoints.fairseq import convert_state_dict
from mae_ast_fast.models.mae_ast import Features, MAEASTOutput
from mae_ast_fast.ops.packing import real_tokens

PATHS = [("torch", "sdpa"), ("torch", "math"), ("triton", "short")]  # (impl, attention)


def build(case: Golden, impl: str = "torch", attention: str = "auto") -> MAEAST:
    model = MAEAST.from_fairseq_state_dict(case.state_dict, case.options, impl=impl, attention=attention)
    return model.to(DEVICE if impl == "triton" else "cpu")


@pytest.fixture(scope="module", params=MAE_AST)
def case(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.mark.parametrize(("impl", "attention"), PATHS)
def test_forward_training_matches_golden(case: Golden, impl: str, attention: str) -> None:
    model = build(case, impl, attention).train()
    out = model(case["source"].to(model.mask_token.device), mask=case.mask)
    out = MAEASTOutput(**{name: x.cpu() for name, x in vars(out).items()})

    assert_golden(out.loss, case["loss/total"], "loss")
    assert_golden(out.loss_reconstruction, case["loss/recon_mse"], "loss_reconstruction")
    assert_golden(out.loss_classification, case["loss/info_nce"], "loss_classification")
    assert_golden(out.pred_reconstruction, case["logit_m_list_recon"].flatten(0, 1), "pred_reconstruction")
    assert_golden(out.pred_classification, case["logit_m_list_class"].flatten(0, 1), "pred_classification")
    assert_golden(out.target, case["target_m_list"].flatten(0, 1), "target")
    assert_golden(out.loss_per_clip.mean(), case["loss/total"], "loss_per_clip")
    model.cpu()
    assert_golden(model.input_norm.running_mean, case["bn_after/running_mean"], "running_mean")
    assert_golden(model.input_norm.running_var, case["bn_after/running_var"], "running_var")
    assert torch.equal(model.input_norm.num_batches_tracked, case["bn_after/num_batches_tracked"])


@pytest.mark.parametrize(("impl", "attention"), PATHS)
def test_backward_every_gradient_matches_golden(case: Golden, impl: str, attention: str) -> None:
    model = build(case, impl, attention).train()
    model(case["source"].to(model.mask_token.device), mask=case.mask).loss.backward()

    recorded = case.section("grads/")
    assert_golden_zero(recorded["encoder_mask_emb"], "encoder_mask_emb")
    # The mapping only renames and concatenates, so it maps gradients as it maps weights.
    statistics = {name: value for name, value in case.state_dict.items() if name.startswith("batch_norm.")}
    unused = {name: value for name, value in case.state_dict.items() if name.startswith("layer_norm.")}
    expected = convert_state_dict({**recorded, **statistics, **unused}, model.config)
    actual = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    assert set(actual) == {name for name in expected if not name.startswith("input_norm.")}
    for name, gradient in actual.items():
        if name.endswith("qkv.weight") or name.endswith("qkv.bias"):
            for chunk, (a, e) in enumerate(zip(gradient.chunk(3), expected[name].chunk(3), strict=True)):
                if chunk == 1 and name.endswith("bias"):  # the key bias cancels in the softmax: rounding noise around 0
                    assert_golden_zero(a, name)
                else:
                    assert_golden(a, e, f"{name}[{'qkv'[chunk]}]")
        else:
            assert_golden(gradient, expected[name], name)


@pytest.mark.parametrize(("impl", "attention"), PATHS)
def test_extract_features_padded_clips_match_golden(case: Golden, impl: str, attention: str) -> None:
    model = build(case, impl, attention)
    source, lengths = case.whole_patch_source
    with torch.no_grad():
        out = model.extract_features(source.to(model.mask_token.device), lengths)
    out = Features(out.last_hidden_state.cpu(), [state.cpu() for state in out.hidden_states], out.lengths.cpu())
    padding = case["eval_padded/out_padding_mask"]
    assert torch.equal(real_tokens(out.lengths, padding.shape[1]), ~padding)
    assert len(out.hidden_states) == model.config.encoder_layers
    assert_golden(out.last_hidden_state[~padding], case["eval_padded/x"][~padding], "last_hidden_state")
    for layer, state in enumerate(out.hidden_states):
        assert_golden(state[~padding], case[f"eval_padded/hidden_states/{layer}"][~padding], f"layer {layer + 1}")
        assert not state[padding].any()
    assert not out.last_hidden_state[padding].any()


def test_extract_features_single_layer_matches_golden() -> None:
    for name in MAE_AST:
        case = Golden(name)
        if "eval_output_layer/x" not in case.tensors:  # the chunk case recorded none
            assert name == "mae_ast_patch_chunk"
            continue
        layer = case.options["eval_output_layer/output_layer"]
        source, lengths = case.whole_patch_source
        with torch.no_grad():
            out = build(case).extract_features(source, lengths, layer=layer)
        padding = case["eval_output_layer/padding_mask"]
        assert_golden(out.last_hidden_state[~padding], case["eval_output_layer/x"][~padding], name)
        assert len(out.hidden_states) == layer

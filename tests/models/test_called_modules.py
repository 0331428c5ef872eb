"""Replaced Linear and LayerNorm modules, and hooks on them, take part in the forward.

Adapters (peft), pruning, parametrizations, hooks and quantisation all rely on ``module(x)``. The fused operations read
raw weights instead, so they may only run if every module is plain.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from policy import BF16_LOSS, ONE_STEP, assert_quantised, assert_rounding
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, TrainStep
from mae_ast_fast.downstream.classifier import AudioClassifier
from mae_ast_fast.models.transformer import is_plain

SMALL = {"embed_dim": 32, "num_heads": 2, "ffn_dim": 64}
RATES = ("dropout", "attention_dropout", "activation_dropout", "input_dropout", "encoder_layerdrop")
NO_DROPOUT = dict.fromkeys(RATES, 0.0)
DECODER = {"decoder_embed_dim": 24, "decoder_layers": 2, "encoder_layers": 2}
FRAMES = [96, 64, 33]
ARCHITECTURES = ["post-norm", "pre-norm", "ssast"]


# Matrices of N inputs are scaled by GAIN / sqrt(N): as initialised they would change the loss by less than rounding.
GAIN = 25.0


def build(
    architecture: str = "post-norm", impl: str = "torch", recompute: str = "none", **fields: Any
) -> MAEAST | SSAST:
    torch.manual_seed(0)
    if architecture == "ssast":
        sizes = {"embed_dim": 32, "num_heads": 2, "layers": 2, "input_frames": 96, "mask_patches": 20}
        model = SSAST(SSASTConfig(**sizes, **fields), impl=impl)
    else:
        config = MAEASTConfig(norm_first=architecture == "pre-norm", **{**SMALL, **DECODER, **NO_DROPOUT, **fields})
        model = MAEAST(config, impl=impl, recompute=recompute)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "layers." in name:
                module.weight *= GAIN * module.in_features**-0.5
    return model.train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(FRAMES), max(FRAMES), 128, generator=generator), torch.tensor(FRAMES)


def losses(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a fixed batch and mask, and its gradients."""
    model.zero_grad()
    features, frames = batch()
    loss = model(features, frames, generator=torch.Generator().manual_seed(2)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_losses(model: nn.Module, other: nn.Module) -> None:
    """Losses and gradients of a fixed batch and mask agree up to rounding."""
    (loss, grads), (other_loss, other_grads) = losses(model), losses(other)
    assert_rounding(other_loss, loss, "loss")
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        assert_rounding(other_grads[name], grad, name, grad=True)


def fusible_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and LayerNorm of the model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.LayerNorm)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_hooks_fire_once_per_module_and_change_nothing(architecture: str) -> None:
    plain, hooked = build(architecture), build(architecture)
    calls: Counter[str] = Counter()
    for name, module in fusible_modules(hooked).items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    assert_same_losses(plain, hooked)
    assert calls == dict.fromkeys(fusible_modules(hooked), 1)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backward_hooks_fire_once_per_module(architecture: str, register: str) -> None:
    model, calls = build(architecture), Counter()
    for name, module in fusible_modules(model).items():
        getattr(module, register)(lambda *_, name=name: calls.update([name]))
    losses(model)
    assert calls == dict.fromkeys(fusible_modules(model), 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_global_forward_hook_sees_every_module(architecture: str) -> None:
    plain, model = build(architecture), build(architecture)
    expected, called = set(fusible_modules(model).values()), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module))
    try:
        hooked = losses(model)
    finally:
        handle.remove()
    assert expected <= called
    assert_rounding(hooked[0], losses(plain)[0], "loss")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_pre_hook_on_each_module_changes_loss(architecture: str) -> None:
    plain = losses(build(architecture))[0]
    for name in fusible_modules(build(architecture)):
        model = build(architecture)
        # One factor per column: a LayerNorm would cancel a factor that all columns share.
        model.get_submodule(name).register_forward_pre_hook(lambda _, x: (x[0] * torch.linspace(1, 2, x[0].shape[1]),))
        assert not torch.equal(losses(model)[0], plain), name


class Adapter(nn.Module):
    """The base layer plus a product of two small matrices; its weight and bias stay visible, as with peft."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        merged = copy.deepcopy(self.base)
        with torch.no_grad():
            merged.weight += self.up.weight @ self.down.weight
        return merged


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent)
    if isinstance(parent, nn.Sequential | nn.ModuleList):
        parent[int(leaf)] = module
    else:
        setattr(parent, leaf, module)


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in fusible_modules(model).items() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapter_on_each_linear_equals_merged_weight_and_gets_gradients(architecture: str) -> None:
    for name in linears(build(architecture)):
        adapted, merged = build(architecture), build(architecture)
        torch.manual_seed(3)
        adapter = Adapter(adapted.get_submodule(name))
        replace(adapted, name, adapter)
        replace(merged, name, adapter.merged())
        (loss, _), (expected, _), (plain, _) = losses(adapted), losses(merged), losses(build(architecture))
        assert abs(loss - expected) <= ONE_STEP * expected, name
        assert abs(loss - plain) > ONE_STEP * plain, name
        assert adapter.up.weight.grad.abs().max() > 0 and adapter.down.weight.grad.abs().max() > 0, name


@pytest.mark.ci
@pytest.mark.parametrize("architecture", ["post-norm", "pre-norm"])
def test_adapters_with_triton_match_torch(architecture: str) -> None:
    models = [build(architecture, impl) for impl in ("torch", "triton")]
    for model in models:
        torch.manual_seed(3)
        for name in (
            "encoder.layers.0.fc1",
            "encoder.layers.1.out_proj",
            "decoder.layers.1.qkv",
            "decoder.layers.0.fc2",
        ):
            replace(model, name, Adapter(model.get_submodule(name)))
        model.decoder.norm.register_forward_hook(lambda *_: None)
    assert_same_losses(models[0], models[1])


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_gelu_recompute_with_adapter_saves_memory_and_keeps_gradients(layer: str) -> None:
    results, kept_bytes = [], []
    for recompute in ("none", "gelu"):
        model, tensors = build(recompute=recompute), {}
        torch.manual_seed(3)
        replace(model, f"encoder.layers.0.{layer}", Adapter(model.get_submodule(f"encoder.layers.0.{layer}")))

        def keep(x: Tensor, tensors: dict[int, int] = tensors) -> Tensor:
            tensors[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            results.append(losses(model))
        kept_bytes.append(sum(tensors.values()))
    assert kept_bytes[1] < kept_bytes[0]
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert_rounding(results[1][1][name], grad, name, grad=True)


def test_train_step_bf16_updates_only_adapters_of_frozen_model() -> None:
    model = build().requires_grad_(False)
    for name in linears(model):
        replace(model, name, Adapter(model.get_submodule(name)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    exact = copy.deepcopy(model)
    steps = [TrainStep(m, 1e-2, precision=p) for m, p in ((exact, "fp32"), (model, "bf16"))]
    features, frames = batch()
    losses_of = [[float(step(features, frames, seed=4).loss) for _ in range(2)] for step in steps]
    assert abs(losses_of[1][0] - losses_of[0][0]) <= BF16_LOSS * losses_of[0][0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pruned_weights_get_no_gradient(architecture: str) -> None:
    model = build(architecture)
    for name in linears(model):
        prune.l1_unstructured(model.get_submodule(name), "weight", 0.5)
    for _ in range(2):
        _, grads = losses(model)
        for name in linears(model):
            is_kept = model.get_submodule(name).weight_mask.bool()
            grad = grads[f"{name}.weight_orig"]
            assert not grad[~is_kept].any() and grad[is_kept].any(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parametrized_weights_are_used_and_trained(architecture: str) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

        def right_inverse(self, weight: Tensor) -> Tensor:
            return weight / 2

    plain, model = build(architecture), build(architecture)
    for name, module in fusible_modules(model).items():
        old = type(module)
        if isinstance(module, nn.Linear):
            parametrizations.weight_norm(module)
        else:
            parametrize.register_parametrization(module, "weight", Doubled())
        assert not is_plain(old, module), name
    (loss, _), (expected, _) = losses(model), losses(plain)
    assert_rounding(loss, expected, "loss")
    untrained = [n for n, p in model.named_parameters() if ".original" in n and (p.grad is None or not p.grad.any())]
    assert not untrained


def test_replaced_layer_norm_is_called() -> None:
    for name, module in fusible_modules(build()).items():
        if isinstance(module, nn.LayerNorm):
            for other in (nn.RMSNorm(module.normalized_shape[0]), nn.LayerNorm(module.normalized_shape[0], eps=0.5)):
                model = build()
                replace(model, name, other)
                assert not torch.equal(losses(model)[0], losses(build())[0]), (name, other)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linear_in_sequential_keeps_loss(architecture: str) -> None:
    for name in linears(build(architecture)):
        model = build(architecture)
        replace(model, name, nn.Sequential(model.get_submodule(name)))
        assert losses(model)[0] == losses(build(architecture))[0], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linear_in_sequential_keeps_model_dtype(architecture: str, dtype: torch.dtype) -> None:
    features, frames = batch()
    for name in linears(build(architecture)):
        model = build(architecture).to(dtype)
        expected = model.encode(features.to(dtype), frames).x
        replace(model, name, nn.Sequential(model.get_submodule(name)))
        assert losses(model)[0].isfinite(), name
        x = model.encode(features.to(dtype), frames).x
        assert x.dtype == expected.dtype == dtype, name
    classifier = AudioClassifier(build(architecture), ["a", "b"], max_seconds=0.5).to(dtype)
    classifier.head = nn.Sequential(classifier.head)
    assert classifier(features.to(dtype), frames).dtype == dtype


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layer_norm_replaced_by_linear_is_called(architecture: str) -> None:
    for name, module in fusible_modules(build(architecture)).items():
        if isinstance(module, nn.LayerNorm):
            model, width = build(architecture), module.normalized_shape[0]
            replace(model, name, nn.Linear(width, width))
            _, grads = losses(model)
            assert grads[f"{name}.weight"].any(), name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_ssast_heads_of_other_modules_are_called(precision: torch.dtype) -> None:
    width, patch = 32, 256
    for head in (
        nn.Linear(width, patch),
        nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, patch)),
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Sequential(nn.Tanh(), nn.Linear(width, patch))),
    ):
        model = build("ssast")
        model.classification_head, model.reconstruction_head = head, copy.deepcopy(head)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss, grads = losses(model)
        assert loss.isfinite()
        for name, p in model.named_parameters():
            assert "head" not in name or grads[name].any() or p.dim() == 1, name


def test_replaced_forward_method_is_called() -> None:
    model, calls = build(), []
    for name, module in fusible_modules(model).items():
        forward = module.forward
        module.forward = lambda x, name=name, forward=forward: calls.append(name) or forward(x)
    assert_same_losses(build(), model)
    assert set(calls) == set(fusible_modules(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize")
def test_dynamic_quantisation_stays_near_fp32(architecture: str) -> None:
    model = build(architecture).eval()
    features, frames = batch()
    expected = model.encode(features, frames).x
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert_quantised(quantised.encode(features, frames).x, expected)
    classifier = AudioClassifier(model, ["a", "b"], max_seconds=0.5).eval()
    expected = classifier(features, frames)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(classifier), {nn.Linear}, dtype=torch.qint8)
    assert_quantised(quantised(features, frames), expected)


def test_is_plain_new_model_is_true_for_every_module() -> None:
    for architecture in ARCHITECTURES:
        for name, module in build(architecture).named_modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                assert is_plain(type(module), module), name


@pytest.mark.ci
def test_compile_plain_and_adapted_models_make_one_graph() -> None:
    features, frames = batch()
    for adapted in (False, True):
        model = build()
        if adapted:
            replace(model, "encoder.layers.0.fc1", Adapter(model.encoder.layers[0].fc1))
        mask = model.sample_mask(frames, features.shape[1], seed=3)
        sizes = model.sizes_of(FRAMES)
        model.input_norm.eval()
        expected = model(features, frames, mask, sizes=sizes).loss
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_rounding(compiled(features, frames, mask, sizes=sizes).loss, expected, "loss")


@pytest.fixture
def lora() -> Iterator[Any]:
    """``MAEASTForAudioClassification`` with LoRA on every Linear of its layers, by the real peft."""
    peft = pytest.importorskip("peft", reason="peft is not installed (extra test)")
    pytest.importorskip("transformers", reason="transformers is not installed (extra test)")
    from mae_ast_fast.integrations.transformers import MAEASTForAudioClassification, MAEASTHFConfig

    torch.manual_seed(0)
    sizes = build().config.to_dict() | {"decoder_layers": 0}
    model = MAEASTForAudioClassification(MAEASTHFConfig(**sizes, num_labels=2))
    config = peft.LoraConfig(r=4, target_modules=["qkv", "out_proj", "fc1", "fc2"], modules_to_save=["classifier"])
    return peft.get_peft_model(model, config)


def test_peft_lora_trainer_updates_every_adapter(lora: Any, tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    features, frames = batch()
    attention_mask = torch.arange(features.shape[1]) < frames[:, None]
    rows = [
        {"input_features": x, "attention_mask": m.long(), "labels": i % 2}
        for i, (x, m) in enumerate(zip(features, attention_mask, strict=True))
    ]
    before = {name: p.detach().clone() for name, p in lora.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=3, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(lora, arguments, train_dataset=rows).train()
    assert len(before) == 2 * 2 * 4 + 2  # A and B of 4 matrices in 2 layers, and the head
    for name, p in lora.named_parameters():
        if name in before:
            assert not torch.equal(p, before[name]), name


def test_peft_lora_disabled_or_merged_gives_expected_logits(lora: Any) -> None:
    lora.eval()
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    features, _ = batch()
    with torch.no_grad():
        on = lora(features).logits
        with lora.disable_adapter():
            off = lora(features).logits
        merged = lora.merge_and_unload()(features).logits
    assert not torch.equal(on, off)
    assert_rounding(merged, on, "logits")

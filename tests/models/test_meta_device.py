"""Models made on the meta device and filled from a state dict: all values must be those of the model that was saved.

A buffer that no state dict holds is what every such way loses. New memory holds NaN in these tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig
from mae_ast_fast.downstream.classifier import AudioClassifier
from mae_ast_fast.models.base import PretrainingModel
from mae_ast_fast.models.transformer import Positions, sinusoid_2d
from mae_ast_fast.s3prl import Upstream

SIZES = {"num_mel_bins": 128, "embed_dim": 16, "num_heads": 2}
DEPTH = {"ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1, "decoder_embed_dim": 8}


def mae_ast(patch: tuple[int, int] = (16, 16), positions: str = "sinusoid") -> MAEAST:
    return MAEAST(MAEASTConfig(**SIZES, **DEPTH, patch_size=patch, positions=positions))


def hf_model() -> nn.Module:
    hf = pytest.importorskip("mae_ast_fast.hf", reason="transformers is not installed")
    return hf.MAEASTHFModel(hf.MAEASTHFConfig(**mae_ast().config.to_dict()))


def hf_classifier() -> nn.Module:
    hf = pytest.importorskip("mae_ast_fast.hf", reason="transformers is not installed")
    return hf.MAEASTForAudioClassification(hf.MAEASTHFConfig(**mae_ast().config.to_dict(), num_labels=2))


BUILD: dict[str, Callable[[], nn.Module]] = {
    "patch": mae_ast,
    "frame": lambda: mae_ast((2, 128)),
    "sinusoid_2d": lambda: mae_ast(positions="sinusoid_2d"),
    "ssast": lambda: SSAST(SSASTConfig(**SIZES, layers=1, input_frames=64, mask_patches=8)),
    "classifier": lambda: AudioClassifier(mae_ast(), ["a", "b"]),
    "attentive": lambda: AudioClassifier(mae_ast(), ["a", "b"], head="attentive"),
    "ssast_classifier": lambda: AudioClassifier(BUILD["ssast"](), ["a", "b"], max_seconds=0.6),
    "s3prl": lambda: Upstream(mae_ast()),
    "hf": hf_model,
    "hf_classifier": hf_classifier,
}


@pytest.fixture(autouse=True)
def new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # and with it torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def saved_and_empty(name: str) -> tuple[nn.Module, nn.Module]:
    """A model with random weights, and one of its kind on the meta device; both in evaluation mode."""
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.4)
    with torch.device("meta"):
        empty = BUILD[name]().eval()
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    return model, empty


def output(model: nn.Module) -> Tensor:
    features = torch.linspace(-9, 0, 2 * 48 * 128).view(2, 48, 128)
    if isinstance(model, Upstream):
        return model([torch.linspace(-1, 1, 4000)])["last_hidden_state"]
    if isinstance(model, PretrainingModel):
        return model.encode(features).x
    result = model(features)
    return result if isinstance(result, Tensor) else result[0]


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    """The same tensors, buffers outside of state dicts included, and the same output."""
    ours, theirs = (dict([*x.named_parameters(), *x.named_buffers()]) for x in (loaded, model))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(output(loaded), output(model)) and output(model).isfinite().all()


@pytest.mark.parametrize("name", BUILD)
def test_to_empty_then_load_equals_saved_model(name: str) -> None:
    model, loaded = saved_and_empty(name)
    loaded.to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict())
    assert_same(loaded, model)


@pytest.mark.parametrize("name", BUILD)
def test_load_with_assign_equals_saved_model(name: str) -> None:
    model, loaded = saved_and_empty(name)
    loaded.load_state_dict(model.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in loaded.buffers())
    assert_same(copy.deepcopy(loaded).to("cpu"), model)


@pytest.mark.parametrize("name", BUILD)
def test_to_empty_of_model_in_memory_keeps_positions(name: str) -> None:
    model, _ = saved_and_empty(name)
    loaded = copy.deepcopy(model).to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict())
    assert_same(loaded, model)


@pytest.mark.parametrize("name", ["patch", "sinusoid_2d", "hf_classifier"])
def test_weights_set_one_by_one_equal_saved_model(name: str) -> None:
    model, loaded = saved_and_empty(name)
    for path, tensor in model.state_dict().items():
        module = loaded.get_submodule(path.rpartition(".")[0])
        kind = module._parameters if path.rpartition(".")[2] in module._parameters else module._buffers
        kind[path.rpartition(".")[2]] = tensor
    moved = copy.deepcopy(loaded).to("cpu")  # what accelerate does next, and what cannot copy from the meta device
    assert torch.equal(output(moved), output(model))
    assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize("include_buffers", [False, True])
def test_accelerate_empty_weights_equal_saved_model(include_buffers: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, _ = saved_and_empty("patch")
    assert isinstance(model, MAEAST)
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        loaded = mae_ast()
    accelerate.load_checkpoint_and_dispatch(loaded, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    assert_same(loaded.eval(), model)


def test_fully_shard_and_set_model_state_dict_equal_saved_model() -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model, loaded = saved_and_empty("patch")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for module in (*loaded.encoder.layers, *loaded.decoder.layers, loaded):
            fully_shard(module, mesh=mesh)
        loaded.to_empty(device="cpu")
        set_model_state_dict(loaded, model.state_dict(), options=StateDictOptions(full_state_dict=True))
        for name, buffer in model.named_buffers():
            assert torch.equal(loaded.get_buffer(name), buffer), name
        losses = [x(torch.ones(1, 64, 128), generator=torch.Generator().manual_seed(0)).loss for x in (loaded, model)]
        assert torch.equal(*losses) and losses[0].isfinite()
    finally:
        distributed.destroy_process_group()


def test_stored_positions_survive_every_way() -> None:
    model, loaded = saved_and_empty("patch")
    table = sinusoid_2d(300, 16, 1).half().float()
    state = {**model.state_dict(), "encoder_positions.table": table}
    model.load_state_dict(state)
    loaded.load_state_dict(state, assign=True)
    assert_same(loaded, model)
    emptied = copy.deepcopy(model).to_empty(device="cpu")
    assert emptied.encoder_positions.table.isnan().all()  # the state dict has it, as it has the weights
    emptied.load_state_dict(model.state_dict())
    assert_same(emptied, model)


def test_stored_positions_never_loaded_are_named() -> None:
    model, loaded = saved_and_empty("patch")
    state = {**model.state_dict(), "encoder_positions.table": sinusoid_2d(300, 16, 1)}
    loaded.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()}, assign=True)
    loaded.load_state_dict(model.state_dict(), assign=True, strict=False)
    with pytest.raises(RuntimeError, match="position table of the checkpoint is still on the meta device"):
        output(loaded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtype_rounds_positions_once(dtype: torch.dtype) -> None:
    model, loaded = saved_and_empty("patch")
    loaded.to(dtype).to_empty(device="cpu").load_state_dict(model.to(dtype).state_dict())
    assert loaded.encoder_positions.table.dtype == dtype
    assert torch.equal(loaded.encoder_positions.table, sinusoid_2d(2048, 16, 1).to(dtype))
    assert_same(loaded, model)


def test_positions_changed_by_the_user_survive_casts_and_copies() -> None:
    model, _ = saved_and_empty("patch")
    changed = model.encoder_positions.table * 2
    model.encoder_positions.table = changed
    assert torch.equal(copy.deepcopy(model).double().to("cpu").encoder_positions.table, changed.double())
    assert torch.equal(model.half().float().encoder_positions.table, changed.half().float())


def test_fake_tensors_move_without_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert Positions(8).double().table.dtype == torch.float64

"""TrainStep: updates equal those of PyTorch's own parts in sequence; skipped updates change no weights."""

from __future__ import annotations

import bisect
import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE
from policy import BF16_LOSS, BUCKET_SHARE, assert_rounding
from torch import Tensor, nn

from mae_ast_fast import MAEAST, SSAST, MAEASTConfig, SSASTConfig, TrainStep
from mae_ast_fast.data.shards import Crop, _Budget, bucket_edges
from mae_ast_fast.ops.fbank import SAMPLE_RATE, num_frames
from mae_ast_fast.tools.doctor import CLIP_SECONDS, count_saved
from mae_ast_fast.training import cuda_graphs, micro_batch
from mae_ast_fast.training.micro_batch import MicroBatch
from mae_ast_fast.training.step import PRECISIONS

OFF = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "input_dropout", "encoder_layerdrop"), 0.0)
NUM_FRAMES = [48, 17, 33]
CLIP_NUM_FRAMES = num_frames(round(CLIP_SECONDS * SAMPLE_RATE))


def build(**fields: Any) -> MAEAST:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "ffn_dim": 48, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    options = {name: fields.pop(name) for name in ("impl", "recompute") if name in fields}
    config = MAEASTConfig(num_mel_bins=32, patch_size=(8, 8), decoder_embed_dim=16, **{**sizes, **OFF, **fields})
    return MAEAST(config, **options).to(DEVICE).train()


def log_mel(num_frames: list[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(len(num_frames), max(num_frames), 32, generator=generator) * 3 - 4).to(DEVICE)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_train_step_update_equals_clip_grad_norm_and_adamw(clip_norm: float) -> None:
    model, reference_model = build(), build()
    options = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    update = TrainStep(model, 1.0, clip_norm=clip_norm, **options)
    adamw = torch.optim.AdamW(reference_model.parameters(), lr=1.0, **options)
    for index, rate in enumerate((1e-3, 5e-3, 0.0, 2e-3)):
        x = log_mel(NUM_FRAMES, index)
        mask = model.sample_mask(torch.tensor(NUM_FRAMES, device=DEVICE), max(NUM_FRAMES), seed=index)
        metrics = update(x, NUM_FRAMES, mask, lr=rate)
        out = reference_model(x, torch.tensor(NUM_FRAMES), mask)
        adamw.zero_grad()
        out.loss.backward()
        norm = nn.utils.clip_grad_norm_(reference_model.parameters(), clip_norm)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        assert (norm > clip_norm) == (clip_norm < 1), "clipping must apply in one case and not in the other"
        expected = (out.loss, out.loss_reconstruction, out.loss_classification, out.accuracy, norm)
        for name, metric, value in zip(metrics._fields, metrics, expected, strict=True):
            assert_rounding(metric, value.float(), name, grad=name == "grad_norm")
    for (name, parameter), expected_parameter in zip(
        model.named_parameters(), reference_model.parameters(), strict=True
    ):
        if not name.endswith("qkv.bias"):  # its key part has gradient 0, which AdamW turns into steps of noise
            assert_rounding(parameter, expected_parameter, name, grad=True)


def test_train_step_defaults_are_the_papers() -> None:
    update = TrainStep(build())
    (group,) = update.optimizer.param_groups
    defaults = float(group["lr"]), group["betas"], group["eps"], group["weight_decay"], update.clip_norm
    assert defaults == (torch.tensor(1e-4).item(), (0.9, 0.98), 1e-6, 0.01, 10.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_train_step_precision_sets_dtype_of_activations(precision: str) -> None:
    model, dtypes = build(), []
    model.encoder.layers[0].register_forward_hook(lambda _, inputs, out: dtypes.append((inputs[0].dtype, out[0].dtype)))
    update = TrainStep(model, precision=precision)
    metrics = update(log_mel(NUM_FRAMES), NUM_FRAMES)
    dtype = PRECISIONS[precision] or torch.float32
    assert dtypes == [(dtype, dtype)] and {metric.dtype for metric in metrics} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.skipif(DEVICE.type != "cpu", reason="masked tokens are counted on a CPU only")
def test_train_step_mask_of_another_count_on_cpu_equals_model_loss() -> None:
    model = build()
    mask = torch.zeros(3, 24, dtype=torch.bool)
    mask[:, :2] = True
    expected = build()(log_mel(NUM_FRAMES), torch.tensor(NUM_FRAMES), mask).loss.detach()
    assert TrainStep(model)(log_mel(NUM_FRAMES), NUM_FRAMES, mask).loss == expected


@pytest.mark.parametrize("with_mask", [False, True])
def test_train_step_call_equals_update_of_one_micro_batch(with_mask: bool) -> None:
    """Bit for bit, from the same state of torch's generator, which both leave in the same state."""
    results = []
    for through_update in (False, True):
        update = TrainStep(build(dropout=0.2), 1e-2)
        mask = update.model.sample_mask(torch.tensor(NUM_FRAMES), max(NUM_FRAMES), seed=1) if with_mask else None
        torch.manual_seed(3)
        for rate in (1e-2, 1e-3):
            if through_update:
                metrics = update.update([MicroBatch(log_mel(NUM_FRAMES), NUM_FRAMES, mask=mask)], lr=rate)
            else:
                metrics = update(log_mel(NUM_FRAMES), NUM_FRAMES, mask, lr=rate)
        results.append([*metrics, *update.model.parameters(), torch.get_rng_state()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_train_step_one_micro_batch_draws_what_the_model_draws() -> None:
    """The masks and the dropout of one micro-batch are those of the model called with the same generator."""
    update, model = TrainStep(build(dropout=0.2)), build(dropout=0.2)
    torch.manual_seed(3)
    loss = update(log_mel(NUM_FRAMES), NUM_FRAMES).loss
    torch.manual_seed(3)
    assert loss == model(log_mel(NUM_FRAMES), torch.tensor(NUM_FRAMES)).loss


def test_train_step_drops_gradients_of_an_earlier_backward() -> None:
    model = build()
    model(log_mel(NUM_FRAMES)).loss.backward()
    first = TrainStep(model)(log_mel(NUM_FRAMES), NUM_FRAMES, seed=0).grad_norm
    assert first == TrainStep(build())(log_mel(NUM_FRAMES), NUM_FRAMES, seed=0).grad_norm


def test_train_step_updates_fp64_model() -> None:
    model = build().double()
    before = weights(model)
    assert TrainStep(model, 1e-3)(log_mel(NUM_FRAMES).double(), NUM_FRAMES).loss.isfinite()
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_train_step_masks_depend_on_clip_ids_and_epoch() -> None:
    ids = torch.tensor([7, 1, 2**40 + 3], device=DEVICE)
    losses = []
    for clips, epoch in ((ids, 3), (ids, 3), (ids + 1, 3), (ids, 4)):
        losses.append(TrainStep(build())(log_mel(NUM_FRAMES), NUM_FRAMES, seed=5, clip_ids=clips, epoch=epoch).loss)
    assert losses[0] == losses[1] and losses[0] != losses[2] and losses[0] != losses[3]
    model = build()
    mask = model.sample_mask(torch.tensor(NUM_FRAMES, device=DEVICE), max(NUM_FRAMES), seed=5, clip_ids=ids, epoch=3)
    assert TrainStep(model)(log_mel(NUM_FRAMES), NUM_FRAMES, mask).loss == losses[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_step_non_finite_update_changes_nothing(precision: str) -> None:
    model = build()
    update = TrainStep(model, 1e-2, precision=precision)
    assert update(log_mel(NUM_FRAMES), NUM_FRAMES).grad_norm.isfinite()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(update.optimizer.state_dict()["state"])
    bad = log_mel(NUM_FRAMES)
    bad[0, 0, 0] = float("inf")
    assert not update(bad, NUM_FRAMES).grad_norm.isfinite()
    hook = model.head.weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    assert update(bad.clamp(max=9.0), NUM_FRAMES).grad_norm == float("inf")
    hook.remove()
    running = ("input_norm.running_mean", "input_norm.running_var", "input_norm.num_batches_tracked")
    for name, value in model.state_dict().items():  # the second batch was finite, so its statistics count
        assert torch.equal(value, before[name]) or (name in running and value.isfinite()), name
    assert model.input_norm.num_batches_tracked == 2
    for index, saved in update.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][name]) for name, value in saved.items())
    for parameter in model.parameters():
        assert parameter.grad is None


def test_train_step_fp16_finds_its_scale_and_returns_unscaled_norms() -> None:
    model = build()
    update = TrainStep(model, 1e-3, precision="fp16", clip_norm=0.5)
    expected = TrainStep(build(), 1e-3, clip_norm=0.5)(log_mel(NUM_FRAMES), NUM_FRAMES, seed=1)
    update.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)
    before, skipped = weights(model), 0
    while not (metrics := update(log_mel(NUM_FRAMES), NUM_FRAMES, seed=1)).grad_norm.isfinite():
        assert_same_weights(model, before)
        skipped += 1
    assert 1 <= skipped < 20 and update.scaler.get_scale() == 2.0 ** (24 - skipped)
    assert abs(metrics.loss / expected.loss - 1) < BF16_LOSS
    assert abs(metrics.grad_norm / expected.grad_norm - 1) < BF16_LOSS
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_step_loaded_state_continues_bit_exactly(precision: str) -> None:
    whole = TrainStep(build(dropout=0.1), precision=precision)
    if whole.scaler is not None:
        whole.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**7, growth_interval=3)
    rates = (1e-3, 2e-3, 3e-3, 4e-3)

    def run(update: TrainStep, steps: range) -> None:
        for index in steps:
            torch.manual_seed(index)
            update(log_mel(NUM_FRAMES, index), NUM_FRAMES, lr=rates[index], seed=index)

    run(whole, range(2))
    model = copy.deepcopy(whole.model)
    resumed = TrainStep(model, precision=precision)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert resumed.lr == rates[1], "a state contains its rate"
    if resumed.scaler is not None:
        assert resumed.scaler.state_dict() == whole.scaler.state_dict() != TrainStep(model).state_dict()["scaler"]
    run(whole, range(2, 4))
    run(resumed, range(2, 4))
    assert_same_weights(model, weights(whole.model))
    assert resumed.optimizer.param_groups[0]["lr"] is resumed.lr


def test_train_step_unequal_clips_compute_no_padding_rows() -> None:
    """Clips of unequal length, the shortest an eighth of the longest, make not one row of padding."""
    model = build()
    update = TrainStep(model)
    frames = [400, 50, 123, 260, 77]
    shapes = []
    model.encoder.layers[0].register_forward_hook(lambda _, args, out: shapes.append(len(args[0])))
    model.decoder.layers[0].register_forward_hook(lambda _, args, out: shapes.append(len(args[0])))
    update(log_mel(frames), frames)
    tokens = sum(count // 8 * 4 for count in frames)
    assert update.num_tokens == update.num_rows == tokens and shapes == [model.sizes_of(frames).visible, tokens]


# ---------------------------------------------------------------------------------------------------------- recompute


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("recompute", ["gelu", "layer"])
def test_recompute_changes_no_bit(recompute: str, impl: str, norm_first: bool) -> None:
    """With dropout: the recomputation must use the masks of the forward."""
    rates = {"dropout": 0.2, "attention_dropout": 0.2, "input_dropout": 0.1}
    results = []
    for mode in ("none", recompute):
        model = build(impl=impl, recompute=mode, norm_first=norm_first, **rates)
        torch.manual_seed(1)
        out = model(log_mel(NUM_FRAMES), torch.tensor(NUM_FRAMES))
        out.loss.backward()
        results.append((out.loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


# In the interpreter it takes 20 s.
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.long)])
def test_recompute_gelu_saves_one_ffn_activation_per_layer(impl: str) -> None:
    options = {"impl": impl, "encoder_layers": 3, "decoder_layers": 2}
    saved_bytes = {}
    for mode in ("none", "gelu", "layer"):
        model = build(recompute=mode, **options)
        saved_bytes[mode] = count_saved(model, 2, "fp32")
    tokens = CLIP_NUM_FRAMES // 8 * 4
    visible = MAEAST.sizes_of(model, [CLIP_NUM_FRAMES]).visible
    rows = 2 * (3 * visible + tokens + (tokens - visible))  # the last decoder layer runs on the masked tokens only
    activation_bytes = rows * model.config.ffn_dim * 4
    assert saved_bytes["none"] - saved_bytes["gelu"] == activation_bytes
    assert saved_bytes["layer"] < saved_bytes["gelu"]


# ---------------------------------------------------------------------------------------- one graph for similar batches


def aot(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make torch.compile trace without a compiler; returns the list that collects its graphs."""
    graphs: list[Any] = []
    from torch._dynamo.backends.common import aot_autograd

    def collect(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    from functorch.compile import make_boxed_func

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(collect(graph, inputs)))
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


def test_train_step_compiled_updates_share_a_graph_and_equal_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = aot(monkeypatch)
    model, other = build(), build()
    update, plain = TrainStep(model, 1e-3, compile=True), TrainStep(other, 1e-3)
    for seed, frames in enumerate(([48, 17, 33], [48, 32, 9], [48, 24, 24])):
        x = log_mel(frames, seed)
        metrics = update(x, frames, seed=seed)
        for name, metric, expected in zip(metrics._fields, metrics, plain(x, frames, seed=seed), strict=True):
            assert_rounding(metric, expected, name, grad=True)
    assert len(graphs) == 2, "one forward and one backward"
    assert plain.num_rows == plain.num_tokens == update.num_tokens
    assert update.num_rows >= update.num_tokens


@pytest.mark.ci
def test_train_step_compiled_new_batches_make_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """New numbers of clips, new lengths, equal and unequal clips: shapes become symbols, not constants."""
    graphs = aot(monkeypatch)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    update, plain = (TrainStep(build(), 1e-3, compile=compile) for compile in (True, False))
    rng = torch.Generator().manual_seed(0)
    for seed in range(14):
        clips = int(torch.randint(2, 20, (), generator=rng))
        frames = torch.randint(16, 200, (clips,), generator=rng).tolist() if seed % 2 else [16 * (3 + seed)] * clips
        x = log_mel(frames, seed)
        assert_rounding(update(x, frames, seed=seed).loss, plain(x, frames, seed=seed).loss, f"{frames}", grad=True)
    assert len(graphs) <= 2 * 6, "forwards and backwards"


def test_padded_shape_adds_at_most_an_eighth() -> None:
    for frames in ([1000] * 33, [998, 400, 700, 123] * 8, [2000] * 17):
        config = MAEASTConfig.preset("patch_tiny", encoder_layers=1)
        exact = MAEAST.sizes_of(build(), frames)
        model = MAEAST(config)
        x, counts = torch.zeros(len(frames), max(frames), 1), torch.tensor(frames)
        shape = micro_batch.PaddedShape.of(model, len(frames), max(frames), model.sizes_of(frames))
        x, padded, ids = micro_batch._pad(x, counts, torch.arange(len(frames)), shape)
        assert torch.equal(padded[: len(frames)], counts) and not padded[len(frames) :].any()
        assert len(x) == len(padded) == len(ids) <= max(len(frames) * 9 / 8, len(frames) + 1)
        assert max(frames) <= x.shape[1] <= max(frames) * 9 / 8 + 16 * config.patch_size[0]
        bucket = exact.bucket()
        assert bucket.visible + bucket.masked <= (exact.visible + exact.masked) * BUCKET_SHARE


class Recorder:
    """Replaces CUDA graphs: a recorded function runs only at a replay, on the tensors of the record."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded = self.replayed = self.waits = 0
        recorder = self

        class Stream:
            def __init__(self, device: Any = None) -> None:
                pass

            def wait_stream(self, other: Any) -> None:
                recorder.waits += 1

            def __enter__(self) -> None:
                pass

            def __exit__(self, *error: object) -> None:
                pass

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(cuda_graphs, "record", self.record)

    def record(self, function: Callable[[], Tensor], pool: Any, stream: Any) -> tuple[Callable[[], Any], Tensor]:
        self.recorded += 1
        result = torch.full((5,), float("nan"))

        def replay() -> None:
            self.replayed += 1
            result.copy_(function())

        return replay, result


def graphed(model: MAEAST, rate: float = 1e-3) -> TrainStep:
    """A TrainStep with graphs on a CPU, where its constructor refuses them."""
    update = TrainStep(model, rate)
    update.pads_shapes, update.graphs = True, cuda_graphs.Graphs(update._update_on_device, model, update.device)
    return update


def test_graphs_replay_reads_inputs_of_the_current_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    model, other = build(), build()
    update, plain = graphed(model), TrainStep(other, 1e-3)
    batches = [[48, 17, 33], [48, 32, 9], [90, 8], [48, 24, 24], [90, 16], [48, 17, 33]]
    first = None
    for seed, frames in enumerate(batches):
        x = log_mel(frames, seed)
        before = x.clone()
        ids = torch.arange(len(frames)) + seed
        draw = {"lr": 1e-3 / (1 + seed), "seed": seed, "clip_ids": ids, "epoch": seed}
        metrics = update(x, frames, **draw)
        for name, metric, expected in zip(metrics._fields, metrics, plain(x, frames, **draw), strict=True):
            assert_rounding(metric, expected, f"update {seed}: {name}", grad=True)
        first = (x, before, metrics, [metric.clone() for metric in metrics]) if seed == 1 else first
    x, before, metrics, copies = first
    assert torch.equal(x, before), "a graph reads a copy"
    assert all(torch.equal(*pair) for pair in zip(metrics, copies, strict=True)), "and returns a copy"
    assert (recorded := recorder.recorded) == 2, recorded
    assert recorder.replayed == 4, "every update of a shape but its first"
    assert recorder.waits == 2 * len(batches), "the graphs for the caller, and the caller for the graphs"


@pytest.mark.parametrize("other", ["sizes", "clips", "frames"])
def test_graphs_replay_only_for_batches_of_their_padded_shape(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    """Batches of equal shape but other row counts have other graphs; shapes that round up to the same share one."""
    recorder = Recorder(monkeypatch)
    update, plain = graphed(build()), TrainStep(build(), 1e-3)
    batches = {
        "sizes": [[200, 8, 8], [200, 200, 200], [200, 16, 8], [200, 200, 200]],
        "clips": [[16] * 17, [16] * 18],
        "frames": [[41] * 3, [47] * 3],
    }[other]
    for seed, frames in enumerate(batches):
        x = log_mel(frames, seed)
        metrics, expected = (step(x, frames, seed=seed) for step in (update, plain))
        assert_rounding(metrics.loss, expected.loss, f"{frames}", grad=True)
        assert_rounding(metrics.grad_norm, expected.grad_norm, f"{frames}", grad=True)
    assert (recorder.recorded, recorder.replayed) == ((2, 2) if other == "sizes" else (1, 1))


def test_graphs_after_loaded_state_or_longer_positions_are_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded state replaces AdamW's state, and longer clips replace the table of positions."""
    recorder = Recorder(monkeypatch)
    update = graphed(build())
    frames = [48, 17]
    for _ in range(2):
        update(log_mel(frames), frames)
    update.load_state_dict(copy.deepcopy(update.state_dict()))
    assert not update.graphs.cache
    for _ in range(2):
        update(log_mel(frames), frames)
    assert recorder.recorded == 2
    long = [2048 // 4 * 8 + 8]
    update(log_mel(long), long)  # more tokens than the table has
    for _ in range(2):
        update(log_mel(frames), frames)
    assert recorder.recorded == 3


def test_graphs_with_two_masks_equal_plain_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch)
    sizes = {"embed_dim": 32, "num_heads": 2, "layers": 1, "patch_size": (8, 8), "num_mel_bins": 32}
    config = SSASTConfig(**sizes, input_frames=56, mask_patches=20, objective="joint_two_pass")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(SSAST(config).train())
    update, plain = graphed(models[0]), TrainStep(models[1], 1e-3)
    for seed in range(3):
        x = log_mel(NUM_FRAMES, seed)
        metrics, expected = (step(x, NUM_FRAMES, seed=seed) for step in (update, plain))
        assert_rounding(metrics.loss, expected.loss, f"update {seed}", grad=True)


def test_graphs_over_the_limit_drop_the_least_recently_used(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "GRAPHS_KEPT", 2)
    update = graphed(build())
    for frames in ([16], [16], [160], [160], [16], [800], [16], [800], [160]):
        update(log_mel(frames), frames)
    # Most recently used are 16 and 800, so 160 is dropped and recorded again.
    assert len(update.graphs.cache) == 2 and (recorder.recorded, recorder.replayed) == (3, 5)


def loader_batches(
    batch_seconds: float, min_seconds: float, max_seconds: float, draw_seconds: Callable[[random.Random], float]
) -> list[list[int]]:
    """Frame counts of the clips of 3,000 batches, by the loader's buckets and budget, of random recordings."""
    edges = bucket_edges(round(max_seconds * SAMPLE_RATE))
    rng, batches = random.Random(0), []
    buckets: list[list[int]] = [[] for _ in edges]
    while len(batches) < 3000:
        seconds_left = draw_seconds(rng)
        while seconds_left >= min_seconds:
            num_samples = round(min(seconds_left, max_seconds) * SAMPLE_RATE)
            seconds_left -= max_seconds
            bucket = buckets[bisect.bisect_left(edges, num_samples)]
            bucket.append(num_samples)
            budget = _Budget(round(batch_seconds * SAMPLE_RATE), edges)
            for crop_samples in bucket:
                budget.add(Crop(None, 0, crop_samples))
            if budget.close_to_exceeding():
                batches.append([num_frames(crop_samples) for crop_samples in bucket])
                bucket.clear()
    return batches[:3000]


def speech(rng: random.Random) -> float:
    return rng.lognormvariate(1.2, 0.6)


def audio_set_and_speech(rng: random.Random) -> float:
    return 10.0 if rng.random() < 0.5 else 2 + 33 * rng.betavariate(2.2, 5)


RUNS = {
    "default": (MAEASTConfig.preset("patch_tiny"), (160, 0.4, 10, speech), 2900),
    "default, frame": (MAEASTConfig.preset("frame_tiny"), (160, 0.4, 10, speech), 2900),
    "paper": (MAEASTConfig.preset("patch_base"), (525, 2, 15.6, audio_set_and_speech), 2900),
    "quick": (MAEASTConfig.preset("patch_tiny"), (40, 0.4, 10, speech), 2700),
    "frame": (MAEASTConfig.preset("frame_tiny"), (40, 0.4, 10, speech), 2700),
    "ssast": (SSASTConfig.preset("patch_tiny"), (40, 0.4, 10, speech), 2700),
}


@pytest.mark.parametrize("run", RUNS)
def test_graph_cache_of_loader_batches_mostly_replays(run: str) -> None:
    config, (batch_seconds, min_seconds, max_seconds, draw_seconds), min_replayed = RUNS[run]
    with torch.device("meta"):
        model = {MAEASTConfig: MAEAST, SSASTConfig: SSAST}[type(config)](config)
    cache, recorded, replayed = cuda_graphs.GraphCache(), [], 0
    for frames in loader_batches(batch_seconds, min_seconds, max_seconds, draw_seconds):
        shape = micro_batch.PaddedShape.of(model, len(frames), max(frames), model.sizes_of(frames))
        recorded_before = len(recorded)
        graph = cache.take(shape, lambda: recorded.append(1) or "graph")
        replayed += graph == "graph" and len(recorded) == recorded_before
    assert replayed >= min_replayed, f"{replayed} of 3,000 replayed, {len(recorded)} recorded, {len(cache)} shapes"


@pytest.mark.ci
@pytest.mark.parametrize("objective", ["joint", "joint_two_pass"])
def test_train_step_compiled_ssast_equals_plain_ssast(monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    """SSAST's masks depend on the width of the batch, and its positions end with its longest clip."""
    aot(monkeypatch)
    updates = []
    for compile in (True, False):
        torch.manual_seed(0)
        sizes = {"embed_dim": 32, "num_heads": 2, "layers": 1, "patch_size": (8, 8), "num_mel_bins": 32}
        model = SSAST(SSASTConfig(**sizes, input_frames=56, mask_patches=20, objective=objective)).to(DEVICE).train()
        updates.append(TrainStep(model, 1e-3, compile=compile))
    for seed, frames in enumerate(([55, 17, 33], [48, 8])):
        x = log_mel(frames, seed)
        metrics, expected = (update(x, frames, seed=seed) for update in updates)
        for name, metric, value in zip(metrics._fields, metrics, expected, strict=True):
            assert_rounding(metric, value, name, grad=True)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: TrainStep(build(), precision="fp8"), ["fp32, bf16, fp16", "'fp8'"]),
        (lambda: TrainStep(build(), clip_norm=0.0), ["clip_norm", "positive", "0.0"]),
        (lambda: TrainStep(build().cpu(), graphs=True), ["CUDA", "cpu"]),
        (lambda: build(recompute="gelus"), ["none, gelu, layer", "'gelus'"]),
        (lambda: build(recompute="gelu", activation_dropout=0.1), ["activation_dropout=0", "0.1", "layer"]),
        (lambda: setattr(build(), "recompute", "gelus"), ["none, gelu, layer", "'gelus'"]),
        (lambda: setattr(build(activation_dropout=0.1), "recompute", "gelu"), ["activation_dropout=0", "0.1", "layer"]),
        (lambda: setattr(build(), "impl", "cuda"), ["impl", "'cuda'"]),
        (lambda: setattr(build(), "attention", "flash"), ["attention", "'flash'"]),
        (lambda: TrainStep(build())(log_mel(NUM_FRAMES), [49, 17, 33]), ["between 0 and T=48", "[49, 17, 33]"]),
        (lambda: TrainStep(build())(log_mel(NUM_FRAMES), [48, -1, 33]), ["between 0 and T=48", "-1"]),
        (lambda: TrainStep(build())(log_mel(NUM_FRAMES), [48, 17]), ["integers (3,)", "(2,)"]),
        (lambda: TrainStep(build())(log_mel(NUM_FRAMES), [48.0, 17.0, 33.0]), ["integers (3,)", "float32"]),
        (lambda: TrainStep(build())(log_mel(NUM_FRAMES), [7, 7, 0]), ["at least 2 patches of 8 frames", "[7, 7, 0]"]),
        (lambda: TrainStep(build())(log_mel(NUM_FRAMES)[0]), ["(B, T, F)", "(48, 32)"]),
    ],
)
def test_train_step_rejects_wrong_arguments(run: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        run()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_train_step_graphs_reject_several_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch)
    micro_batches = [MicroBatch(log_mel(NUM_FRAMES), NUM_FRAMES), MicroBatch(log_mel(NUM_FRAMES)[:0])]
    with pytest.raises(ValueError, match=r"one batch of clips, got micro-batches of \[3, 0\] clips"):
        graphed(build()).update(micro_batches)


def test_train_step_compile_rejects_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    aot(monkeypatch)
    with pytest.raises(ValueError, match="mask=None"):
        TrainStep(build(), compile=True)(log_mel(NUM_FRAMES), NUM_FRAMES, torch.zeros(3, 24, dtype=torch.bool))


def test_train_step_several_micro_batches_reject_mask() -> None:
    mask = torch.zeros(3, 24, dtype=torch.bool)
    micro_batches = [MicroBatch(log_mel(NUM_FRAMES), mask=mask), MicroBatch(log_mel(NUM_FRAMES))]
    with pytest.raises(ValueError, match="updates of several micro-batches draw their masks: expected mask=None"):
        TrainStep(build()).update(micro_batches)


# --------------------------------------------------------------------------------------------------- lengths on a GPU


def hide_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat tensors of lengths as if they were on a GPU, so that the host does not read their values."""
    monkeypatch.setattr(micro_batch, "_is_on_host", lambda num_frames: not isinstance(num_frames, Tensor))


def build_ssast(objective: str) -> SSAST:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "num_heads": 2, "layers": 1, "patch_size": (8, 8), "num_mel_bins": 32}
    return SSAST(SSASTConfig(**sizes, input_frames=56, mask_patches=20, objective=objective)).to(DEVICE).train()


MODELS = {
    "chunk": build,
    "random": lambda: build(masking="random"),
    "stride": lambda: build(prediction_stride=2),
    "ssast": lambda: build_ssast("joint"),
    "ssast, two passes": lambda: build_ssast("joint_two_pass"),
}


def assert_same_updates(with_gpu_lengths: TrainStep, with_host_lengths: TrainStep, batches: list[list[int]]) -> None:
    """Lengths on a GPU give the metrics of lengths on the host."""
    for seed, frames in enumerate(batches):
        x = log_mel([55, *frames], seed)[1:]  # of one width
        lengths = torch.tensor(frames, device=DEVICE)
        metrics, expected = with_gpu_lengths(x, lengths, seed=seed), with_host_lengths(x, frames, seed=seed)
        for name, metric, value in zip(metrics._fields, metrics, expected, strict=True):
            assert_rounding(metric, value, f"{frames}: {name}", grad=True)


BATCHES = [[48, 17, 33], [0, 55, 9, 16], [55, 0, 0], [8, 8, 8], [55, 55, 55]]


@pytest.mark.parametrize("model", MODELS)
def test_train_step_lengths_on_gpu_change_no_loss(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    hide_lengths(monkeypatch)
    # At a learning rate of 0 every loss is one of the same weights.
    with_gpu_lengths, with_host_lengths = TrainStep(MODELS[model](), 0.0), TrainStep(MODELS[model](), 0.0)
    assert_same_updates(with_gpu_lengths, with_host_lengths, BATCHES)
    assert with_gpu_lengths.num_tokens == with_host_lengths.num_tokens == with_host_lengths.num_rows
    full = MODELS[model]().sizes_of([55])
    assert with_gpu_lengths.num_rows == sum(map(len, BATCHES)) * full.max_tokens > with_gpu_lengths.num_tokens


@pytest.mark.parametrize("model", ["chunk", "ssast"])
def test_train_step_compiled_lengths_on_gpu_change_no_loss(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    graphs = aot(monkeypatch)
    hide_lengths(monkeypatch)
    with_gpu_lengths = TrainStep(MODELS[model](), 1e-3, compile=True)
    assert_same_updates(with_gpu_lengths, TrainStep(MODELS[model](), 1e-3), [BATCHES[0], BATCHES[2], BATCHES[4]])
    assert len(graphs) == 2, "one forward and one backward: sizes follow from the shape"


def test_graphs_of_one_shape_with_lengths_on_gpu_record_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    hide_lengths(monkeypatch)
    with_gpu_lengths = graphed(build())
    assert_same_updates(with_gpu_lengths, TrainStep(build(), 1e-3), [BATCHES[0], BATCHES[2], BATCHES[4]])
    assert (recorder.recorded, recorder.replayed) == (1, 2)


@pytest.mark.parametrize("model", MODELS)
def test_train_step_lengths_on_gpu_weight_micro_batches_by_masked_tokens(
    monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Inserting a micro-batch without clips does not change the result."""
    hide_lengths(monkeypatch)
    results = []
    for make_lengths in (list, torch.tensor):
        update = TrainStep(MODELS[model](), 1e-3)
        x = log_mel([55, 17, 33])
        micro_batches = [
            MicroBatch(x, make_lengths([55, 0, 33]), seed=1),
            MicroBatch(x[:1], make_lengths([17]), seed=2),
        ]
        if make_lengths is torch.tensor:
            micro_batches.insert(1, MicroBatch(x[:0]))
        results.append(update.update(micro_batches))
    for name, metric, value in zip(results[0]._fields, *results, strict=True):
        assert_rounding(value, metric, name, grad=True)


def test_train_step_lengths_on_gpu_out_of_range_are_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_lengths(monkeypatch)
    x = log_mel(NUM_FRAMES)
    metrics = TrainStep(build())(x, torch.tensor([2**40, -7, 33], device=DEVICE), seed=0)
    expected = TrainStep(build())(x, [48, 0, 33], seed=0)
    for name, metric, value in zip(metrics._fields, metrics, expected, strict=True):
        assert_rounding(metric, value, name, grad=True)


def test_train_step_lengths_on_gpu_without_masked_tokens_give_0(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_lengths(monkeypatch)
    metrics = TrainStep(build())(log_mel(NUM_FRAMES), torch.tensor([7, 0, 7], device=DEVICE))
    assert metrics.loss == 0 and metrics.grad_norm == 0
    with pytest.raises(ValueError, match=r"at least 2 patches of 8 frames.*got frames \[7, 7\]"):
        TrainStep(build())(log_mel([7, 7]), torch.tensor([7, 3], device=DEVICE))


@pytest.mark.parametrize("shape", ["patch", "frame", "stride", "ssast"])
@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.75, 0.93])
def test_largest_sizes_bound_every_batch(shape: str, ratio: float) -> None:
    """With ``drawn=False`` they also bound masks with any number of masked tokens."""
    if shape == "ssast":
        model = build_ssast("joint")
    else:
        frame = {"patch_size": (2, 32), "masking": "random"}
        other = {"patch": {}, "frame": frame, "stride": {"prediction_stride": 3}}[shape]
        model = MAEAST(MAEASTConfig(num_mel_bins=32, mask_ratio=ratio, **{"patch_size": (8, 8), **other}, embed_dim=12))
    exact_counts = [model.sizes_of([frames]) for frames in range(56)]
    for max_frames in range(56):
        one_clip = model.largest_sizes(1, max_frames)
        assert one_clip.has_padding_rows
        for field in range(5):
            assert one_clip[field] == max(counts[field] for counts in exact_counts[: max_frames + 1])
        three_clips = model.largest_sizes(3, max_frames)
        assert three_clips == one_clip._replace(visible=3 * one_clip.visible, masked=3 * one_clip.masked)
        tokens = model.config.num_tokens(max_frames)
        masked = -(-tokens // model._prediction_stride)
        assert model.largest_sizes(3, max_frames, drawn=False)[:5] == (3 * tokens, 3 * masked, tokens, masked, tokens)


def test_train_step_lengths_on_gpu_take_a_mask_of_any_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host counts nothing then, so there are rows for any number of masked tokens."""
    hide_lengths(monkeypatch)
    for share in (0.1, 0.5, 0.95):
        mask = torch.rand(3, 24, generator=torch.Generator().manual_seed(0)) < share
        update = TrainStep(build())
        expected = build()(log_mel(NUM_FRAMES), torch.tensor(NUM_FRAMES), mask.to(DEVICE)).loss.detach()
        inputs = MicroBatch(log_mel(NUM_FRAMES), torch.tensor(NUM_FRAMES, device=DEVICE), mask=mask.to(DEVICE))
        batch = micro_batch.to_device(inputs, update.model, update.device, pads_shapes=False)
        _, batch.token_counts = micro_batch._frames_and_token_counts(inputs, update.model)  # on a CPU they are None
        loss = update._update_on_device([batch])[0]
        assert_rounding(loss, expected, f"{share}")


# ---------------------------------------------------------------------------------------------------------- on a GPU

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs and waits for a GPU: needs one")
IMPLS = ["torch", "triton"]


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("impl", IMPLS)
def test_train_step_call_never_waits_for_the_gpu(impl: str, precision: str) -> None:
    update = TrainStep(build(impl=impl, dropout=0.1), precision=precision)
    x = log_mel(NUM_FRAMES)
    on_host = x.cpu()
    for count in range(3):
        torch.cuda.set_sync_debug_mode("error" if count else "default")  # the first update compiles and allocates
        try:
            update(x, NUM_FRAMES, lr=1e-3, seed=count, clip_ids=torch.arange(3))
            update(on_host, NUM_FRAMES, seed=torch.tensor(count), clip_ids=[4, 0, 2])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("placement", ["list", "cpu", "cuda"])
def test_train_step_lengths_anywhere_never_wait_for_the_gpu(placement: str) -> None:
    update, x = TrainStep(build()), log_mel(NUM_FRAMES)
    lengths = NUM_FRAMES if placement == "list" else torch.tensor(NUM_FRAMES, device=placement)
    mask = update.model.sample_mask(torch.tensor(NUM_FRAMES), max(NUM_FRAMES), seed=0)
    micro_batches = [MicroBatch(x, lengths), MicroBatch(x[:0]), MicroBatch(x, lengths)]
    for count in range(3):
        torch.cuda.set_sync_debug_mode("error" if count else "default")  # the first update compiles and allocates
        try:
            update(x, lengths)
            update(x, lengths, mask)
            update.update(micro_batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_models_with_lengths_on_host_never_wait_for_the_gpu() -> None:
    for model in (build(), build_ssast("joint")):
        x, lengths = log_mel(NUM_FRAMES), torch.tensor(NUM_FRAMES)
        for count in range(2):
            torch.cuda.set_sync_debug_mode("error" if count else "default")
            try:
                model(x, lengths).loss.backward()
                model.encode(x, lengths)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_step_update_of_micro_batches_never_waits_for_the_gpu(precision: str) -> None:
    update = TrainStep(build(dropout=0.1), precision=precision)
    micro_batches = [
        MicroBatch(log_mel(NUM_FRAMES), NUM_FRAMES, seed=1),
        MicroBatch(log_mel(NUM_FRAMES)[:0]),
        MicroBatch(log_mel([40])),
    ]
    for count in range(3):
        torch.cuda.set_sync_debug_mode("error" if count else "default")  # the first update compiles and allocates
        try:
            update.update(micro_batches, lr=1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("impl", IMPLS)
def test_graphs_on_gpu_equal_plain_updates(impl: str, precision: str) -> None:
    update = TrainStep(build(impl=impl), 1e-3, precision=precision, graphs=True)
    plain = TrainStep(build(impl=impl), 1e-3, precision=precision)
    for seed, frames in enumerate(([48, 17, 33], [48, 32, 9], [90, 8], [48, 24, 24], [90, 16], [48, 17, 33])):
        x = log_mel(frames, seed)
        metrics = update(x, frames, lr=1e-3, seed=seed)
        expected = plain(x, frames, lr=1e-3, seed=seed)
        if precision == "fp32":
            assert_rounding(metrics.loss, expected.loss, f"update {seed}", grad=True)
        else:
            assert abs(metrics.loss / expected.loss - 1) < BF16_LOSS


@needs_gpu
def test_graphs_on_gpu_draw_new_dropout_at_each_replay() -> None:
    update = TrainStep(build(impl="triton", dropout=0.3), 0.0, graphs=True)
    x = log_mel(NUM_FRAMES)
    losses = []
    for seed in (0, 0, 1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(update(x, NUM_FRAMES, seed=0).loss))
    assert losses[2] == losses[3] and len({losses[1], losses[2], losses[4]}) == 3

"""TrainStep: the same update as PyTorch's own pieces one after another; what must not touch the weights does not."""

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
from mae_ast_fast.training import cuda_graphs
from mae_ast_fast.training import step as module

OFF = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "input_dropout", "encoder_layerdrop"), 0.0)
FRAMES = [48, 17, 33]
CLIP_FRAMES = num_frames(round(CLIP_SECONDS * SAMPLE_RATE))


def build(**fields: Any) -> MAEAST:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "ffn_dim": 48, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    how = {name: fields.pop(name) for name in ("impl", "recompute") if name in fields}
    config = MAEASTConfig(num_mel_bins=32, patch_size=(8, 8), decoder_embed_dim=16, **{**sizes, **OFF, **fields})
    return MAEAST(config, **how).to(DEVICE).train()


def features(frames: list[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(len(frames), max(frames), 32, generator=generator) * 3 - 4).to(DEVICE)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_an_update_is_clip_grad_norm_and_adamw(clip_norm: float) -> None:
    model, other = build(), build()
    how = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    update = TrainStep(model, 1.0, clip_norm=clip_norm, **how)
    adamw = torch.optim.AdamW(other.parameters(), lr=1.0, **how)
    for index, rate in enumerate((1e-3, 5e-3, 0.0, 2e-3)):
        x = features(FRAMES, index)
        mask = model.sample_mask(torch.tensor(FRAMES, device=DEVICE), max(FRAMES), seed=index)
        numbers = update(x, FRAMES, mask, lr=rate)
        out = other(x, torch.tensor(FRAMES), mask)
        adamw.zero_grad()
        out.loss.backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), clip_norm)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        assert (norm > clip_norm) == (clip_norm < 1), "the limit is to bind in one case and not in the other"
        expected = (out.loss, out.loss_reconstruction, out.loss_classification, out.accuracy, norm)
        for name, number, value in zip(numbers._fields, numbers, expected, strict=True):
            assert_rounding(number, value.float(), name, grad=name == "grad_norm")
    for (name, parameter), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if not name.endswith("qkv.bias"):  # its key part has gradient 0, of which AdamW makes steps of noise
            assert_rounding(parameter, theirs, name, grad=True)


def test_defaults_are_the_papers() -> None:
    update = TrainStep(build())
    (group,) = update.optimizer.param_groups
    found = float(group["lr"]), group["betas"], group["eps"], group["weight_decay"], update.clip_norm
    assert found == (torch.tensor(1e-4).item(), (0.9, 0.98), 1e-6, 0.01, 10.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_stream_has_the_precision_that_was_asked_for(precision: str) -> None:
    model, seen = build(), []
    model.encoder.layers[0].register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].dtype, out[0].dtype)))
    update = TrainStep(model, precision=precision)
    numbers = update(features(FRAMES), FRAMES)
    dtype = module.PRECISIONS[precision] or torch.float32
    assert seen == [(dtype, dtype)] and {number.dtype for number in numbers} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.skipif(DEVICE.type != "cpu", reason="only a CPU counts what a mask hides")
def test_a_mask_of_another_count_is_counted() -> None:
    model = build()
    mask = torch.zeros(3, 24, dtype=torch.bool)
    mask[:, :2] = True
    expected = build()(features(FRAMES), torch.tensor(FRAMES), mask).loss.detach()
    assert TrainStep(model)(features(FRAMES), FRAMES, mask).loss == expected


def test_gradients_that_lay_there_before_do_not_count() -> None:
    model = build()
    model(features(FRAMES)).loss.backward()
    first = TrainStep(model)(features(FRAMES), FRAMES, seed=0).grad_norm
    assert first == TrainStep(build())(features(FRAMES), FRAMES, seed=0).grad_norm


def test_a_model_in_fp64_is_updated_too() -> None:
    model = build().double()
    before = weights(model)
    assert TrainStep(model, 1e-3)(features(FRAMES).double(), FRAMES).loss.isfinite()
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_masks_are_drawn_for_the_clips_and_the_epoch() -> None:
    ids = torch.tensor([7, 1, 2**40 + 3], device=DEVICE)
    losses = []
    for clips, epoch in ((ids, 3), (ids, 3), (ids + 1, 3), (ids, 4)):
        losses.append(TrainStep(build())(features(FRAMES), FRAMES, seed=5, clip_ids=clips, epoch=epoch).loss)
    assert losses[0] == losses[1] and losses[0] != losses[2] and losses[0] != losses[3]
    model = build()
    mask = model.sample_mask(torch.tensor(FRAMES, device=DEVICE), max(FRAMES), seed=5, clip_ids=ids, epoch=3)
    assert TrainStep(model)(features(FRAMES), FRAMES, mask).loss == losses[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_update_that_is_not_finite_changes_nothing(precision: str) -> None:
    model = build()
    update = TrainStep(model, 1e-2, precision=precision)
    assert update(features(FRAMES), FRAMES).grad_norm.isfinite()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(update.optimizer.state_dict()["state"])
    bad = features(FRAMES)
    bad[0, 0, 0] = float("inf")
    assert not update(bad, FRAMES).grad_norm.isfinite()
    hook = model.head.weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    assert update(bad.clamp(max=9.0), FRAMES).grad_norm == float("inf")
    hook.remove()
    running = ("input_norm.running_mean", "input_norm.running_var", "input_norm.num_batches_tracked")
    for name, value in model.state_dict().items():  # the second batch was sound, so its statistics count
        assert torch.equal(value, before[name]) or (name in running and value.isfinite()), name
    assert model.input_norm.num_batches_tracked == 2
    for number, kept in update.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[number][name]) for name, value in kept.items())
    for parameter in model.parameters():
        assert parameter.grad is None


def test_fp16_finds_its_scale_and_tells_norms_without_it() -> None:
    model = build()
    update = TrainStep(model, 1e-3, precision="fp16", clip_norm=0.5)
    expected = TrainStep(build(), 1e-3, clip_norm=0.5)(features(FRAMES), FRAMES, seed=1)
    update.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)
    before, skipped = weights(model), 0
    while not (numbers := update(features(FRAMES), FRAMES, seed=1)).grad_norm.isfinite():
        assert_same_weights(model, before)
        skipped += 1
    assert 1 <= skipped < 20 and update.scaler.get_scale() == 2.0 ** (24 - skipped)
    assert abs(numbers.loss / expected.loss - 1) < BF16_LOSS
    assert abs(numbers.grad_norm / expected.grad_norm - 1) < BF16_LOSS
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_saved_state_goes_on_to_the_bit(precision: str) -> None:
    whole = TrainStep(build(dropout=0.1), precision=precision)
    if whole.scaler is not None:
        whole.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**7, growth_interval=3)
    rates = (1e-3, 2e-3, 3e-3, 4e-3)

    def run(update: TrainStep, steps: range) -> None:
        for index in steps:
            torch.manual_seed(index)
            update(features(FRAMES, index), FRAMES, lr=rates[index], seed=index)

    run(whole, range(2))
    model = copy.deepcopy(whole.model)
    part = TrainStep(model, precision=precision)
    part.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert part.lr == rates[1], "a state brings its rate"
    if part.scaler is not None:
        assert part.scaler.state_dict() == whole.scaler.state_dict() != TrainStep(model).state_dict()["scaler"]
    run(whole, range(2, 4))
    run(part, range(2, 4))
    assert_same_weights(model, weights(whole.model))
    assert part.optimizer.param_groups[0]["lr"] is part.lr


def test_what_is_computed_is_real_tokens() -> None:
    """Clips of unequal length, from an eighth of the longest on: not one row of padding."""
    model = build()
    update = TrainStep(model)
    frames = [400, 50, 123, 260, 77]
    shapes = []
    model.encoder.layers[0].register_forward_hook(lambda _, args, out: shapes.append(len(args[0])))
    model.decoder.layers[0].register_forward_hook(lambda _, args, out: shapes.append(len(args[0])))
    update(features(frames), frames)
    tokens = sum(count // 8 * 4 for count in frames)
    assert update.tokens == update.rows == tokens and shapes == [model.sizes_of(frames).visible, tokens]


# ---------------------------------------------------------------------------------------------------------- recompute


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("recompute", ["gelu", "layer"])
def test_recomputing_changes_no_bit(recompute: str, impl: str, norm_first: bool) -> None:
    """With dropout, whose masks must be those of the forward."""
    rates = {"dropout": 0.2, "attention_dropout": 0.2, "input_dropout": 0.1}
    found = []
    for what in ("none", recompute):
        model = build(impl=impl, recompute=what, norm_first=norm_first, **rates)
        torch.manual_seed(1)
        out = model(features(FRAMES), torch.tensor(FRAMES))
        out.loss.backward()
        found.append((out.loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


# In the interpreter it takes 20 s.
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.long)])
def test_recomputing_gelus_keeps_one_hidden_tensor_less_a_layer(impl: str) -> None:
    how = {"impl": impl, "encoder_layers": 3, "decoder_layers": 2}
    kept = {}
    for what in ("none", "gelu", "layer"):
        model = build(recompute=what, **how)
        kept[what] = count_saved(model, 2, "fp32")
    tokens = CLIP_FRAMES // 8 * 4
    visible = MAEAST.sizes_of(model, [CLIP_FRAMES]).visible
    rows = 2 * (3 * visible + tokens + (tokens - visible))  # the last decoder layer takes the masked tokens alone
    hidden = rows * model.config.ffn_dim * 4
    assert kept["none"] - kept["gelu"] == hidden
    assert kept["layer"] < kept["gelu"]


# ------------------------------------------------------------------------------------------- one graph for like batches


def aot(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile without a compiler; returns the list of graphs that it will have made."""
    graphs: list[Any] = []
    from torch._dynamo.backends.common import aot_autograd

    def keep(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    from functorch.compile import make_boxed_func

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(keep(graph, inputs)))
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


def test_compiled_updates_share_a_graph_and_equal_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = aot(monkeypatch)
    model, other = build(), build()
    update, plain = TrainStep(model, 1e-3, compile=True), TrainStep(other, 1e-3)
    for seed, frames in enumerate(([48, 17, 33], [48, 32, 9], [48, 24, 24])):
        x = features(frames, seed)
        numbers = update(x, frames, seed=seed)
        for name, number, expected in zip(numbers._fields, numbers, plain(x, frames, seed=seed), strict=True):
            assert_rounding(number, expected, name, grad=True)
    assert len(graphs) == 2, "one forward and one backward"
    assert plain.rows == plain.tokens == update.tokens
    assert update.rows >= update.tokens


@pytest.mark.ci
def test_ever_new_batches_make_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other numbers of clips, other lengths, equal clips and unequal ones: shapes become symbols, not constants."""
    graphs = aot(monkeypatch)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    update, plain = (TrainStep(build(), 1e-3, compile=compile) for compile in (True, False))
    rng = torch.Generator().manual_seed(0)
    for seed in range(14):
        clips = int(torch.randint(2, 20, (), generator=rng))
        frames = torch.randint(16, 200, (clips,), generator=rng).tolist() if seed % 2 else [16 * (3 + seed)] * clips
        x = features(frames, seed)
        assert_rounding(update(x, frames, seed=seed).loss, plain(x, frames, seed=seed).loss, f"{frames}", grad=True)
    assert len(graphs) <= 2 * 6, "forwards and backwards"


def test_buckets_cost_at_most_an_eighth() -> None:
    for frames in ([1000] * 33, [998, 400, 700, 123] * 8, [2000] * 17):
        config = MAEASTConfig.preset("patch_tiny", encoder_layers=1)
        exact = MAEAST.sizes_of(build(), frames)
        model = MAEAST(config)
        x, counts = torch.zeros(len(frames), max(frames), 1), torch.tensor(frames)
        shape = module.Shape.of(model, len(frames), max(frames), model.sizes_of(frames))
        x, padded, ids = module._pad(x, counts, torch.arange(len(frames)), shape)
        assert torch.equal(padded[: len(frames)], counts) and not padded[len(frames) :].any()
        assert len(x) == len(padded) == len(ids) <= max(len(frames) * 9 / 8, len(frames) + 1)
        assert max(frames) <= x.shape[1] <= max(frames) * 9 / 8 + 16 * config.patch_size[0]
        bucket = exact.bucket()
        assert bucket.visible + bucket.masked <= (exact.visible + exact.masked) * BUCKET_SHARE


class Recorder:
    """A stand-in for CUDA graphs: what is recorded runs only when it is replayed, on the tensors of the record."""

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
    """A TrainStep with graphs, which a CPU would be refused."""
    update = TrainStep(model, rate)
    update.bucketed, update.graphs = True, cuda_graphs.Graphs(update._update, model, update.device)
    return update


def test_graphs_take_every_input_from_the_batch_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    model, other = build(), build()
    update, plain = graphed(model), TrainStep(other, 1e-3)
    batches = [[48, 17, 33], [48, 32, 9], [90, 8], [48, 24, 24], [90, 16], [48, 17, 33]]
    first = None
    for seed, frames in enumerate(batches):
        x = features(frames, seed)
        before = x.clone()
        ids = torch.arange(len(frames)) + seed
        draw = {"lr": 1e-3 / (1 + seed), "seed": seed, "clip_ids": ids, "epoch": seed}
        numbers = update(x, frames, **draw)
        for name, number, expected in zip(numbers._fields, numbers, plain(x, frames, **draw), strict=True):
            assert_rounding(number, expected, f"update {seed}: {name}", grad=True)
        first = (x, before, numbers, [number.clone() for number in numbers]) if seed == 1 else first
    x, before, numbers, kept = first
    assert torch.equal(x, before), "a graph reads a copy"
    assert all(torch.equal(*pair) for pair in zip(numbers, kept, strict=True)), "and tells one"
    assert (recorded := recorder.recorded) == 2, recorded
    assert recorder.replayed == 4, "of each shape all but the first"
    assert recorder.waits == 2 * len(batches), "for the caller, and the caller for it"


@pytest.mark.parametrize("other", ["sizes", "clips", "frames"])
def test_a_graph_serves_its_bucket_alone(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    """Of equal shapes, batches with other numbers of rows; of other shapes, those that round up to the same."""
    recorder = Recorder(monkeypatch)
    update, plain = graphed(build()), TrainStep(build(), 1e-3)
    batches = {
        "sizes": [[200, 8, 8], [200, 200, 200], [200, 16, 8], [200, 200, 200]],
        "clips": [[16] * 17, [16] * 18],
        "frames": [[41] * 3, [47] * 3],
    }[other]
    for seed, frames in enumerate(batches):
        x = features(frames, seed)
        numbers, expected = (step(x, frames, seed=seed) for step in (update, plain))
        assert_rounding(numbers.loss, expected.loss, f"{frames}", grad=True)
        assert_rounding(numbers.grad_norm, expected.grad_norm, f"{frames}", grad=True)
    assert (recorder.recorded, recorder.replayed) == ((2, 2) if other == "sizes" else (1, 1))


def test_graphs_go_where_what_they_read_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's state by that of a checkpoint, the positions by a longer table."""
    recorder = Recorder(monkeypatch)
    update = graphed(build())
    frames = [48, 17]
    for _ in range(2):
        update(features(frames), frames)
    update.load_state_dict(copy.deepcopy(update.state_dict()))
    assert not update.graphs.known
    for _ in range(2):
        update(features(frames), frames)
    assert recorder.recorded == 2
    long = [2048 // 4 * 8 + 8]
    update(features(long), long)  # more tokens than the table has
    for _ in range(2):
        update(features(frames), frames)
    assert recorder.recorded == 3


def test_two_masks_go_through_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch)
    sizes = {"embed_dim": 32, "num_heads": 2, "layers": 1, "patch_size": (8, 8), "num_mel_bins": 32}
    config = SSASTConfig(**sizes, input_frames=56, mask_patches=20, objective="joint_two_pass")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(SSAST(config).train())
    update, plain = graphed(models[0]), TrainStep(models[1], 1e-3)
    for seed in range(3):
        x = features(FRAMES, seed)
        numbers, expected = (step(x, FRAMES, seed=seed) for step in (update, plain))
        assert_rounding(numbers.loss, expected.loss, f"update {seed}", grad=True)


def test_old_graphs_go(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "GRAPHS_KEPT", 2)
    update = graphed(build())
    for frames in ([16], [16], [160], [160], [16], [800], [16], [800], [160]):
        update(features(frames), frames)
    # Used last: 16 and 800, so that 160 goes, and begins anew.
    assert len(update.graphs.known) == 2 and (recorder.recorded, recorder.replayed) == (3, 5)


def batches_of(seconds: float, shortest: float, longest: float, draw: Callable[[random.Random], float]) -> list[Any]:
    """Frames of the clips of 3,000 batches, by the loader's buckets and budget, of recordings drawn in seconds."""
    edges = bucket_edges(round(longest * SAMPLE_RATE))
    rng, found = random.Random(0), []
    windows: list[list[int]] = [[] for _ in edges]
    while len(found) < 3000:
        rest = draw(rng)
        while rest >= shortest:
            samples = round(min(rest, longest) * SAMPLE_RATE)
            rest -= longest
            bucket = windows[bisect.bisect_left(edges, samples)]
            bucket.append(samples)
            budget = _Budget(round(seconds * SAMPLE_RATE), edges)
            for window in bucket:
                budget.add(Crop(None, 0, window))
            if budget.close_to_exceeding():
                found.append([num_frames(window) for window in bucket])
                bucket.clear()
    return found[:3000]


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
def test_graphs_of_the_loaders_batches_are_mostly_replayed(run: str) -> None:
    config, batches, at_least = RUNS[run]
    with torch.device("meta"):
        model = {MAEASTConfig: MAEAST, SSASTConfig: SSAST}[type(config)](config)
    known, recorded, replayed = cuda_graphs.GraphCache(), [], 0
    for frames in batches_of(*batches):
        shape = module.Shape.of(model, len(frames), max(frames), model.sizes_of(frames))
        count = len(recorded)
        graph = known.take(shape, lambda: recorded.append(1) or "graph")
        replayed += graph == "graph" and len(recorded) == count
    assert replayed >= at_least, f"{replayed} of 3,000 replayed, {len(recorded)} recorded, {len(known)} shapes"


@pytest.mark.ci
@pytest.mark.parametrize("objective", ["joint", "joint_two_pass"])
def test_ssast_in_buckets_equals_ssast(monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    """Its masks are laid out by the batch's width, and it has positions for no frame more than its longest clip's."""
    aot(monkeypatch)
    updates = []
    for compile in (True, False):
        torch.manual_seed(0)
        sizes = {"embed_dim": 32, "num_heads": 2, "layers": 1, "patch_size": (8, 8), "num_mel_bins": 32}
        model = SSAST(SSASTConfig(**sizes, input_frames=56, mask_patches=20, objective=objective)).to(DEVICE).train()
        updates.append(TrainStep(model, 1e-3, compile=compile))
    for seed, frames in enumerate(([55, 17, 33], [48, 8])):
        x = features(frames, seed)
        numbers, expected = (update(x, frames, seed=seed) for update in updates)
        for name, number, value in zip(numbers._fields, numbers, expected, strict=True):
            assert_rounding(number, value, name, grad=True)


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
        (lambda: TrainStep(build())(features(FRAMES), [49, 17, 33]), ["between 0 and T=48", "[49, 17, 33]"]),
        (lambda: TrainStep(build())(features(FRAMES), [48, -1, 33]), ["between 0 and T=48", "-1"]),
        (lambda: TrainStep(build())(features(FRAMES), [48, 17]), ["integers (3,)", "(2,)"]),
        (lambda: TrainStep(build())(features(FRAMES), [48.0, 17.0, 33.0]), ["integers (3,)", "float32"]),
        (lambda: TrainStep(build())(features(FRAMES), [7, 7, 0]), ["at least 2 patches of 8 frames", "[7, 7, 0]"]),
        (lambda: TrainStep(build())(features(FRAMES)[0]), ["(B, T, F)", "(48, 32)"]),
    ],
)
def test_wrong_arguments_are_errors_that_say_what_came(run: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        run()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_graph_is_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch)
    part = module.MicroBatch(features(FRAMES), FRAMES)
    with pytest.raises(ValueError, match=r"one batch of clips, got parts of \[3, 0\] clips"):
        graphed(build()).update([part, module.MicroBatch(features(FRAMES)[:0])])


def test_masks_and_buckets_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    aot(monkeypatch)
    with pytest.raises(ValueError, match="mask=None"):
        TrainStep(build(), compile=True)(features(FRAMES), FRAMES, torch.zeros(3, 24, dtype=torch.bool))


# --------------------------------------------------------------------------------------------------- lengths on a GPU


def unknown_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of lengths are treated as those on a GPU, whose values the host does not know."""
    monkeypatch.setattr(module, "_is_known", lambda lengths: not isinstance(lengths, Tensor))


def build_ssast(objective: str) -> SSAST:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "num_heads": 2, "layers": 1, "patch_size": (8, 8), "num_mel_bins": 32}
    return SSAST(SSASTConfig(**sizes, input_frames=56, mask_patches=20, objective=objective)).to(DEVICE).train()


MODELS = {
    "chunk": build,
    "random": lambda: build(masking="random"),
    "ssast": lambda: build_ssast("joint"),
    "ssast, two passes": lambda: build_ssast("joint_two_pass"),
}


def assert_same_updates(unknown: TrainStep, known: TrainStep, batches: list[list[int]]) -> None:
    """Lengths that the host does not know give the losses and the norms of those that it knows."""
    for seed, frames in enumerate(batches):
        x = features([55, *frames], seed)[1:]  # of one width
        lengths = torch.tensor(frames, device=DEVICE)
        numbers, expected = unknown(x, lengths, seed=seed), known(x, frames, seed=seed)
        for name, number, value in zip(numbers._fields, numbers, expected, strict=True):
            assert_rounding(number, value, f"{frames}: {name}", grad=True)


BATCHES = [[48, 17, 33], [0, 55, 9, 16], [55, 0, 0], [8, 8, 8], [55, 55, 55]]


@pytest.mark.parametrize("model", MODELS)
def test_lengths_on_a_gpu_change_no_loss(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    unknown_lengths(monkeypatch)
    unknown, known = TrainStep(MODELS[model](), 0.0), TrainStep(MODELS[model](), 0.0)  # each loss of the same weights
    assert_same_updates(unknown, known, BATCHES)
    assert unknown.tokens == known.tokens == known.rows
    full = MODELS[model]().sizes_of([55])
    assert unknown.rows == sum(map(len, BATCHES)) * full.max_tokens > unknown.tokens


@pytest.mark.parametrize("model", ["chunk", "ssast"])
def test_lengths_on_a_gpu_compiled_change_no_loss(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    graphs = aot(monkeypatch)
    unknown_lengths(monkeypatch)
    unknown = TrainStep(MODELS[model](), 1e-3, compile=True)
    assert_same_updates(unknown, TrainStep(MODELS[model](), 1e-3), [BATCHES[0], BATCHES[2], BATCHES[4]])
    assert len(graphs) == 2, "one forward and one backward: sizes follow from the shape"


def test_lengths_on_a_gpu_of_one_shape_make_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    unknown_lengths(monkeypatch)
    unknown = graphed(build())
    assert_same_updates(unknown, TrainStep(build(), 1e-3), [BATCHES[0], BATCHES[2], BATCHES[4]])
    assert (recorder.recorded, recorder.replayed) == (1, 2)


@pytest.mark.parametrize("model", MODELS)
def test_update_with_lengths_on_a_gpu_weighs_parts_by_masked_tokens(
    monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """A part without clips adds nothing; without one the result is the same."""
    unknown_lengths(monkeypatch)
    found = []
    for where in (list, torch.tensor):
        update = TrainStep(MODELS[model](), 1e-3)
        x = features([55, 17, 33])
        parts = [module.MicroBatch(x, where([55, 0, 33]), seed=1), module.MicroBatch(x[:1], where([17]), seed=2)]
        if where is torch.tensor:
            parts.insert(1, module.MicroBatch(x[:0]))
        found.append(update.update(parts))
    for name, number, value in zip(found[0]._fields, *found, strict=True):
        assert_rounding(value, number, name, grad=True)


def test_lengths_on_a_gpu_out_of_range_are_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown_lengths(monkeypatch)
    x = features(FRAMES)
    numbers = TrainStep(build())(x, torch.tensor([2**40, -7, 33], device=DEVICE), seed=0)
    expected = TrainStep(build())(x, [48, 0, 33], seed=0)
    for name, number, value in zip(numbers._fields, numbers, expected, strict=True):
        assert_rounding(number, value, name, grad=True)


def test_lengths_on_a_gpu_too_short_to_hide_anything_give_0(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown_lengths(monkeypatch)
    numbers = TrainStep(build())(features(FRAMES), torch.tensor([7, 0, 7], device=DEVICE))
    assert numbers.loss == 0 and numbers.grad_norm == 0
    with pytest.raises(ValueError, match=r"at least 2 patches of 8 frames.*got frames \[7, 7\]"):
        TrainStep(build())(features([7, 7]), torch.tensor([7, 3], device=DEVICE))


@pytest.mark.parametrize("shape", ["patch", "frame", "ssast"])
@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.75, 0.93])
def test_largest_sizes_hold_every_batch(shape: str, ratio: float) -> None:
    """Also a mask that hides another number than those that are drawn, where it may."""
    if shape == "ssast":
        model = build_ssast("joint")
    else:
        other = {"patch": {}, "frame": {"patch_size": (2, 32), "masking": "random"}}[shape]
        model = MAEAST(MAEASTConfig(num_mel_bins=32, mask_ratio=ratio, **{"patch_size": (8, 8), **other}, embed_dim=12))
    every = [model.sizes_of([frames]) for frames in range(56)]
    for longest in range(56):
        one = model.largest_sizes(1, longest)
        assert one.has_padding_rows
        for place in range(5):
            assert one[place] == max(sizes[place] for sizes in every[: longest + 1])
        three = model.largest_sizes(3, longest)
        assert three == one._replace(visible=3 * one.visible, masked=3 * one.masked)
        tokens = one.max_tokens
        assert model.largest_sizes(3, longest, drawn=False)[:5] == (3 * tokens, 3 * tokens, tokens, tokens, tokens)


def test_a_mask_of_any_count_fits_lengths_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host counts nothing: rows for whatever it may hide."""
    unknown_lengths(monkeypatch)
    for share in (0.1, 0.5, 0.95):
        mask = torch.rand(3, 24, generator=torch.Generator().manual_seed(0)) < share
        update = TrainStep(build())
        expected = build()(features(FRAMES), torch.tensor(FRAMES), mask.to(DEVICE)).loss.detach()
        batch = update._prepare(module.MicroBatch(features(FRAMES), torch.tensor(FRAMES, device=DEVICE)), drawn=False)
        found = update._update(batch.features, batch.lengths, mask.to(DEVICE), batch.sizes)[0]
        assert_rounding(found, expected, f"{share}")


# ---------------------------------------------------------------------------------------------------------- on a GPU

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs and waits for a GPU: needs one")
IMPLS = ["torch", "triton"]


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("impl", IMPLS)
def test_an_update_never_waits_for_the_gpu(impl: str, precision: str) -> None:
    update = TrainStep(build(impl=impl, dropout=0.1), precision=precision)
    x = features(FRAMES)
    on_host = x.cpu()
    for count in range(3):
        torch.cuda.set_sync_debug_mode("error" if count else "default")  # the first update compiles and allocates
        try:
            update(x, FRAMES, lr=1e-3, seed=count, clip_ids=torch.arange(3))
            update(on_host, FRAMES, seed=torch.tensor(count), clip_ids=[4, 0, 2])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("where", ["list", "cpu", "cuda"])
def test_update_with_lengths_anywhere_never_waits(where: str) -> None:
    update, x = TrainStep(build()), features(FRAMES)
    lengths = FRAMES if where == "list" else torch.tensor(FRAMES, device=where)
    mask = update.model.sample_mask(torch.tensor(FRAMES), max(FRAMES), seed=0)
    parts = [module.MicroBatch(x, lengths), module.MicroBatch(x[:0]), module.MicroBatch(x, lengths)]
    for count in range(3):
        torch.cuda.set_sync_debug_mode("error" if count else "default")  # the first update compiles and allocates
        try:
            update(x, lengths)
            update(x, lengths, mask)
            update.update(parts)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_models_with_lengths_on_the_host_never_wait() -> None:
    for model in (build(), build_ssast("joint")):
        x, lengths = features(FRAMES), torch.tensor(FRAMES)
        for count in range(2):
            torch.cuda.set_sync_debug_mode("error" if count else "default")
            try:
                model(x, lengths).loss.backward()
                model.encode(x, lengths)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_update_of_parts_never_waits_for_the_gpu(precision: str) -> None:
    update = TrainStep(build(dropout=0.1), precision=precision)
    parts = [
        module.MicroBatch(features(FRAMES), FRAMES, seed=1),
        module.MicroBatch(features(FRAMES)[:0]),
        module.MicroBatch(features([40])),
    ]
    for count in range(3):
        torch.cuda.set_sync_debug_mode("error" if count else "default")  # the first update compiles and allocates
        try:
            update.update(parts, lr=1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("impl", IMPLS)
def test_cuda_graphs_compute_the_same(impl: str, precision: str) -> None:
    update = TrainStep(build(impl=impl), 1e-3, precision=precision, graphs=True)
    plain = TrainStep(build(impl=impl), 1e-3, precision=precision)
    for seed, frames in enumerate(([48, 17, 33], [48, 32, 9], [90, 8], [48, 24, 24], [90, 16], [48, 17, 33])):
        x = features(frames, seed)
        numbers = update(x, frames, lr=1e-3, seed=seed)
        expected = plain(x, frames, lr=1e-3, seed=seed)
        if precision == "fp32":
            assert_rounding(numbers.loss, expected.loss, f"update {seed}", grad=True)
        else:
            assert abs(numbers.loss / expected.loss - 1) < BF16_LOSS


@needs_gpu
def test_cuda_graphs_draw_other_dropout_each_time() -> None:
    update = TrainStep(build(impl="triton", dropout=0.3), 0.0, graphs=True)
    x = features(FRAMES)
    losses = []
    for seed in (0, 0, 1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(update(x, FRAMES, seed=0).loss))
    assert losses[2] == losses[3] and len({losses[1], losses[2], losses[4]}) == 3

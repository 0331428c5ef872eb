"""What only sample_mask has; test_ops.py has the rest. Masks equal those of masking.sample_mask to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, check_compiles

from mae_ast_fast import ops
from mae_ast_fast.ops import masking
from mae_ast_fast.ops.masking import MASKING_STRATEGIES, num_visible, philox4x32

KERNEL_STRATEGIES = ("random", "chunk")
OTHER_STRATEGIES = tuple(sorted(set(MASKING_STRATEGIES) - set(KERNEL_STRATEGIES)))


def check_equal(strategy: str, num_tokens: list[int], grid_f: int, mask_ratio: float, **options) -> torch.Tensor:
    """Check that the kernel's mask equals masking.py's on the CPU, with exact counts; returns the mask."""
    on_device = torch.tensor(num_tokens, dtype=torch.int64, device=DEVICE)
    mask = ops.sample_mask(strategy, on_device, grid_f, mask_ratio, **options, impl="triton").cpu()
    expected = masking.sample_mask(strategy, num_tokens, grid_f, mask_ratio, **options)
    assert mask.dtype == torch.bool and mask.shape == expected.shape
    assert mask.sum(1).tolist() == [n - num_visible(n, mask_ratio) for n in num_tokens]
    assert torch.equal(mask, expected)
    return mask


@st.composite
def cases(draw: st.DrawFn) -> dict:
    strategy = draw(st.sampled_from(KERNEL_STRATEGIES))
    grid_f = draw(st.integers(2 if strategy == "chunk" else 1, 9))
    per_step = grid_f if strategy == "chunk" else 1
    num_tokens = [per_step * n for n in draw(st.lists(st.integers(0, 12), max_size=3))]
    return {
        "strategy": strategy,
        "num_tokens": num_tokens,
        "grid_f": grid_f,
        "mask_ratio": draw(st.floats(0.001, 0.999)),
        "seed": draw(st.integers(-(2**63), 2**64 - 1)),
        "clip_ids": [draw(st.integers(-(2**40), 2**40)) for _ in num_tokens],
        "epoch": draw(st.integers(-3, 2**33)),
        "max_tokens": max(num_tokens, default=0) + per_step * draw(st.integers(0, 3)),
    }


@pytest.mark.ci
@settings(max_examples=30, deadline=None)
@given(cases())
@example({"strategy": "random", "num_tokens": [], "grid_f": 1, "mask_ratio": 0.5, "seed": 1, "max_tokens": 4})
@example({"strategy": "random", "num_tokens": [0, 1], "grid_f": 1, "mask_ratio": 0.99, "seed": 2**63})
@example({"strategy": "chunk", "num_tokens": [0, 0], "grid_f": 8, "mask_ratio": 0.75, "seed": -1})
@example({"strategy": "chunk", "num_tokens": [40, 0, 8], "grid_f": 8, "mask_ratio": 0.75, "seed": -1, "epoch": 2**31})
def test_sample_mask_any_clips_and_seeds_match_masking(case: dict) -> None:
    check_equal(**case)


@pytest.mark.parametrize("strategy", KERNEL_STRATEGIES)
@pytest.mark.parametrize("clip", range(3))
def test_sample_mask_ten_second_clips_match_masking(strategy: str, clip: int) -> None:
    """512 tokens are the maximum of a row of the table; the three clips draw squares of the three sizes."""
    sizes = [3 + (philox4x32((0, n, 0, 4), (3, 0))[0] * 3 >> 32) for n in range(3)]
    assert sorted(sizes) == [3, 4, 5]
    check_equal(strategy, [512], 8, 0.75, seed=3, clip_ids=[clip])


@pytest.mark.parametrize(("clip", "rank", "pair"), [(21310, 17, (112, 134)), (108248, 422, (219, 271))])
def test_sample_mask_equal_words_mask_lower_token(clip: int, rank: int, pair: tuple[int, int]) -> None:
    """If two tokens of a clip draw the same word and only one of them is masked, it is the lower one."""
    words = philox4x32((torch.arange(512), clip, 0, 0), (1, 0))[0]
    assert words[pair[0]] == words[pair[1]] and (words < words[pair[0]]).sum() == rank
    for masked_of_pair, masked in ((0, [False, False]), (1, [True, False]), (2, [True, True])):
        mask = check_equal("random", [512], 1, (rank + masked_of_pair) / 512, seed=1, clip_ids=[clip])
        assert mask[0, list(pair)].tolist() == masked


@pytest.mark.parametrize("strategy", KERNEL_STRATEGIES)
def test_sample_mask_any_source_of_seed_matches_masking(strategy: str) -> None:
    """A number, a tensor, a generator and PyTorch's global generator give the masks of masking.py."""
    case = {"num_tokens": [24, 16], "grid_f": 8, "mask_ratio": 0.5}
    expected = check_equal(strategy, **case, seed=2**40 + 1)
    assert torch.equal(expected, check_equal(strategy, **case, seed=torch.tensor(2**40 + 1)))
    seed = torch.tensor(2**40 + 1, device=DEVICE)
    num_tokens = torch.tensor([24, 16], dtype=torch.int32, device=DEVICE)
    mask = ops.sample_mask(strategy, num_tokens, 8, 0.5, seed=seed, max_tokens=24, impl="triton")
    assert torch.equal(expected, mask.cpu())
    masks = []
    for sample, options in ((ops.sample_mask, {"impl": "triton"}), (masking.sample_mask, {})):
        masks.append(sample(strategy, num_tokens, 8, 0.5, generator=torch.Generator().manual_seed(5), **options))
        torch.manual_seed(6)
        masks.append(sample(strategy, num_tokens, 8, 0.5, **options))
    assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0], masks[1])


def test_sample_mask_strided_counts_and_ids_match_masking() -> None:
    num_tokens, clip_ids = torch.tensor([[40, 7], [24, 9], [8, 5]], device=DEVICE).unbind(1)
    assert num_tokens.stride(0) == 2
    mask = ops.sample_mask("chunk", num_tokens, 8, 0.5, seed=4, clip_ids=clip_ids, impl="triton")
    assert torch.equal(mask.cpu(), check_equal("chunk", [40, 24, 8], 8, 0.5, seed=4, clip_ids=[7, 9, 5]))


def test_sample_mask_writes_nothing_past_last_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    from mae_ast_fast.kernels import sample_mask as module

    num_tokens, clip_ids = torch.tensor([9, 5], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    buffer = torch.ones(18 + 600, dtype=torch.bool, device=DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape, **_: buffer[:18].view(*shape))
        mask = module.forward(
            num_tokens,
            num_tokens - 3,
            clip_ids,
            torch.tensor(8, device=DEVICE),
            epoch=0,
            grid_f=1,
            max_tokens=9,
            chunk=False,
        )
    assert mask.sum(1).tolist() == [6, 2] and buffer[18:].all()


@pytest.mark.parametrize("strategy", OTHER_STRATEGIES)
def test_sample_mask_other_strategies_need_torch(strategy: str) -> None:
    with pytest.raises(ValueError, match=f"has the strategies random and chunk, got '{strategy}': use impl='torch'"):
        ops.sample_mask(strategy, [24, 16], 8, 0.5, seed=3, impl="triton")
    expected = masking.sample_mask(strategy, [24, 16], 8, 0.5, seed=3)
    for impl in ("auto", "torch"):
        assert torch.equal(ops.sample_mask(strategy, [24, 16], 8, 0.5, seed=3, impl=impl), expected)


@pytest.mark.parametrize("strategy", KERNEL_STRATEGIES)
def test_sample_mask_auto_matches_masking(strategy: str) -> None:
    num_tokens = torch.tensor([24, 16], device=DEVICE)
    expected = masking.sample_mask(strategy, [24, 16], 8, 0.5, seed=3)
    for impl in ("auto", "torch"):
        assert torch.equal(ops.sample_mask(strategy, num_tokens, 8, 0.5, seed=3, impl=impl).cpu(), expected)


@pytest.mark.parametrize("epoch", [2**31, 2**32 - 1, -1, -(2**31)])
def test_sample_mask_every_bit_of_epoch_matters(epoch: int) -> None:
    num_tokens = torch.tensor([24, 16], device=DEVICE)
    mask, other = (ops.sample_mask("random", num_tokens, 8, 0.5, seed=3, epoch=e, impl="triton") for e in (epoch, 1))
    assert torch.equal(mask.cpu(), masking.sample_mask("random", [24, 16], 8, 0.5, seed=3, epoch=epoch))
    assert not torch.equal(mask, other)


@pytest.mark.parametrize("strategy", KERNEL_STRATEGIES)
def test_sample_mask_torch_compiles(strategy: str) -> None:
    def draw(tokens: torch.Tensor) -> torch.Tensor:
        return ops.sample_mask(strategy, tokens, 8, 0.5, seed=3, max_tokens=24, impl="torch")

    check_compiles(draw, {"tokens": torch.tensor([24, 16], device=DEVICE)})


def test_sample_mask_meta_tensors_read_nothing_back() -> None:
    """With ``max_tokens`` tensors without values are enough: nothing waits for a device."""
    num_tokens = torch.empty(3, dtype=torch.int64, device="meta")
    mask = ops.sample_mask("chunk", num_tokens, 8, 0.75, seed=3, max_tokens=64, impl="triton")
    assert mask.shape == (3, 64) and mask.dtype == torch.bool and mask.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "checker"}, "strategy must be one of random, .*, got 'checker'"),
        ({"strategy": "chunk", "grid_f": 1}, "grid_f must be >= 2 for chunk, got 1"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \(0, 1\), got 1.0"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
        ({"clip_ids": [1, 2]}, r"clip_ids must have the shape of tokens \(1,\), got \(2,\)"),
        ({"max_tokens": 9000}, "sample_mask takes rows of at most 8192 values, got 9000: use impl='torch'"),
        ({"impl": "cuda"}, "impl must be one of auto, torch, triton"),
    ],
)
def test_sample_mask_bad_input_raises(change: dict, message: str) -> None:
    inputs = {"strategy": "random", "grid_f": 1, "mask_ratio": 0.5, "seed": 1, "impl": "triton"}
    with pytest.raises(ValueError, match=message):
        ops.sample_mask(**{"tokens": torch.tensor([8], device=DEVICE), **inputs, **change})

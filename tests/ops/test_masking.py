"""Masks: counts, independence, reproducibility, and each strategy compared with a loop that adds shape after shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy import OFFICIAL_DIGITS, STANDARD_ERRORS

from mae_ast_fast.ops import masking
from mae_ast_fast.ops.masking import MASKING_STRATEGIES, num_visible, philox4x32, sample_mask

GRID_STRATEGIES = ("chunk", "chunk_official", "frequency")
all_strategies = pytest.mark.parametrize("strategy", MASKING_STRATEGIES)


def standard_error(p: float, draws: int) -> float:
    return (p * (1 - p) / draws) ** 0.5


# --- random numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_counters_give_random123_words(counter, key, expected):
    assert philox4x32(counter, key) == expected
    words = philox4x32([torch.tensor([c]) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(w.item() for w in words) == expected


def test_philox_tensors_of_any_shape_equal_integers():
    index, clip, epoch = torch.tensor([0, 1, 2**31, 2**32 - 1]), torch.tensor([[3], [2**32 - 7]]), 2**32 - 2
    words = philox4x32((index, clip, epoch, 4), (2**32 - 5, 6))
    for i, n in enumerate(index.tolist()):
        for b, c in enumerate(clip[:, 0].tolist()):
            assert tuple(w[b, i].item() for w in words) == philox4x32((n, c, epoch, 4), (2**32 - 5, 6))


def test_sample_mask_fixed_seed_gives_pinned_masks():
    # A change of these values changes every mask that is drawn with a seed.
    expected = {
        "random": "001001111000101110100101",
        "chunk": "111111110000000011001100",
        "chunk_official": "000000000011111111111100",
        "span": "111111111100000000001100",
        "time": "000011110000000011111111",
        "frequency": "011001100110011001100110",
    }
    drawn = {
        name: "".join("01"[m] for m in sample_mask(name, [24], 4, 0.5, seed=2**40 + 1, clip_ids=[5], epoch=2)[0])
        for name in MASKING_STRATEGIES
    }
    assert drawn == expected


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "mask_ratio", "visible"),
    [(80, 0.8, 15), (512, 0.6, 204), (512, 0.75, 128), (1, 0.5, 1), (0, 0.5, 0), (8, 0.999, 1), (8, 1e-17, 8)],
)
def test_num_visible_examples_give_expected_counts(tokens, mask_ratio, visible):
    assert num_visible(tokens, mask_ratio) == visible
    counts = num_visible(torch.tensor([[tokens]], dtype=torch.int32), mask_ratio)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[visible]]


@given(st.floats(0, 1, exclude_min=True, exclude_max=True), st.lists(st.integers(0, 10**6)))
def test_num_visible_tensors_truncate_as_python(mask_ratio, tokens):
    expected = [min(n, max(1, int((1 - mask_ratio) * n))) for n in tokens]
    assert num_visible(torch.tensor(tokens, dtype=torch.int64), mask_ratio).tolist() == expected
    assert [num_visible(n, mask_ratio) for n in tokens] == expected


@st.composite
def cases(draw, max_columns=12, max_batch=5):
    """(strategy, tokens, grid_f, mask_ratio, seed)"""
    strategy = draw(st.sampled_from(MASKING_STRATEGIES))
    grid_f = draw(st.integers(2 if strategy in GRID_STRATEGIES else 1, 9))
    columns = draw(st.lists(st.integers(0, max_columns), max_size=max_batch))
    mask_ratio = draw(st.floats(0.001, 0.999))
    return strategy, [n * grid_f for n in columns], grid_f, mask_ratio, draw(st.integers(-(2**63), 2**64 - 1))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_sample_mask_any_input_has_exact_counts(case):
    strategy, tokens, grid_f, mask_ratio, seed = case
    mask = sample_mask(strategy, tokens, grid_f, mask_ratio, seed=seed)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(tokens), max(tokens, default=0))
    assert mask.sum(1).tolist() == [n - num_visible(n, mask_ratio) for n in tokens]
    for row, n in zip(mask, tokens, strict=True):
        assert not row[n:].any()


@pytest.mark.parametrize("strategy", ["random", "span", "time"])
def test_sample_mask_clips_of_zero_or_one_token_stay_visible(strategy):
    mask = sample_mask(strategy, [0, 1, 2], 1, 0.99, seed=3)
    assert mask.sum(1).tolist() == [0, 0, 1]


@all_strategies
def test_sample_mask_long_clip_has_exact_count(strategy):
    assert sample_mask(strategy, [48000], 8, 0.75, seed=0).sum() == 36000


# --- dependence of a row on its inputs --------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(cases(), st.randoms(use_true_random=False), st.integers(0, 3))
def test_sample_mask_other_batch_order_or_padding_gives_same_rows(case, rng, padding):
    strategy, tokens, grid_f, mask_ratio, seed = case
    ids = [rng.randrange(2**33) for _ in tokens]
    kwargs = {"seed": seed, "epoch": 7}
    together = sample_mask(strategy, tokens, grid_f, mask_ratio, clip_ids=ids, **kwargs)
    order = rng.sample(range(len(tokens)), k=len(tokens))
    width = max(tokens, default=0) + padding * grid_f
    shuffled = sample_mask(
        strategy,
        [tokens[i] for i in order],
        grid_f,
        mask_ratio,
        clip_ids=[ids[i] for i in order],
        max_tokens=width,
        **kwargs,
    )
    assert shuffled.shape == (len(tokens), width)
    for row, i in zip(shuffled, order, strict=True):
        alone = sample_mask(strategy, tokens[i : i + 1], grid_f, mask_ratio, clip_ids=ids[i : i + 1], **kwargs)
        assert torch.equal(alone[0], together[i, : tokens[i]])
        assert torch.equal(row[: tokens[i]], together[i, : tokens[i]])
        assert not row[tokens[i] :].any()


@all_strategies
def test_sample_mask_other_seed_epoch_or_clip_changes_mask(strategy):
    def draw(seed=2**50 + 1, clip=4, epoch=2):
        return sample_mask(strategy, [512], 8, 0.4, seed=seed, clip_ids=torch.tensor([clip]), epoch=epoch)

    first = draw()
    assert torch.equal(draw(), first)
    assert torch.equal(draw(seed=torch.tensor(2**50 + 1)), first)
    assert torch.equal(draw(clip=4 + 2**32), first)
    assert torch.equal(draw(epoch=2 + 2**32), first)
    for other in (draw(seed=1), draw(seed=2**50), draw(seed=2**51 + 1), draw(epoch=3), draw(epoch=0)):
        assert not torch.equal(other, first)
    assert torch.equal(draw(clip=5), first) == (strategy == "chunk_official")


@all_strategies
def test_sample_mask_negative_seed_equals_its_64_bits(strategy):
    draws = [sample_mask(strategy, [64], 8, 0.5, seed=s) for s in (-5, 2**64 - 5, torch.tensor(-5))]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


@all_strategies
def test_sample_mask_without_clip_ids_uses_row_numbers(strategy):
    tokens = torch.tensor([64, 128, 64])
    expected = sample_mask(strategy, tokens, 8, 0.5, seed=1, clip_ids=[0, 1, 2])
    assert torch.equal(sample_mask(strategy, tokens, 8, 0.5, seed=1), expected)
    assert torch.equal(sample_mask(strategy, tokens.int(), 8, 0.5, seed=1, clip_ids=torch.arange(3).int()), expected)


@all_strategies
def test_sample_mask_generator_state_determines_mask(strategy):
    generator = torch.Generator().manual_seed(11)
    first, second = (sample_mask(strategy, [512] * 2, 8, 0.4, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    fresh = torch.Generator().manual_seed(11)
    assert torch.equal(sample_mask(strategy, [512] * 2, 8, 0.4, generator=fresh), first)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        assert torch.equal(sample_mask(strategy, [512] * 2, 8, 0.4), first)
        assert torch.equal(sample_mask(strategy, [512] * 2, 8, 0.4), second)


def test_sample_mask_generator_draws_all_64_seed_bits(monkeypatch):
    keys = []
    monkeypatch.setattr(masking, "philox4x32", lambda counter, key: keys.append(key) or philox4x32(counter, key))
    generator = torch.Generator().manual_seed(0)
    for _ in range(64):
        sample_mask("random", [8], 8, 0.5, generator=generator)
    for low_or_high in zip(*keys, strict=True):
        for bit in range(32):
            assert {word >> bit & 1 for word in low_or_high} == {0, 1}


@all_strategies
def test_sample_mask_given_width_reads_no_values(strategy):
    # The meta device has no values: any read that would wait for a GPU raises here.
    tokens = torch.empty(3, dtype=torch.int64, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    mask = sample_mask(strategy, tokens, 8, 0.75, seed=seed, clip_ids=tokens, max_tokens=64)
    assert (mask.shape, mask.dtype, mask.device.type) == ((3, 64), torch.bool, "meta")


# --- each strategy against a plain loop -------------------------------------------------------------------------------


def loop_mask(strategy, tokens, grid_f, mask_ratio, *, seed, clip, epoch):
    """Masked tokens of one clip as in the papers: shapes are added one after another."""

    def words(index, stream, word=0):
        key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        return philox4x32((torch.arange(index), torch.tensor([clip]), epoch, stream), key)[word].tolist()

    def argsort(order):
        return sorted(range(len(order)), key=order.__getitem__)

    count = tokens - num_visible(tokens, mask_ratio)
    columns = tokens // grid_f
    if strategy == "chunk_official":
        clip = 0
    size = 3 + words(1, masking._SIZE)[0] * 3 // 2**32
    covered = set()
    if strategy == "random":
        return set(argsort(words(tokens, masking._TOKEN))[:count])
    if strategy == "chunk":
        for start in argsort(words((columns + 4) * (grid_f + 4), masking._CHUNK)):
            if len(covered) >= count:
                break
            t0, f0 = start // (grid_f + 4) - 4, start % (grid_f + 4) - 4
            covered |= {
                t * grid_f + f
                for t in range(t0, t0 + size)
                for f in range(f0, f0 + size)
                if 0 <= t < columns and 0 <= f < grid_f
            }
        surplus = words((columns + 4) * (grid_f + 4), masking._CHUNK, word=1)
        kept = sorted(covered, key=lambda n: surplus[(n // grid_f + 4) * (grid_f + 4) + n % grid_f + 4])
        return set(kept[:count])
    if strategy == "chunk_official":
        for start in argsort(words(tokens, masking._SPAN)):
            if count == 0 or len(covered) > count:
                break
            square = {start + i + grid_f * j for i in range(size) for j in range(size)}
            covered |= {n for n in square if n < tokens}
        return set(sorted(covered)[:count])
    if strategy == "span":
        for start in argsort(words(tokens + 9, masking._SPAN)):
            fresh = sorted(set(range(max(0, start - 9), min(tokens, start + 1))) - covered)
            covered |= set(fresh[: count - len(covered)])
        return covered
    line = (lambda n: n // grid_f) if strategy == "time" else (lambda n: n % grid_f)
    order = words(columns if strategy == "time" else grid_f, masking._LINE)
    within = words(tokens, masking._TOKEN)
    return set(sorted(range(tokens), key=lambda n: (order[line(n)], within[n]))[:count])


@settings(max_examples=300, deadline=None)
@given(cases(max_columns=14, max_batch=4))
def test_sample_mask_any_input_equals_plain_loop(case):
    strategy, tokens, grid_f, mask_ratio, seed = case
    mask = sample_mask(strategy, tokens, grid_f, mask_ratio, seed=seed, epoch=3)
    for clip, (row, n) in enumerate(zip(mask, tokens, strict=True)):
        expected = loop_mask(strategy, n, grid_f, mask_ratio, seed=seed, clip=clip, epoch=3)
        assert set(row.nonzero()[:, 0].tolist()) == expected


@all_strategies
def test_sample_mask_ten_second_clip_equals_plain_loop(strategy):
    mask = sample_mask(strategy, [512] * 4, 8, 0.75, seed=99)
    for clip, row in enumerate(mask):
        assert set(row.nonzero()[:, 0].tolist()) == loop_mask(strategy, 512, 8, 0.75, seed=99, clip=clip, epoch=0)


# --- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["random", "chunk", "time", "frequency"])
def test_sample_mask_many_draws_mask_every_token_equally_often(strategy):
    draws, p = 4096, 0.75
    share = sum(sample_mask(strategy, [512] * 512, 8, p, seed=s).sum(0) for s in range(draws // 512)) / draws
    bound = STANDARD_ERRORS * standard_error(p, draws)
    assert (share - p).abs().max() <= bound


def test_random_mask_pairs_match_draw_without_replacement():
    draws, tokens = 4096, 32
    mask = sample_mask("random", [tokens] * draws, 8, 0.5, seed=5).double()
    p = 0.5 * (tokens / 2 - 1) / (tokens - 1)
    together = (mask.T @ mask / draws)[~torch.eye(tokens, dtype=torch.bool)]
    assert (together - p).abs().max() <= STANDARD_ERRORS * standard_error(p, draws)


def chunk_sizes(clips: int, seed: int) -> torch.Tensor:
    return 3 + (philox4x32((0, torch.arange(clips), 0, masking._SIZE), (seed, 0))[0] * 3 >> 32)


def test_chunk_sizes_many_draws_are_equally_likely():
    draws = 4096
    sizes = chunk_sizes(draws, seed=1)
    assert ((sizes >= 3) & (sizes <= 5)).all()
    for size in (3, 4, 5):
        assert abs((sizes == size).double().mean() - 1 / 3) <= STANDARD_ERRORS * standard_error(1 / 3, draws)


def test_chunk_official_many_draws_match_marginals_of_paper_code():
    # By time column, recorded from the paper's code (512 tokens, ratio 0.75). The 8 tokens of a column belong to one
    # mask, so a column's mean has at most the standard error of one token.
    draws = 4000
    masks = torch.stack([sample_mask("chunk_official", [512], 8, 0.75, seed=s)[0] for s in range(draws)])
    columns = masks.view(draws, 64, 8).double().mean((0, 2))
    expected = {0: 0.26, 1: 0.50, 2: 0.65, 3: 0.73, 32: 0.78, 62: 0.68, 63: 0.34}
    for column, p in expected.items():
        assert abs(columns[column] - p) <= STANDARD_ERRORS * standard_error(p, draws) + OFFICIAL_DIGITS, column


@given(
    st.integers(2, 9), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.floats(0.01, 0.99), st.integers(0, 9)
)
@settings(deadline=None)
def test_chunk_official_equal_lengths_share_mask_with_last_token_visible(grid_f, columns, mask_ratio, seed):
    tokens = [n * grid_f for n in columns for _ in range(2)]
    mask = sample_mask("chunk_official", tokens, grid_f, mask_ratio, seed=seed, clip_ids=range(7, 7 + len(tokens)))
    for row in range(0, len(tokens), 2):
        assert torch.equal(mask[row], mask[row + 1])
        assert not mask[row, tokens[row] - 1]


# --- structure --------------------------------------------------------------------------------------------------------


def neighbours_agree(mask: torch.Tensor) -> float:
    grid = mask.view(len(mask), 64, 8)
    return (grid[:, 1:] == grid[:, :-1]).double().mean().item()


def test_chunk_mask_neighbours_agree_more_than_random():
    draws, p = 256, 0.75
    by_chance = p * (p * 512 - 1) / 511 + (1 - p) * ((1 - p) * 512 - 1) / 511
    bound = STANDARD_ERRORS * standard_error(by_chance, draws)  # as if a clip were one draw: wide
    assert abs(neighbours_agree(sample_mask("random", [512] * draws, 8, p, seed=0)) - by_chance) <= bound
    assert neighbours_agree(sample_mask("chunk", [512] * draws, 8, p, seed=0)) > by_chance + bound


def in_mostly_masked_square(grid: torch.Tensor, size: int) -> torch.Tensor:
    """(B, 64, 8) bool: tokens in a size x size square, clipped to the grid, of which more than half is masked."""
    pool = torch.nn.functional.avg_pool2d
    grid = grid[:, None].double()
    padding = [size - 1] * 4
    padded = [torch.nn.functional.pad(x, padding) for x in (grid, torch.ones_like(grid))]
    masked, inside = (pool(x, size, stride=1) for x in padded)
    return torch.nn.functional.max_pool2d((masked > inside / 2).double(), size, stride=1)[:, 0] > 0


def test_chunk_mask_consists_of_squares():
    mask, chance = (sample_mask(name, [512] * 64, 8, 0.3, seed=4) for name in ("chunk", "random"))
    sizes = chunk_sizes(64, seed=4)
    for size in (3, 4, 5):
        for clips, squares in ((mask, True), (chance, False)):
            grid = clips[sizes == size].view(-1, 64, 8)
            outside = (grid & ~in_mostly_masked_square(grid, size)).sum((1, 2))
            # Giving back the surplus, at most size^2 - 1 tokens, leaves fewer than size^2 tokens outside a square.
            assert ((outside < size**2) == squares).all()


def runs(row: torch.Tensor) -> list[tuple[int, int]]:
    """(first, last + 1) of each run of masked tokens."""
    edges = torch.nn.functional.pad(row.int(), (1, 1)).diff()
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))


@pytest.mark.parametrize("mask_ratio", [0.1, 0.5, 0.75])
def test_span_mask_consists_of_runs_of_ten(mask_ratio):
    tokens = 400
    short = 0
    for row in sample_mask("span", [tokens] * 64, 1, mask_ratio, seed=6):
        inner = [end - begin for begin, end in runs(row) if begin > 0 and end < tokens]
        broken = [length for length in inner if length < masking.SPAN_LENGTH]
        assert len(broken) <= 1  # the last span, whose end is the surplus
        short += len(broken)
        assert max(inner) >= masking.SPAN_LENGTH
    assert short > 0  # otherwise the case above did not occur


@pytest.mark.parametrize(("strategy", "dim"), [("time", 2), ("frequency", 1)])
def test_line_mask_has_whole_lines_and_one_partial(strategy, dim):
    mask = sample_mask(strategy, [512] * 64, 8, 0.7, seed=8).view(64, 64, 8)  # 359 = 44 columns + 7 = 5 rows + 39
    num_masked = mask.sum(dim)
    full = mask.shape[dim]
    is_partial = (num_masked > 0) & (num_masked < full)
    assert is_partial.sum(1).tolist() == [1] * 64
    partial = num_masked[is_partial]
    assert (partial == 359 % full).all()
    # The tokens of the partial line are drawn, not its first ones.
    index = is_partial.nonzero()
    lines = torch.stack([mask[b].select(2 - dim, n) for b, n in index.tolist()])
    assert len({tuple(line.tolist()) for line in lines}) > 1
    assert len(set(index[:, 1].tolist())) > 1


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "chunks"}, r"strategy must be one of random, .*got 'chunks'"),
        ({"mask_ratio": 0.0}, r"mask_ratio must be in \(0, 1\), got 0.0"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \(0, 1\), got 1.0"),
        ({"mask_ratio": float("nan")}, r"mask_ratio must be in \(0, 1\), got nan"),
        ({"tokens": torch.ones(2, 1, dtype=torch.int64)}, r"tokens must be 1-D integers, got torch.int64 .*\(2, 1\)"),
        ({"tokens": torch.tensor([8.0])}, r"tokens must be 1-D integers, got torch.float32"),
        ({"tokens": torch.tensor([True])}, r"tokens must be 1-D integers, got torch.bool"),
        ({"strategy": "time", "tokens": [8, 12]}, r"tokens must be multiples of grid_f=8 and >= 0, got \[8, 12\]"),
        ({"strategy": "time", "tokens": [-8]}, r"tokens must be multiples of grid_f=8 and >= 0, got \[-8\]"),
        ({"strategy": "time", "max_tokens": 8}, r"max_tokens must be a multiple of grid_f=8 and >= 16, got 8"),
        ({"strategy": "time", "max_tokens": 20}, r"max_tokens must be a multiple of grid_f=8 and >= 16, got 20"),
        ({"clip_ids": [1, 2, 3]}, r"clip_ids must have the shape of tokens \(2,\), got \(3,\)"),
        ({"clip_ids": torch.zeros(2)}, r"clip_ids must be 1-D integers, got torch.float32"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, r"seed must be an integer or a 0-d int64 tensor, got .*\(1,\)"),
        ({"seed": torch.tensor(1.0)}, r"seed must be an integer or a 0-d int64 tensor, got torch.float32"),
        ({"seed": 2**64}, r"seed must fit 64 bits, got 18446744073709551616"),
        ({"seed": 1, "generator": torch.Generator()}, r"expected generator or seed, got both"),
        ({"grid_f": 0}, r"grid_f must be >= 1 for random, got 0"),
        *(({"strategy": s, "grid_f": 1}, rf"grid_f must be >= 2 for {s}, got 1") for s in GRID_STRATEGIES),
    ],
)
def test_sample_mask_invalid_argument_raises(changes, message):
    arguments = {"strategy": "random", "tokens": [8, 16], "grid_f": 8, "mask_ratio": 0.75, **changes}
    with pytest.raises(ValueError, match=message):
        sample_mask(**arguments)


def test_num_visible_invalid_argument_raises():
    with pytest.raises(ValueError, match=r"mask_ratio must be in \(0, 1\), got 1.5"):
        num_visible(torch.tensor([8]), 1.5)
    with pytest.raises(ValueError, match="tokens must be >= 0, got -1"):
        num_visible(-1, 0.5)


@pytest.mark.parametrize("strategy", ["random", "span", "chunk_official"])
def test_sample_mask_strategies_without_columns_take_any_count(strategy):
    mask = sample_mask(strategy, [80, 37], 8, 0.75, seed=1)
    assert mask.sum(1).tolist() == [60, 37 - num_visible(37, 0.75)] and not mask[1, 37:].any()
    with pytest.raises(ValueError, match="multiples of grid_f=8"):
        sample_mask("time", [80, 37], 8, 0.75)

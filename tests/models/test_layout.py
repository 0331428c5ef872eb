"""TokenLayout against loops over clips."""

from __future__ import annotations

import pytest
import torch

from mae_ast_fast.models.layout import TokenLayout
from mae_ast_fast.ops.packing import TokenCounts

NUM_TOKENS = [5, 0, 3, 4]
MASKED = [[0, 3], [], [0, 1, 2], []]  # the third clip has no visible token, the fourth no masked one


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    real = torch.arange(max(NUM_TOKENS)) < torch.tensor(NUM_TOKENS)[:, None]
    is_masked = torch.zeros_like(real)
    for clip, tokens in enumerate(MASKED):
        is_masked[clip, tokens] = True
    return real & ~is_masked, is_masked


def counts() -> TokenCounts:
    num_masked = [len(tokens) for tokens in MASKED]
    return TokenCounts.of([n - m for n, m in zip(NUM_TOKENS, num_masked, strict=True)], num_masked)


@pytest.mark.parametrize("num_class_tokens", [0, 2])
@pytest.mark.parametrize("padding", [False, True])
def test_layout_rows_equal_loops(num_class_tokens: int, padding: bool) -> None:
    """Each row is a class token, a visible token or a masked token, and knows where it comes from."""
    used = counts().bucket() if padding else counts()
    is_visible, is_masked = masks()
    num_frames = torch.tensor(NUM_TOKENS)
    layout = TokenLayout.of(num_frames, is_visible, is_masked, used, num_class_tokens=num_class_tokens)
    rows, visible, masked, masked_rows = [], [], [], []
    for clip, tokens in enumerate(NUM_TOKENS):
        rows += [("class", clip, i) for i in range(num_class_tokens)]
        for token in range(tokens):
            if token in MASKED[clip]:
                masked.append((clip, token))
                masked_rows.append(len(rows))
                rows.append(("masked", clip, token))
            else:
                visible.append((clip, token))
                rows.append(("visible", clip, token))
    restored = {"masked": lambda clip, token: -1, "class": lambda clip, token: clip * num_class_tokens + token}
    restored["visible"] = lambda clip, token: num_class_tokens * len(NUM_TOKENS) + visible.index((clip, token))
    expected = [restored[kind](clip, token) for kind, clip, token in rows]

    num_rows = len(layout.tokens.clip)
    assert (num_rows > len(rows)) == padding
    assert layout.ids_restore.tolist() == expected + [-1] * (num_rows - len(rows))
    assert (
        list(zip(layout.visible.clip.tolist(), layout.visible.token.tolist(), strict=True))[: len(visible)] == visible
    )
    queries = layout.query_rows
    assert queries.indices.tolist() == masked_rows + [num_rows] * (len(queries.indices) - len(masked))
    assert (
        list(zip(queries.packing.clip.tolist(), queries.packing.token.tolist(), strict=True))[: len(masked)] == masked
    )
    assert layout.has_loss.tolist() == [True, False, False, False]
    assert layout.tokens.cu_seqlens.diff().tolist() == [n + num_class_tokens for n in NUM_TOKENS]


@pytest.mark.parametrize("num_class_tokens", [0, 2])
def test_layout_unmasked_equals_one_with_an_empty_mask(num_class_tokens: int) -> None:
    real = torch.arange(max(NUM_TOKENS)) < torch.tensor(NUM_TOKENS)[:, None]
    num_frames = torch.tensor(NUM_TOKENS)
    layout = TokenLayout.unmasked(num_frames, real, NUM_TOKENS, num_class_tokens=num_class_tokens)
    expected = TokenLayout.of(
        num_frames,
        real,
        torch.zeros_like(real),
        TokenCounts.of(NUM_TOKENS, [0] * len(NUM_TOKENS)),
        num_class_tokens=num_class_tokens,
    )
    assert torch.equal(layout.ids_restore, expected.ids_restore)
    assert torch.equal(layout.mask, expected.mask) and not layout.has_loss.any()
    for name in ("tokens", "visible", "masked"):
        packing, other = getattr(layout, name), getattr(expected, name)
        assert torch.equal(packing.clip, other.clip) and torch.equal(packing.token, other.token), name
        assert torch.equal(packing.cu_seqlens, other.cu_seqlens) and packing.max_seqlen == other.max_seqlen, name


@pytest.mark.parametrize("num_class_tokens", [0, 2])
def test_layout_with_gaps_leaves_out_tokens_that_are_neither(num_class_tokens: int) -> None:
    """Visible tokens 1 and 4 and masked token 3 of five; visible 0 and masked 2 of three."""
    is_visible, is_masked = torch.zeros(2, 2, 5, dtype=torch.bool)
    is_visible[[0, 0, 1], [1, 4, 0]] = True
    is_masked[[0, 1], [3, 2]] = True
    layout = TokenLayout.of(
        torch.tensor([5, 3]),
        is_visible,
        is_masked,
        TokenCounts.of([2, 1], [1, 1]),
        num_class_tokens=num_class_tokens,
        has_gaps=True,
    )
    c = num_class_tokens
    class_tokens = list(range(c))
    assert layout.tokens.clip.tolist() == [0] * (c + 3) + [1] * (c + 2)
    expected = [*class_tokens, 1 + c, 3 + c, 4 + c, *class_tokens, 0 + c, 2 + c]
    assert layout.tokens.token.tolist() == expected
    first = 2 * c  # the class tokens of both clips precede the visible tokens
    expected = [*class_tokens, first, -1, first + 1, *(c + i for i in class_tokens), first + 2, -1]
    assert layout.ids_restore.tolist() == expected
    assert layout.query_rows.indices.tolist() == [c + 1, 2 * c + 4]

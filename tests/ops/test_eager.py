"""eager.py and attention/cpu.py against reference.py, as the kernels are: what impl="torch" and a CPU run.

Operations on clips, dropout and recomputation; test_ops.py has the row maths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, compare, cu_seqlens, randn, results_and_gradients
from kernel_checks import inputs as make_inputs
from torch import Tensor

from mae_ast_fast import ops
from mae_ast_fast.ops import reference
from mae_ast_fast.ops.attention import attention, cross_attention
from mae_ast_fast.ops.cases import op_cases
from mae_ast_fast.ops.dropout import drop
from mae_ast_fast.ops.packing import PaddedView, cumulative, similar_clips

CLIPS = {
    "equal": [6, 6, 6],
    "mixed": [13, 17, 4, 12],
    "empty clips": [0, 3, 0, 0, 7, 1, 0],
    "as many rows as padded ones": [5, 7, 4],  # with the five padding rows: 3 * 7 = 16 + 5
    "one row": [1],
    "very mixed": [2] * 9 + [0, 40, 3],
}
BACKENDS = ("math", "clips") if DEVICE.type == "cpu" else ("math",)
WEIGHTS = ("w1", "b1", "w2")
DROPOUT_SHAPES = {
    "scatter_tokens": ([0, 1, 1, 0, 0, 1, 0] * 6, 33),
    "add_layer_norm": (70, 33),
    "bias_gelu": (70, 33),
    "feed_forward": (70, 32, 48),
}

each_dtype = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
each_clips = pytest.mark.parametrize("clip_rows", CLIPS.values(), ids=CLIPS.keys())
each_padding = pytest.mark.parametrize("padding_rows", [0, 5], ids=["exact", "padding rows"])


def with_padding(x: Tensor, padding_rows: int) -> Tensor:
    """``x`` and rows of NaN past the last clip."""
    return torch.cat((x, x.new_full((padding_rows, *x.shape[1:]), float("nan"))))


def row_inputs(name: str, shape: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    return make_inputs(op_cases()[name], shape, dtype)


check = partial(compare, capped=False)  # eager.py rounds where the reference does


def check_clips(
    eager: Callable[..., Any],
    specified: Callable[..., Any],
    inputs: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    rows: int,
    padding_rows: int,
) -> None:
    """Check the first ``rows`` results, those of clips, and all gradients: padding rows get none.

    Args:
        eager: Function under test; takes the inputs by name.
        specified: The same function in reference.py.
        inputs: Differentiable tensors.
        dtype: Dtype of the inputs.
        rows: Rows of all clips in the results.
        padding_rows: Rows past the last clip in each input.
    """

    def of_clips(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        def call(**inputs: Tensor) -> tuple[Tensor, ...]:
            outputs = function(**inputs)
            return tuple(x[:rows] for x in (outputs if isinstance(outputs, tuple) else (outputs,)))

        return call

    check(of_clips(eager), of_clips(specified), inputs, list(inputs), dtype=dtype, dot=True)
    if padding_rows:
        gradients = results_and_gradients(of_clips(eager), inputs, list(inputs))
        for name, x in inputs.items():
            assert not gradients[f"gradient of {name}"][len(x) - padding_rows :].any(), name


# ---------------------------------------------------------------------------------------------------- clips together


def test_similar_clips_only_very_unequal_lengths_are_grouped() -> None:
    """The tests below run padded clips of equal and of unequal lengths, and groups."""
    groups = {name: similar_clips(cu_seqlens(rows).cpu(), max(rows), sum(rows)) for name, rows in CLIPS.items()}
    assert [clips.tolist() for clips in groups.pop("empty clips") or []] == [[5], [1], [4]]
    assert [clips.tolist() for clips in groups.pop("very mixed") or []] == [[*range(9), 11], [10]]
    assert set(groups.values()) == {None}


@each_padding
@each_dtype
@each_clips
@pytest.mark.parametrize("over", ["targets", "predictions"])
def test_info_nce_values_and_gradients_match_reference(
    *, clip_rows: list[int], dtype: torch.dtype, over: str, padding_rows: int
) -> None:
    rows, cu = sum(clip_rows), cu_seqlens(clip_rows)
    checked = {"dtype": dtype, "rows": rows, "padding_rows": padding_rows}
    prediction, target = randn(rows, 24, seed=1) / 3, randn(rows, 24, seed=2)
    inputs = {"prediction": prediction.to(dtype), "target": target.to(dtype)}
    inputs = {name: with_padding(x, padding_rows) for name, x in inputs.items()}
    lengths = {"cu_seqlens": cu, "max_seqlen": max(clip_rows), "exact": not padding_rows}
    eager = partial(ops.info_nce, **lengths, over=over, impl="torch")
    check_clips(eager, partial(reference.info_nce, cu_seqlens=cu, over=over), inputs, **checked)


@each_padding
@each_dtype
@each_clips
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_values_and_gradients_match_reference(
    *, clip_rows: list[int], dtype: torch.dtype, backend: str, padding_rows: int
) -> None:
    rows, cu = sum(clip_rows), cu_seqlens(clip_rows)
    checked = {"dtype": dtype, "rows": rows, "padding_rows": padding_rows}
    inputs = {"qkv": with_padding(randn(rows, 3, 2, 8, dtype=dtype), padding_rows)}
    lengths = {"cu_seqlens": cu, "max_seqlen": max(clip_rows), "exact": not padding_rows}
    eager = partial(attention, **lengths, backend=backend)
    check_clips(eager, partial(reference.attention, cu_seqlens=cu), inputs, **checked)


@each_padding
@each_dtype
@each_clips
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_attention_values_and_gradients_match_reference(
    *, clip_rows: list[int], dtype: torch.dtype, backend: str, padding_rows: int
) -> None:
    clip_queries = [rows if clip % 3 == 0 else rows // 2 for clip, rows in enumerate(clip_rows)]
    rows, boundaries = sum(clip_queries), {"cu_q": cu_seqlens(clip_queries), "cu_kv": cu_seqlens(clip_rows)}
    checked = {"dtype": dtype, "rows": rows, "padding_rows": padding_rows}
    inputs = {
        "q": with_padding(randn(rows, 2, 8, seed=1, dtype=dtype), padding_rows),
        "kv": with_padding(randn(sum(clip_rows), 2, 2, 8, seed=2, dtype=dtype), padding_rows),
    }
    longest = {"max_q": max(clip_queries), "max_kv": max(clip_rows), "exact": not padding_rows}
    eager = partial(cross_attention, **boundaries, **longest, backend=backend)
    check_clips(eager, partial(reference.cross_attention, **boundaries), inputs, **checked)


@each_dtype
@each_clips
def test_short_attention_values_and_gradients_match_reference(clip_rows: list[int], dtype: torch.dtype) -> None:
    inputs, cu = {"qkv": randn(sum(clip_rows), 3, 2, 8, dtype=dtype)}, cu_seqlens(clip_rows)
    eager = partial(ops.short_attention, cu_seqlens=cu, max_seqlen=max(clip_rows), impl="torch")
    check(eager, partial(reference.attention, cu_seqlens=cu), inputs, ["qkv"], dtype=dtype, dot=True)


@pytest.mark.parametrize("clip_rows", [*CLIPS.values(), [2, 0], [0, 1]])
def test_padded_view_pad_then_unpad_returns_rows(clip_rows: list[int]) -> None:
    longest, x = max(clip_rows), randn(sum(clip_rows), 2, 3).cpu()
    pad = PaddedView(cumulative(torch.tensor(clip_rows)), longest, len(x))
    padded = pad.pad(x)
    assert padded.shape == (len(clip_rows), longest, 2, 3)
    first = 0
    for clip, count in enumerate(clip_rows):
        assert torch.equal(padded[clip, :count], x[first : first + count])
        assert not padded[clip, count:].any()
        assert pad.valid[clip].tolist() == [index < count for index in range(longest)]
        assert pad.key_valid[clip].tolist() == [index < max(count, 1) for index in range(longest)]
        first += count
    assert torch.equal(pad.unpad(padded), x)
    row_in_clip = pad.unpad(torch.arange(longest))
    assert row_in_clip.tolist() == [index for count in clip_rows for index in range(count)]


# ---------------------------------------------------------------------------------------------------------- row maths


@each_dtype
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_feed_forward_values_and_gradients_match_reference(rows: int, dtype: torch.dtype, recompute: bool) -> None:
    inputs, eager = (
        row_inputs("feed_forward", (rows, 32, 48), dtype),
        partial(ops.feed_forward, recompute=recompute, impl="torch"),
    )
    check(eager, reference.feed_forward, inputs, list(inputs), dtype=dtype, summed=WEIGHTS, dot=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feed_forward_recompute_fp32_weights_is_bit_equal(dtype: torch.dtype) -> None:
    inputs, results = row_inputs("feed_forward", (33, 32, 48), dtype), []
    for recompute in (False, True):
        eager = partial(ops.feed_forward, recompute=recompute, impl="torch")
        results.append(results_and_gradients(eager, inputs, list(inputs)))
    assert [x.dtype for x in results[0].values()] == [dtype, dtype, *[torch.float32] * 3]
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())


# ------------------------------------------------------------------------------------------------------------ dropout


@pytest.fixture
def same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """``F.dropout`` is ``drop`` in reference.py, so that one seed gives both implementations the same mask."""
    monkeypatch.setattr(reference, "F", SimpleNamespace(**(vars(reference.F) | {"dropout": drop})))


def seeded(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """``function`` with dropout, whose masks are drawn from one seed in every call."""

    def call(**inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return function(**inputs, **options, dropout=0.3)

    return call


@each_dtype
@pytest.mark.parametrize("name", DROPOUT_SHAPES)
@pytest.mark.usefixtures("same_dropout")
def test_dropout_of_row_operation_matches_reference(name: str, dtype: torch.dtype) -> None:
    inputs = row_inputs(name, DROPOUT_SHAPES[name], dtype)
    eager, specified = seeded(getattr(ops, name), impl="torch"), seeded(getattr(reference, name))
    without = results_and_gradients(getattr(reference, name), inputs, [])
    assert not torch.equal(specified(**inputs), without["output 0"])
    case = op_cases()[name]
    check(eager, specified, inputs, case.differentiable, dtype=dtype, summed=case.summed, dot=case.dot)


@each_dtype
@pytest.mark.parametrize(
    "function",
    [partial(attention, backend="math"), partial(ops.short_attention, impl="torch")],
    ids=["attention", "short_attention"],
)
@pytest.mark.usefixtures("same_dropout")
def test_dropout_of_attention_matches_reference(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """On a CPU, for clips of one length: the masks of all clips are then one sequence of random words."""
    inputs, cu = {"qkv": randn(24, 3, 2, 8, dtype=dtype).cpu()}, cu_seqlens([8, 8, 8]).cpu()
    eager = seeded(function, cu_seqlens=cu, max_seqlen=8)
    check(eager, seeded(reference.attention, cu_seqlens=cu), inputs, ["qkv"], dtype=dtype, dot=True)

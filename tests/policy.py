"""Every tolerance of the test suite, by name. No number of this kind stands in a test file.

Relaxing one is a commit of its own, with the measurement that makes it necessary.
"""

from __future__ import annotations

import torch

GOLDEN = 1e-5  # max|a - b| / max|b| per tensor, against tensors recorded from the paper's own code
GOLDEN_ZERO = 1e-6  # max|a| where the recorded value is 0 or rounding noise around 0
FBANK_ABS = 1e-3  # log-mel, absolute, against torchaudio.compliance.kaldi.fbank in fp32 on CPU
ROUNDING = 2e-6  # max|a - b| / max|b|: one computation in another order or shape, fp32
ROUNDING_GRAD = 2e-5  # the same for gradients summed over all tokens of a batch

BF16_LOSS = 2e-3  # one step in bf16, same mask, dropout 0: loss relative to fp32
HALF_FEATURES = 1e-2  # half-precision weights of a tiny model against fp32, max|a - b| / max|b|
PERFECT_MSE = 1e-12  # of a prediction that is the target, up to rounding

# Masks. A frequency estimated from N independent draws of probability p has the standard error sqrt(p (1 - p) / N);
# beyond 6 of them lies 2e-9 of a normal distribution, 1e-6 for the 512 tokens of a clip together.
STANDARD_ERRORS = 6.0
OFFICIAL_DIGITS = 0.005  # half a unit of the two digits to which the official marginals are recorded

# Audio files.
TONE_HZ = 1.0  # a tone of a second or more keeps its frequency (bins are 0.5 Hz apart)
CODEC_RMS = 0.05  # root mean square of a 0.3 tone: lossy codecs and their edges
CODEC_SECONDS = 0.15  # padding that lossy codecs leave at the ends
RESAMPLE_ABS = 1e-5  # in blocks against in one piece
PADDING_SHARE = 0.05  # padded share of batches of 160 s, lengths uniform in 0.3 - 10 s


def max_rel(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max|a - b| / max|b| in fp64; infinite on another shape or on any NaN."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    actual, expected = actual.detach().double(), expected.detach().double()
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    difference = (actual - expected).abs().max().item()
    return difference / max(expected.abs().max().item(), 1e-300) if difference else 0.0


def _check(actual: torch.Tensor, expected: torch.Tensor, bound: float, name: str) -> None:
    error = max_rel(actual, expected)
    assert error <= bound, f"{name}: max|a - b| / max|b| = {error:.3g}, allowed {bound:.3g}"


def assert_golden(actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor") -> None:
    """Against a tensor recorded from the paper's code."""
    _check(actual, expected, GOLDEN, name)


def assert_golden_zero(actual: torch.Tensor, name: str = "tensor") -> None:
    """Where the recorded tensor is rounding noise around 0."""
    error = actual.detach().double().abs().max().item()
    assert error <= GOLDEN_ZERO, f"{name}: max|a| = {error:.3g}, allowed {GOLDEN_ZERO:.3g}"


def assert_rounding(actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor", grad: bool = False) -> None:
    """The same fp32 computation in another order or another shape."""
    _check(actual, expected, ROUNDING_GRAD if grad else ROUNDING, name)


def assert_fbank(actual: torch.Tensor, expected: torch.Tensor, name: str = "fbank") -> None:
    """Log-mel against Kaldi's, absolute."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    assert error <= FBANK_ABS, f"{name}: max|a - b| = {error:.3g}, allowed {FBANK_ABS:.3g}"

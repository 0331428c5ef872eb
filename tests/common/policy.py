"""Every tolerance of the test suite, by name. Test files contain no tolerances of their own.

Those of kernels, with the rule that they belong to, are in mae_ast_fast/ops/policy.py. Relaxing one is a commit of its
own, with the measurement that makes it necessary.
"""

from __future__ import annotations

import torch

from mae_ast_fast.ops.policy import ROUNDING_FP64, assert_close, assert_kernel, max_rel  # noqa: F401 - for tests

GOLDEN = 1e-5  # max|a - b| / max|b| per tensor, against tensors recorded from the paper's own code
GOLDEN_ZERO = 1e-6  # max|a| where the recorded value is 0 or rounding noise around 0
FBANK_ABS = 1e-3  # log-mel, absolute, against torchaudio.compliance.kaldi.fbank in fp32 on CPU
ESSENTIA_LOG_MEL = {"rtol": 0.0, "atol": 1e-4}  # log10 of a mel spectrum, against Essentia's in fp32
LIBROSA_MEL = {"rtol": 0.0, "atol": 1e-5}  # a mel spectrum below 2, against librosa's in fp32
ROUNDING = 2e-6  # max|a - b| / max|b|: one computation in another order or shape, fp32
ROUNDING_GRAD = 2e-5  # like ROUNDING, for gradients summed over all tokens of a batch

ONE_STEP = 1e-5  # loss of one step, impl triton against torch, fp32, same mask, dropout 0
FIFTY_STEPS = 1e-4  # like ONE_STEP, for each loss of 50 steps
DIRECTIONAL = 1e-2  # relative: slope of the loss along the gradient, from two fp32 evaluations
PROCESSES = 1e-5  # metrics of 20 updates: N processes, micro-batches and one batch, fp32; max|a - b| / max|b|
PROCESSES_WEIGHTS = 1e-4  # weights after these updates: AdamW makes full steps from small gradients
BF16_LOSS = 2e-3  # one step in bf16, same mask, dropout 0: loss relative to fp32
GRAD_NORM = {"fp32": 1e-4, "bf16": 2e-2}  # like BF16_LOSS, for the gradient norm, with the layers' weights scaled up
CONVERGED_FIRST = 1e-5  # 20 updates, fast against reference, fp32: mean relative distance of the losses
CONVERGED_LAST = 2e-2  # mean loss of the last 20 of 200 updates: by then rounding alone has separated the runs
MUON = 1e-2  # updates of a matrix, ours against torch.optim.Muon's, both in bf16: rms of the difference over rms
LOGISTIC_GRADIENT = 1e-4  # absolute: gradient of the mean loss of a logistic regression at its optimum
PROBABILITY = 1e-4  # absolute: a clip alone against in a batch, through a norm that divides by small deviations
HALF_PROBABILITY = 5e-3  # absolute: a head trained on features in fp16, applied to features in fp32
# A tiny model in half precision against fp32, max|a - b| / max|b|. Largest of 400 random models and batches with
# impl="torch": 0.0033 in fp16, 0.0206 in bf16 (median 0.011). Largest of 24 with the kernels: 0.0026 and 0.0155.
HALF_FEATURES = {torch.float16: 1e-2, torch.bfloat16: 2.5e-2}
ATTENTION_EPS = 4  # probabilities and output are rounded once each: max|a - b| / max|b| in units of the dtype's eps
INT8 = 5e-2  # dynamic quantisation of every Linear of a tiny model: max|a - b| / max|b| (measured: 1.1e-2 to 2.2e-2)
PERFECT_MSE = 1e-12  # loss of a prediction that equals the target up to rounding

# Masks. A frequency estimated from N independent draws of probability p has the standard error sqrt(p (1 - p) / N).
# A normal distribution exceeds 6 standard errors with probability 2e-9, or 1e-6 for the 512 tokens of a clip together.
STANDARD_ERRORS = 6.0
OFFICIAL_DIGITS = 0.005  # half a unit of the two digits to which the official marginals are recorded

# Audio files.
TONE_HZ = 1.0  # frequency error of a tone of 1 s or longer (bins are 0.5 Hz apart)
CODEC_RMS = 0.05  # root mean square error on a tone of amplitude 0.3, for lossy codecs and their edges
CODEC_SECONDS = 0.15  # padding that lossy codecs add at the ends, in seconds
RESAMPLE_ABS = 1e-5  # absolute: resampled in blocks against resampled at once
BUCKET_SHARE = 9 / 8 + 0.05  # rows of a rounded-up batch over its real rows: an eighth more, or 15 in small batches
PADDING_SHARE = 0.05  # padded share of batches of 160 s, clips uniform in 0.3 - 10 s

# Memory.
DECODER_BYTES = 128 << 20  # more than for a short file, for any header and any length
RSS_GROWTH = 8 << 20  # bytes, by a line fitted to the measurements from the end of the warm-up to the end of the run


def assert_golden(actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor") -> None:
    """Assert that a tensor equals one recorded from the paper's code."""
    assert_close(actual, expected, GOLDEN, name)


def assert_golden_zero(actual: torch.Tensor, name: str = "tensor") -> None:
    """Assert that a tensor is 0 where the recorded one is rounding noise around 0."""
    error = actual.detach().double().abs().max().item()
    assert error <= GOLDEN_ZERO, f"{name}: max|a| = {error:.3g}, allowed {GOLDEN_ZERO:.3g}"


def assert_rounding(actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor", grad: bool = False) -> None:
    """Assert that two tensors come from one fp32 computation in another order or shape."""
    assert_close(actual, expected, ROUNDING_GRAD if grad else ROUNDING, name)


def assert_rounding_fp64(actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor") -> None:
    """Assert that two tensors come from one fp64 computation in another order or shape, without a step in fp32."""
    assert_close(actual, expected, ROUNDING_FP64, name)


def assert_quantised(actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor") -> None:
    """Assert that a result with int8 weights is near the fp32 one."""
    assert_close(actual, expected, INT8, name)


def assert_fbank(actual: torch.Tensor, expected: torch.Tensor, name: str = "fbank") -> None:
    """Assert that a log-mel spectrogram is near Kaldi's; the tolerance is absolute."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    assert error <= FBANK_ABS, f"{name}: max|a - b| = {error:.3g}, allowed {FBANK_ABS:.3g}"

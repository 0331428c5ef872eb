"""Log-mel filter banks of a batch of waveforms, equal to ``torchaudio.compliance.kaldi.fbank`` of each clip.

Only real frames are computed: the frames of all clips are packed, processed in chunks and scattered into the padded
output. The features of a clip therefore depend neither on its padding nor on the other clips.
"""

from __future__ import annotations

import functools
import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any, overload

import torch

from ..devices import send

SAMPLE_RATE = 16000
WINDOW = 400  # samples, 25 ms
HOP = 160  # samples, 10 ms
NUM_MEL_BINS = 128

_FFT = 512
_PREEMPHASIS = 0.97
_FLOOR = torch.finfo(torch.float32).eps  # as in Kaldi, for every dtype
_FRONTENDS = {"mae_ast": 0.85, "ssast": 1.0}  # exponent of the Hann window: 0.85 is Kaldi's povey window
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int16)
# A mel bin covers few FFT bins, so the matrix product runs in blocks of mel bins over the FFT bins that they cover: a
# quarter of the arithmetic in less than half the time. Blocks of 8 are slower again.
_MEL_BLOCK = 16
_MAX_PEAK = 30.0  # of floats: more than decoders overshoot, and than speech of unit variance has
_SEEN_DEVICES: set[torch.device] = set()  # GPUs whose first waveforms were looked at
_ROW_MULTIPLE = 64  # for leftover rows BLAS uses other kernels, which round differently


@overload
def num_frames(samples: int) -> int: ...
@overload
def num_frames(samples: torch.Tensor) -> torch.Tensor: ...
def num_frames(samples: int | torch.Tensor) -> int | torch.Tensor:
    """Frames that fit entirely into ``samples`` samples at 16 kHz (Kaldi's ``snip_edges``): 0 below 25 ms."""
    frames = (samples - WINDOW) // HOP + 1
    return frames.clamp(min=0) if isinstance(frames, torch.Tensor) else max(frames, 0)


def frames_to_samples(frames: int) -> int:
    """Samples at 16 kHz that ``frames`` frames cover, at least 1: the fewest whose ``num_frames`` is ``frames``."""
    return (frames - 1) * HOP + WINDOW


def pad_clips(clips: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Waveforms (B, S) of several clips, padded with zeros, and the samples of each clip.

    Args:
        clips: (S,) each, at least one, as ``fbank`` takes them, on one device. Clips of one dtype keep it. Otherwise
            all become fp32, or fp64 if one is, and int16 is scaled to [-1, 1).

    Raises:
        ValueError: A shape or dtype is not as described, or the devices differ.
    """
    if not clips or any(clip.dim() != 1 for clip in clips):
        raise ValueError(f"clips must be at least one tensor (S,), got {[tuple(clip.shape) for clip in clips]}")
    if wrong := [clip.dtype for clip in clips if clip.dtype not in _DTYPES]:
        raise ValueError(f"clips must be of a floating dtype or int16, got {wrong[0]}")
    if len(devices := sorted({str(clip.device) for clip in clips})) > 1:
        raise ValueError(f"clips must be on one device, got {' and '.join(devices)}")
    if len({clip.dtype for clip in clips}) > 1:
        dtype = torch.float64 if any(clip.dtype == torch.float64 for clip in clips) else torch.float32
        clips = [_to_float(clip).to(dtype) for clip in clips]
    return torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True), [len(clip) for clip in clips]


@torch.no_grad()
def fbank(
    waveforms: torch.Tensor | Sequence[torch.Tensor],
    lengths: torch.Tensor | Sequence[int] | None = None,
    sample_rate: int = SAMPLE_RATE,
    frontend: str = "mae_ast",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-mel filter banks: 128 bins from 20 Hz to 8 kHz, windows of 25 ms every 10 ms, natural log, not normalised.

    The result has no gradient. Lengths on a GPU cost one synchronisation, because the shape of the output depends on
    them; other lengths cost none. The first call on a GPU waits for its constants.

    Args:
        waveforms: (B, S) mono samples in [-1, 1], floating point, or int16 PCM, which is divided by 32768. Arithmetic
            is in fp32, or in fp64 for fp64 samples. Or a list of clips (S,) of any lengths, each scaled by its own
            dtype. Floats far beyond [-1, 1] are used as they are, with one warning (on a GPU the first call looks).
        lengths: (B,) samples of each clip, integers in 0..S. None: S for all clips. Samples past the length of a clip
            do not change any result. A clip of less than 400 samples (25 ms) has no frames. None for a list of clips.
        sample_rate: Sample rate of ``waveforms`` in Hz. Other rates than 16000 are resampled by
            ``torchaudio.functional.resample``, clip by clip, in fp64 on CUDA.
        frontend: ``"mae_ast"`` is ``kaldi.fbank(sample_frequency=16000, use_energy=False, num_mel_bins=128)`` (arXiv
            2203.16691, official code). ``"ssast"`` adds ``htk_compat=True, window_type="hanning"`` and first subtracts
            the mean of each clip from its samples (arXiv 2110.09784, official code).

    Returns:
        Log-mel (B, T, 128) in fp32 (fp64 for fp64 samples) on the device of ``waveforms``, with T the frames of the
        longest clip and 0.0 in the rows past the last frame of a clip; and the frames of each clip (B,), int64, on the
        device of ``lengths``. For ``lengths`` None or a list the frames are on the CPU, so that models can read them
        without waiting for a GPU.

    Raises:
        ValueError: A shape, dtype, length, rate or name is not as described.
        ImportError: Resampling is needed and torchaudio is not installed.
    """
    waveforms, lengths = _as_batch(waveforms, lengths)
    frames_device = lengths.device if isinstance(lengths, torch.Tensor) else torch.device("cpu")
    num_samples = _check(waveforms, lengths, sample_rate, frontend)
    _check_scale(waveforms, num_samples)
    with torch.autocast(waveforms.device.type, enabled=False):
        if sample_rate != SAMPLE_RATE and waveforms.numel():
            waveforms, num_samples = _resample(waveforms, num_samples, int(sample_rate))
        log_mel, frames = _packed_fbank(waveforms.contiguous(), num_samples, frontend)
    return log_mel, send(frames, frames_device)


def _as_batch(
    waveforms: Any, lengths: torch.Tensor | Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor | Sequence[int] | None]:
    """A list of clips as a padded batch and its lengths. Anything else is returned as it is, to be checked."""
    is_list = isinstance(waveforms, list | tuple) and all(isinstance(clip, torch.Tensor) for clip in waveforms)
    if not is_list or not waveforms:
        return waveforms, lengths
    if lengths is not None:
        raise ValueError("lengths must be None for a list of clips, which have their own")
    return pad_clips(waveforms)


def _check(
    waveforms: Any, lengths: torch.Tensor | Sequence[int] | None, sample_rate: int, frontend: str
) -> torch.Tensor:
    """Check the arguments of ``fbank`` and return the samples of each clip (B,), int64 on the CPU."""
    if not isinstance(waveforms, torch.Tensor) or waveforms.dtype not in _DTYPES:
        got = waveforms.dtype if isinstance(waveforms, torch.Tensor) else type(waveforms).__name__
        raise ValueError(f"waveforms must be a tensor, or a list of tensors, of a floating dtype or int16, got {got}")
    if waveforms.dim() == 1:
        raise ValueError(
            f"waveforms must be (B, S), got a 1-D tensor of shape {tuple(waveforms.shape)}: "
            "add a batch dimension, waveforms[None]"
        )
    if waveforms.dim() != 2:
        raise ValueError(f"waveforms must be (B, S), mono, got shape {tuple(waveforms.shape)}")
    if not isinstance(sample_rate, numbers.Integral) or isinstance(sample_rate, bool) or sample_rate < 1:
        raise ValueError(f"sample_rate must be a positive integer in Hz, got {sample_rate!r}")
    if frontend not in _FRONTENDS:
        raise ValueError(f"frontend must be one of {', '.join(_FRONTENDS)}, got {frontend!r}")
    batch, longest = waveforms.shape
    if lengths is None:
        return torch.full((batch,), longest, device="cpu")
    num_samples = lengths if isinstance(lengths, torch.Tensor) else torch.as_tensor(lengths, device="cpu")
    if num_samples.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), one for each clip, got {tuple(num_samples.shape)}")
    integers = not (num_samples.is_floating_point() or num_samples.is_complex() or num_samples.dtype == torch.bool)
    if batch and not integers:  # an empty list makes a float tensor
        raise ValueError(f"lengths must be integers, in samples, got {num_samples.dtype}")
    num_samples = num_samples.to("cpu", torch.int64)
    if ((num_samples < 0) | (num_samples > longest)).any():
        raise ValueError(
            f"lengths must lie in 0..{longest}, the samples of waveforms, "
            f"got {num_samples.min().item()} to {num_samples.max().item()}"
        )
    return num_samples


def _check_scale(waveforms: torch.Tensor, num_samples: torch.Tensor) -> None:
    """Warn once of floats that are on the scale of integers: all log-mel values are then about 21 too high."""
    device = waveforms.device
    is_looked_at = device.type == "cpu" or (device.type == "cuda" and device not in _SEEN_DEVICES)
    if not is_looked_at or waveforms.dtype == torch.int16 or _warn_of_scale.cache_info().currsize:
        return
    _SEEN_DEVICES.add(device)
    # Only real samples: those past a clip's length may be anything.
    peaks = [torch.stack(clip.aminmax()).abs().max() for clip in _split(waveforms, num_samples) if len(clip)]
    if peaks and _MAX_PEAK < (peak := float(torch.stack(peaks).max())) < math.inf:
        _warn_of_scale(peak)


@functools.lru_cache(maxsize=1)
def _warn_of_scale(peak: float) -> None:
    warnings.warn(
        f"waveforms reach {peak:.6g}, but floats are taken as samples in [-1, 1]: divide samples on the scale of int16 "
        "by 32768, or pass them as int16",
        stacklevel=5,
    )


def _resample(
    waveforms: torch.Tensor, num_samples: torch.Tensor, sample_rate: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms and samples of each clip at 16 kHz."""
    try:
        from torchaudio.functional import resample
    except ImportError as error:
        raise ImportError(
            f"resampling from {sample_rate} Hz to {SAMPLE_RATE} Hz needs torchaudio: "
            'pip install "mae-ast-fast[train]", or pass waveforms of 16 kHz'
        ) from error
    # Clip by clip, because torchaudio's filter rounds a batch differently from a single clip, which changes the weakest
    # bins by more than 1e-3. On a CPU it is also faster: 1.1 to 6 times with 64 clips of 10 s and one thread.
    clips = [_to_float(clip) for clip in _split(waveforms, num_samples)]
    dtype = clips[0].dtype
    if waveforms.is_cuda:  # by default cuDNN filters fp32 in TF32, a noise 60 dB below the signal
        clips = [clip.double() for clip in clips]
    clips = [resample(clip, sample_rate, SAMPLE_RATE).to(dtype) if len(clip) else clip.to(dtype) for clip in clips]
    num_samples = torch.tensor([len(clip) for clip in clips], device="cpu")
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), num_samples


def _split(waveforms: torch.Tensor, num_samples: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of the samples of each clip, without padding."""
    sizes = torch.stack([num_samples, waveforms.shape[1] - num_samples], dim=1).flatten().tolist()
    return waveforms.contiguous().view(-1).split(sizes)[::2]


def _to_float(samples: torch.Tensor) -> torch.Tensor:
    """Samples in fp64 for fp64, otherwise in fp32; int16 is scaled to [-1, 1)."""
    if samples.dtype == torch.int16:
        return samples.float().mul_(1 / 32768)
    return samples if samples.dtype == torch.float64 else samples.float()


def _packed_fbank(
    waveforms: torch.Tensor, num_samples: torch.Tensor, frontend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """``fbank`` at 16 kHz: ``waveforms`` are contiguous, ``num_samples`` and the returned frames are on the CPU."""
    device = waveforms.device
    dtype = torch.float64 if waveforms.dtype == torch.float64 else torch.float32
    batch, max_samples = waveforms.shape
    frames = num_frames(num_samples)
    max_frames = int(frames.max()) if batch else 0
    total = int(frames.sum())
    log_mel = torch.zeros(batch, max_frames, NUM_MEL_BINS, dtype=dtype, device=device)
    flat_log_mel = log_mel.view(-1, NUM_MEL_BINS)
    if not total:
        return log_mel, frames

    window, mel_blocks = _constants(frontend, dtype, device)
    product_dtype = mel_blocks[0][2].dtype

    clip = torch.repeat_interleave(torch.arange(batch, device="cpu"), frames)
    time = torch.arange(total, device="cpu") - (frames.cumsum(0) - frames)[clip]
    first_sample, row = send(clip * max_samples + time * HOP, device), send(clip * max_frames + time, device)
    if frontend == "ssast":
        clip_means = _clip_means(waveforms, num_samples)[send(clip, device), None]

    # All chunks of a call have the same number of rows: the last one ends in rows of the chunk before it, which are
    # not used.
    num_chunks = math.ceil(total / _chunk_rows(device))
    chunk_rows = math.ceil(total / num_chunks / _ROW_MULTIPLE) * _ROW_MULTIPLE
    all_windows = waveforms.view(-1).unfold(0, WINDOW, 1)  # (B * S - 399, 400), a view
    frame = torch.zeros(chunk_rows, WINDOW, dtype=dtype, device=device)
    padded = torch.zeros(chunk_rows, _FFT, dtype=dtype, device=device)
    emphasised = padded[:, :WINDOW]
    mel = torch.empty(chunk_rows, NUM_MEL_BINS, dtype=product_dtype, device=device)
    # Kaldi's order of operations, rounding by rounding: bins 100 dB below the peak depend on how samples are rounded,
    # and only the same rounding gives the same value there.
    for start in range(0, total, chunk_rows):
        stop = min(start + chunk_rows, total)
        frame[: stop - start] = _to_float(all_windows.index_select(0, first_sample[start:stop]))
        if frontend == "ssast":
            frame[: stop - start] -= clip_means[start:stop]
        frame -= frame.mean(dim=1, keepdim=True)
        torch.mul(frame[:, :1], _PREEMPHASIS, out=emphasised[:, :1])
        torch.mul(frame[:, :-1], _PREEMPHASIS, out=emphasised[:, 1:])
        torch.sub(frame, emphasised, out=emphasised)
        emphasised *= window
        # Squares of real and imaginary parts: the mel product adds the two, because the bank has each row twice.
        power = torch.view_as_real(torch.fft.rfft(padded)).flatten(1).square_().to(product_dtype)
        for bins, mels, bank in mel_blocks:
            torch.mm(power[:, bins], bank, out=mel[:, mels])
        mel.clamp_(min=_FLOOR).log_()
        flat_log_mel.index_copy_(0, row[start:stop], mel[: stop - start].to(dtype))
    return log_mel, frames


def _chunk_rows(device: torch.device) -> int:
    """Frames per chunk: what the caches of a CPU hold (measured), or enough to fill a GPU (about 0.2 GB)."""
    return 512 if device.type == "cpu" else 16384


def _clip_means(waveforms: torch.Tensor, num_samples: torch.Tensor) -> torch.Tensor:
    """Mean (B,) of the samples of each clip; NaN for a clip without samples."""
    # One reduction per clip: the weakest bins of a tone show how the mean is rounded (0.05 of a log-mel at 8 kHz), and
    # only torch.mean of the clip alone rounds as SSAST's code does. It costs 5 % of the call.
    return torch.stack([_to_float(clip).mean() for clip in _split(waveforms, num_samples)])


@functools.cache
def _constants(
    frontend: str, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, list[tuple[slice, slice, torch.Tensor]]]:
    """The window, and the mel bank in blocks (columns of the power spectrum, mel bins, weights).

    The copy to a GPU is synchronous, because calls on other streams read the cached result too.
    """
    window = torch.hann_window(WINDOW, periodic=False, dtype=dtype, device="cpu").pow(_FRONTENDS[frontend])
    # A global switch turns fp32 products on a GPU into TF32, with 10 bits of mantissa. It does not affect fp64.
    bank = _mel_bank().to(torch.float64 if device.type == "cuda" else dtype)
    blocks = []
    for low in range(0, NUM_MEL_BINS, _MEL_BLOCK):
        mels = slice(low, low + _MEL_BLOCK)
        used = bank[mels].any(dim=0).nonzero()
        bins = slice(2 * int(used.min()), 2 * int(used.max()) + 2)  # two columns per bin, real and imaginary
        weights = bank[mels].T.repeat_interleave(2, dim=0)[bins]
        blocks.append((bins, mels, weights.contiguous().to(device)))
    return window.to(device), blocks


def _mel_bank() -> torch.Tensor:
    """Triangular mel filters (128, 257) from 20 Hz to 8 kHz, in fp32 for every dtype, as in torchaudio."""
    low, high = (1127.0 * math.log(1.0 + hertz / 700.0) for hertz in (20.0, SAMPLE_RATE / 2))
    step = (high - low) / (NUM_MEL_BINS + 1)
    index = torch.arange(NUM_MEL_BINS, dtype=torch.float32, device="cpu")[:, None]
    left, centre, right = low + index * step, low + (index + 1.0) * step, low + (index + 2.0) * step
    hertz = (SAMPLE_RATE / _FFT) * torch.arange(_FFT // 2, dtype=torch.float32, device="cpu")
    mel = 1127.0 * (1.0 + hertz / 700.0).log()
    bank = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0.0)
    return torch.nn.functional.pad(bank, (0, 1))  # the bin at 8 kHz belongs to no filter

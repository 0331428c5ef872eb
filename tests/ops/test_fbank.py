"""fbank compared with torchaudio's Kaldi filter banks clip by clip, and with itself in other batches."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy import assert_fbank, assert_rounding

from mae_ast_fast.ops.fbank import HOP, SAMPLE_RATE, WINDOW, fbank, frames_to_samples, num_frames

torchaudio, kaldi = (pytest.importorskip(name) for name in ("torchaudio", "torchaudio.compliance.kaldi"))
FRONTENDS = ("mae_ast", "ssast")
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SECONDS = 2


def reference(clip: torch.Tensor, frontend: str) -> torch.Tensor:
    """Log-mel of one clip (S,) as in the papers' code."""
    options = {"sample_frequency": 16000, "use_energy": False, "num_mel_bins": 128}
    if frontend == "ssast":
        clip = clip - clip.mean()
        options |= {"htk_compat": True, "window_type": "hanning", "dither": 0.0}
    return kaldi.fbank(clip[None], **options)


def _speech(num_samples: int) -> torch.Tensor:
    """Synthetic voice: pulses of a gliding pitch through four formants, with syllables and a little breath."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(num_samples, dtype=torch.float64) / SAMPLE_RATE
    cycles = 120 * time + 4 * torch.sin(2 * torch.pi * 0.7 * time)
    source = torch.diff(cycles.floor(), prepend=torch.zeros(1)) + 0.003 * torch.randn(num_samples, generator=generator)
    tail = torch.arange(1024, dtype=torch.float64) / SAMPLE_RATE
    for hertz, bandwidth in ((600, 80), (1200, 90), (2500, 120), (3500, 200)):
        resonance = torch.exp(-torch.pi * bandwidth * tail) * torch.cos(2 * torch.pi * hertz * tail)
        size = num_samples + len(tail)
        source = torch.fft.irfft(torch.fft.rfft(source, size) * torch.fft.rfft(resonance, size), size)[:num_samples]
    syllables = torch.sin(2 * torch.pi * 1.5 * time).clamp(min=0.0)
    return (0.9 * source * syllables / (source * syllables).abs().max()).float()


def _signals() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    num_samples = SECONDS * SAMPLE_RATE
    time = torch.arange(num_samples, dtype=torch.float64) / SAMPLE_RATE
    noise = torch.randn(num_samples, generator=generator)

    def tone(hertz: float) -> torch.Tensor:
        return torch.sin(2 * torch.pi * hertz * time)

    signals = {
        "speech": _speech(num_samples),
        "speech_pcm": (_speech(num_samples) * 32767).round() / 32768,
        "noise": 0.1 * noise,
        "noise_full_scale": noise.clamp(-1.0, 1.0),
        "noise_below_floor": 1e-5 * noise,
        "silence": torch.zeros(num_samples),
        "dc": torch.full((num_samples,), 0.7),
        "tone_25": tone(25.0),
        "tone_440": tone(440.0),
        "tone_7900": tone(7900.0),
        "tone_nyquist": (1 - 2 * (torch.arange(num_samples) % 2)),
        "tone_on_dc": 0.4 * tone(3210.7) + 0.5,
        "tone_clipped": (4 * tone(300.0)).clamp(-1.0, 1.0),
        "square": tone(97.3).sign(),
        "chirp": torch.sin(2 * torch.pi * (50 + 1900 * time) * time),
        "impulses": torch.arange(num_samples) % 3000 == 1234,
        "steps": torch.arange(num_samples) % 6000 < 3000,
    }
    return {name: signal.float() for name, signal in signals.items()}


SIGNALS = _signals()


def _batch(clips: list[torch.Tensor], padding: float, num_samples: int | None = None) -> torch.Tensor:
    batch = torch.full((len(clips), num_samples or max(map(len, clips))), padding, dtype=clips[0].dtype)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    return batch


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", SIGNALS)
def test_fbank_one_clip_equals_kaldi(name, frontend):
    for num_samples in (400, 401, 559, 560, 719, 720, 5000, SECONDS * SAMPLE_RATE):
        clip = SIGNALS[name][:num_samples]
        log_mel, frames = fbank(clip[None], frontend=frontend)
        expected = reference(clip, frontend)
        assert log_mel.dtype == torch.float32 and frames.tolist() == [len(expected)]
        assert_fbank(log_mel[0], expected, f"{name}, {num_samples} samples")


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", ["speech", "tone_7900"])
def test_fbank_minute_long_clip_equals_kaldi(name, frontend):
    clip = SIGNALS[name].repeat(60 // SECONDS)
    assert_fbank(fbank(clip[None], frontend=frontend)[0][0], reference(clip, frontend))


@pytest.mark.parametrize("padding", [0.0, float("nan"), float("-inf"), 3e38, 0.5])
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_fbank_padded_batch_equals_kaldi_clip_by_clip(frontend, padding):
    clips = [signal[: 3000 + 1777 * i] for i, signal in enumerate(SIGNALS.values())]
    clips += [torch.zeros(0), SIGNALS["noise"][:399], SIGNALS["noise"][:400]]
    log_mel, frames = fbank(_batch(clips, padding, 40000), [len(clip) for clip in clips], frontend=frontend)
    assert frames.dtype == torch.int64 and frames.tolist() == [num_frames(len(clip)) for clip in clips]
    assert log_mel.shape == (len(clips), max(frames), 128)
    for clip, clip_log_mel, count in zip(clips, log_mel, frames.tolist(), strict=True):
        assert torch.equal(clip_log_mel[count:], torch.zeros_like(clip_log_mel[count:]))
        if count:
            assert_fbank(clip_log_mel[:count], reference(clip, frontend))


@pytest.mark.parametrize("frontend", FRONTENDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_fbank_clip_in_any_batch_is_bit_equal_to_clip_alone(frontend, data):
    """For other batches, positions in the batch and padding, in fp32 and fp64."""
    names = data.draw(st.lists(st.sampled_from(sorted(SIGNALS)), min_size=1, max_size=8))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    clips = [SIGNALS[name][: data.draw(st.integers(0, 24000))].to(dtype) for name in names]
    num_samples = max(map(len, clips)) + data.draw(st.integers(0, 2000))
    padding = data.draw(st.sampled_from([0.0, 1.0, float("nan"), float("inf")]))
    log_mel, frames = fbank(_batch(clips, padding, num_samples), [len(clip) for clip in clips], frontend=frontend)
    for clip, clip_log_mel, count in zip(clips, log_mel, frames.tolist(), strict=True):
        alone, alone_frames = fbank(clip[None], frontend=frontend)
        assert count == alone_frames.item() == num_frames(len(clip))
        assert torch.equal(clip_log_mel[:count], alone[0])
        assert torch.equal(clip_log_mel[count:], torch.zeros_like(clip_log_mel[count:]))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_fbank_non_finite_clip_does_not_change_other_clips(frontend, broken):
    waveforms = torch.stack([SIGNALS[name] for name in ("speech", "noise", "chirp", "square", "steps", "speech")])
    expected, _ = fbank(waveforms, frontend=frontend)  # 1188 frames: several chunks on a CPU
    waveforms[1, 5000], waveforms[4, 31000] = broken, broken
    log_mel, _ = fbank(waveforms, frontend=frontend)
    assert not log_mel[1].isfinite().all() and not log_mel[4].isfinite().all()
    whole = [0, 2, 3, 5]
    assert torch.equal(log_mel[whole], expected[whole])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", SIGNALS)
def test_fbank_fp32_error_is_at_most_twice_kaldis(name, frontend, device):
    clip = SIGNALS[name].to(device)
    exact = reference(clip.double().cpu(), frontend)
    log_mel = fbank(clip[None], frontend=frontend)[0][0].cpu()
    allowed = 2 * (reference(clip, frontend).cpu().double() - exact).abs().max()
    # Subtract twice torchaudio's own error from the error; the rest has to pass.
    error = (log_mel.double() - exact).abs()
    assert_fbank((error - allowed).clamp(min=0.0), torch.zeros_like(error), name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_fbank_fp64_clips_equal_kaldi(frontend, device):
    clips = [SIGNALS[name].double() for name in ("speech", "tone_on_dc", "square")]
    log_mel, frames = fbank(torch.stack(clips).to(device), frontend=frontend)
    assert log_mel.dtype == torch.float64 and log_mel.device.type == device and frames.device.type == "cpu"
    for clip, clip_log_mel in zip(clips, log_mel.cpu(), strict=True):
        assert_rounding(clip_log_mel, reference(clip, frontend))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_fbank_int16_samples_are_divided_by_32768(frontend, device):
    samples = (SIGNALS["speech"] * 32767).round().to(torch.int16)
    samples[0], samples[1] = -32768, 32767
    waveforms = torch.stack([samples, samples.flip(0)]).to(device)
    lengths = [len(samples), 12345]
    log_mel, frames = fbank(waveforms, lengths, frontend=frontend)
    expected, expected_frames = fbank(waveforms.float() / 32768, lengths, frontend=frontend)
    assert torch.equal(log_mel, expected) and torch.equal(frames, expected_frames)
    assert log_mel.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_fbank_half_precision_samples_are_computed_in_fp32(dtype, frontend):
    clip = SIGNALS["speech"].to(dtype)[None]
    log_mel, _ = fbank(clip, frontend=frontend)
    assert log_mel.dtype == torch.float32
    assert torch.equal(log_mel, fbank(clip.float(), frontend=frontend)[0])


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_fbank_other_sample_rate_equals_resampled_kaldi(rate, frontend):
    clips = [SIGNALS[name] for name in ("speech", "noise", "tone_440", "impulses", "silence")]
    clips = [clip[:num_samples] for clip, num_samples in zip(clips, (31999, 20000, 10007, 4000, 0), strict=True)]
    waveforms, num_samples = _batch(clips, float("nan")), [len(clip) for clip in clips]
    log_mel, frames = fbank(waveforms, num_samples, sample_rate=rate, frontend=frontend)
    for clip, clip_log_mel, count in zip(clips[:-1], log_mel, frames.tolist(), strict=False):
        expected = reference(torchaudio.functional.resample(clip, rate, SAMPLE_RATE), frontend)
        assert count == len(expected)
        assert_fbank(clip_log_mel[:count], expected, f"{rate} Hz")
        assert torch.equal(clip_log_mel[count:], torch.zeros_like(clip_log_mel[count:]))
    assert frames[-1] == 0


def test_fbank_other_sample_rate_counts_frames_as_torchaudio():
    for rate in (8000, 11025, 44100, 48000):
        for num_samples in [WINDOW * rate // SAMPLE_RATE + i for i in range(-3, 4)]:
            resampled = torchaudio.functional.resample(torch.zeros(num_samples), rate, SAMPLE_RATE)
            assert fbank(torch.zeros(1, num_samples), sample_rate=rate)[1].item() == num_frames(len(resampled))


def test_fbank_int16_at_other_sample_rate_equals_float():
    samples = (SIGNALS["speech"] * 32767).round().to(torch.int16)
    log_mel, _ = fbank(samples[None], sample_rate=44100)
    assert torch.equal(log_mel, fbank(samples[None].float() / 32768, sample_rate=44100)[0])


def test_fbank_without_torchaudio_fails_only_to_resample(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        monkeypatch.setitem(sys.modules, name, None)
    module = importlib.import_module("mae_ast_fast.ops.fbank")
    name = f"{module.__package__}.fbank_without_torchaudio"
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    clip = SIGNALS["speech"][None]
    assert torch.equal(fresh.fbank(clip)[0], fbank(clip)[0])
    with pytest.raises(ImportError, match=r'8000 Hz.*torchaudio.*pip install "mae-ast-fast\[train\]"'):
        fresh.fbank(clip, sample_rate=8000)


def test_fbank_silence_gives_floor():
    log_mel, _ = fbank(torch.zeros(1, 1600))
    assert torch.equal(log_mel, torch.tensor(torch.finfo(torch.float32).eps).log().expand(1, 8, 128))
    assert round(log_mel[0, 0, 0].item(), 4) == -15.9424


@pytest.mark.parametrize("rate", [16000, 48000])
@pytest.mark.parametrize("shape, lengths", [((3, 399), None), ((2, 1000), [0, 399]), ((0, 5000), []), ((2, 0), [0, 0])])
def test_fbank_clips_shorter_than_a_window_have_no_frames(shape, lengths, rate):
    for dtype in (torch.float32, torch.int16):
        log_mel, frames = fbank(torch.ones(shape, dtype=dtype), lengths, sample_rate=rate)
        assert log_mel.shape == (shape[0], 0, 128) and log_mel.dtype == torch.float32
        assert frames.dtype == torch.int64 and frames.tolist() == [0] * shape[0]


def test_num_frames_any_length_counts_whole_windows():
    for num_samples in [*range(1000), 160000]:
        assert num_frames(num_samples) == len(range(0, num_samples - WINDOW + 1, HOP))
    num_samples = torch.arange(3000)
    assert num_frames(num_samples).tolist() == [num_frames(n) for n in range(3000)]


@pytest.mark.parametrize("device", DEVICES)
def test_fbank_any_type_of_lengths_gives_same_result(device):
    waveforms = torch.stack([SIGNALS["speech"], SIGNALS["noise"]]).to(device)
    expected, frames = fbank(waveforms, [9000, 20000])
    assert frames.tolist() == [num_frames(9000), num_frames(20000)] and frames.device.type == "cpu"
    for lengths in (
        torch.tensor([9000, 20000]),
        torch.tensor([9000, 20000], dtype=torch.int32),
        torch.tensor([9000, 20000], device=device),
    ):
        log_mel, frames_again = fbank(waveforms, lengths)
        assert torch.equal(log_mel, expected) and torch.equal(frames_again.cpu(), frames)
        assert frames_again.device == lengths.device, "frames are on the device of the lengths"
    assert fbank(waveforms)[1].device.type == "cpu"


def test_fbank_any_memory_layout_gives_same_result():
    stereo = torch.stack([SIGNALS["speech"], SIGNALS["noise"]], dim=1)  # (S, 2), as audio files are stored
    waveforms = stereo.T.contiguous()
    expected, _ = fbank(waveforms, [9000, 20000])
    assert torch.equal(fbank(stereo.T, [9000, 20000])[0], expected)
    wide = torch.full((2, 2 * waveforms.shape[1]), float("nan"))
    wide[:, ::2] = waveforms
    assert torch.equal(fbank(wide[:, ::2], [9000, 20000])[0], expected)
    expanded = fbank(waveforms[:1].expand(3, -1))[0]
    assert torch.equal(expanded, fbank(waveforms[:1])[0].expand(3, -1, -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_fbank_global_settings_do_not_change_result(frontend, device):
    """Autograd, autocast, precision of products, default dtype and device; the input is not modified."""
    waveforms = torch.stack([SIGNALS["speech"], SIGNALS["tone_7900"]]).to(device)
    before = waveforms.clone()
    calls = [{"lengths": None}, {"lengths": [30000, 20000]}]
    resampling = [{"lengths": [30000, 20000], "sample_rate": 22050}]

    def run(calls: list[dict]) -> list[torch.Tensor]:
        importlib.import_module("mae_ast_fast.ops.fbank")._constants.cache_clear()
        return [fbank(waveforms, frontend=frontend, **call)[0] for call in calls]

    def same(calls: list[dict]) -> bool:
        return all(map(torch.equal, run(calls), expected))

    expected = run(calls + resampling)
    assert torch.equal(waveforms, before)
    waveforms.requires_grad_()
    assert same(calls + resampling) and not run(calls)[0].requires_grad
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype=dtype):
            assert same(calls + resampling)
    precision, default_dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert same(calls + resampling)
        torch.set_float32_matmul_precision("high")  # as training scripts do
        for log_mel, usual in zip(run(calls), expected, strict=False):
            assert_fbank(log_mel, usual)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(default_dtype)
    with torch.device("meta"):  # torchaudio's filter cannot run in it
        assert same(calls)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"waveforms": torch.zeros(1000)}, r"\(B, S\).*1-D.*\(1000,\).*add a batch dimension"),
        ({"waveforms": torch.zeros(2, 1, 1000)}, r"\(B, S\).*\(2, 1, 1000\)"),
        ({"waveforms": torch.zeros(())}, r"\(B, S\)"),
        ({"waveforms": torch.zeros(2, 1000, dtype=torch.int32)}, r"int16, got torch.int32"),
        ({"waveforms": torch.zeros(2, 1000, dtype=torch.complex64)}, r"got torch.complex64"),
        ({"waveforms": [[0.0] * 1000] * 2}, r"must be a tensor.*got list"),
        ({"lengths": [1000]}, r"shape \(2,\).*got \(1,\)"),
        ({"lengths": torch.tensor([[500], [500]])}, r"shape \(2,\).*got \(2, 1\)"),
        ({"lengths": [1001, 5]}, r"0\.\.1000.*got 5 to 1001"),
        ({"lengths": [500, -1]}, r"0\.\.1000.*got -1 to 500"),
        ({"lengths": [0.5, 1.0]}, r"integers.*got torch.float32"),
        ({"lengths": torch.tensor([True, False])}, r"integers.*got torch.bool"),
        ({"frontend": "whisper"}, r"mae_ast, ssast, got 'whisper'"),
        ({"sample_rate": 0}, r"positive integer.*got 0"),
        ({"sample_rate": -16000}, r"positive integer.*got -16000"),
        ({"sample_rate": 16000.0}, r"positive integer.*got 16000.0"),
        ({"sample_rate": True}, r"positive integer.*got True"),
    ],
)
def test_fbank_invalid_argument_raises(change, message):
    with pytest.raises(ValueError, match=message):
        fbank(**{"waveforms": torch.zeros(2, 1000), **change})


@pytest.mark.parametrize("frames", [1, 2, 998])
def test_frames_to_samples_is_the_fewest_with_so_many_frames(frames: int) -> None:
    samples = frames_to_samples(frames)
    assert (num_frames(samples), num_frames(samples - 1)) == (frames, frames - 1)

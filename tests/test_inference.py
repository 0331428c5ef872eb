"""Inference on files: features in one chunk or in several, masked clips, and the encoder alone."""

from __future__ import annotations

import itertools
import stat
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from policy import assert_rounding
from safetensors.numpy import load_file

from mae_ast_fast import MAEAST, MAEASTConfig, fbank, inference
from mae_ast_fast.data import audio
from mae_ast_fast.devices import pick_device
from mae_ast_fast.inference import (
    FileFeatures,
    extract_file,
    masked_clips,
    output_paths,
    save_features,
    save_model,
    select,
)
from mae_ast_fast.ops.fbank import num_frames
from mae_ast_fast.training.evaluation import HeldOut

soundfile, *_ = (pytest.importorskip(name) for name in ("soundfile", "soxr", "av"))
AUDIO = Path(__file__).parent / "audio"
SPEECH = AUDIO / "festvox-ru" / "51a406a1a0.opus"  # 10.8 s
SOUND = AUDIO / "sonic-pi-samples" / "018e740416.opus"  # 3.7 s
RATE = 16000


def make_model(family: str = "patch", **fields) -> MAEAST:
    torch.manual_seed(0)
    shape = {"patch": ((16, 16), "chunk"), "frame": ((2, 128), "random")}[family]
    small = {"embed_dim": 32, "ffn_dim": 64, "num_heads": 2, "encoder_layers": 2}
    decoder = {"decoder_embed_dim": 32, "decoder_layers": 1}
    config = MAEASTConfig(patch_size=shape[0], masking=shape[1], **{**small, **decoder, **fields})
    model = MAEAST(config).eval()
    # Statistics like those after training: with an untrained model's every clip would look constant.
    model.input_norm.running_mean.fill_(-8.0)
    model.input_norm.running_var.fill_(16.0)
    return model


@pytest.mark.parametrize("family", ["patch", "frame"])
@pytest.mark.parametrize("layer", [None, 1])
def test_extract_file_one_chunk_equals_extract_features_bit_for_bit(family, layer):
    model = make_model(family)
    extracted = extract_file(model, SPEECH, layer)
    with torch.no_grad():
        log_mel, frames = fbank(torch.from_numpy(audio.decode(SPEECH))[None])
        expected = model.extract_features(log_mel, frames, layer).last_hidden_state[0].numpy()
    np.testing.assert_array_equal(extracted.features, expected)
    assert extracted.features.dtype == np.float32
    assert len(extracted.times) == len(extracted.frequency_block) == len(expected)


def test_extract_file_as_long_as_a_chunk_is_not_cut(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(2 * RATE), RATE)
    model = make_model()
    np.testing.assert_array_equal(
        extract_file(model, path, chunk_seconds=2.0).features, extract_file(model, path).features
    )


def stream(samples: np.ndarray, rng: np.random.Generator):
    """The samples in blocks of random length, as a decoder yields them."""
    while samples.size:
        n = int(rng.integers(1, 30_000))
        yield samples[:n]
        samples = samples[n:]


@pytest.mark.parametrize("kt", [16, 2])
@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.0, 2.17, 3.999, 4.0, 4.03, 9.41])
def test_chunks_frames_equal_those_of_the_whole_recording(kt, seconds):
    rng = np.random.default_rng(1)
    samples = rng.standard_normal(round(seconds * RATE)).astype(np.float32) * 0.1
    chunk_frames = 208  # 2.08 s, whole patches of both models
    chunks = list(inference._chunks(stream(samples, rng), chunk_frames, kt))
    frames = [num_frames(chunk.size) for chunk in chunks]
    assert sum(frames) == num_frames(samples.size)
    assert all(count % kt == 0 for count in frames[:-1])
    assert max(frames) <= chunk_frames
    assert len(chunks) == 1 or min(frames) >= chunk_frames // 2 - kt, "the last chunk is very short"
    expected, _ = fbank(torch.from_numpy(samples)[None])
    log_mel = torch.cat([fbank(torch.from_numpy(chunk)[None])[0] for chunk in chunks], dim=1)
    assert_rounding(log_mel, expected, "frames")


@pytest.mark.parametrize("family", ["patch", "frame"])
def test_extract_file_long_file_is_encoded_chunk_by_chunk(family):
    model = make_model(family)
    kt, grid_f = model.config.patch_size[0], model.config.grid_f
    extracted = extract_file(model, SPEECH, chunk_seconds=2.0)
    log_mel, frames = fbank(torch.from_numpy(audio.decode(SPEECH))[None])
    chunk_frames = -(-200 // kt) * kt
    total = int(frames)
    borders = [0]
    while total - borders[-1] >= 2 * chunk_frames:
        borders.append(borders[-1] + chunk_frames)
    if total - borders[-1] > chunk_frames:
        borders.append(borders[-1] + -(-(total - borders[-1]) // (2 * kt)) * kt)
    borders.append(total)
    assert len(borders) > 5
    with torch.no_grad():
        chunks = [model.extract_features(log_mel[:, a:b]).last_hidden_state[0] for a, b in itertools.pairwise(borders)]
    assert_rounding(torch.from_numpy(extracted.features), torch.cat(chunks), "features")
    assert len(extracted.features) == -(-total // kt) * grid_f


@pytest.mark.parametrize(("family", "chunk_seconds"), [("patch", 30.0), ("patch", 1.0), ("frame", 1.0)])
def test_extract_file_times_are_token_centres(family, chunk_seconds):
    model = make_model(family)
    kt, grid_f = model.config.patch_size[0], model.config.grid_f
    extracted = extract_file(model, SOUND, chunk_seconds=chunk_seconds)
    num_blocks = len(extracted.times) // grid_f
    # Frame t covers 25 ms from t * 10 ms on. A token's centre is halfway between those of its first and last frame.
    expected = [(first + (kt - 1) / 2) * 0.010 + 0.0125 for first in range(0, num_blocks * kt, kt)]
    np.testing.assert_allclose(extracted.times.reshape(num_blocks, grid_f), np.repeat([expected], grid_f, 0).T)
    assert (extracted.frequency_block.reshape(num_blocks, grid_f) == np.arange(grid_f)).all()


def test_extract_file_memory_is_independent_of_file_length(monkeypatch):
    seconds = 600

    def blocks(path):
        rng = np.random.default_rng(0)
        for _ in range(seconds // 10):
            yield rng.standard_normal(10 * RATE, np.float32) * 0.1

    monkeypatch.setattr(audio, "decode_blocks", blocks)
    model = make_model(embed_dim=4, ffn_dim=8, encoder_layers=1)
    tracemalloc.start()  # traces numpy's memory: samples and features
    try:
        extracted = extract_file(model, "long.wav", chunk_seconds=10.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(extracted.features) == -(-num_frames(seconds * RATE) // 16) * 8
    samples_of_ten_chunks = 10 * 10 * RATE * 4
    arrays = sum(array.nbytes for array in (extracted.features, extracted.times, extracted.frequency_block))
    assert peak < 3 * arrays + samples_of_ten_chunks < seconds * RATE * 4


def test_extract_file_bf16_equals_model_under_autocast():
    model = make_model()
    features = extract_file(model, SOUND, precision="bf16").features
    log_mel, _ = fbank(torch.from_numpy(audio.decode(SOUND))[None])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model.extract_features(log_mel).last_hidden_state[0]
    assert expected.dtype == torch.bfloat16
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, expected.float().numpy())


def test_extract_file_training_model_is_evaluated_and_stays_in_training():
    model = make_model()
    expected = extract_file(model, SOUND).features
    model.train()
    before = model.input_norm.running_mean.clone()
    np.testing.assert_array_equal(extract_file(model, SOUND).features, expected)
    assert model.training
    assert torch.equal(model.input_norm.running_mean, before)


def test_extract_file_wrong_files_and_arguments_raise(tmp_path):
    model = make_model()
    short = tmp_path / "short.wav"
    soundfile.write(short, np.zeros(399), RATE)
    with pytest.raises(audio.AudioError, match=r"short\.wav: shorter than 25 ms"):
        extract_file(model, short)
    soundfile.write(short, np.zeros(400), RATE)
    assert len(extract_file(model, short).features) == 8
    with pytest.raises(audio.AudioError, match="unreadable"):
        extract_file(model, tmp_path / "none.wav")
    with pytest.raises(ValueError, match=r"layer must be an integer in 1\.\.2, got 3"):
        extract_file(model, SOUND, layer=3)
    for chunk_seconds in (0.0, -1.0, 960.1, float("nan")):
        with pytest.raises(ValueError, match=r"chunk_seconds must be positive and at most 960"):
            extract_file(model, SOUND, chunk_seconds=chunk_seconds)
    with pytest.raises(ValueError, match="precision must be fp32 or bf16, got 'fp16'"):
        extract_file(model, SOUND, precision="fp16")


# ---------------------------------------------------------------------------------------------------------- writing


def example() -> FileFeatures:
    rng = np.random.default_rng(0)
    return FileFeatures(
        rng.standard_normal((6, 4)).astype(np.float32), np.arange(6) / 7, np.arange(6, dtype=np.int32) % 2
    )


@pytest.mark.parametrize("file_format", ["npz", "safetensors"])
def test_save_features_round_trip_keeps_arrays(tmp_path, file_format):
    features, path = example(), tmp_path / "new" / f"x.{file_format}"
    save_features(features, path, file_format)
    loaded = dict(np.load(path)) if file_format == "npz" else load_file(path)
    assert sorted(loaded) == ["features", "frequency_block", "times"]
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, getattr(features, name))
        assert array.dtype == getattr(features, name).dtype
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_save_features_unknown_format_raises(tmp_path):
    with pytest.raises(ValueError, match="file_format must be npz or safetensors, got 'csv'"):
        save_features(example(), tmp_path / "x.csv", "csv")


@pytest.mark.parametrize("file_format", ["npz", "safetensors"])
def test_save_features_failure_keeps_previous_file(tmp_path, file_format, monkeypatch):
    path = tmp_path / f"x.{file_format}"
    path.write_bytes(b"before")

    def fail(file, *arguments, **arrays):
        if file_format == "npz":
            file.write(b"half")
        else:
            Path(arguments[0]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez" if file_format == "npz" else "safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_features(example(), path, file_format)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_output_paths_mirror_inputs_without_duplicates():
    def names(*inputs):
        return [str(path) for path in output_paths(inputs, Path("out"), ".npz")]

    assert names("/x/a/talk.wav") == ["out/talk.npz"]
    assert names("/x/a/talk.wav", "/x/a/rain.flac") == ["out/talk.npz", "out/rain.npz"]
    assert names("/x/a/talk.wav", "/x/b/talk.wav") == ["out/a/talk.npz", "out/b/talk.npz"]
    assert names("/x/a/talk.wav", "/x/a/talk.flac") == ["out/talk.wav.npz", "out/talk.flac.npz"]
    assert names("/x/talk.1.wav", "/x/talk.2.wav") == ["out/talk.1.npz", "out/talk.2.npz"]
    assert names("/x/a/../talk.wav", "/x/a/talk.wav") == ["out/talk.npz", "out/a/talk.npz"]
    # A replaced suffix must not give another file's whole name.
    assert len(set(names("/x/a.wav", "/x/a.flac", "/x/a.wav.ogg"))) == 3
    with pytest.raises(ValueError, match="is given twice"):
        output_paths(["/x/a.wav", "/x/./a.wav"], Path("out"), ".npz")


# ----------------------------------------------------------------------------------------------------- masked clips


def test_masked_clips_defaults_equal_held_out_evaluation():
    model = make_model()
    clips = masked_clips(model, [SPEECH, SOUND])
    waveform = torch.from_numpy(audio.decode(SPEECH, 10.0))[None]
    log_mel, frames = fbank(waveform)
    assert clips.names == ["51a406a1a0.opus", "018e740416.opus"]
    assert torch.equal(clips.log_mel[0], log_mel[0])
    expected = HeldOut.of(model, log_mel, frames, names=["x"], kinds=[""])
    assert torch.equal(clips.mask[:1], expected.mask)
    clip = select(clips, 1)
    assert clip.log_mel.shape[1] == int(clip.num_frames) < clips.log_mel.shape[1]
    assert clip.names == ["018e740416.opus"]


def test_masked_clips_seed_start_and_seconds_select_mask_and_audio():
    model = make_model()
    first, again = masked_clips(model, [SPEECH], seed=1), masked_clips(model, [SPEECH], seed=1)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.mask, masked_clips(model, [SPEECH], seed=2).mask)
    late = masked_clips(model, [SPEECH], start=2.5, seconds=3.0)
    samples = audio.decode(SPEECH)[round(2.5 * RATE) : round(5.5 * RATE)]
    assert torch.equal(late.log_mel, fbank(torch.from_numpy(samples)[None])[0])
    whole = num_frames(audio.decode(SPEECH).size - 2 * RATE)
    assert masked_clips(model, [SPEECH], start=2.0, seconds=1e6).num_frames.tolist() == [whole]


def test_masked_clips_wrong_files_and_arguments_raise(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match=r"018e740416\.opus is 3\.\d\d s long: nothing at 100 s"):
        masked_clips(model, [SOUND], start=100.0)
    with pytest.raises(ValueError, match="too few to mask"):
        masked_clips(model, [SPEECH, SOUND], start=0.0, seconds=0.1)
    with pytest.raises(ValueError, match="start must be >= 0 and seconds > 0, got -1 and 10"):
        masked_clips(model, [SPEECH], start=-1.0)
    with pytest.raises(audio.AudioError):
        masked_clips(model, [tmp_path / "none.wav"])


# ---------------------------------------------------------------------------------------------------- encoder alone


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_first": True},
        {"decoder_embed_dim": 16},  # with a projection between encoder and decoder
        {"encoder_projection": True},
    ],
)
def test_save_model_encoder_keeps_features_bit_for_bit(tmp_path, fields):
    model = make_model(**fields)
    save_model(model.encoder_only(), tmp_path / "encoder")
    encoder = MAEAST.from_pretrained(tmp_path / "encoder")
    assert encoder.config.decoder_layers == 0
    modules = {name.split(".")[0] for name in encoder.state_dict()}
    assert modules == {"input_norm", "patch_embed", "encoder"}
    log_mel = torch.randn(2, 200, 128)
    frames = torch.tensor([200, 90])
    for layer in (None, 1):
        expected = model.extract_features(log_mel, frames, layer)
        actual = encoder.extract_features(log_mel, frames, layer)
        assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
        for state, expected_state in zip(actual.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(state, expected_state)
    with pytest.raises(ValueError, match="an encoder alone"):
        encoder(log_mel)


def test_save_model_encoder_keeps_position_table(tmp_path):
    model = make_model()
    table = model.encoder_positions.table.half().float()  # as in a checkpoint of a fairseq run in fp16
    model.load_state_dict({**model.state_dict(), "encoder_positions.table": table})
    save_model(model.encoder_only(), tmp_path / "encoder")
    encoder = MAEAST.from_pretrained(tmp_path / "encoder")
    assert torch.equal(encoder.encoder_positions.table, table)
    log_mel = torch.randn(1, 160, 128)
    expected = model.extract_features(log_mel).last_hidden_state
    assert torch.equal(encoder.extract_features(log_mel).last_hidden_state, expected)
    assert not torch.equal(make_model().extract_features(log_mel).last_hidden_state, expected)


def test_save_model_folder_with_model_or_run_raises(tmp_path):
    model = make_model()
    size = save_model(model, tmp_path / "model")
    assert size == (tmp_path / "model" / "model.safetensors").stat().st_size
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"already holds model\.safetensors, config\.json"):
        save_model(model.encoder_only(), tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="already holds checkpoints"):
        save_model(model, tmp_path / "run")


def test_pick_device_names_give_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="PyTorch sees 0 CUDA devices"):
        pick_device("cuda")
    for name in ("gpu", "cpu:1", "cuda:", "cuda:x", ""):
        with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="PyTorch sees 2 CUDA devices"):
        pick_device("cuda:2")

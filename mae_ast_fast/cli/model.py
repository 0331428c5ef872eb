"""The commands that use a trained model: ``features``, ``reconstruct``, ``export`` and ``convert``."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import check_out_folder
from .parser import (
    CHECKPOINT_HELP,
    CommandError,
    Parser,
    SkipLog,
    add_device,
    load_mae_ast_on_device,
    load_on_device,
    metavar,
)

if TYPE_CHECKING:
    from torch import nn


def run_features(argv: Sequence[str]) -> int:
    """Write encoder features of audio files. Returns the exit code of ``SkipLog``."""
    parser = Parser(
        "features",
        "Writes encoder features of audio files. Arrays: features (tokens, D), times (tokens,), the centre of each "
        "token in seconds, and frequency_block (tokens,), 0 for the lowest. Tokens are ordered by time. A patch model "
        "has several frequency blocks per time step, next to each other: "
        "features.reshape(-1, frequency_block.max() + 1, D).mean(1) is one vector per time step. Files without usable "
        "audio are named and skipped. The exit code is 1 if a FILE was skipped or nothing was written; broken files in "
        "a folder do not change it.",
        (
            "talk.wav --checkpoint runs/pretrain --out talk.npz",
            "recordings/ --checkpoint runs/pretrain --out features/ --layer 9 --format safetensors",
        ),
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files, folders, or fairseq .tsv manifests")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help="folder for one output per file, in the same folders relative to each other; or, for one file, a name "
        "that ends in .npz or .safetensors",
    )
    parser.add_argument("--layer", type=int, metavar="K", help="layer, counted from 1 (default: the encoder's output)")
    parser.add_argument(
        "--chunk-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="length in seconds of the chunks in which longer files are encoded, each by itself (default: 30)",
    )
    parser.add_argument(
        "--format",
        choices=("npz", "safetensors"),
        help="format of the output (default: by the name of --out, otherwise npz)",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the model (default: fp32)"
    )
    add_device(parser)
    arguments = parser.read(argv)

    from ..data.audio import AudioError
    from ..inference import extract_file, output_paths, save_features

    skipped = SkipLog()
    paths = list(dict.fromkeys(skipped.find_files(arguments.files)))
    out = Path(arguments.out)
    out_format = out.suffix[1:] if out.suffix in (".npz", ".safetensors") and not out.is_dir() else None
    is_one_file = len(arguments.files) == 1 and paths == [os.path.abspath(arguments.files[0])]
    if is_one_file and out.suffix and not (out_format or out.is_dir() or arguments.out.endswith(os.sep)):
        raise ValueError(f"--out must end in .npz or .safetensors, or be a folder ({out}/), got {out}")
    if out_format and len(paths) + skipped.count > 1:
        raise ValueError(f"--out {out} names one file, got {len(paths) + skipped.count}: name a folder")
    if out_format and arguments.format not in (None, out_format):
        raise ValueError(f"--out {out} and --format {arguments.format} contradict each other")
    file_format = arguments.format or out_format or "npz"
    targets = [out] * len(paths) if out_format else output_paths(paths, out, f".{file_format}") if paths else []
    check_out_folder(out.parent if out_format else out)
    model = load_mae_ast_on_device(arguments.checkpoint, arguments.device, "features")
    num_written = 0
    for path, target in zip(paths, targets, strict=True):
        try:
            extracted = extract_file(
                model,
                path,
                layer=arguments.layer,
                chunk_seconds=arguments.chunk_seconds,
                precision=arguments.precision,
            )
        except AudioError as error:
            skipped.add(error)
            continue
        try:
            save_features(extracted, target, file_format)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            skipped.add(AudioError(path, f"its name is too long for one that ends in .{file_format}"))
            continue
        num_written += 1
        num_tokens, width = extracted.features.shape
        print(f"{target}: {num_tokens} tokens x {width}, to {extracted.times[-1]:.2f} s", flush=True)
    if num_written != 1 or skipped.count:
        print(f"{num_written} written, {skipped.count} skipped")
    return skipped.exit_code(num_written)


def run_reconstruct(argv: Sequence[str]) -> int:
    """Mask clips, reconstruct them and draw the result. Returns the exit code."""
    from ..ops.masking import MASKING_STRATEGIES

    parser = Parser(
        "reconstruct",
        "Masks part of audio clips, reconstructs it with a model, and draws original, masked and reconstructed "
        "log-mel, one row per file. Prints the error on the masked patches, and the errors of simple predictions from "
        "the visible ones.",
        (
            "talk.wav --checkpoint runs/pretrain --out talk.png",
            "talk.wav rain.flac --checkpoint runs/pretrain --out both.png --mask-ratio 0.5 --masking time --start 30",
        ),
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=CHECKPOINT_HELP)
    parser.add_argument("--out", required=True, metavar="PNG", help="picture to write")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seed of the mask (default: that of the held-out evaluation)"
    )
    parser.add_argument(
        "--mask-ratio", type=float, metavar="X", help="share of masked tokens, in (0, 1) (default: the model's)"
    )
    parser.add_argument(
        "--masking",
        metavar=metavar(str, MASKING_STRATEGIES),
        help="masking strategy (default: the model's)",
    )
    parser.add_argument(
        "--start", type=float, default=0.0, metavar="S", help="start of the clip in each file, in seconds (default: 0)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="length of a clip in seconds (default: 10, or less if the model takes less)",
    )
    add_device(parser)
    arguments = parser.read(argv)

    from ..inference import masked_clips, select
    from ..training.evaluation import evaluate
    from ..training.figures import plot_reconstruction

    out = Path(arguments.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {out}")
    if out.is_dir():
        raise ValueError(f"--out must be the file to write, got the folder {out}")
    check_out_folder(out.parent)
    for file in arguments.files:
        if os.path.isdir(file):
            raise ValueError(f"{file} is a folder; name a file")
        if not os.path.exists(file):
            raise ValueError(f"no such file: {file}")
    model = load_on_device(arguments.checkpoint, arguments.device)
    clips = masked_clips(
        model,
        arguments.files,
        seed=arguments.seed,
        start=arguments.start,
        seconds=arguments.seconds,
        mask_ratio=arguments.mask_ratio,
        masking=arguments.masking,
    )
    reports = [evaluate(model, select(clips, index)) for index in range(len(clips.names))]
    out.parent.mkdir(parents=True, exist_ok=True)
    plot_reconstruction(model, clips, out)
    for name, report in zip(clips.names, reports, strict=True):
        baselines = ", ".join(f"{label.replace('_', ' ')} {error:.4f}" for label, error in report["baselines"].items())
        print(
            f"{name}: MSE {report['reconstruction_mse']:.4f} on {report['masked_tokens']} masked patches; "
            f"baselines: {baselines}; InfoNCE accuracy {report['accuracy']:.4f}, chance {report['chance']:.4f}"
        )
    print(f"wrote {out}")
    return 0


def run_export(argv: Sequence[str]) -> int:
    """Write the encoder of a model. Returns the exit code."""
    parser = Parser(
        "export",
        "Writes model.safetensors and config.json of the encoder alone, without decoder and heads, for feature "
        "extraction and fine-tuning. MAEAST.from_pretrained(DIR).extract_features gives the same features to the bit. "
        "With --format transformers, writes a folder for AutoModel of Hugging Face transformers, or for "
        "AutoModelForAudioClassification if CHECKPOINT is a fine-tuned classifier. Import mae_ast_fast.hf before "
        "loading it.",
        ("runs/pretrain pretrain_encoder/", "mae_ast_patch.pt mae_ast_patch_encoder/"),
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    parser.add_argument("dir", metavar="DIR", help="new folder")
    parser.add_argument(
        "--format",
        default="mae_ast_fast",
        choices=("mae_ast_fast", "transformers"),
        metavar="NAME",
        help="format of the folder: mae_ast_fast or transformers (default: mae_ast_fast)",
    )
    arguments = parser.read(argv)

    from ..checkpoints.load import load_mae_ast
    from ..inference import save_model

    if arguments.format == "transformers":
        return _export_to_transformers(arguments.checkpoint, Path(arguments.dir))

    model = load_mae_ast(arguments.checkpoint, "export")
    encoder = model.encoder_only()
    size = save_model(encoder, Path(arguments.dir))
    print(
        f"{arguments.dir}: encoder of {_num_parameters(encoder)} parameters, {size / 1e6:,.1f} MB "
        f"(the whole model has {_num_parameters(model)} parameters)"
    )
    return 0


def _export_to_transformers(checkpoint: str, folder: Path) -> int:
    """Write a model or classifier for Hugging Face transformers. Returns the exit code."""
    try:
        from ..integrations.transformers import export, load
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise CommandError("transformers missing: pip install transformers") from None
    exported = export(load(checkpoint), folder)
    size = (folder / "model.safetensors").stat().st_size
    print(f"{folder}: {type(exported).__name__} of {_num_parameters(exported)} parameters, {size / 1e6:,.1f} MB")
    return 0


def run_convert(argv: Sequence[str]) -> int:
    """Convert an official checkpoint. Returns the exit code."""
    parser = Parser(
        "convert",
        "Converts a checkpoint of the paper's own code (fairseq, .pt) to model.safetensors and config.json. It needs "
        "no fairseq and executes nothing from the file.",
        ("mae_ast_patch.pt mae_ast_patch/", "mae_ast_frame.pt mae_ast_frame/"),
    )
    parser.add_argument("official", metavar="OFFICIAL.pt", help="the paper's checkpoint")
    parser.add_argument("dir", metavar="DIR", help="new folder")
    arguments = parser.read(argv)

    from ..checkpoints.load import load_fairseq
    from ..inference import save_model
    from ..models.config import MAEASTConfig

    model = load_fairseq(arguments.official)
    size = save_model(model, Path(arguments.dir))
    config = model.config
    assert isinstance(config, MAEASTConfig)
    print(
        f"{arguments.dir}: {_num_parameters(model)} parameters, {size / 1e6:,.1f} MB; patches of "
        f"{config.patch_size[0]} x {config.patch_size[1]}, width {config.embed_dim}, "
        f"{config.encoder_layers} + {config.decoder_layers} layers"
    )
    return 0


def _num_parameters(model: nn.Module) -> str:
    """Number of parameters, with commas."""
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"

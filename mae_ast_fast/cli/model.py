"""What is done with a trained model: ``features``, ``reconstruct``, ``export`` and ``convert``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .parser import CHECKPOINT_HELP, CommandError, Parser, SkipLog, add_device, load

if TYPE_CHECKING:
    from ..models.mae_ast import MAEAST


def run_features(argv: Sequence[str]) -> int:
    parser = Parser(
        "features",
        "Encoder features of audio files, with the time of each. Arrays: features (tokens, D), times (tokens,) in "
        "seconds, the centre of each token, and frequency_block (tokens,), 0 the lowest. Tokens run through time; a "
        "patch model has several frequency blocks a time step, next to each other: "
        "features.reshape(-1, frequency_block.max() + 1, D).mean(1) is one vector a time step. Files that give no "
        "audio are named and skipped, and the exit code is then 1.",
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
        help="folder for one output a file, which lie in it as the files lie to each other; or, for one file, a name "
        "that ends in .npz or .safetensors",
    )
    parser.add_argument("--layer", type=int, metavar="K", help="layer from 1 on (default: the encoder's output)")
    parser.add_argument(
        "--chunk-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="longer files are encoded in pieces of this length in seconds, each by itself (default: 30)",
    )
    parser.add_argument("--format", choices=("npz", "safetensors"), help="(default: by the name of --out, else npz)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (default: fp32)")
    add_device(parser)
    arguments = parser.read(argv)

    from ..data.audio import AudioError
    from ..inference import extract_file, output_paths, save_features

    skipped = SkipLog()
    paths = list(dict.fromkeys(skipped.listing(arguments.files)))
    out = Path(arguments.out)
    named = out.suffix[1:] if out.suffix in (".npz", ".safetensors") and not out.is_dir() else None
    if named and len(paths) + skipped.count > 1:
        raise ValueError(f"--out {out} names one file, got {len(paths) + skipped.count}: name a folder")
    if named and arguments.format not in (None, named):
        raise ValueError(f"--out {out} and --format {arguments.format} contradict each other")
    form = arguments.format or named or "npz"
    targets = [out] * len(paths) if named else output_paths(paths, out, f".{form}") if paths else []
    model = load(arguments.checkpoint, arguments.device, "features")
    written = 0
    for path, target in zip(paths, targets, strict=True):
        try:
            found = extract_file(model, path, arguments.layer, arguments.chunk_seconds, arguments.precision)
        except AudioError as error:
            skipped.add(error)
            continue
        save_features(found, target, form)
        written += 1
        tokens, width = found.features.shape
        print(f"{target}: {tokens} tokens x {width}, to {found.times[-1]:.2f} s", flush=True)
    if written != 1 or skipped.count:
        print(f"{written} written, {skipped.count} skipped")
    return 1 if skipped.count else 0


def run_reconstruct(argv: Sequence[str]) -> int:
    parser = Parser(
        "reconstruct",
        "Hides part of audio clips, lets a model fill it in, and draws original, masked and reconstructed log-mel, one "
        "row a file. Prints the error on the hidden patches beside those of simple guesses from the visible ones.",
        (
            "talk.wav --checkpoint runs/pretrain --out talk.png",
            "talk.wav rain.flac --checkpoint runs/pretrain --out both.png --mask-ratio 0.5 --masking time --start 30",
        ),
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=CHECKPOINT_HELP)
    parser.add_argument("--out", required=True, metavar="PNG", help="picture to write")
    parser.add_argument("--seed", type=int, metavar="N", help="of the mask (default: the held-out evaluation's)")
    parser.add_argument("--mask-ratio", type=float, metavar="X", help="share hidden, in (0, 1) (default: the model's)")
    parser.add_argument("--masking", metavar="NAME", help="strategy of hiding (default: the model's)")
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="seconds into each file (default: 0)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="length of a clip (default: 10, or as much as an SSAST takes)"
    )
    add_device(parser)
    arguments = parser.read(argv)

    from ..inference import masked_clips, select
    from ..training.evaluation import evaluate
    from ..training.figures import plot_reconstruction

    out = Path(arguments.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {out}")
    model = load(arguments.checkpoint, arguments.device)
    hide = {"mask_ratio": arguments.mask_ratio, "masking": arguments.masking}
    clips = masked_clips(model, arguments.files, arguments.seed, arguments.start, arguments.seconds, **hide)
    reports = [evaluate(model, select(clips, index)) for index in range(len(clips.names))]
    out.parent.mkdir(parents=True, exist_ok=True)
    plot_reconstruction(model, clips, out)
    for name, report in zip(clips.names, reports, strict=True):
        baselines = ", ".join(f"{other.replace('_', ' ')} {error:.4f}" for other, error in report["baselines"].items())
        print(
            f"{name}: MSE {report['reconstruction_mse']:.4f} on {report['masked_tokens']} hidden patches; "
            f"baselines: {baselines}; InfoNCE accuracy {report['accuracy']:.4f}, chance {report['chance']:.4f}"
        )
    print(f"wrote {out}")
    return 0


def run_export(argv: Sequence[str]) -> int:
    parser = Parser(
        "export",
        "Writes the encoder alone, model.safetensors and config.json: what feature extraction and fine-tuning need, "
        "without decoder and heads. MAEAST.from_pretrained(DIR).extract_features gives the same features to the bit. "
        "With --format transformers for AutoModel of Hugging Face transformers, a fine-tuned classifier for its "
        "AutoModelForAudioClassification; import mae_ast_fast.hf first.",
        ("runs/pretrain encoder/", "mae_ast_patch.pt encoder/"),
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    parser.add_argument("dir", metavar="DIR", help="new folder")
    parser.add_argument(
        "--format",
        default="mae_ast_fast",
        choices=("mae_ast_fast", "transformers"),
        metavar="NAME",
        help="mae_ast_fast or transformers (default: mae_ast_fast)",
    )
    arguments = parser.read(argv)

    from ..checkpoints.load import load_mae_ast
    from ..inference import save_model
    from ..models.mae_ast import encoder_alone

    if arguments.format == "transformers":
        return _export_to_transformers(arguments.checkpoint, Path(arguments.dir))

    model = load_mae_ast(arguments.checkpoint, "export")
    encoder = encoder_alone(model)
    size = save_model(encoder, Path(arguments.dir))
    print(
        f"{arguments.dir}: encoder of {_parameters(encoder)} parameters, {size / 1e6:,.1f} MB "
        f"(the whole model has {_parameters(model)} parameters)"
    )
    return 0


def _export_to_transformers(checkpoint: str, folder: Path) -> int:
    try:
        from ..integrations.transformers import export, load
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise CommandError("transformers missing: pip install transformers") from None
    written = export(load(checkpoint), folder)
    size = (folder / "model.safetensors").stat().st_size
    print(f"{folder}: {type(written).__name__} of {_parameters(written)} parameters, {size / 1e6:,.1f} MB")
    return 0


def run_convert(argv: Sequence[str]) -> int:
    parser = Parser(
        "convert",
        "Turns a checkpoint of the paper's own code (fairseq, .pt) into model.safetensors and config.json. Neither "
        "fairseq is needed nor anything from the file executed.",
        ("mae_ast_patch.pt mae_ast_patch/", "mae_ast_frame.pt mae_ast_frame/"),
    )
    parser.add_argument("official", metavar="OFFICIAL.pt", help="the paper's checkpoint")
    parser.add_argument("dir", metavar="DIR", help="new folder")
    arguments = parser.read(argv)

    from ..checkpoints.load import load_fairseq
    from ..inference import save_model

    model = load_fairseq(arguments.official)
    size = save_model(model, Path(arguments.dir))
    config = model.config
    print(
        f"{arguments.dir}: {_parameters(model)} parameters, {size / 1e6:,.1f} MB; patches of {config.patch_size[0]} x "
        f"{config.patch_size[1]}, width {config.embed_dim}, {config.encoder_layers} + {config.decoder_layers} layers"
    )
    return 0


def _parameters(model: MAEAST) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"

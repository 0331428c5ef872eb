"""Options of pretraining."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..files import paths_as_text
from ..models.config import CONFIGS, MAEASTConfig, SSASTConfig
from ..models.transformer import RECOMPUTE
from ..ops.attention import BACKENDS
from ..ops.fbank import SAMPLE_RATE, num_frames
from ..validate import check_at_least, check_choice, check_positive
from .distributed import PARALLEL
from .optimizer import OPTIMIZERS
from .step import PRECISIONS

# Options that change neither the computations nor their order: a run may be resumed with other values.
FREE_OPTIONS = (
    "out",
    "log_every",
    "save_every",
    "evaluate_every",
    "keep",
    "workers",
    "loader_workers",
    "cache",
    "parallel",
)
CHOICES: dict[str, tuple[str, ...]] = {  # option -> its values
    "model": tuple(CONFIGS),
    "precision": ("auto", *PRECISIONS),
    "device": ("auto", "cpu", "cuda"),
    "impl": ("auto", "torch", "triton"),
    "attention": ("auto", *BACKENDS),
    "recompute": RECOMPUTE,
    "parallel": PARALLEL,
    "optimizer": OPTIMIZERS,
}


@dataclass
class PretrainOptions:
    """Options of ``mae-ast-fast pretrain``.

    Args:
        data: Folder of audio, fairseq .tsv manifest, audio file, Lhotse manifest, folder of Shar shards, or their URL.
            Anything but 16 kHz shards is converted to them once, in the cache. None: the default corpus, real
            recordings from Debian packages, fetched once.
        out: Run folder. A run that was stopped there is resumed.
        model: mae_ast, or ssast, the baseline, on the same data with the same losses.
        preset: Model sizes: {patch,frame}_{base,base_6layer,small,tiny}; for ssast without base_6layer. None: those of
            --init-from, or patch_tiny.
        model_args: Model fields that replace the preset's, as in MAEASTConfig or SSASTConfig: --model_args.mask_ratio
            0.8. For ssast, fields not given follow from the run: input_frames from max_seconds, mask_patches from the
            preset's share, mean and std from the training clips.
        init_from: Start from this checkpoint: a folder of ours or an official file, .pt of MAE-AST, .pth of SSAST. A
            preset must have its sizes.
        steps: Updates of the whole run. The learning rate reaches 0 at the last.
        batch_seconds: Audio per update, in seconds, over all processes: a token budget, not a clip count.
        micro_batches: Micro-batches per update, each of batch_seconds / micro_batches. Processes share them; one with
            several accumulates their gradients. A multiple of the number of processes; the results do not depend on
            that number. None: one per process, at the run's first start.
        parallel: How the processes under torchrun share a model: ddp, or fsdp, which splits its state among them.
        max_seconds: In seconds. Longer clips are cut into crops of at most this length.
        min_seconds: In seconds. Shorter clips are skipped. prepare keeps clips from 0.3 s by default.
        optimizer: adamw, or muon, for the weight matrices of the layers with adamw for the rest.
        lr: Peak learning rate. Paper: 1e-4.
        warmup_steps: Updates of linear warm-up from 0. Paper: 32,000.
        weight_decay: Decoupled weight decay, on all parameters.
        clip_norm: Maximum L2 norm of the gradient.
        seed: Seed of weights, data order, masks and dropout.
        precision: fp32, bf16, fp16 (with a scaled loss), or auto: bf16 if the device computes it natively, otherwise
            fp32.
        device: cpu, cuda, or auto: cuda if available.
        impl: Implementation of the model's operations: auto, torch or triton.
        attention: Attention backend. auto chooses by device and precision.
        recompute: What the backward recomputes instead of keeping it in memory: none, gelu, or layer.
        compile: Run the model through torch.compile.
        graphs: Run updates as CUDA graphs: faster for small batches.
        log_every: Updates between two lines of progress, and between two checks that the loss is finite.
        save_every: Updates between two checkpoints.
        evaluate_every: Updates between two evaluations on held-out clips.
        keep: Number of checkpoints to keep.
        workers: Processes that decode audio while shards are made.
        loader_workers: Processes that read batches for each training process. 0: it reads them itself.
        cache: Folder for fetched packages and decoded audio. None: $MAE_AST_FAST_CACHE or the user's cache folder.

    Raises:
        ValueError: A value out of range, or options that contradict each other.
    """

    data: str | None = None
    out: str = "runs/pretrain"
    model: str = "mae_ast"
    preset: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    steps: int = 10_000
    batch_seconds: float = 160.0
    micro_batches: int | None = None
    parallel: str = "ddp"
    max_seconds: float = 10.0
    min_seconds: float = 0.4
    optimizer: str = "adamw"
    lr: float = 5e-4
    warmup_steps: int = 500
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    impl: str = "auto"
    attention: str = "auto"
    recompute: str = "none"
    compile: bool = False
    graphs: bool = False
    log_every: int = 10
    save_every: int = 500
    evaluate_every: int = 1000
    keep: int = 2
    workers: int = 2
    loader_workers: int = 1
    cache: str | None = None

    def __post_init__(self) -> None:
        paths_as_text(self, "data", "out", "cache", "init_from")
        check_at_least(self, "steps", "log_every", "save_every", "evaluate_every", "keep", "workers", least=1)
        check_at_least(self, "warmup_steps", "weight_decay", "loader_workers", least=0)
        check_positive(self, "batch_seconds", "max_seconds", "min_seconds", "lr", "clip_norm")
        if self.micro_batches is not None:
            check_at_least(self, "micro_batches", least=1)
        if not self.min_seconds <= self.max_seconds <= self.batch_seconds:
            raise ValueError(
                "expected min_seconds <= max_seconds <= batch_seconds, got "
                f"{self.min_seconds}, {self.max_seconds} and {self.batch_seconds}"
            )
        for name, choices in CHOICES.items():
            check_choice(self, name, choices)
        if self.parallel == "fsdp" and self.optimizer == "muon":
            raise ValueError("parallel=fsdp splits the matrices that muon needs whole: use parallel=ddp")
        if self.parallel == "fsdp" and (self.precision == "fp16" or self.compile or self.graphs):
            raise ValueError("parallel=fsdp takes fp32 and bf16, neither compile nor graphs: use parallel=ddp")
        config = self.model_config()
        if self.recompute == "gelu" and config.activation_dropout > 0.0:
            raise ValueError(
                f"recompute=gelu needs activation_dropout 0, got {config.activation_dropout}: use recompute=layer"
            )

    def model_config(self, source: MAEASTConfig | SSASTConfig | None = None) -> MAEASTConfig | SSASTConfig:
        """Configuration of the run's model: the preset with ``model_args``; without a preset, ``source`` with them.

        Args:
            source: Configuration of the checkpoint that the run starts from. None: it starts from none.

        Raises:
            ValueError: A preset or field that the model does not have, a source of the other model, or sizes that
                contradict each other or the length of the crops.
        """
        config_class = CONFIGS[self.model]
        if source is not None and not isinstance(source, config_class):
            source_model = next(name for name, other in CONFIGS.items() if isinstance(source, other))
            raise ValueError(
                f"--model {self.model} cannot start from --init-from {self.init_from}: it is a {source_model}"
            )
        names = [field.name for field in fields(config_class)]
        if unknown := [name for name in self.model_args if name not in names]:
            raise ValueError(f"--model {self.model} has no model_args {', '.join(unknown)}; it has {', '.join(names)}")
        if source is not None and self.preset is None:
            base = source
        elif (name := self.preset or "patch_tiny") in config_class.preset_names():
            base = config_class.preset(name)
        else:
            presets = ", ".join(config_class.preset_names())
            raise ValueError(f"preset must be one of {presets} for --model {self.model}, got {name!r}")
        if isinstance(base, SSASTConfig):
            assert source is None or isinstance(source, SSASTConfig)  # checked above
            return self._ssast_config(base, source)
        if base is source:
            return MAEASTConfig.from_dict({**base.to_dict(), **self.model_args})
        return MAEASTConfig.preset(name, **self.model_args)  # the default masking depends on patch_size

    def _ssast_config(self, base: SSASTConfig, source: SSASTConfig | None) -> SSASTConfig:
        """Sizes of ``base`` with values of the run; the same share of patches is masked whatever the length.

        Args:
            base: Configuration of the preset or of the checkpoint.
            source: Configuration of the checkpoint, for its positions and statistics. None: there is none.
        """
        window_frames = num_frames(round(self.max_seconds * SAMPLE_RATE))
        values: dict[str, Any] = {**base.to_dict(), "input_frames": window_frames}
        if source is not None:
            values |= {"input_frames": source.input_frames, "mean": source.mean, "std": source.std}
        values |= self.model_args
        if "mask_patches" not in self.model_args:
            num_patches = SSASTConfig.from_dict({**values, "mask_patches": 1}).num_patches
            mask_patches = round(base.mask_patches / base.num_patches * num_patches)
            values["mask_patches"] = min(max(1, mask_patches), num_patches - 1)
        config = SSASTConfig.from_dict(values)
        if config.input_frames < window_frames:
            raise ValueError(
                f"input_frames must be at least {window_frames}, the frames of max_seconds={self.max_seconds:g}, got "
                f"{config.input_frames}: use a smaller --max-seconds"
            )
        return config

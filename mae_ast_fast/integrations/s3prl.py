"""MAE-AST as an upstream of s3prl, the toolkit of the SUPERB tasks (arXiv 2105.01051).

``Upstream`` has the interface of s3prl's upstreams and returns the features of ``MAEAST.extract_features``. It does not
import s3prl. ``register`` adds it to s3prl's hub; hubconf.py, in the repository, adds it to torch.hub.

A patch model has several frequency blocks per time step. Each token gives one vector, ordered by time step and within
a time step from the lowest frequencies up. s3prl's upstream of the paper's own code has the same order, and a mean over
the vectors is the paper's pooling. The rate is kt * 160 / (F // kf) samples/vector: 320 for the paper's patch model
(8 vectors per 2560 samples) and for its frame model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.load import load_mae_ast
from ..models.mae_ast import MAEAST
from ..ops.fbank import HOP, WINDOW, pad_clips


class Upstream(nn.Module):
    """A MAE-AST encoder as s3prl's upstream: waveforms to the outputs of all layers.

    In training mode the encoder applies dropout, but the statistics of the input normalisation stay fixed and no layer
    is skipped: s3prl's weighted sum needs every layer's own output.

    Args:
        model: Model to use. It is changed in place (``encoder.layerdrop`` becomes 0), not copied.

    Raises:
        ValueError: The samples per vector are no whole number, which s3prl requires.
    """

    def __init__(self, model: MAEAST) -> None:
        super().__init__()
        kt, grid_f = model.config.patch_size[0], model.config.grid_f
        if kt * HOP % grid_f:
            raise ValueError(
                f"s3prl needs a whole number of samples per vector, got {kt * HOP} / {grid_f} with patches of {kt} "
                f"frames x {model.config.patch_size[1]} bins"
            )
        self.model = model
        self.model.encoder.layerdrop = 0.0
        self.downsample_rate = kt * HOP // grid_f

    def get_downsample_rates(self, key: str = "hidden_states") -> int:
        """Samples per vector at 16 kHz, the same for every feature ``key``."""
        return self.downsample_rate

    def train(self, mode: bool = True) -> Upstream:
        """Set the mode as in ``nn.Module``; the input normalisation stays in evaluation mode."""
        super().train(mode)
        self.model.input_norm.eval()
        return self

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """Features of a batch as ``MAEAST.extract_features`` gives them, in the number of vectors that s3prl expects.

        Args:
            wavs: (num_samples,) each, mono at 16 kHz, of any lengths: floats in [-1, 1] or int16. A clip shorter than
                25 ms is padded with zeros to 25 ms.

        Returns:
            ``hidden_states``, one (B, L, D) per layer from the first to the last, and ``last_hidden_state`` (B, L, D).
            A clip of S samples has ceil(S / rate) vectors, as s3prl counts them, and L is the count of the longest
            clip. The vectors are the clip's tokens: excess tokens at the end are cut, and missing ones repeat the last
            token. A patch model can have 7 tokens too many, because it encodes a time step that has one frame, while
            s3prl accepts 4. There can be 2 too few, because a frame is longer than its hop. Rows past a clip's vectors
            are undefined.

        Raises:
            ValueError: ``wavs`` is no list of 1-D tensors, is empty, or its devices differ.
        """
        if len(wavs) == 0 or any(not isinstance(wav, Tensor) or wav.dim() != 1 for wav in wavs):
            got = [tuple(wav.shape) if isinstance(wav, Tensor) else type(wav).__name__ for wav in wavs]
            raise ValueError(f"wavs must be a list of 1-D tensors, got {got}")
        waveforms, lengths = pad_clips(list(wavs))
        num_samples = torch.tensor(lengths, device="cpu")
        padded_samples = num_samples.clamp(min=WINDOW)
        waveforms = nn.functional.pad(waveforms, (0, int(padded_samples.max()) - waveforms.shape[1]))
        log_mel, num_frames = self.model.features(waveforms, padded_samples)
        encoded = self.model.extract_features(log_mel, num_frames)

        num_tokens = encoded.lengths[:, None]
        num_vectors = -(-num_samples.to(num_tokens.device)[:, None] // self.downsample_rate)
        position = torch.arange(int(num_vectors.max()), device=num_tokens.device)
        repeats_last = ((position >= num_tokens) & (position < num_vectors))[:, :, None]

        def to_vectors(state: Tensor) -> Tensor:
            last = state.take_along_dim(num_tokens[:, :, None] - 1, 1)
            resized = nn.functional.pad(state, (0, 0, 0, len(position) - state.shape[1]))
            return torch.where(repeats_last, last, resized)

        return {
            "hidden_states": [to_vectors(state) for state in encoded.hidden_states],
            "last_hidden_state": to_vectors(encoded.last_hidden_state),
        }


def mae_ast_fast(
    ckpt: str | os.PathLike[str] | None = None, model_config: str | None = None, refresh: bool = False
) -> Upstream:
    """The upstream of a checkpoint, in evaluation mode: an entry of s3prl's hub and of torch.hub.

    Args:
        ckpt: Checkpoint as ``checkpoint.load_model`` takes it: a folder, a run folder, a file of the paper's own code
            or a repository on the Hub.
        model_config: Unused; s3prl passes it to upstreams with a configuration file.
        refresh: Unused; s3prl passes it to upstreams that it downloads.

    Raises:
        ValueError: ``ckpt`` is None or no checkpoint of MAE-AST.
    """
    if ckpt is None:
        raise ValueError("mae_ast_fast needs a checkpoint: ckpt=..., S3PRLUpstream(path_or_url=...)")
    return Upstream(load_mae_ast(ckpt, "s3prl")).eval()


def mae_ast_fast_local(
    ckpt: str | os.PathLike[str], model_config: str | None = None, refresh: bool = False
) -> Upstream:
    """The upstream of a local checkpoint: as ``mae_ast_fast``, but never from the Hub.

    Args:
        ckpt: Folder or file.
        model_config: Unused.
        refresh: Unused.

    Raises:
        ValueError: ``ckpt`` is no file or folder, or no checkpoint of MAE-AST.
    """
    if not Path(ckpt).exists():
        raise ValueError(f"no checkpoint at {ckpt}: expected a folder or a file")
    return mae_ast_fast(ckpt, model_config, refresh)


def register() -> None:
    """Add the entries to ``s3prl.hub``, where s3prl looks up upstreams by name.

    Raises:
        ImportError: s3prl is not installed, or cannot be imported.
    """
    from s3prl import hub

    hub.mae_ast_fast, hub.mae_ast_fast_local = mae_ast_fast, mae_ast_fast_local

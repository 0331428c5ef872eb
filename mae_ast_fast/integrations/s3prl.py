"""MAE-AST as an upstream of s3prl, the toolkit of the SUPERB tasks (arXiv 2105.01051).

``Upstream`` has the interface of s3prl's upstreams and the features of ``MAEAST.extract_features``; it needs no s3prl.
``register`` adds it to s3prl's hub, and hubconf.py, in the repository, to torch.hub.

A patch model has several frequency blocks a time step. Its tokens stay what they are, one vector each, time step by
time step and inside one from the lowest frequencies up: s3prl's upstream of the paper's own code does the same, and a
mean over them is the paper's pooling. A vector then stands for kt * 160 / (F // kf) samples: 320 for the paper's patch
model (8 vectors every 2560 samples) as for its frame model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..checkpoints.load import load_mae_ast
from ..models.mae_ast import MAEAST
from ..ops.fbank import HOP, WINDOW


class Upstream(nn.Module):
    """s3prl's view of a model: waveforms to the outputs of all layers.

    In training the encoder has its dropout, but the statistics of the input normalisation stay, and no layer is
    skipped: s3prl's weighted sum counts on every layer's own output.

    Args:
        model: Whose encoder it is; it is taken over, not copied.

    Raises:
        ValueError: A vector of the model would not stand for a whole number of samples, which s3prl counts in.
    """

    def __init__(self, model: MAEAST) -> None:
        super().__init__()
        kt, grid_f = model.config.patch_size[0], model.config.grid_f
        if kt * HOP % grid_f:
            raise ValueError(
                f"s3prl needs a whole number of samples a vector, got {kt * HOP} / {grid_f}: patches of {kt} frames x "
                f"{model.config.patch_size[1]} bins do not fit it"
            )
        self.model = model
        self.model.encoder.layerdrop = 0.0
        self.downsample_rate = kt * HOP // grid_f

    def get_downsample_rates(self, key: str = "hidden_states") -> int:
        """Samples at 16 kHz that a vector stands for, the same for every feature ``key``."""
        return self.downsample_rate

    def train(self, mode: bool = True) -> Upstream:
        super().train(mode)
        self.model.input_norm.eval()
        return self

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """Features of a batch, as ``MAEAST.extract_features`` gives them, in the number that s3prl expects.

        Args:
            wavs: (samples,) each, mono floats in [-1, 1] at 16 kHz, of any lengths. One shorter than 25 ms counts as
                followed by zeros up to there.

        Returns:
            ``hidden_states``, one (B, L, D) a layer, the first layer's first, and ``last_hidden_state`` (B, L, D). A
            clip of S samples has ceil(S / rate) vectors, as s3prl counts them, and L is that of the longest clip. They
            are the clip's tokens: of more, the last are cut, and of fewer the last is repeated. A patch model can have
            7 more, because a time step is encoded as soon as one of its frames is there, and s3prl accepts 4; there can
            be 2 fewer, because a frame is longer than its hop. Rows past a clip's vectors are for nobody to read.

        Raises:
            ValueError: Not such a list.
        """
        if len(wavs) == 0 or any(not isinstance(wav, Tensor) or wav.dim() != 1 for wav in wavs):
            got = [tuple(wav.shape) if isinstance(wav, Tensor) else type(wav).__name__ for wav in wavs]
            raise ValueError(f"wavs must be a list of 1-D tensors, got {got}")
        samples = torch.tensor([len(wav) for wav in wavs], device="cpu")
        lengths = samples.clamp(min=WINDOW)
        padded = pad_sequence(list(wavs), batch_first=True)
        padded = nn.functional.pad(padded, (0, int(lengths.max()) - padded.shape[1]))
        features = self.model.extract_features(*self.model.features(padded, lengths))

        tokens = features.lengths[:, None]
        wanted = -(-samples.to(tokens.device)[:, None] // self.downsample_rate)
        place = torch.arange(int(wanted.max()), device=tokens.device)
        repeats = ((place >= tokens) & (place < wanted))[:, :, None]

        def counted(state: Tensor) -> Tensor:
            last = state.take_along_dim(tokens[:, :, None] - 1, 1)
            return torch.where(repeats, last, nn.functional.pad(state, (0, 0, 0, len(place) - state.shape[1])))

        return {
            "hidden_states": [counted(state) for state in features.hidden_states],
            "last_hidden_state": counted(features.last_hidden_state),
        }


def mae_ast_fast(
    ckpt: str | os.PathLike[str] | None = None, model_config: str | None = None, refresh: bool = False
) -> Upstream:
    """The upstream of a checkpoint, in evaluation mode: an entry of s3prl's hub and of torch.hub.

    Args:
        ckpt: Whatever ``checkpoint.load_model`` reads: a folder, a run, a file of the paper's own code or a name on the
            Hub.
        model_config: What s3prl passes for upstreams with a configuration of their own; unused.
        refresh: What s3prl passes for upstreams that it downloads; unused.

    Raises:
        ValueError: No checkpoint, or not one of MAE-AST.
    """
    if ckpt is None:
        raise ValueError("mae_ast_fast needs a checkpoint: ckpt=..., S3PRLUpstream(path_or_url=...)")
    return Upstream(load_mae_ast(ckpt, "s3prl")).eval()


def mae_ast_fast_local(
    ckpt: str | os.PathLike[str], model_config: str | None = None, refresh: bool = False
) -> Upstream:
    """As ``mae_ast_fast``, and never from the Hub.

    Raises:
        ValueError: As there, or ``ckpt`` is no file and no folder.
    """
    if not Path(ckpt).exists():
        raise ValueError(f"no checkpoint at {ckpt}: expected a folder or a file")
    return mae_ast_fast(ckpt, model_config, refresh)


def register() -> None:
    """Adds the entries to ``s3prl.hub``, where s3prl looks upstreams up by name.

    Raises:
        ImportError: s3prl is not installed, or cannot be imported.
    """
    from s3prl import hub

    hub.mae_ast_fast, hub.mae_ast_fast_local = mae_ast_fast, mae_ast_fast_local

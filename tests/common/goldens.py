"""Tensors recorded from the paper's own code (tests/golden, see its README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "golden"
MAE_AST = ("mae_ast_patch_small", "mae_ast_frame_small", "mae_ast_patch_chunk", "mae_ast_prenorm_proj")


def time_major(x: Tensor, dim: int, extents: tuple[int, int]) -> Tensor:
    """Reorder a dimension of SSAST's official tensors, frequency before time, to time before frequency.

    Args:
        x: Tensor whose dimension ``dim`` has ``extents[0] * extents[1]`` values.
        dim: Tokens, or values of a patch.
        extents: Frequency and time extent: of the grid for tokens, of a patch for values.
    """
    dim %= x.dim()
    return x.unflatten(dim, extents).transpose(dim, dim + 1).flatten(dim, dim + 1)


class Golden:
    """One recorded case: ``options`` of the official code, ``tensors`` by their recorded names."""

    def __init__(self, name: str) -> None:
        self.options = json.loads((FOLDER / f"{name}.json").read_text())
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        self.clips = self.tensors["source"].shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def section(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a prefix, by the rest of their names."""
        return {name[len(prefix) :]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    @property
    def state_dict(self) -> dict[str, Tensor]:
        return self.section("state_dict/")

    @property
    def mask(self) -> Tensor:
        """(B, L) bool, True = masked."""
        mask = torch.zeros(self.clips, self.options["num_tokens"], dtype=torch.bool)
        for clip in range(self.clips):
            mask[clip, self[f"masked_idx/{clip}"]] = True
        return mask

    @property
    def whole_patch_source(self) -> tuple[Tensor, Tensor]:
        """Source and frame counts of the padded feature case, cut to the batch's whole patches as the paper does."""
        source, lengths = self["eval_padded/source"], self["eval_padded/lengths"]
        kt = self.options["cfg/model/ast_kernel_size_time"]
        whole = source.shape[1] // kt * kt
        return source[:, :whole], lengths.clamp(max=whole)

"""The losses of both models: means over the masked tokens of a batch, and the output of a forward pass.

Letters as in mae_ast.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MAEASTConfig, SSASTConfig
from .layout import TokenLayout

MIN_NORM = 1e-3  # of a prediction, and of a normalised patch without its mean; a smaller one has no direction


@dataclass
class MAEASTOutput:
    """Losses and predictions of one batch. Rows run clip by clip, tokens ascending; M is the number of masked tokens.

    If ``forward`` was given sizes with padding rows, M includes them. Padding rows come last, belong to no clip and
    have no meaning.

    Attributes:
        loss: Weighted total, 0-d; a mean over all masked tokens of the batch, as the next three.
        loss_reconstruction: Mean squared error, unweighted, 0-d; 0 if that objective is off.
        loss_classification: InfoNCE, unweighted, 0-d; 0 if that objective is off.
        accuracy: Share of masked rows whose largest product is with their own target, 0-d; 0 if InfoNCE is off.
        loss_per_clip: (B,) weighted total of each clip; 0 for a clip without visible or without masked tokens.
        pred_reconstruction: (M, P).
        pred_classification: (M, P).
        target: (M, P) normalised patches; in two passes of SSAST a pair.
        mask: (B, L) bool, True = masked and predicted: False past a clip's tokens. In two passes of SSAST a pair.
    """

    loss: Tensor
    loss_reconstruction: Tensor
    loss_classification: Tensor
    accuracy: Tensor
    loss_per_clip: Tensor
    pred_reconstruction: Tensor
    pred_classification: Tensor
    target: Tensor | tuple[Tensor, Tensor]
    mask: Tensor | tuple[Tensor, Tensor]


class LossTerms(NamedTuple):
    """The first five fields of ``MAEASTOutput``."""

    loss: Tensor
    loss_reconstruction: Tensor
    loss_classification: Tensor
    accuracy: Tensor
    loss_per_clip: Tensor


def cosine_operands(prediction: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Predictions and targets (M, P) in fp32 whose products are cosines over the temperature; targets lose their mean.

    Args:
        prediction: (M, P). One near 0 has no direction either.
        target: (M, P). A constant patch has no direction: its cosines are near 0.
        temperature: > 0.
    """
    target = target.float()
    target = F.normalize(target - target.mean(1, keepdim=True), dim=1, eps=MIN_NORM)
    return F.normalize(prediction.float(), dim=1, eps=MIN_NORM) / temperature, target


def loss_terms(
    config: MAEASTConfig | SSASTConfig,
    layout: TokenLayout,
    *,
    mse: Tensor | None = None,
    nce: Tensor | None = None,
    hit: Tensor | None = None,
) -> LossTerms:
    """Means over the masked tokens of clips that add to the losses, and the weighted total (paper, section 2.3).

    Args:
        config: Weights of the two losses.
        layout: Layout of the batch.
        mse: (M,) squared error of each masked token; None: that objective is off.
        nce: (M,) InfoNCE of each masked token; None: that objective is off.
        hit: (M,) bool, given together with ``nce``: whether a masked token's own target scores highest.
    """
    values = nce if mse is None else mse
    assert values is not None  # the configuration has an objective
    masked, has_loss = layout.masked, layout.has_loss
    weight = (has_loss[masked.clip] & masked.valid).to(values.dtype)  # 0 for rows of other clips and for padding
    zeros = torch.zeros_like(weight)
    mse = zeros if mse is None else torch.where(weight > 0, mse, 0)
    hit = zeros if hit is None else hit * weight
    nce = zeros if nce is None else torch.where(weight > 0, nce, 0)  # InfoNCE of padding rows is undefined
    total = config.reconstruction_weight * mse + config.classification_weight * nce
    clip_sums = zeros.new_zeros(len(has_loss)).index_add(0, masked.clip, total)
    count = weight.sum().clamp(min=1)
    return LossTerms(
        loss=total.sum() / count,
        loss_reconstruction=mse.sum() / count,
        loss_classification=nce.sum() / count,
        accuracy=hit.sum() / count,
        loss_per_clip=clip_sums / masked.counts.clamp(min=1),
    )

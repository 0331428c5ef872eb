"""The public path ``mae_ast_fast.hf``; the code is in ``integrations.transformers``."""

from .integrations.transformers import (
    MAEASTFeatureExtractor,
    MAEASTForAudioClassification,
    MAEASTHFConfig,
    MAEASTHFModel,
    MAEASTModelOutput,
    MAEASTPreTrainedModel,
    export,
    load,
)

__all__ = [
    "MAEASTFeatureExtractor",
    "MAEASTForAudioClassification",
    "MAEASTHFConfig",
    "MAEASTHFModel",
    "MAEASTModelOutput",
    "MAEASTPreTrainedModel",
    "export",
    "load",
]

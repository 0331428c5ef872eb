"""Fast, trustworthy pretraining of MAE-AST, the masked autoencoding audio spectrogram transformer."""

from .checkpoint import load_fairseq
from .models.config import MAEASTConfig, SSASTConfig
from .models.mae_ast import MAEAST
from .ops.fbank import fbank
from .ssast import SSAST
from .training.step import TrainStep

__version__ = "0.1.0"
__all__ = ["MAEAST", "SSAST", "MAEASTConfig", "SSASTConfig", "TrainStep", "fbank", "load_fairseq"]

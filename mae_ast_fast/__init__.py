"""Fast, trustworthy pretraining of MAE-AST, the masked autoencoding audio spectrogram transformer."""

from .checkpoints.load import load_fairseq
from .models.config import MAEASTConfig, SSASTConfig
from .models.mae_ast import MAEAST
from .models.ssast import SSAST
from .ops.fbank import fbank
from .training.step import TrainStep

__version__ = "0.1.0"
__all__ = ["MAEAST", "SSAST", "MAEASTConfig", "SSASTConfig", "TrainStep", "fbank", "load_fairseq"]

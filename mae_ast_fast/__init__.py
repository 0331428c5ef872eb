"""Fast, trustworthy pretraining of MAE-AST, the masked autoencoding audio spectrogram transformer."""

from .checkpoint import load_fairseq
from .config import MAEASTConfig, SSASTConfig
from .fbank import fbank
from .model import MAEAST
from .ssast import SSAST
from .step import TrainStep

__version__ = "0.1.0"
__all__ = ["MAEAST", "SSAST", "MAEASTConfig", "SSASTConfig", "TrainStep", "fbank", "load_fairseq"]

"""matpac_fast: MATPAC audio self-supervision, pre-training and embeddings, with fused kernels."""

from . import ops
from .backend import use_backend
from .config import MatpacConfig
from .model import Matpac

__version__ = "0.1.0"

__all__ = ["Matpac", "MatpacConfig", "__version__", "ops", "use_backend"]

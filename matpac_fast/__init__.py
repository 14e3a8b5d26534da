"""matpac_fast: MATPAC audio self-supervision, pre-training and embeddings, with fused kernels."""

from . import ops
from .audio_encoder import AudioEncoder
from .backend import use_backend
from .config import MatpacConfig
from .embedding import Embeddings
from .encoder import list_encoders, load_encoder, register_encoder
from .model import Matpac, MatpacOutput
from .official import get_matpac
from .vit_encoder import Encoder
from .zoo import registry as _registry  # noqa: F401 - makes its encoders known

__version__ = "0.1.0"

__all__ = [
    "AudioEncoder",
    "Embeddings",
    "Encoder",
    "Matpac",
    "MatpacConfig",
    "MatpacOutput",
    "__version__",
    "get_matpac",
    "list_encoders",
    "load_encoder",
    "ops",
    "register_encoder",
    "use_backend",
]

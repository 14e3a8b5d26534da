"""Pre-training: the loop, its configuration, what it draws and what it keeps."""

from .config import TrainConfig, fit_to_run
from .distributed import PeerError
from .logs import Reporter, Reporters, read_log
from .loop import Probe, Result, pretrain
from .transform import Transform
from .watch import TrainingError

__all__ = [
    "PeerError",
    "Probe",
    "Reporter",
    "Reporters",
    "Result",
    "TrainConfig",
    "TrainingError",
    "Transform",
    "fit_to_run",
    "pretrain",
    "read_log",
]

"""Pre-training: the loop, its configuration, what it draws and what it keeps; and the parts for a loop of one's own."""

from .config import TrainConfig, fit_to_run
from .logs import Reporter, Reporters, read_log
from .loop import Result, pretrain
from .meeting import PeerError
from .probing import Probe
from .sampler import Plan, Sampler
from .schedule import learning_rate
from .step import make_optimizer
from .transform import Transform
from .watch import TrainingError
from .weights import load_weights

__all__ = [
    "PeerError",
    "Plan",
    "Probe",
    "Reporter",
    "Reporters",
    "Result",
    "Sampler",
    "TrainConfig",
    "TrainingError",
    "Transform",
    "fit_to_run",
    "learning_rate",
    "load_weights",
    "make_optimizer",
    "pretrain",
    "read_log",
]

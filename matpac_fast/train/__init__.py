"""Pre-training: the loop, its configuration, what it draws and what it keeps."""

from .config import TrainConfig, fit_to_run
from .logs import Reporter, read_log
from .loop import Result, pretrain
from .watch import TrainingError

__all__ = ["Reporter", "Result", "TrainConfig", "TrainingError", "fit_to_run", "pretrain", "read_log"]

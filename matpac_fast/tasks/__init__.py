"""Tasks: data sets with their official layouts and splits, all as one thing, `Task`."""

from __future__ import annotations

import importlib

from ..errors import ConfigError
from .task import DatasetError, Fold, Task

__all__ = ["TASKS", "DatasetError", "Fold", "Task", "load_task"]

# name -> what is asked; each is a module of this package
TASKS = {
    "folder": "sub-folder = label, or a clips.csv with labels, splits and groups",
    "esc50": "ESC-50: 50 environmental sounds, 5 folds",
    "urbansound8k": "UrbanSound8K: 10 urban sounds, 10 folds",
    "gtzan": "GTZAN, fault-filtered: 10 genres",
    "tau2020": "TAU Urban Acoustic Scenes 2020 Mobile: 10 scenes, a score for each device",
    "openmic": "OpenMIC-2018: 20 instruments, partial labels, mAP",
    "magnatagatune": "MagnaTagATune: 50 tags, mAP",
    "nsynth": "NSynth: 11 instrument families",
    "fsd50k": "FSD50K: 200 sounds, several to a clip, mAP",
    "hear": "a task of the HEAR benchmark, as that has released it, of whole clips",
}


def load_task(spec: str, partial: bool = False, seed: int = 0) -> Task:
    """A task by "name:folder", such as "esc50:/data/ESC-50"; its files are checked one by one, and decoded only
    where the header does not state a length.

    Args:
        spec: a name of `TASKS` and the data set's folder.
        partial: take a folder that is incomplete for what it has; what it lacks is then in `left_out`.
        seed: draws the split of a folder that has none.

    Raises:
        ConfigError: no such task.
        DatasetError: the folder is incomplete or altered; the error has every file's name.
    """
    name, colon, folder = spec.partition(":")
    if name not in TASKS or not colon or not folder:
        raise ConfigError(f"task {spec!r}; expected NAME:FOLDER with a name of {', '.join(TASKS)}")
    return importlib.import_module(f".{name}", __package__).load(folder, partial, seed)

"""MagnaTagATune: 29 s excerpts of music, its fifty commonest tags, split by folder: 0-b, c, d-f."""

from __future__ import annotations

import os

import numpy as np

from .task import Fold, Layout, Task

_TAGS = 50
_CLIPS = 25_863
# Three files of the official archive are empty.
_EMPTY = {
    "6/norine_braun-now_and_zen-08-gently-117-146.mp3",
    "8/jacob_heringman-josquin_des_prez_lute_settings-19-gintzler__pater_noster-204-233.mp3",
    "9/american_baroque-dances_and_suites_of_rameau_and_couperin-25-le_petit_rien_trio_xiv_concert_couperin-88-117.mp3",
}


def load(path: str | os.PathLike[str], partial: bool = False, seed: int = 0) -> Task:
    """The official folder: annotations_final.csv and the sixteen folders 0 to f, in it or in mp3/.

    The fifty tags are those of most clips; clips that have none of them are left out, as is usual. Excerpts of one
    recording are one group, and the official folders keep an artist's work together.
    """
    layout = Layout("magnatagatune", path, partial)
    table = "annotations_final.csv"
    rows = layout.rows(table, ["clip_id", "mp3_path"], "\t")
    layout.count(table, "clips", len(rows), _CLIPS)
    tags = [name for name in (rows[0] if rows else {}) if name not in ("clip_id", "mp3_path")]
    values = np.array([[row[tag] == "1" for tag in tags] for row in rows])
    common = np.sort(np.argsort(-values.sum(0), kind="stable")[:_TAGS])
    values = values[:, common]
    wanted = values.any(1) & np.array([row["mp3_path"] not in _EMPTY for row in rows])
    rows, values = [row for row, kept in zip(rows, wanted, strict=True) if kept], values[wanted]
    root = layout.first("mp3", ".")
    names = [os.path.normpath(f"{root}/{row['mp3_path']}") for row in rows]
    kept, seconds = layout.audio(names, (20.0, 40.0))
    first = np.array([rows[i]["mp3_path"][0] for i in kept])
    train, valid, test = first <= "b", first == "c", first >= "d"
    return Task(
        name="magnatagatune",
        kind="multi",
        classes=tuple(tags[i] for i in common),
        paths=[layout.folder / names[i] for i in kept],
        targets=values[kept].astype(np.float32),
        # The file's name ends in the seconds that the excerpt begins and ends at.
        groups=np.array([rows[i]["mp3_path"].rsplit("-", 2)[0] for i in kept]),
        folds=[Fold(*map(np.flatnonzero, (train, test, valid)))],
        seconds=seconds,
        left_out=layout.problems,
    )

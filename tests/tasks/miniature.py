"""Miniature copies of the data sets, in their official layouts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import soundfile


def tone(path: Path, seconds: float, seed: int = 0, rate: int = 8000) -> None:
    """A file whose sound tells the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * rate)) / rate
    random = np.random.default_rng(seed)
    wave = 0.3 * np.sin(2 * np.pi * 200 * (1 + seed % 7) * time) + 0.01 * random.normal(size=len(time))
    soundfile.write(path, wave, rate, **({"format": "OGG", "subtype": "VORBIS"} if path.suffix == ".ogg" else {}))


def table(path: Path, rows: list[dict], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def esc50(root: Path) -> None:
    rows = []
    for fold in range(1, 6):
        for target, category in enumerate(("dog", "rain", "clock_tick")):
            name = f"{fold}-{100 * fold + target}-A-{target}.wav"
            rows.append(dict(filename=name, fold=fold, target=target, category=category, esc10="False"))
            rows[-1] |= dict(src_file=100 * fold + target, take="A")
            tone(root / "audio" / name, 5, target)
    table(root / "meta/esc50.csv", rows)


def urbansound8k(root: Path) -> None:
    rows = []
    for fold in range(1, 11):
        for target, name in enumerate(("siren", "drilling")):
            file = f"{1000 + fold}-{target}-0-0.wav"
            rows.append(dict(slice_file_name=file, fsID=1000 + fold, start=0, end=1, salience=1, fold=fold))
            rows[-1] |= {"classID": target, "class": name}
            tone(root / f"audio/fold{fold}" / file, 0.5 + target, target)
    table(root / "metadata/UrbanSound8K.csv", rows)


def gtzan(root: Path) -> None:
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for genre in ("blues", "rock"):
        for i in range(6):
            tone(root / f"genres/{genre}/{genre}.{i:05d}.wav", 30, i, 2000)
            splits[("train", "train", "train", "valid", "valid", "test")[i]].append(f"{genre}/{genre}.{i:05d}.au")
    for split, names in splits.items():
        (root / f"{split}_filtered.txt").write_text("\n".join(names) + "\n")


def tau2020(root: Path) -> None:
    meta, setup = [], {"train": [], "evaluate": []}
    for number, scene in enumerate(("airport", "metro_station")):
        for location in range(3):
            for device in ("a", "s1") if location < 2 else ("a", "s4"):
                name = f"audio/{scene}-barcelona-{10 * number + location}-{location}-{device}.wav"
                tone(root / name, 10, number)
                row = dict(filename=name, scene_label=scene)
                meta.append(row | dict(identifier=f"barcelona-{10 * number + location}", source_label=device))
                setup["train" if location < 2 else "evaluate"].append(row)
    table(root / "meta.csv", meta, "\t")
    for name, rows in setup.items():
        table(root / f"evaluation_setup/fold1_{name}.csv", rows, "\t")


def openmic(root: Path) -> None:
    places = {"accordion": 0, "bass": 1, "banjo": 2}
    root.mkdir(parents=True, exist_ok=True)
    (root / "class-map.json").write_text(json.dumps(places))
    rows, splits = [], {"train": [], "test": []}
    for i in range(8):
        key = f"{i:06d}_{1000 * i}"
        tone(root / f"audio/{key[:3]}/{key}.ogg", 10, i)
        for instrument, place in places.items():
            if (i + place) % 4:  # a quarter is unknown
                rows.append(dict(sample_key=key, instrument=instrument, relevance=0.5 if (i + place) % 2 else 0.49))
                rows[-1]["num_responses"] = 3
        splits["train" if i < 5 else "test"].append(key)
    table(root / "openmic-2018-aggregated-labels.csv", rows)
    for split, keys in splits.items():
        (root / "partitions").mkdir(exist_ok=True)
        (root / f"partitions/split01_{split}.csv").write_text("\n".join(keys) + "\n")


def magnatagatune(root: Path) -> None:
    rows = []
    for i, folder in enumerate(("0", "3", "b", "c", "d", "f", "1")):
        name = f"{folder}/artist-album-01-song-{29 * i}-{29 * i + 29}.wav"  # libsndfile goes by content, not by name
        tone(root / "mp3" / name, 29, i, 2000)
        tags = {f"tag {t}": int((i + t) % 3 == 0) for t in (51, *range(51))}  # of which 50 and 51 are on no clip
        tags["tag 50"] = tags["tag 51"] = 0
        if folder == "1":
            tags = dict.fromkeys(tags, 0)
        rows.append({"clip_id": i, **tags, "mp3_path": name})
    table(root / "annotations_final.csv", rows, "\t")


def nsynth(root: Path) -> None:
    for split, families in dict(train=("bass", "reed", "synth_lead"), valid=("bass", "reed"), test=("bass",)).items():
        notes = {}
        for pitch in (40, 60):
            for family in families:
                name = f"{family}_acoustic_000-{pitch:03d}-100"
                notes[name] = dict(instrument_family_str=family, instrument_str=f"{family}_{split}", pitch=pitch)
                tone(root / f"nsynth-{split}/audio/{name}.wav", 4, pitch)
        (root / f"nsynth-{split}/examples.json").write_text(json.dumps(notes))


def fsd50k(root: Path) -> None:
    words = ("Bark", "Rain", "Guitar")
    (root / "FSD50K.ground_truth").mkdir(parents=True)
    (root / "FSD50K.ground_truth/vocabulary.csv").write_text("".join(f"{i},{w},/m/{i}\n" for i, w in enumerate(words)))
    rows = {"dev": [], "eval": []}
    for i in range(9):
        part = "dev" if i < 7 else "eval"
        labels = ",".join(words[j] for j in sorted({i % 3, (i + i // 3) % 3}))
        rows[part].append(dict(fname=str(i), labels=labels, mids="/m/0"))
        if part == "dev":
            rows[part][-1]["split"] = "train" if i < 5 else "val"
        tone(root / f"FSD50K.{part}_audio/{i}.wav", 0.5 + i / 4, i)
    for part, some in rows.items():
        table(root / f"FSD50K.ground_truth/{part}.csv", some)


def hear(root: Path, splits=("fold00", "fold01", "fold02"), mode="new_split_kfold", kind="multiclass") -> None:
    """In which numbers are labels: how many speak."""
    labels = (0, 2, 10)  # as text 10 comes before 2
    for number, split in enumerate(splits):
        told = {}
        for label in labels:
            name = f"{label}-{number}.wav"
            told[name] = [label] if kind == "multiclass" or label == 2 else [label, 2]
            tone(root / f"48000/{split}/{name}", 1.5, label, 8000)
        (root / f"{split}.json").write_text(json.dumps(told))
    table(root / "labelvocabulary.csv", [dict(idx=i, label=label) for i, label in enumerate(labels)])
    about = dict(task_name="libricount", version="v1", embedding_type="scene", prediction_type=kind, split_mode=mode)
    about |= dict(sample_duration=1.5, evaluation=["top1_acc"], nfolds=len(splits), splits=list(splits), mode="full")
    (root / "task_metadata.json").write_text(json.dumps(about))


def folder(root: Path, labels: tuple[str, ...] = ("cat", "dog", "owl"), clips: int = 10, seconds: float = 1.0) -> None:
    """Sub-folder = label; the label is in the pitch, so that any encoder can hear it."""
    for number, label in enumerate(labels):
        for i in range(clips):
            tone(root / label / f"{i}.wav", seconds, number + 7 * i, 16_000)

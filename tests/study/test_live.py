"""The live probe: right on audio that can be told apart, at chance on noise, and told by a run as it goes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import soundfile
import torch

from matpac_fast.audio.corpus import Corpus
from matpac_fast.audio_encoder import AudioEncoder
from matpac_fast.config import MatpacConfig
from matpac_fast.errors import AudioError, ConfigError
from matpac_fast.model import Matpac
from matpac_fast.study.live import LiveProbe, _evenly, _nearest
from matpac_fast.train import TrainConfig, pretrain, read_log

CONFIG = MatpacConfig(
    n_frames=32,
    width=16,
    depth=1,
    num_heads=2,
    predictor_width=12,
    predictor_depth=1,
    predictor_heads=2,
    head_hidden=16,
    head_bottleneck=8,
    prototypes=12,
)


pytestmark = pytest.mark.usefixtures("one_thread")


def write(folder, name, wave, sample_rate=16_000):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, sample_rate)


@pytest.fixture
def tones(tmp_path):
    """Three pitches of eight clips each, in noise; and files that are of no use."""
    rng = np.random.default_rng(0)
    time = np.arange(6_000) / 16_000
    for label, hz in (("low", 200), ("middle", 900), ("high", 4_000)):
        for i in range(8):
            wave = 0.3 * np.sin(2 * np.pi * hz * time + i) + 0.02 * rng.standard_normal(len(time))
            write(tmp_path / "tones", f"{label}/deep/{i}.wav", wave)
    write(tmp_path / "tones", "loose.wav", np.zeros(500))
    write(tmp_path / "tones", "few/0.wav", rng.standard_normal(500) / 10)
    (tmp_path / "tones" / "low" / "broken.wav").write_bytes(b"RIFF")
    return tmp_path / "tones"


def test_it_tells_tones_apart_and_says_what_it_left_out(tones):
    probe = LiveProbe(tones, seconds=0.25)
    assert (probe.labels, len(probe)) == (["high", "low", "middle"], 24)
    assert all(len(wave) == 4_000 and wave.dtype == np.int16 for wave in probe._waves)
    assert len(probe.left_out) == 2
    assert "few: 1 clip; a label needs four" in probe.left_out[0]
    assert "broken.wav" in probe.left_out[1]
    state = Matpac(CONFIG).state_dict()
    found = probe(state, CONFIG)
    # Even an untrained encoder passes the pitch on.
    for side in ("student", "teacher"):
        assert found[f"{side}_knn"] == found[f"{side}_linear"] == 1.0
        assert 1 < found[f"{side}_rank"] < 24
    assert found["statistics_linear"] == found["statistics_knn"] == 1.0
    assert (found["clips"], found["labels"]) == (24, 3)
    with torch.device("meta"):  # as torch.set_default_device("cuda")
        assert found == LiveProbe(tones, seconds=0.25)(state, CONFIG)
    assert found["student_rank"] != found["teacher_rank"]  # two encoders, not one twice
    state["student.norm.weight"] = torch.full((16,), float("nan"))
    found = probe(state, CONFIG)
    assert math.isnan(found["student_knn"])
    assert found["teacher_knn"] == 1.0


def test_a_model_of_32_khz_hears_what_is_above_8(tmp_path, monkeypatch):
    rng, rates, embed_many = np.random.default_rng(0), set(), AudioEncoder.embed_many

    def noted(self, clips, sample_rate):
        rates.add(sample_rate)
        return embed_many(self, clips, sample_rate)

    monkeypatch.setattr(AudioEncoder, "embed_many", noted)
    for i in range(16):
        tone = 0.3 * np.sin(2 * np.pi * (9_500, 13_000)[i % 2] / 32_000 * np.arange(6_000))
        write(tmp_path / "tones", f"{i % 2}/{i:02d}.wav", tone + 0.02 * rng.standard_normal(6_000), 32_000)
    config = CONFIG.replace(sample_rate=32_000, f_max=16_000.0)  # at 16 kHz, both would be noise
    found = LiveProbe(tmp_path / "tones", sample_rate=32_000)(Matpac(config).state_dict(), config)
    assert found["student_knn"] == found["teacher_knn"] == 1.0
    assert rates == {32_000}


def test_on_labels_that_mean_nothing_it_is_at_chance(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(80):
        write(tmp_path / "noise", f"{i % 2}/{i:02d}.wav", 0.1 * rng.standard_normal(3_000))
    found = LiveProbe(tmp_path / "noise")(Matpac(CONFIG).state_dict(), CONFIG)
    for name in ("student_knn", "student_linear", "teacher_knn", "teacher_linear", "statistics_linear"):
        assert 0.3 < found[name] < 0.7


def test_neighbours_vote_by_their_cosine():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [-1.0, 0.2]])
    labels = torch.tensor([0, 0, 1, 1])
    test = torch.tensor([[2.0, 0.1], [-3.0, 0.1], [5.0, 0.0]])
    assert _nearest(train, labels, test, torch.tensor([0, 1, 1])).tolist() == [True, True, False]


def test_clips_are_chosen_evenly():
    by_label = {"a": list(range(10)), "b": list(range(100)), "c": list(range(3))}
    assert {label: len(paths) for label, paths in _evenly(by_label, 33).items()} == {"c": 3, "a": 10, "b": 20}
    assert _evenly(by_label, 12)["b"] == [0, 20, 40, 60, 80]
    assert _evenly(by_label, 1_000) == by_label


def test_folders_without_labels_are_refused(tmp_path):
    with pytest.raises(AudioError, match="no such folder"):
        LiveProbe(tmp_path / "nowhere")
    write(tmp_path, "one/0.wav", np.ones(400) / 3)
    with pytest.raises(ConfigError, match=r"labels with four clips or more: 0;.*one: 1 clip; a label needs four"):
        LiveProbe(tmp_path)


def test_a_run_logs_it_before_during_and_after_and_is_not_changed_by_it(tmp_path, tones):
    rng = np.random.default_rng(0)
    corpus = Corpus.from_arrays([rng.uniform(-0.5, 0.5, 6_000) for _ in range(6)])
    config = TrainConfig(steps=5, batch_size=2, probe_every=2, log_every=1, precision="float32")
    probe = LiveProbe(tones, n_clips=16)
    pretrain(corpus, tmp_path / "probed", CONFIG, config, "cpu", probe=probe)
    pretrain(corpus, tmp_path / "plain", CONFIG, config, "cpu")
    told = [r for r in read_log(tmp_path / "probed" / "log.jsonl") if r.get("event") == "probe"]
    assert [r["step"] for r in told] == [0, 2, 4, 5]
    assert told[0].keys() >= {"student_knn", "student_linear", "student_rank", "teacher_knn", "clips", "seconds"}
    losses = [
        [r["loss"] for r in read_log(tmp_path / name / "log.jsonl") if "loss" in r] for name in ("probed", "plain")
    ]
    assert losses[0] == losses[1]

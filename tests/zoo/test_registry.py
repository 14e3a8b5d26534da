"""Names, the table of docs/encoders.md, and the encoder of one's own that it shows."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch

import matpac_fast as mf
from matpac_fast import encoder as encoders
from matpac_fast.config import PRESETS
from matpac_fast.errors import CheckpointError, ConfigError
from matpac_fast.zoo import aisfx, beats, cnn14, crepe, passt, registry
from tests.zoo.official import noise

DOCS = Path(__file__).parents[2] / "docs" / "encoders.md"


@pytest.fixture
def own_names(monkeypatch):
    monkeypatch.setattr(encoders, "_registry", dict(encoders._registry))


def test_every_encoder_is_listed_once():
    names = mf.list_encoders()
    assert len(names) == len(set(names))
    assert {name for name, _, _ in registry.ENCODERS} <= set(names)
    assert {"random-init", "logmel-stats", "passt", "beats", "cnn14", "hear", "aisfx", "torchcrepe"} <= set(names)
    assert mf.list_encoders("untrained-*") == [f"untrained-{preset}" for preset in PRESETS]
    text = DOCS.read_text(encoding="utf-8")
    assert all(f"`{name}" in text for name in names if not name.startswith("untrained-"))


def test_an_encoder_is_imported_when_it_is_loaded():
    entries = [encoders._registry[name].load for name, _, _ in registry.ENCODERS]
    assert all(isinstance(entry, importlib.metadata.EntryPoint) for entry in entries)
    assert all(callable(entry.load()) for entry in entries)


def seconds(text: str) -> float | None:
    found = re.match(r"([\d.]+) (ms|s)", text)
    return None if found is None else float(found[1]) * {"ms": 1e-3, "s": 1.0}[found[2]]


def test_the_table_of_the_docs_is_true():
    made = {
        "passt:FILE": passt.Passt,
        "beats:FILE": beats.Beats,
        "cnn14:FILE": cnn14.Cnn14,
        "aisfx": aisfx.AiSfx,
        "torchcrepe": crepe.Crepe,
        "torchcrepe:tiny": lambda: crepe.Crepe("tiny"),
        "logmel-stats": lambda: mf.load_encoder("logmel-stats", "cpu"),
        "untrained-tiny": lambda: mf.load_encoder("untrained-tiny", "cpu"),
        "matpac-nano": lambda: mf.load_encoder(device="cpu"),
        "matpac:FILE": mf.Encoder,
    }
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in DOCS.read_text("utf-8").splitlines()
        if line.count("|") == 9 and not line.startswith(("|---", "| name"))
    ]  # fmt: skip
    checked = set()
    for names, _, rate, numbers, frames, shortest, native, beyond in rows:
        for name in re.findall(r"`([^`]+)`", names):
            if name not in made:
                continue
            with torch.device("meta") if name.endswith("FILE") or "crepe" in name else torch.device("cpu"):
                facts = made[name]().facts()
            checked.add(name)
            assert (facts["sample_rate"], facts["embedding_dim"]) == (int(rate), int(numbers)), name
            assert facts["frame_seconds"] == seconds(frames), name
            assert facts["min_seconds"] == pytest.approx(seconds(shortest), rel=0.02), name
            assert facts["native_seconds"] == pytest.approx(seconds(native), abs=1e-3), name
            assert facts["beyond"] == beyond, name
    assert checked == set(made)


def test_the_encoder_in_the_docs(own_names):
    text = DOCS.read_text(encoding="utf-8")
    code = text.split("<!-- run by tests/zoo/test_registry.py -->\n```python\n")[1].split("```")[0]
    exec(compile(code, str(DOCS), "exec"), {"__name__": "docs"})
    encoder = mf.load_encoder("loudness", "cpu")
    assert "loudness" in mf.list_encoders()
    wave = noise(48_000)
    found = encoder.embed([wave, wave[:1]], 16_000, temporal_support=1.0)
    assert found[0].values.shape == (3, 2)
    torch.testing.assert_close(found[0].values[1, 1], wave[16_000:32_000].abs().max())
    torch.testing.assert_close(found[1].values[0, 0], wave[0] ** 2 / 160)
    assert encoder.embed(wave, 44_100, 0.5).values.shape[1] == 2


@pytest.mark.parametrize("name", ["", "a:b", "team/a", "m2d", "random-init", "untrained-mine"])
def test_names_that_cannot_be(own_names, name):
    with pytest.raises(ConfigError, match="expected one without a colon or / that is not built in"):
        mf.register_encoder(name, "x:y")


def test_what_is_registered_may_be_a_reference_a_mark_and_an_option(own_names, tmp_path):
    mf.register_encoder("broken", "no_such_module:load")
    with pytest.raises(CheckpointError, match="encoder 'broken': no_such_module:load does not load"):
        mf.load_encoder("broken", "cpu")
    asked = []

    def load(argument: str, device: torch.device, dtype: torch.dtype, num_heads: int | None = None) -> mf.AudioEncoder:
        asked.append((argument, num_heads))
        return mf.load_encoder("logmel-stats", device)

    mf.register_encoder("marked", load, mark="only.mine")
    path = tmp_path / "mine.pt"
    torch.save({"only.mine": torch.zeros(1)}, path)
    mf.load_encoder(path, "cpu")
    mf.load_encoder("marked:any thing", "cpu", num_heads=3)
    assert asked == [(str(path), None), ("any thing", 3)]
    mf.register_encoder("trained", lambda argument, device, dtype: mf.load_encoder("passt").requires_grad_().train())
    assert not any(p.requires_grad for p in mf.load_encoder("trained", "cpu").parameters())
    mf.register_encoder("liar", lambda argument, device, dtype: None)
    with pytest.raises(CheckpointError, match="encoder 'liar': .* gave a NoneType, not an AudioEncoder"):
        mf.load_encoder("liar", "cpu")


def test_this_packages_names_come_before_other_packages(monkeypatch):
    entries = [
        importlib.metadata.EntryPoint(name, "elsewhere:load", "matpac_fast.encoders")
        for name in ("logmel-stats", "matpac-nano")
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    assert mf.list_encoders("logmel*") == ["logmel-stats"]
    assert mf.list_encoders("matpac-nano") == ["matpac-nano"]
    assert mf.load_encoder("logmel-stats", "cpu").embedding_dim == 160


def test_a_package_that_exits_when_it_is_imported_ends_nothing(own_names, tmp_path, monkeypatch):
    (tmp_path / "quits.py").write_text("raise SystemExit('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    mf.register_encoder("quits", "quits:load")
    with pytest.raises(CheckpointError, match="encoder 'quits': quits:load does not load: no licence"):
        mf.load_encoder("quits", "cpu")


def test_a_name_of_several_packages_is_refused(monkeypatch):
    places = ("one:load", "two:load")
    entries = [importlib.metadata.EntryPoint("theirs", place, "matpac_fast.encoders") for place in places]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    assert mf.list_encoders("theirs") == ["theirs"]
    with pytest.raises(ConfigError, match="'theirs' is what several installed packages call .*: one:load, two:load;"):
        mf.load_encoder("theirs", "cpu")


def test_statistics_are_those_of_the_log_mel():
    encoder = mf.load_encoder("logmel-stats", "cpu")
    wave = noise(2, 20_000)
    spec = mf.ops.log_mel(wave)
    want = torch.cat([spec.mean(2), spec.var(2, correction=0).sqrt()], dim=1)
    torch.testing.assert_close(encoder.embed(wave, 16_000).values[:, 0], want, rtol=0, atol=1e-5)
    assert encoder.embed(wave[0, :1], 16_000).values[0, 80:].abs().max() == 0  # one frame does not deviate
    with pytest.raises(ConfigError, match="logmel-stats takes no argument; got 'x'"):
        mf.load_encoder("logmel-stats:x", "cpu")

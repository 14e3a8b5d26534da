"""`matpac-fast doctor`: everything is said, what is missing has its command, what computes wrongly fails."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from matpac_fast import __version__, backend, ops
from matpac_fast.audio import decode
from matpac_fast.cli import doctor, main


@pytest.fixture(autouse=True)
def no_audio_twice(request, monkeypatch):
    # The tone through every codec is tried once; the other tests are about other parts.
    if request.node.name not in ("test_all_is_well", "test_a_decoder_that_is_off_fails"):
        monkeypatch.setattr(doctor, "_audio", lambda: "left out")


def test_all_is_well(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert __version__ in out
    assert torch.__version__ in out
    assert all(f"  {name} " in out for name in ("reference", "cpp", "soundfile", "soxr", "onnx", "triton"))
    assert out.count(" ok: ") == 4
    assert "training     ok: gradients in float32 on cpu, off by " in out
    assert ".wav .flac .ogg .opus .mp3 (soundfile" in out
    assert "quality soxr HQ" in out
    assert out.endswith("All is well.\n")


def test_what_is_missing_comes_with_the_command_that_mends_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "MISSING, needed for prepare and embed: pip install pyarrow" in out
    assert "not installed; for export --onnx: pip install 'matpac_fast[export]'" in out
    assert "Something is wrong: pyarrow is missing\n" in out


def test_a_package_whose_shared_library_is_missing_is_missing(monkeypatch):
    def unloadable(name: str) -> None:
        raise OSError("libsndfile.so.1: cannot open shared object file")

    assert doctor._version("soundfile") is not None
    monkeypatch.setattr(doctor.importlib, "import_module", unloadable)
    assert doctor._version("soundfile") is None


def test_a_kernel_that_is_off_fails(monkeypatch, capsys):
    right = ops.log_mel
    monkeypatch.setattr(ops, "log_mel", lambda wave, *args: right(wave, *args) + 1e-3)
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "log-mel      FAILED: ArithmeticError: " in out
    assert "is off by 1.0e-03" in out
    assert "embedding    ok" in out
    assert out.endswith("Something is wrong: log-mel\n")


def test_gradients_that_are_off_fail(monkeypatch, capsys):
    right = ops.prototype_loss

    def off(*args, **options):
        loss, mean = right(*args, **options)
        return (loss if backend._forced == "reference" else 1.5 * loss), mean

    monkeypatch.setattr(ops, "prototype_loss", off)
    assert doctor.main() == 1
    assert "training     FAILED: ArithmeticError: gradients on cpu are off by " in capsys.readouterr().out


def test_a_decoder_that_is_off_fails(monkeypatch):
    monkeypatch.setattr(doctor, "_FORMATS", {".wav": ("WAV", "PCM_16")})
    right = decode.read_audio
    monkeypatch.setattr(decode, "read_audio", lambda path: right(path) / 2)
    with pytest.raises(ArithmeticError, match=r"^\.wav cannot be decoded by .*: pip install -U soundfile"):
        doctor._audio()


def test_an_embedding_that_is_no_numbers_fails(monkeypatch):
    found = SimpleNamespace(values=torch.full((1, 4), torch.nan))
    monkeypatch.setattr("matpac_fast.encoder.load_encoder", lambda: SimpleNamespace(embed=lambda *_: found))
    with pytest.raises(ArithmeticError, match="an embedding is not finite"):
        doctor._embedding()


def test_what_breaks_in_a_test_does_not_hide_the_rest(monkeypatch, capsys):
    def broken(*_: object) -> None:
        raise RuntimeError("undefined symbol: log_mel_cpu")

    monkeypatch.setattr(ops, "log_mel", broken)
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert out.count("FAILED: RuntimeError: undefined symbol: log_mel_cpu") == 2
    assert "audio files  ok" in out

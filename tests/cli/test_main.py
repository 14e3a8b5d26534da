"""The command line's own behaviour: help, unknown commands, one-line errors, exit codes."""

from __future__ import annotations

import types

import pytest

from matpac_fast import __version__, cli
from matpac_fast.errors import CorpusError


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert cli.main([]) == cli.FAILED


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"matpac_fast {__version__}"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"matpac-fast {name}" in capsys.readouterr().out


def test_an_unknown_command_is_named(capsys):
    assert cli.main(["pretrian"]) == cli.FAILED
    assert "no command 'pretrian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CorpusError("corpus/ holds no index; run matpac-fast prepare"), 2, "corpus/ holds no index"),
        (OSError(28, "No space left on device", "out.parquet"), 2, "No space left on device: 'out.parquet'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_without_traceback(monkeypatch, capsys, error, code, line):
    def fail() -> None:
        raise error

    monkeypatch.delenv("MATPAC_FAST_DEBUG", raising=False)
    monkeypatch.setattr(cli.importlib, "import_module", lambda *_: types.SimpleNamespace(main=fail))
    assert cli.main(["demo"]) == code
    err = capsys.readouterr().err
    assert line in err
    assert len(err.strip().splitlines()) == 1

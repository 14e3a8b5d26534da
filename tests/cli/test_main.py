"""The command line's own behaviour: help, unknown commands, one-line errors, exit codes."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from matpac_fast import __version__, cli
from matpac_fast.cli._options import described
from matpac_fast.errors import ConfigError, CorpusError


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
    said = capsys.readouterr().out
    assert f"Example: matpac-fast {name}" in said
    # What may be left out says what happens then; a switch is no choice between three words.
    assert "default: None" not in said
    assert "{None" not in said
    assert "True,False" not in said


def test_an_unknown_command_is_named(capsys):
    assert cli.main(["pretrian"]) == cli.FAILED
    assert "no command 'pretrian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CorpusError("corpus/ holds no index; run matpac-fast prepare"), 2, "corpus/ holds no index"),
        (OSError(28, "No space left on device", "out.parquet"), 2, "demo: out.parquet: No space left on device"),
        (OSError("no device"), 2, "demo: no device"),
        (ConfigError("demo: hop is 0"), 2, "matpac-fast demo: hop is 0"),
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


def test_nothing_is_said_to_nobody(monkeypatch, capfd):
    def unheard() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    moved: list = []
    monkeypatch.setattr(cli.os, "dup2", lambda *handles: moved.append(handles))
    monkeypatch.setattr(cli.importlib, "import_module", lambda *_: types.SimpleNamespace(main=unheard))
    assert cli.main(["demo"]) == cli.UNHEARD
    assert capfd.readouterr() == ("", "")
    assert [to for _, to in moved] == [sys.stdout.fileno()]  # for what Python flushes when it exits


def test_a_switch_is_left_as_it_is_where_nothing_is_said():
    seen = []

    def main(
        source: Annotated[Path, tyro.conf.Positional], fast: bool | None = None, sizes: tuple[float, ...] | None = None
    ) -> None:
        """Do it."""
        seen.append((str(source), fast, sizes))

    for more in ([], ["--fast"], ["--no-fast", "--sizes", "1", "2.5"]):
        tyro.cli(described(main), args=["here", *more])
    assert seen == [("here", None, None), ("here", True, None), ("here", False, (1.0, 2.5))]

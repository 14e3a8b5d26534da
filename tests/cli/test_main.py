"""The command line's own behaviour: help, unknown commands, one-line errors, exit codes."""

from __future__ import annotations

import io
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import torch
import tyro

from matpac_fast import __version__, cli, embedding
from matpac_fast.cli._options import described
from matpac_fast.errors import ConfigError, CorpusError


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert cli.main([]) == cli.FAILED


def test_the_demo_takes_as_long_as_the_readme_says():
    said = "in five to ten minutes, offline"
    assert said in (Path(__file__).parents[2] / "README.md").read_text()
    assert all(words in cli.COMMANDS["demo"] for words in said.split(", "))


def test_a_command_is_annotated_once_however_often_it_runs_in_a_process():
    """Python 3.10 read the third round's annotations wrongly."""

    def main(name: str, number: int | None = None) -> None: ...

    once = dict(described(main).__annotations__)
    assert described(main).__annotations__ == once


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
    described = said.partition("\n")[2].partition("\u256d")[0]  # between usage and options
    assert max(map(len, described.splitlines())) <= 80  # the terminal's width here
    # What may be left out says what happens then; a switch is no choice between three words.
    assert "default: None" not in said
    assert "(default: )" not in said
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
        (PermissionError(13, "Permission denied", "demo"), 2, "matpac-fast demo: demo: Permission denied"),
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


def running(monkeypatch, main):
    monkeypatch.setattr(cli.importlib, "import_module", lambda *_: types.SimpleNamespace(main=main))
    return cli.main(["demo"])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["embed", "--help"]])
def test_what_cannot_be_printed_is_one_line_or_nothing(monkeypatch, capsys, arguments):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(arguments) == cli.FAILED
    assert capsys.readouterr().err == f"matpac-fast {arguments[0]}: standard output: No space left on device\n"
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as unheard:  # closing it raises nothing any more
        monkeypatch.setattr(sys, "stdout", unheard)
        assert cli.main(arguments) == cli.UNHEARD
    assert capsys.readouterr().err == ""


def test_a_name_that_cannot_be_encoded_ends_no_command(monkeypatch):
    told = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", told)
    assert running(monkeypatch, lambda: print("h\xe9 \udcff")) == 0
    assert told.buffer.getvalue() == b"h\\xe9 \\udcff\n"  # pyright: ignore[reportAttributeAccessIssue]


def test_no_name_of_a_file_moves_the_terminal(monkeypatch, capsys):
    def fail() -> None:
        raise CorpusError("a\x1b]0;title\x07\x9b2J\nb.wav: un\xe9cht\ttoo")

    monkeypatch.delenv("MATPAC_FAST_DEBUG", raising=False)
    assert running(monkeypatch, fail) == cli.FAILED
    said = capsys.readouterr().err
    assert said == "matpac-fast demo: a\\x1b]0;title\\x07\\x9b2J\\nb.wav: un\xe9cht\ttoo\n"


def test_streams_that_are_closed_are_none_of_the_next_file(monkeypatch, capsys):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
        assert running(monkeypatch, lambda: print("lost", file=getattr(sys, name))) == 0  # noqa: B023
        getattr(sys, name).close()
        monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


def test_too_few_threads_are_one_line_and_other_faults_are_not(monkeypatch, capsys):
    def fail(text: str) -> Callable[[], None]:
        def main() -> None:
            raise RuntimeError(text)

        return main

    monkeypatch.delenv("MATPAC_FAST_DEBUG", raising=False)
    assert running(monkeypatch, fail("can't start new thread")) == cli.FAILED
    assert capsys.readouterr().err.startswith("matpac-fast demo: can't start new thread; expected more memory")
    with pytest.raises(RuntimeError, match="a fault"):
        running(monkeypatch, fail("a fault"))


def test_the_packages_own_warnings_are_one_line_and_others_are_as_ever(monkeypatch, capsys):
    def main() -> None:
        warnings.warn_explicit("demo: half the room", UserWarning, embedding.__file__, 7)
        warnings.warn_explicit("two\nlines", UserWarning, cli.__file__, 7)
        warnings.warn_explicit("of another", UserWarning, torch.__file__, 7)
        warnings.warn_explicit("of an age", FutureWarning, cli.__file__, 7)

    monkeypatch.delenv("MATPAC_FAST_DEBUG", raising=False)
    shown = warnings.showwarning
    with pytest.warns() as others:
        assert running(monkeypatch, main) == 0
    assert capsys.readouterr().err == "matpac-fast demo: warning: half the room\nmatpac-fast demo: warning: two\n"
    assert [str(other.message) for other in others] == ["of another", "of an age"]
    assert warnings.showwarning is shown  # for who calls it from Python
    monkeypatch.setenv("MATPAC_FAST_DEBUG", "1")
    with pytest.warns() as others:
        assert running(monkeypatch, main) == 0
    assert (len(others), capsys.readouterr().err) == (4, "")


def test_what_is_no_path_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, named in (
        (["prepare", "", "corpus"], "''"),
        (["prepare", ".", "s3://bucket/x"], "'s3://bucket/x'"),
        (["pretrain", ".", "--out", "run", "--init", ""], "''"),
        (["demo", "--out", ""], "''"),
    ):
        assert cli.main(arguments) == cli.FAILED
        line = f"matpac-fast {arguments[0]}: {named} is no path; expected that of a file or folder of this machine\n"
        assert capsys.readouterr().err == line
    assert not list(tmp_path.iterdir())

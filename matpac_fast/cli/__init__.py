"""The command line: `matpac-fast <command>`, one thin file a command, imported only when it runs.

A command is a module of this package with a function `main(...)`; its signature and docstring are the command's
options and help (tyro reads them). It returns its exit code, or None for 0.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from ..errors import MatpacFastError, first_line
from ._words import plain

# name, which is its module's -> one line of help
COMMANDS = {
    "demo": "pre-train, embed and probe on the embedded audio, offline, in five to ten minutes",
    "prepare": "turn a folder of audio into a corpus for pre-training",
    "pretrain": "pre-train an encoder on a corpus",
    "embed": "embed a folder of audio at a temporal support",
    "probe": "score an encoder on a task at one temporal support",
    "study": "accuracy, memory and time against the temporal support",
    "export": "write an encoder as one ONNX or torch.export file",
    "bench": "what the fused kernels gain on this machine, and where a training step's time goes",
    "doctor": "what runs here, what is missing for what, and the command that mends it",
}

# Exit codes: 0 done, 2 the command could not do its work, 130 interrupted (Ctrl-C), 141 nobody reads what it prints;
# others are a command's own.
FAILED = 2
INTERRUPTED = 130
UNHEARD = 141  # as a program that SIGPIPE ends

_NO_THREAD = "can't start new thread"  # Python's words
_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return f"usage: matpac-fast COMMAND ...\n\n{rows}\n\nmatpac-fast COMMAND --help shows its options and an example."


def main(argv: list[str] | None = None) -> int:
    """Run one command. Expected errors are one line on stderr; MATPAC_FAST_DEBUG=1 shows their traceback."""
    argv = sys.argv[1:] if argv is None else argv
    _mend_streams()
    try:
        try:
            return _run(argv)
        except Exception as error:
            _tell_others(argv, first_line(error))
            raise
        finally:
            _flush()
    except BrokenPipeError:  # nobody reads on, as behind `| head`; Python would say so once more when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNHEARD
    except OSError as error:
        if _debugs():
            raise
        return _failed(argv, _line(error))


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else FAILED
    if argv[0] == "--version":
        from .. import __version__

        print(f"matpac_fast {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"matpac-fast: no command {argv[0]!r}\n\n{_usage()}", file=sys.stderr)
        return FAILED
    try:
        module = importlib.import_module(f".{argv[0]}", __package__)
        import tyro

        from ._options import described, description, paths

        command, prog = described(module.main), f"matpac-fast {argv[0]}"
        with _short_warnings(argv):
            return tyro.cli(command, prog=prog, description=description(command), args=argv[1:], registry=paths) or 0
    except KeyboardInterrupt:
        print(f"matpac-fast {argv[0]}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except MatpacFastError as error:
        if _debugs():
            raise
        return _failed(argv, str(error).removeprefix(f"{argv[0]}: "))
    except RuntimeError as error:
        if _debugs() or str(error) != _NO_THREAD:
            raise
        return _failed(argv, f"{error}; expected more memory (ulimit -v) or more processes (ulimit -u) to be allowed")


def _failed(argv: list[str], line: str) -> int:
    _say(argv, line)
    _tell_others(argv, line)
    return FAILED


def _tell_others(argv: list[str], line: str) -> None:
    """Where several processes train together, the others wait for this one."""
    if argv[:1] == ["pretrain"] and _is_one_of_several():
        from ..train.joining import leave_word

        leave_word(line)


def _is_one_of_several() -> bool:
    """Whether torchrun started this process beside others; each says what ails it."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def _say(argv: list[str], line: str) -> None:
    rank = f" (rank {os.environ['RANK']})" if _is_one_of_several() else ""
    line = plain(line).replace("\n", "\\n")  # as a file may be called
    print(f"{' '.join(['matpac-fast', *argv[:1]])}{rank}: {line}", file=sys.stderr)


@contextlib.contextmanager
def _short_warnings(argv: list[str]) -> Iterator[None]:
    """Print the package's own warnings as one line each: a path and a line of source would look like a crash."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if _debugs() or not (issubclass(category, UserWarning) and filename.startswith(_PACKAGE)):
                others(message, category, filename, lineno, file, line)
            else:
                text = first_line(message) if isinstance(message, Warning) else message
                _say(argv, f"warning: {text.removeprefix(f'{argv[0]}: ')}")

        warnings.showwarning = show
        yield


def _debugs() -> bool:
    return os.environ.get("MATPAC_FAST_DEBUG") == "1"


def _mend_streams() -> None:
    """Have a stdout and a stderr that take whatever is printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by 2>&-; another file would get its number, and what C libraries write there
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # no name ends a finished run in an error


def _flush() -> None:
    """Write out what was printed: what fails then is said here, and not by Python when it exits."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error.filename = "standard output"
        raise


def _line(error: OSError) -> str:
    """What is wrong, in one line; the file first, without the system's number."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"

"""The command line: `matpac-fast <command>`, one thin file a command, imported only when it runs.

A command is a module of this package with a function `main(...)`; its signature and docstring are the command's
options and help (tyro reads them). It returns its exit code, or None for 0.
"""

from __future__ import annotations

import importlib
import os
import sys

from ..errors import MatpacFastError

# name -> (module, one line of help)
COMMANDS = {
    "demo": ("demo", "pre-train, embed and probe on the embedded audio, offline, in a few minutes"),
    "prepare": ("prepare", "turn a folder of audio into a corpus for pre-training"),
    "pretrain": ("pretrain", "pre-train an encoder on a corpus"),
    "embed": ("embed", "embed a folder of audio at a temporal support"),
    "probe": ("probe", "score an encoder on a task at one temporal support"),
    "study": ("study", "accuracy, memory and time against the temporal support"),
    "export": ("export", "write an encoder as one ONNX or torch.export file"),
    "bench": ("bench", "what the fused kernels gain on this machine, and where a training step's time goes"),
    "doctor": ("doctor", "what runs here, what is missing for what, and the command that mends it"),
}

# Exit codes: 0 done, 2 the command could not do its work, 130 interrupted (Ctrl-C), 141 nobody reads what it prints;
# others are a command's own.
FAILED = 2
INTERRUPTED = 130
UNHEARD = 141  # as a program that SIGPIPE ends


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: matpac-fast COMMAND ...\n\n{rows}\n\nmatpac-fast COMMAND --help shows its options and an example."


def main(argv: list[str] | None = None) -> int:
    """Run one command. Expected errors are one line on stderr; MATPAC_FAST_DEBUG=1 shows their traceback."""
    argv = sys.argv[1:] if argv is None else argv
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
        module = importlib.import_module(f".{COMMANDS[argv[0]][0]}", __package__)
        import tyro

        from ._options import described

        return tyro.cli(described(module.main), prog=f"matpac-fast {argv[0]}", args=argv[1:]) or 0
    except KeyboardInterrupt:
        print(f"matpac-fast {argv[0]}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # nobody reads on, as behind `| head`; Python would say so once more when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNHEARD
    except (MatpacFastError, OSError) as error:
        if os.environ.get("MATPAC_FAST_DEBUG") == "1":
            raise
        # Of the processes that torchrun starts each says what ails it.
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1" else ""
        print(f"matpac-fast {argv[0]}{rank}: {_line(error).removeprefix(f'{argv[0]}: ')}", file=sys.stderr)
        return FAILED


def _line(error: Exception) -> str:
    """What is wrong, in one line; of the system's errors the file first, without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"

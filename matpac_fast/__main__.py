"""`python -m matpac_fast`: what runs on this machine, and why the rest does not; with arguments `matpac-fast`."""

import sys

import torch

from . import __version__, backend

if __name__ == "__main__":
    if len(sys.argv) > 1:
        from .cli import main

        sys.exit(main())
    print(f"matpac_fast {__version__}, torch {torch.__version__}\n\n{backend.table()}")

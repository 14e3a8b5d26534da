"""`python -m matpac_fast`: what runs on this machine, and why the rest does not."""

import torch

from . import __version__, backend

if __name__ == "__main__":
    print(f"matpac_fast {__version__}, torch {torch.__version__}\n\n{backend.table()}")

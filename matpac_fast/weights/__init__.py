"""The pre-trained encoders that lie in this package; README.md beside this file is their model card."""

from pathlib import Path

DEFAULT = "matpac-nano"
PACKAGED = {DEFAULT: Path(__file__).parent / "matpac-nano.safetensors"}

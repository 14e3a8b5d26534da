"""The native functions. Pointers are integers; every argument is validated by `matpac_fast.ops`, none here."""

CUDA_ARCHS: str

def cuda_versions() -> tuple[int, int]: ...

"""The exceptions of the package. Each says what came, what was expected and what to do."""


class MatpacFastError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it as one line."""


class BackendError(MatpacFastError, RuntimeError):
    """A backend was forced that cannot run here; the message carries the reason."""


class ConfigError(MatpacFastError, ValueError):
    """A configuration that cannot be, such as heads that do not divide the width."""


class AudioError(MatpacFastError, ValueError):
    """A file or signal that cannot be used: unreadable, truncated, not finite, silent, too short."""


class DiskError(AudioError):
    """A file of audio that the system could not open or read, whatever is in it; another time it may."""


class CorpusError(MatpacFastError, RuntimeError):
    """A corpus that is missing, incomplete or altered."""


class CheckpointError(MatpacFastError, RuntimeError):
    """A checkpoint that is missing, damaged, unsafe or does not fit."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__

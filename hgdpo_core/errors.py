"""Errors a user can cause or must act on. Each message says what was expected, what came, and what to do.

The family is rooted in standard errors so that `except ValueError` and `except OSError` mean what they say,
and every member pickles: workers are separate processes.
"""


class HGDPOError(Exception):
    """Base of every error this package raises on purpose; its message alone, one line, is enough to act on."""

    def __init__(self, message: str = ""):
        super().__init__(" ".join(str(message).splitlines()))  # what it quotes may have line breaks


class ConfigError(HGDPOError, ValueError):
    """A setting is unknown, out of range or contradicts another. Retrying cannot help."""


class InputError(HGDPOError, ValueError):
    """What the user handed in (prompts, images, captions) cannot be used. Retrying cannot help."""


class ModelError(HGDPOError, ValueError):
    """A model is missing, of the wrong architecture, or broken. Retrying cannot help."""


class StorageError(HGDPOError, OSError):
    """The object store refused or lost something; the message says what to do."""


class TransientStorageError(StorageError):
    """The object store did not do its work for a while, although asked several times. Retrying later can help."""


class CorruptShardError(StorageError):
    """A shard's bytes are not the ones its manifest names. Making the shard again repairs it."""


class StoppedError(HGDPOError):
    """Work was asked to stop; everything committed so far is kept and a new start continues there."""


def first_line(error: BaseException) -> str:
    """The message of another library's error, cut to one line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

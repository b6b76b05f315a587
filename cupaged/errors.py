"""Errors a user can cause: each message is one sentence of cause and one of remedy."""


class CupagedError(Exception):
    """Base of every error that cupaged raises on purpose; `str(error)` is fit to print as one line."""


class InvalidArgument(CupagedError, ValueError):
    """An argument, option or prompt that cannot be used as given."""


class CheckpointError(CupagedError):
    """A model folder that cannot be used: missing, corrupt or of an unsupported kind."""


class FetchError(CupagedError):
    """A model that could not be obtained."""


class DeviceError(CupagedError):
    """A device that is missing, too old, or cannot run the kernels."""


class OutOfMemory(CupagedError):
    """Weights or KV pool do not fit in the memory of the device."""

"""The one error that a user is meant to read."""


class VmadError(Exception):
    """Bad input from outside: says what was expected, what came, and what to do. Exit status 2."""


class CheckpointError(VmadError):
    """A checkpoint that cannot be exported."""


class BundleError(VmadError):
    """A bundle (or station) that must not be used."""


class FrameError(VmadError):
    """An image that cannot be inspected."""

"""Errors that only the user can put right; entry points show them as one line and exit with code 2."""

from __future__ import annotations


def in_a_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    if type(error).__name__ == "UnidentifiedImageError":  # Pillow's, with the address of a buffer
        return "is in no image format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__


class UserError(ValueError):
    """Something the user gave is unusable; the message says what and what would be."""


class ConfigError(UserError):
    """A setting that cannot be; the message names the dotted key, its value and what is allowed."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{key}={value}: {allowed}")


class DataError(UserError):
    """Shards, an index or an image that cannot be used; the message names the file and, where there is one, the key."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit the model; the message names the file and the keys."""

"""What is raised where a checkpoint, or the folder of a run, can't be used."""

from __future__ import annotations

__all__ = ["CheckpointError", "FolderInUse"]


class CheckpointError(ValueError):
    """A checkpoint can't be used, or not with this strategy; the message says which file or which setting."""


class FolderInUse(CheckpointError):
    """Another process works on the folder; none of its files were touched."""

"""Several processes that train one adapter together; with one process everything here does nothing."""

from .processes import ALONE, OtherProcessError, Processes
from .torchrun import join

__all__ = ["ALONE", "OtherProcessError", "Processes", "join"]

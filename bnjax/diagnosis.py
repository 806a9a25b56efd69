"""What `bnjax.diagnose` returns: a report, and the findings in it."""

from typing import TYPE_CHECKING

from bnjax._names import front
from bnjax.models.diagnosis import Finding, Report, diagnose

__all__ = ["Finding", "Report", "diagnose"]

if not TYPE_CHECKING:  # or type checkers would accept any name
    __getattr__, __dir__ = front(__name__, __all__)

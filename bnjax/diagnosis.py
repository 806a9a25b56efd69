"""What `bnjax.diagnose` returns: a report, and the findings in it."""

from bnjax.models.diagnosis import Finding, Report, diagnose

__all__ = ["Finding", "Report", "diagnose"]

"""Models seen from outside, whoever wrote them: freeze, recalibrate, diagnose and fold."""

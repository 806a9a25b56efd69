"""Models from outside, in any library or class: freeze, recalibrate, diagnose and fold."""

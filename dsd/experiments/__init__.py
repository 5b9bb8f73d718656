"""Studies, the comparison of schedules, and scaling: what takes too long for every run."""

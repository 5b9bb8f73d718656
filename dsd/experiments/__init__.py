"""Studies, schedule comparisons and scaling: what takes too long for every run."""

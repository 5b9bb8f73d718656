"""The embedded world: drawn scenes of coloured shapes whose every fact is known exactly."""

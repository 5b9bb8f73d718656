"""The synthetic world: rendered scenes of coloured shapes, in which every relation is known exactly."""

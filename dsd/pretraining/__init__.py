"""The recipes and cards of the embedded checkpoints."""

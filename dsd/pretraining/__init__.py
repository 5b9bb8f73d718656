"""Pretraining recipes and model cards of the embedded checkpoints."""

"""Automatic evaluation of new checkpoints."""

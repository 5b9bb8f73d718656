"""Scorers: evidence to scores, higher is better. Plain arithmetic that NumPy arrays and tensors share."""

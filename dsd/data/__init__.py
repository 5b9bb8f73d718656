"""Data: examples, images, draws, splits, mutations, downloads."""

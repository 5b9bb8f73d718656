"""Data: matching examples, images, draws, splits, downloads, and repositories on the Hugging Face Hub."""

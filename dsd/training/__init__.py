"""Few-shot training."""

"""Evidence of (pair, draw) requests: sessions, encodings, batches, races."""

"""Compute the evidence of (pair, draw) requests: sessions, encodings, batches, races."""

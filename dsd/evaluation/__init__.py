"""Evidence to scores to metrics with intervals; ablations, claims, gate."""

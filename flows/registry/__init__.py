"""The model registry, the gate and the leaderboard."""

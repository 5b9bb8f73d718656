"""The model registry and the leaderboard."""

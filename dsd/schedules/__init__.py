"""Schedules: which (candidate, draw) is computed next. No torch."""

"""The report: one HTML page that opens offline, with every number computed from the data folder."""

from dsd.report.page import build

__all__ = ["build"]

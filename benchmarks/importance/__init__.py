"""Importance scheduling on the embedded model: quality of its decisions, and speed over an emulated link."""

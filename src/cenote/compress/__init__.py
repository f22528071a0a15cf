"""Measures recipes against the dense model: quality, time, memory."""

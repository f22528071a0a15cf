"""Procedures that change weights."""

"""Thin faces between this library and others."""

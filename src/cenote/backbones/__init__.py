"""Pretrained networks behind one face."""

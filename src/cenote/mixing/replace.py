"""Placeholder."""


def replace_mixer() -> None: ...

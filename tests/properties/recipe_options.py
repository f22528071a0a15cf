"""What the battery needs to know about recipes on the small decoders of ``attention_hosts`` (4 layers, 6 heads)."""

DENSE: dict[str, str] = {
}
"""Settings under which a recipe must compute what the model does without it."""

SPARSE: dict[str, str] = {
}
"""Settings that change something already at a dozen tokens."""

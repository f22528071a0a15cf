"""What the battery needs to know about recipes on the small decoders of ``attention_hosts`` (4 layers, 6 heads)."""

_VAR = (
    "visual_attention_redistribution(sink_dimensions=(0, 5), image_span=(1, 3), tau=1.2, rho=0.0, min_mass=0.0, "
    "first_layers=1"
)

DENSE: dict[str, str] = {
    "block_heuristic": "block_heuristic(block_size=4, nz_ratio=1.0)",
    "echo_att": "echo_att()",
    "h2o": "h2o(budget=64)",
    "hylra": "hylra(plan=('full', 'select', 1, 'select'), top_k=64, chunk_size=4, threshold=0)",
    "quest": "quest(budget=64, page_size=4, dense_layers=())",
    "seer_attention": "seer_attention(block_size=4, nz_ratio=1.0)",
    "seer_decode": "seer_decode(block_size=4, token_budget=64)",
    "tidal_decode": "tidal_decode(budget=64, sparse_layer_start=1, correction_layer=2)",
    "visual_attention_redistribution": f"{_VAR}, moved=0.0)",
    "window": "window(budget=64)",
}
"""Settings under which a recipe must compute what the model does without it."""

SPARSE: dict[str, str] = {
    "block_heuristic": "block_heuristic(block_size=4, nz_ratio=0.3, last_block_dense=False)",
    "echo_att": "echo_att(shared_layers=(1, 3))",
    "h2o": "h2o(budget=8)",
    "hylra": "hylra(top_k=12, chunk_size=2, first=1, last=2, threshold=0, sparsity=0.6, steps=4)",
    "quest": "quest(budget=8, page_size=4, dense_layers=(0,))",
    "seer_attention": "seer_attention(block_size=4, nz_ratio=0.3, last_block_dense=False)",
    "seer_decode": "seer_decode(block_size=4, token_budget=8)",
    "tidal_decode": "tidal_decode(budget=4, sparse_layer_start=1, correction_layer=2)",
    "visual_attention_redistribution": f"{_VAR}, moved=1.0)",
    "window": "window(budget=6, sinks=2)",
}
"""Settings that change something already at a dozen tokens."""

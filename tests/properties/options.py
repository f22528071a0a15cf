"""What the batteries of pooling properties run over, and what they cannot know from a name."""

from cenote.pooling import create_pooling, list_layer_reductions, list_poolings

# Heads of 8, 12 and 16 and 32 queries divide the width; the grid is longer than the dilations of DOLG's pyramid.
DIM, LAYERS, GRID = 96, 3, (2, 8)

# Constructor options by name, where the defaults do not fit DIM.
OPTIONS: dict[str, dict] = {
    # Small, and nothing that chance decides in training.
    "l_tdnn": {
        "conv_dim": 16, "hidden_size": 32, "num_heads": 4, "pool_dim": 24, "num_blocks": 1, "depth": 2,
        "res2_scale": 4, "se_channels": 8, "dropout": 0.0,
    },
}  # fmt: skip

# Settings beside the defaults that take another path through a pooling.
VARIANTS = [
    "ggem(parametrisation='softplus', offset=True)",
    "spp(levels=[6, 3, 1], floor_at_zero=True)",
    "attentive_statistics(hidden_dim=7)",
    "simpool(gamma=1.25)",
    "dolg(with_aspp=True)",
    "abmilp(cond='pe')",
    "latent_pooling(tokens='last')",
    "histograph(normalisation='softmax', weights='node', hidden_dim=15, num_heads=3)",
    "histograph(residual=True, layer_norm=True)",
    "l_tdnn(net='d3net', num_blocks=2)",
]

COMPOSED = [
    *(f"{reduction} > mean" for reduction in list_layer_reductions()),
    "weighted_layers > efficient_probing",
    "weighted_layers > ggem",
    "mean_layers > spp",
    "one_layer(layer=0) > last_token",
    "concat_layers > attentive_statistics",
]

SPECS = [*list_poolings(), *VARIANTS, *COMPOSED]

# Weights that are no distribution over the tokens: positive gates, or a softmax that also has the query's own key.
UNNORMALISED = {"dolg"}
OWN_KEY = {"clip", "cait"}


def base_name(spec: str) -> str:
    return spec.split(">")[-1].strip().partition("(")[0]


def make(spec: str, **options):
    return create_pooling(spec, dim=DIM, num_layers=LAYERS, grid=GRID, **OPTIONS.get(base_name(spec), {}), **options)

"""SPP-net: the layer on maps of several sizes, and boxes pooled from maps at several scales."""

from torch import Tensor

from cenote.ops.receptive_field import ReceptiveField
from cenote.ops.regions import from_one_based, spp_regions, to_one_based
from cenote.pooling.spp import SPP
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    return {"layer": layer, "regions": regions}[case.case](case)


def layer(case: Case) -> dict[str, Tensor]:
    assert case.config.get("mode", "max") == "max"
    results = {}
    for name, maps in case.inputs.items():
        pool = SPP.from_reference(dim=maps.shape[1], levels=case.config["levels"])
        results[f"pooled{name.removeprefix('x')}"] = pool.pool_maps(maps)
    return results


def regions(case: Case) -> dict[str, Tensor]:
    config = case.config
    height, width = case.inputs["image_size"].tolist()
    result = spp_regions(
        {int(name.removeprefix("feat")): maps for name, maps in case.inputs.items() if name.startswith("feat")},
        from_one_based(case.inputs["boxes"]),
        (height, width),
        scales=config["scales"],
        field=ReceptiveField(config["stride"], config["offset0"] - 1, size=0),
        levels=config["levels"],
        margin=config["offset"],
        standard_size=config["standard_size"],
        clamp=True,
        floor_at_zero=True,
    )
    return {
        "pooled": result.pooled,
        "expected_scale": result.expected_scale,
        "scale_index": result.scale_index,
        "boxes_scaled": to_one_based(result.boxes),
        "windows": result.windows,
    }

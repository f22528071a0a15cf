"""GGeM: the only file pools tokens with one exponent a group."""

import torch
from torch import Tensor

from cenote.pooling.gem import GeM
from cenote.pooling.ggem import GGeM
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    options = {"dim": case.config["dim"], "eps": case.config["eps"]}
    pool = GGeM.from_reference(case.state, num_groups=case.config["num_groups"], **options)
    x = case.inputs["x"].requires_grad_()
    results = {"pooled": pool(x)}
    if "mask" in case.inputs:
        results["pooled_masked"] = pool(x, case.inputs["mask"])
    if "grad" in case.inputs:
        p_grad, x_grad = torch.autograd.grad((results["pooled"] * case.inputs["grad"]).sum(), [pool.p, x])
        results |= {"grad_p": p_grad, "grad_x": x_grad}
    # Outputs gem_p<exponent>: one group.
    for name in case.outputs:
        if name.startswith("gem_p"):
            results[name] = GeM(p=float(name.removeprefix("gem_p")), **options)(x)
    return results

"""L-TDNN for one clip without padding, in the plain layout (1, dim, layers, frames) and with nothing rearranged."""

import torch
import torch.nn.functional as F


def l_tdnn(state, hidden, net, heads, res2_scale=8, depth=4, deviation=0):
    """The vector of one clip; ``hidden`` (layers, frames, dim), ``state`` of an ``LTDNN`` in eval mode."""

    def norm(name, x):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    def crb(name, x, dilation=1):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return norm(f"{name}.norm", F.conv2d(x, weight, bias, padding="same", dilation=dilation).relu())

    def pointwise(name, x):
        weight = state[f"{name}.weight"]
        kernel = weight.reshape(*weight.shape, *(1,) * (x.ndim - 2))
        return (F.conv2d if x.ndim == 4 else F.conv1d)(x, kernel, state.get(f"{name}.bias"))

    def se(name, x):
        mean = x.mean(dim=(2, 3), keepdim=True)
        return x * pointwise(f"{name}.excite", pointwise(f"{name}.squeeze", mean).relu()).sigmoid()

    def se_res2(name, x, dilation):
        groups = crb(f"{name}.reduce", x).chunk(res2_scale, dim=1)
        done = [crb(f"{name}.convs.0", groups[0], dilation)]
        for i in range(1, res2_scale - 1):
            done.append(crb(f"{name}.convs.{i}", done[-1] + groups[i], dilation))
        if res2_scale > 1:
            done.append(groups[-1])
        return x + se(f"{name}.se", crb(f"{name}.expand", torch.cat(done, dim=1)))

    def se_d2(name, x):
        width, done = x.shape[1] // depth, []
        for d in range(depth):
            x = x + crb(f"{name}.convs.{d}", x, 2**d)
            left = x.shape[1] - width
            done.append(x[:, left:])
            x = x[:, :left]
        return se(f"{name}.se", torch.cat(done, dim=1))

    x = crb("net.in_conv", norm("net.in_norm", hidden.permute(2, 0, 1)[None]))
    outputs = []
    while f"net.blocks.{len(outputs)}.se.squeeze.weight" in state:
        name = f"net.blocks.{len(outputs)}"
        x = se_res2(name, x, len(outputs) + 2) if net == "ecapa" else se_d2(name, x)
        outputs.append(x)
    x = pointwise("net.fusion", torch.cat(outputs, dim=1)).relu()

    x = pointwise("layer_pool.in_projection", norm("layer_pool.in_norm", x))[0]
    pooled = []
    for h, part in enumerate(x.chunk(heads)):  # (width, layers, frames)
        w1, b1, w2, b2 = (state[f"layer_pool.{n}"][h] for n in ("w1", "b1", "w2", "b2"))
        scores = [(v.T @ w1 + b1).relu() @ w2 + b2 for v in (part.mean(dim=0), part.amax(dim=0))]
        pooled.append((part * sum(scores).sigmoid().T).amax(dim=1))
    y = norm("layer_pool.out_norm", pointwise("layer_pool.out_projection", torch.cat(pooled)[None]))

    mean, sigma = y.mean(dim=2, keepdim=True), y.std(dim=2, keepdim=True, correction=deviation)
    z = torch.cat([y, mean.expand_as(y), sigma.expand_as(y)], dim=1)
    weights = pointwise("attention_out", norm("attention_norm", pointwise("attention_in", z).relu())).softmax(dim=2)
    first = (weights * y).sum(dim=2)
    second = ((weights * y.square()).sum(dim=2) - first.square()).clamp(min=1e-4).sqrt()
    statistics = norm("statistics_norm", torch.cat([first, second], dim=1))
    return norm("out_norm", F.linear(statistics, state["out_projection.weight"], state["out_projection.bias"]))[0]

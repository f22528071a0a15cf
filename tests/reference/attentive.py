"""The attentive poolings in their published order of operations: project every token, then pool. No masks.

State-dict keys are the official ones, so that ``from_reference`` takes what these modules hold.
"""

import torch
import torch.nn.functional as F
from torch import nn


def linear(rows, columns, bias=True):
    return nn.Linear(columns, rows, bias=bias)


def heads(x, h):
    """(batch, n, h * e) -> (batch, h, n, e)"""
    return x.unflatten(-1, (h, -1)).transpose(1, 2)


def attention(q, k, v, h):
    """Multi-head attention of (batch, q, d) over (batch, n, d): merged output and weights (batch, h, q, n)."""
    q, k, v = heads(q, h), heads(k, h), heads(v, h)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def mlp(dim, hidden):
    return nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})


def run_mlp(m, x):
    return m["fc2"](F.gelu(m["fc1"](x)))


class EfficientProbing(nn.Module):
    def __init__(self, dim, num_queries=32, d_out=1, qkv_bias=False):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, num_queries, dim))
        self.v = nn.Linear(dim, dim // d_out, bias=qkv_bias)

    def forward(self, x, cls=None):
        q = self.cls_token.expand(len(x), -1, -1) if cls is None else cls
        weights = (q @ x.mT * x.shape[-1] ** -0.5).softmax(-1)
        v = heads(self.v(x), q.shape[1])
        return (weights[:, :, None] @ v).flatten(1), weights


class SimPool(nn.Module):
    eps = 1e-6

    def __init__(self, dim, num_heads=1, qkv_bias=False, gamma=None, use_beta=False, linears=True):
        super().__init__()
        self.h, self.gamma, self.linears = num_heads, gamma, linears
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6)
        if linears:
            self.wq, self.wk = linear(dim, dim, qkv_bias), linear(dim, dim, qkv_bias)
        if gamma is not None and use_beta:
            self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, x, cls=None):
        u = self.norm_patches(x)
        q = x.mean(1, keepdim=True) if cls is None else cls
        q, k, v = (self.wq(q), self.wk(u), u) if self.linears else (self.norm_patches(q), u, x)
        if self.gamma is None:
            out, weights = attention(q, k, v, self.h)
            return out[:, 0], weights
        out, weights = attention(q, k, (v - v.min() + self.eps) ** self.gamma, self.h)
        return out[:, 0] ** (1 / self.gamma) + (self.beta if hasattr(self, "beta") else 0), weights


def esimpool(dim, num_heads=12, gamma=None, use_beta=False):
    return SimPool(dim, num_heads, gamma=gamma, use_beta=use_beta, linears=False)


class Clip(nn.Module):
    def __init__(self, in_features, feat_size, num_heads=4, embed_dim=None, out_features=None, qkv_bias=True):
        super().__init__()
        dim, inner = in_features, embed_dim or in_features
        self.h, self.norm = num_heads, nn.LayerNorm(dim, eps=1e-6)
        self.pos_embed = nn.Parameter(torch.zeros(feat_size[0] * feat_size[1] + 1, dim))
        self.qkv, self.proj = nn.Linear(dim, 3 * inner, bias=qkv_bias), nn.Linear(inner, out_features or dim)

    def forward(self, x, cls=None):
        u = self.norm(x)
        s = torch.cat([u.mean(1, keepdim=True) if cls is None else cls, u], 1) + self.pos_embed
        out, weights = attention(*self.qkv(s).chunk(3, -1), self.h)
        return self.proj(out)[:, 0], weights[:, :, 0, 1:]


class SigLIP(nn.Module):
    def __init__(self, in_features, num_heads=8, mlp_ratio=4.0, latent_len=1, pool_type="token", qkv_bias=True):
        super().__init__()
        dim = in_features
        self.h, self.pool_type = num_heads, pool_type
        self.latent = nn.Parameter(torch.zeros(1, latent_len, dim))
        self.q, self.kv, self.proj = linear(dim, dim, qkv_bias), linear(2 * dim, dim, qkv_bias), nn.Linear(dim, dim)
        self.mlp = mlp(dim, int(dim * mlp_ratio))

    def forward(self, x):
        out, weights = attention(self.q(self.latent.expand(len(x), -1, -1)), *self.kv(x).chunk(2, -1), self.h)
        out = self.proj(out)
        out = out + run_mlp(self.mlp, out)
        return out[:, 0] if self.pool_type == "token" else out.mean(1), weights


class AIM(nn.Module):
    def __init__(self, dim, num_heads=16, num_queries=1, qkv_bias=False):
        super().__init__()
        self.h = num_heads
        self.k, self.v = linear(dim, dim, qkv_bias), linear(dim, dim, qkv_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, num_queries, dim))
        self.bn = nn.BatchNorm1d(dim, affine=False, eps=1e-6)

    def forward(self, x, cls=None):
        u = self.bn(x.mT).mT
        q = self.cls_token.expand(len(x), -1, -1) if cls is None else cls
        out, weights = attention(q, self.k(u), self.v(u), self.h)
        return out.mean(1), weights


class Gain(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class CoCa(nn.Module):
    def __init__(
        self, dim, dim_head=64, num_img_queries=196, heads=8, parallel_ff=False, ff_mult=4, norm_context=False
    ):
        super().__init__()
        self.h, self.norm = heads, Gain(dim)
        self.context_norm = Gain(dim) if norm_context else nn.Identity()
        self.img_queries = nn.Parameter(torch.zeros(num_img_queries, dim))
        self.to_q, self.to_kv = linear(heads * dim_head, dim, False), linear(2 * dim_head, dim, False)
        self.to_out = linear(dim, heads * dim_head, False)
        if parallel_ff:
            inner = ff_mult * dim
            self.ff = nn.ModuleList([linear(2 * inner, dim, False), nn.Identity(), linear(dim, inner, False)])

    def forward(self, x, cls=None):
        queries = self.norm(self.img_queries.expand(len(x), -1, -1) if cls is None else cls)
        q = heads(self.to_q(queries), self.h)
        k, v = self.to_kv(self.context_norm(x)).chunk(2, -1)
        weights = (q @ k[:, None].mT * q.shape[-1] ** -0.5).softmax(-1)
        out = self.to_out((weights @ v[:, None]).transpose(1, 2).flatten(2))
        if hasattr(self, "ff"):
            value, gate = self.ff[0](queries).chunk(2, -1)
            out = out + self.ff[2](F.silu(gate) * value)
        return out[:, 0], weights[:, :, 0]


class ClassBlock(nn.Module):
    def __init__(self, dim, h, ratio):
        super().__init__()
        self.h = h
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("q", "k", "v", "proj")})
        self.mlp = mlp(dim, int(dim * ratio))
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, c, x):
        t, a = self.norm1(torch.cat([c, x], 1)), self.attn
        out, weights = attention(a["q"](t[:, :1]), a["k"](t), a["v"](t), self.h)
        c = c + self.gamma_1 * a["proj"](out)
        return c + self.gamma_2 * run_mlp(self.mlp, self.norm2(c)), weights[..., 1:]


class CaiT(nn.Module):
    def __init__(self, embed_dim, num_heads=4, iterations=1, mlp_ratio_clstk=4.0):
        super().__init__()
        self.blocks_token_only = nn.ModuleList(
            ClassBlock(embed_dim, num_heads, mlp_ratio_clstk) for _ in range(iterations)
        )
        self.norm, self.cls_token = nn.LayerNorm(embed_dim), nn.Parameter(torch.zeros(1, 1, embed_dim))

    def forward(self, x, cls=None):
        c = self.cls_token.expand(len(x), -1, -1) if cls is None else cls
        for block in self.blocks_token_only:
            c, weights = block(c, x)
        return self.norm(c)[:, 0], weights


class Block(nn.Module):
    def __init__(self, dim, h, ratio=4.0, qkv_bias=False):
        super().__init__()
        self.h, self.norm1, self.norm2 = h, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"qkv": linear(3 * dim, dim, qkv_bias), "proj": nn.Linear(dim, dim)})
        self.mlp = mlp(dim, int(dim * ratio))

    def forward(self, x):
        out, _ = attention(*self.attn["qkv"](self.norm1(x)).chunk(3, -1), self.h)
        x = x + self.attn["proj"](out)
        return x + run_mlp(self.mlp, self.norm2(x))


class DINOViT(nn.Module):
    def __init__(self, d_model, num_heads=8):
        super().__init__()
        self.dino_block = Block(d_model, num_heads)

    def forward(self, x):
        return self.dino_block(x).mean(1), None


class JEPA(nn.Module):
    def __init__(self, embed_dim, num_heads=16, mlp_ratio=4.0, depth=1, num_queries=1, qkv_bias=True):
        super().__init__()
        dim, self.h = embed_dim, num_heads
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, dim))
        attn = {"q": linear(dim, dim, qkv_bias), "kv": linear(2 * dim, dim, qkv_bias), "proj": nn.Linear(dim, dim)}
        self.cross_attention_block = nn.ModuleDict(
            {
                "norm1": nn.LayerNorm(dim),
                "xattn": nn.ModuleDict(attn),
                "norm2": nn.LayerNorm(dim),
                "mlp": mlp(dim, int(dim * mlp_ratio)),
            }
        )
        if depth > 1:
            self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, qkv_bias) for _ in range(depth - 1))

    def forward(self, x, cls=None):
        block = self.cross_attention_block
        q, a = self.query_tokens.expand(len(x), -1, -1) if cls is None else cls, block["xattn"]
        out, weights = attention(a["q"](q), *a["kv"](block["norm1"](x)).chunk(2, -1), self.h)
        q = q + a["proj"](out)
        q = q + run_mlp(block["mlp"], block["norm2"](q))
        for extra in getattr(self, "blocks", []):
            q = extra(q)
        return q.flatten(1), weights


class CAE(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__()
        self.h, self.query_token = num_heads, nn.Parameter(torch.zeros(1, 1, dim))
        self.norm1_q, self.norm1_k, self.norm1_v, self.norm2_cross = (nn.LayerNorm(dim) for _ in range(4))
        self.cross_attn = nn.Module()
        for name in "qkv":
            setattr(self.cross_attn, name, linear(dim, dim, False))
            if qkv_bias and name != "k":
                self.cross_attn.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(dim)))
        self.cross_attn.proj = nn.Linear(dim, dim)

    def forward(self, x):
        a, query = self.cross_attn, self.query_token.expand(len(x), -1, -1)
        q = a.q(self.norm1_q(query)) + getattr(a, "q_bias", 0)
        v = a.v(self.norm1_v(x)) + getattr(a, "v_bias", 0)
        out, weights = attention(q, a.k(self.norm1_k(x)), v, self.h)
        return a.proj(out)[:, 0], weights


class AbMILP(nn.Module):
    def __init__(
        self,
        dim,
        self_attention_apply_to="both",
        activation="tanh",
        depth=2,
        cond="none",
        content="all",
        num_patches=None,
    ):
        super().__init__()
        self.apply_to, self.content = self_attention_apply_to, content
        if self_attention_apply_to != "none":
            self.self_attn = nn.ModuleDict({"qkv": linear(3 * dim, dim, False), "proj": nn.Linear(dim, dim)})
        act = nn.Tanh if activation == "tanh" else nn.ReLU
        layers = [layer for _ in range(depth - 1) for layer in (nn.Linear(dim, dim), act())]
        self.attention_predictor = nn.Sequential(*layers, nn.Linear(dim, 1))
        if cond == "pe":
            self.register_buffer("pos_embed", torch.zeros(1, num_patches + (content != "patch"), dim))

    def forward(self, x):
        x = x[:, 1:] if self.content == "patch" else x
        y = x
        if self.apply_to != "none":
            y = self.self_attn["proj"](attention(*self.self_attn["qkv"](x).chunk(3, -1), 1)[0])
        weights = self.attention_predictor(y + getattr(self, "pos_embed", 0)).softmax(1)
        return ((y if self.apply_to == "both" else x) * weights).sum(1), weights


class CBAM(nn.Module):
    def __init__(self, channels, spatial_kernel_size=7, rd_ratio=1 / 16):
        super().__init__()
        hidden, size = max(1, int(channels * rd_ratio + 0.5)), spatial_kernel_size
        self.channel = nn.ModuleDict(
            {
                "fc1": nn.Conv2d(channels, hidden, 1, bias=False),
                "fc2": nn.Conv2d(hidden, channels, 1, bias=False),
            }
        )
        conv = nn.ModuleDict({"conv": nn.Conv2d(2, 1, size, padding=size // 2, bias=False), "bn": nn.BatchNorm2d(1)})
        self.spatial = nn.ModuleDict({"conv": conv})

    def forward(self, x, grid=None):
        h, w = grid or (round(x.shape[1] ** 0.5),) * 2
        x = x.mT.unflatten(2, (h, w))
        gate = sum(
            self.channel["fc2"](F.relu(self.channel["fc1"](f(x, (2, 3), True)))) for f in (torch.mean, torch.amax)
        )
        y = x * gate.sigmoid()
        s = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
        y = y * self.spatial["conv"]["bn"](self.spatial["conv"]["conv"](s)).sigmoid()
        return F.relu(y + x).mean((2, 3)), None


class DOLG(nn.Module):
    def __init__(self, in_c, s3_dim=None, act_fn="relu", with_aspp=False):
        super().__init__()
        dim, self.slope = in_c, 0.0 if act_fn == "relu" else 0.01
        if with_aspp:
            self.aspp = nn.Module()
            self.aspp.aspp = nn.ModuleList([nn.Conv2d(dim, 512, 1)])
            self.aspp.aspp.extend(nn.Conv2d(dim, 512, 3, padding=d, dilation=d) for d in (6, 12, 18))
            self.aspp.im_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, 512, 1), nn.ReLU())
            self.aspp.conv_after = nn.Sequential(nn.Conv2d(512 * 5, dim, 1), nn.ReLU())
        self.conv1, self.bn, self.conv2 = nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim), nn.Conv2d(dim, 1, 1)

    def forward(self, x, grid=None):
        h, w = grid or (round(x.shape[1] ** 0.5),) * 2
        x = x.mT.unflatten(2, (h, w))
        if hasattr(self, "aspp"):
            image = self.aspp.im_pool(x).expand(-1, -1, h, w)
            x = self.aspp.conv_after(torch.cat([image, *(conv(x) for conv in self.aspp.aspp)], 1))
        f = self.bn(self.conv1(x))
        a = F.softplus(self.conv2(F.leaky_relu(f, self.slope)))
        return (a * F.normalize(f, dim=1)).mean((2, 3)), a


REFERENCES = {
    "efficient_probing": EfficientProbing,
    "abmilp": AbMILP,
    "aim": AIM,
    "cae": CAE,
    "cait": CaiT,
    "cbam": CBAM,
    "clip": Clip,
    "coca": CoCa,
    "dinovit": DINOViT,
    "dolg": DOLG,
    "esimpool": esimpool,
    "jepa": JEPA,
    "siglip": SigLIP,
    "simpool": SimPool,
}


def fill(module, seed=0):
    """Generic values in every parameter and running statistic; the constants of CoCa's norms stay zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.is_floating_point() and not name.endswith(".beta"):
            fan = tensor[0].numel() if tensor.ndim > 1 and "token" not in name and "quer" not in name else 4
            tensor.copy_(
                torch.randn(tensor.shape, generator=generator) * fan**-0.5 + ("norm" in name and tensor.ndim == 1)
            )
    return module

"""Spatial pyramids of 2000 regions on one feature map: derived levels against four roi_pool calls."""

from __future__ import annotations

import torch
from common import finish, interleaved, ratio
from torchvision.ops import roi_pool

from cenote.ops.pyramid import pyramid_pool_windows

DIM, HEIGHT, WIDTH, LEVELS = 256, 60, 80, (6, 3, 2, 1)


def windows_of(regions: int) -> torch.Tensor:
    """Windows ``x0, y0, x1, y1``, 0-based and half-open, with corners anywhere on the map."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(length, (regions, 2), generator=generator).sort(dim=1).values for length in (WIDTH, HEIGHT))
    return torch.stack([x[:, 0], y[:, 0], x[:, 1] + 1, y[:, 1] + 1], dim=1)


@torch.no_grad()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    maps = torch.randn(1, DIM, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
    rows = []
    for regions in (500, 2000):
        windows = windows_of(regions).to(device)
        owner = torch.zeros(regions, dtype=torch.long, device=device)
        inclusive = torch.cat([owner[:, None], windows[:, :2], windows[:, 2:] - 1], dim=1).float()

        def ours(windows: torch.Tensor = windows, owner: torch.Tensor = owner) -> torch.Tensor:
            return pyramid_pool_windows(maps, windows, owner, LEVELS)

        def peer(inclusive: torch.Tensor = inclusive) -> torch.Tensor:
            return torch.cat([roi_pool(maps, inclusive, n).flatten(1) for n in LEVELS], dim=1)

        assert torch.equal(ours(), peer())
        times = interleaved({"derived levels": ours, "four roi_pool calls": peer}, repeats=7, warmup=1)
        row = {"device": device, "threads": torch.get_num_threads(), "regions": regions}
        row |= {f"{name} ms": min(seconds) * 1e3 for name, seconds in times.items()}
        rows.append(row | {"ratio": ratio(times, "four roi_pool calls", "derived levels")})
    finish("spp_regions", "four torchvision roi_pool calls", 1.5, rows, rows[-1]["ratio"], __doc__)


if __name__ == "__main__":
    main()

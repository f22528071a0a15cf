"""Pretrain a tiny vision transformer by masked autoencoding.

Without options it makes the backbone that ships inside the package, from the training part of scikit-learn's digits
only, in well under a minute on two cores:

    python tools/pretrain_embedded.py

The same on other images (anything that ``cenote.data.load_data`` reads); the result is loaded with
``load_backbone("embedded:runs/cifar10.safetensors")``:

    python tools/pretrain_embedded.py --data cifar10.parquet --image-size 32 --patch-size 4 --channels 3 --dim 128 \
        --depth 6 --epochs 100 --flip --out runs/cifar10.safetensors

No test image is ever seen: the training and the validation part are used, without their labels.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from cenote.backbones.embedded import SHIPPED, EmbeddedBackbone, save_tiny_vit, scale_images
from cenote.backbones.masked_autoencoder import PretrainSettings, pretrain
from cenote.backbones.tiny_vit import TinyViTConfig
from cenote.data import load_data


def training_images(spec: str, image_size: int, channels: int, **columns: str | None) -> torch.Tensor:
    """All images but the test part's, as pixels in [0, 1], ``(images, channels, height, width)``."""
    from PIL import Image

    data = load_data(spec, **columns)
    if data.modality != "image":
        raise SystemExit(f"masked autoencoding needs images, {spec!r} holds {data.modality}")
    plain = TinyViTConfig(image_size, image_size, channels, mean=(0.0,) * channels, std=(1.0,) * channels)
    size, mode = (image_size, image_size), "L" if channels == 1 else "RGB"
    images = [part.items[i].convert(mode) for part in (data.train, data.validation) for i in range(len(part))]
    return scale_images([i if i.size == size else i.resize(size, Image.Resampling.BILINEAR) for i in images], plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="what load_data is given (default: digits)")
    parser.add_argument("--image-column")
    parser.add_argument("--label-column")
    parser.add_argument("--image-size", type=int, default=8)
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3))
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=PretrainSettings.epochs)
    parser.add_argument("--mask-ratio", type=float, default=PretrainSettings.mask_ratio)
    parser.add_argument("--batch-size", type=int, default=PretrainSettings.batch_size)
    parser.add_argument("--lr", type=float, default=PretrainSettings.lr)
    parser.add_argument("--weight-decay", type=float, default=PretrainSettings.weight_decay)
    parser.add_argument("--decoder-dim", type=int, default=PretrainSettings.decoder_dim)
    parser.add_argument("--decoder-depth", type=int, default=PretrainSettings.decoder_depth)
    parser.add_argument("--norm-targets", action="store_true", help="predict patches with mean and deviation removed")
    parser.add_argument("--flip", action="store_true", help="mirror half of the images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="a .safetensors file; the .json goes beside it")
    options = parser.parse_args()

    columns = {"image_column": options.image_column, "label_column": options.label_column}
    if options.data == "digits":
        columns = {}
    images = training_images(options.data, options.image_size, options.channels, **columns)
    mean = tuple(round(v, 6) for v in images.mean(dim=(0, 2, 3)).tolist())
    std = tuple(round(v, 6) for v in images.std(dim=(0, 2, 3)).tolist())
    config = TinyViTConfig(
        options.image_size,
        options.patch_size,
        options.channels,
        options.dim,
        options.depth,
        options.heads,
        4.0,
        mean,
        std,
    )
    settings = PretrainSettings(
        epochs=options.epochs,
        mask_ratio=options.mask_ratio,
        batch_size=options.batch_size,
        lr=options.lr,
        weight_decay=options.weight_decay,
        decoder_dim=options.decoder_dim,
        decoder_depth=options.decoder_depth,
        norm_targets=options.norm_targets,
        flip=options.flip,
        seed=options.seed,
    )
    scale = [torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std)]
    started = time.perf_counter()

    def report(epoch: int, loss: float) -> None:
        if epoch in (1, settings.epochs) or epoch % 10 == 0:
            print(
                f"epoch {epoch:4d} of {settings.epochs}  loss {loss:.4f}  {time.perf_counter() - started:.0f} s",
                flush=True,
            )

    encoder = pretrain((images - scale[0]) / scale[1], config, settings, report, options.device)
    save_tiny_vit(encoder, options.out)
    digest = EmbeddedBackbone(options.out).fingerprint()
    print(
        f"{len(images)} images; wrote {options.out} ({options.out.stat().st_size / 1e6:.2f} MB), weights {digest[:16]}"
    )


if __name__ == "__main__":
    main()

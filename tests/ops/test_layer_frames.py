"""Convolution, normalisation and gated maximum over layers and frames, against torch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cenote.ops.layer_frames import frame_batch_norm, gated_layer_max, layer_gate, same_convolution


@pytest.mark.parametrize(("kernel", "dilation"), [((5, 3), 1), ((1, 5), 1), ((3, 3), 4), ((1, 1), 1)])
def test_convolution_is_a_same_padded_one(kernel, dilation):
    x = torch.randn(2, 3, 7, 6)
    conv = nn.Conv2d(6, 4, kernel, dilation=dilation, padding="same")
    expected = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(same_convolution(x, conv.weight, conv.bias, dilation), expected, rtol=1e-4, atol=1e-5)


def masked(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 5
    mask = torch.rand(shape[0], shape[-2], generator=generator) > 0.4
    mask[:, 2] = True
    return x, mask


@pytest.mark.parametrize("shape", [(4, 5, 7, 3), (4, 7, 3)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_norm_equals_torch_on_the_real_frames_laid_end_to_end(shape, training, with_mask):
    x, mask = masked(shape)
    norm = nn.BatchNorm1d(3, momentum=0.3, eps=1e-4).double().train(training)
    norm.running_mean += 4
    norm.running_var *= 8
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    given = mask if with_mask else None
    out = frame_batch_norm(ours, mean, var, norm.weight, norm.bias, given, training, 0.3, 1e-4)
    real = torch.ones_like(mask) if given is None else mask
    real = real.reshape(4, *(1,) * (len(shape) - 3), 7).expand(shape[:-1])
    expected = norm(theirs[real])
    torch.testing.assert_close(out[real], expected)
    assert bool((out[~real] == 0).all())
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out[real] * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_norm_of_half_precision_takes_statistics_in_float32():
    x, mask = masked((4, 5, 7, 3))
    x = (x + 1000).bfloat16()
    mean, var = torch.zeros(3), torch.ones(3)
    out = frame_batch_norm(x, mean, var, torch.ones(3), torch.zeros(3), mask, training=True, momentum=1.0)
    assert out.dtype == torch.bfloat16
    real = mask[:, None].expand(4, 5, 7)
    torch.testing.assert_close(mean, x.float()[real].mean(dim=0))
    torch.testing.assert_close(var, x.float()[real].var(dim=0), rtol=1e-3, atol=1e-3)


def test_gate_and_maximum_head_by_head():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 6, 3, 5, generator=generator)
    w1, b1, w2, b2 = (torch.randn(3, *s, generator=generator) for s in ((4, 2), (2,), (2, 4), (4,)))
    gate = layer_gate(x, w1, b1, w2, b2)
    pooled = gated_layer_max(x, gate)
    for h in range(3):
        part = x[:, :, :, h]
        f = [F.relu(v.mT @ w1[h] + b1[h]) @ w2[h] + b2[h] for v in (part.mean(-1), part.amax(-1))]  # (2, 6, 4)
        expected = sum(f).sigmoid().mT
        torch.testing.assert_close(gate[:, h], expected)
        torch.testing.assert_close(pooled[:, :, h], (part * expected[..., None]).amax(dim=1))

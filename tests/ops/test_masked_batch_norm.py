import pytest
import torch
from torch import nn

from cenote.ops.masked import masked_batch_norm


def masked_batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 7, 3, generator=generator, dtype=dtype) * 3 + 5
    mask = torch.rand(4, 7, generator=generator) > 0.4
    mask[:, 2] = True
    return x, mask


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_equals_batch_norm_of_the_real_tokens_laid_end_to_end(affine, training):
    x, mask = masked_batch()
    norm = nn.BatchNorm1d(3, affine=affine, momentum=0.3, eps=1e-4).train(training)
    norm.running_mean += 4
    norm.running_var *= 8
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    garbage = ours.masked_fill(~mask[..., None], float("nan"))
    out = masked_batch_norm(garbage, mean, var, mask, norm.weight, norm.bias, training, 0.3, 1e-4)[mask]
    expected = norm(theirs[mask])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_half_precision_statistics_are_float32():
    x, mask = masked_batch()
    x = x + 1000
    mean, var = torch.zeros(3), torch.ones(3)
    out = masked_batch_norm(x.bfloat16(), mean, var, mask, training=True, momentum=1.0)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(mean, x.bfloat16().float()[mask].mean(0))


def test_a_single_token_in_training_and_an_empty_row_are_refused():
    with pytest.raises(ValueError, match="more than one token"):
        masked_batch_norm(torch.randn(1, 1, 3), torch.zeros(3), torch.ones(3), training=True)
    with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
        masked_batch_norm(
            torch.randn(2, 2, 3), torch.zeros(3), torch.ones(3), torch.tensor([[True, True], [False, False]])
        )

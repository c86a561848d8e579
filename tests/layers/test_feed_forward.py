"""The quick GELU of sampling is the one that training uses."""

import torch
import torch.nn.functional as F

from isthmus.nn.attention import tanh_gelu


def test_gelu_without_gradient_equals_torch():
    x = torch.linspace(-12, 12, 4001)
    torch.testing.assert_close(tanh_gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)
    before = x.clone()
    tanh_gelu(x)
    assert torch.equal(x, before)


def test_gelu_with_gradient_is_torch():
    x = torch.randn(50, requires_grad=True)
    assert torch.equal(tanh_gelu(x), F.gelu(x, approximate="tanh"))

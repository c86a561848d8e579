import torch
import torch.nn.functional as F

from isthmus.next_scale.transformer import BlockModulation, SharedModulationOffset, modulated_norm
from isthmus.nn.attention import FeedForward


def test_modulated_norm_is_norm_then_scale_and_shift():
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    zero, one = torch.zeros(2, 1, 8), torch.ones(2, 1, 8)
    plain = modulated_norm(x, zero, zero, 1e-6)
    torch.testing.assert_close(plain.mean(dim=-1), torch.zeros(2, 5))
    torch.testing.assert_close(plain.square().mean(dim=-1), torch.ones(2, 5))
    torch.testing.assert_close(modulated_norm(x, 2 * one, -one, 1e-6), 3 * plain - 1)


def test_block_modulation_gives_six_chunks_in_order():
    modulation = BlockModulation(4)
    activated = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    chunks = modulation.linear(activated).chunk(6, dim=-1)
    assert torch.equal(modulation(activated), torch.stack(chunks, dim=1))


def test_shared_modulation_adds_an_offset_per_block():
    modulation = SharedModulationOffset(4)
    shared = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(modulation(shared) - shared, modulation.offset.expand(3, 6, 4))


def test_feed_forward_is_two_layers_around_the_tanh_gelu():
    layer = FeedForward(4, 6)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    h = layer.up(x)
    gelu = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(layer(x), layer.down(gelu))
    assert not torch.equal(gelu, F.gelu(h))


def test_images_of_many_tokens_are_normed_one_by_one_and_have_the_gradients_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 65, 64, generator=generator, requires_grad=True)
    scale, shift = (torch.randn(3, 1, 64, generator=generator, requires_grad=True) for _ in range(2))
    upstream = torch.randn(3, 65, 64, generator=generator)
    formula = F.layer_norm(x, (64,), eps=1e-6) * (1 + scale) + shift
    trained = modulated_norm(x, scale, shift, 1e-6)
    torch.testing.assert_close(trained, formula)
    expected, found = (torch.autograd.grad(y, (x, scale, shift), upstream) for y in (formula, trained))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)  # sums over 65 tokens of numbers around 1

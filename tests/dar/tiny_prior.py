"""A tiny real next-token prior: every weight random, logits far from uniform, nothing trained."""

import torch
from transformers import LlamaForCausalLM

from isthmus.dar.prior import TokenLayout, new_prior

LAYOUT = TokenLayout(codebook_size=24, num_classes=3, num_tokens=12)


def tiny_prior(layout: TokenLayout = LAYOUT, *, seed: int = 0, num_layers: int = 2) -> LlamaForCausalLM:
    """Two blocks of two heads; as after training, the head rows of classes are zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = new_prior(layout, width=32, num_layers=num_layers, num_heads=2, feed_forward_width=48)
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter.add_(0.25 * torch.randn_like(parameter))
            prior.lm_head.weight[layout.codebook_size :] = 0
    return prior.eval()

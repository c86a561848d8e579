"""A tiny real D-AR pipeline: every weight random, nothing trained."""

import torch

from isthmus.dar.decoder import FlowDecoder
from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.prior import TokenLayout, new_prior
from isthmus.dar.scheduler import FlowMatchingScheduler
from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.text.tokenizer import TextTokenizer, learned_merges

WORDS = TextTokenizer(merges=learned_merges(["a critter with a dome body"] * 20, num_words=280), max_length=12)


def tiny_dar(*, num_classes: int = 3, names: bool = True, words: TextTokenizer | None = None, **options):
    """8 px, 16 tokens in 4 groups, 16 codes; weights far from their start, so that every token and label matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = DiffusionTokenizer(
            image_size=8, patch_size=4, width=16, num_layers=1, condition_width=12, num_condition_layers=1,
            num_tokens=16, num_groups=4, codebook_size=16, codebook_dim=4, head_width=4, init_gate=0.5, table_rows=None,
        )  # fmt: skip
        decoder = FlowDecoder(
            patch_size=2, width=16, num_layers=1, condition_width=12, head_width=4, init_gate=0.5, modulation_std=0.3
        )
        text = (0, 0) if words is None else (words.num_words, words.config["max_length"])
        layout = TokenLayout(16, num_classes, 16, *text)
        transformer = new_prior(layout, width=16, num_layers=2, num_heads=2, feed_forward_width=32)
        with torch.no_grad():
            for model in (tokenizer, decoder, transformer):
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            transformer.lm_head.weight[16:] = 0
    scheduler = FlowMatchingScheduler(num_inference_steps=4, num_groups=4, num_tokens=16)
    class_names = ["face", "flag", "hand", "tree"][:num_classes] if names else None
    parts = (tokenizer.eval(), decoder.eval(), transformer.eval(), scheduler)
    return DARPipeline(*parts, class_names=class_names, text_tokenizer=words, **options)

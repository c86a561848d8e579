"""Speed and memory of the next-scale family against a plain implementation, as ratios of one run.

    python benchmarks/next_scale.py [--quick] [--threads N] [--only train,sample,...]

Every section prints a Markdown table; cells with two figures are wall time / CPU time of the process. How to read
them: docs/benchmarks.md.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from attention_variants import variants
from measure import Gemm, both, in_child, interleaved, machine, peak_mib
from plain import PlainTransformer, default_adamw, plain_tokenizer
from torch import Tensor

from isthmus.next_scale.pyramid import ScaleSchedule
from isthmus.next_scale.refinement import refined_scales
from isthmus.next_scale.runs import TokenizerLoss
from isthmus.next_scale.sampling import AskedTexts, ScaleSampler
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.train_prior import CaptionedTransformer, next_scale_loss, scale_weights
from isthmus.next_scale.train_tokenizer import reconstruction_losses
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.nn.attention import Attend
from isthmus.nn.precision import bf16_speedup
from isthmus.pipelines.options import SamplingOptions
from isthmus.text.encoders import SmallTextEncoder
from isthmus.training.config import OptimConfig
from isthmus.training.optim import ExponentialMovingAverage, adamw

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_32 = (1, 2, 3, 4, 6, 8)
# the block of the published 16-layer model, four of them; and the small model that a laptop trains
WIDE = {"scale_sizes": SCALES_256, "codebook_size": 4096, "width": 1024, "num_layers": 4, "num_heads": 16}
SMALL = {"scale_sizes": SCALES_32, "codebook_size": 1024, "width": 384, "num_layers": 6, "num_heads": 6}
# 900 of 4,096 codes are published; the same share of 1,024
GUIDANCE, TOP_K, TOP_P = 2.0, 225, 0.96


def transformer(shape: dict, scale_attention: str) -> NextScaleTransformer:
    torch.manual_seed(0)
    model = NextScaleTransformer(**shape, codebook_dim=32, num_classes=10, scale_attention=scale_attention)
    with torch.no_grad():  # as if trained: no gate and no logit is near zero
        for name, parameter in model.named_parameters():
            if "modulation" in name or name.startswith("head."):
                parameter.normal_(std=0.05)
    return model


def tokenizer(codebook_size: int, scale_sizes: Sequence[int], base_channels: int, multipliers: Sequence[int]):
    torch.manual_seed(0)
    return MultiScaleVQVAE(
        codebook_size=codebook_size,
        codebook_dim=32,
        scale_sizes=scale_sizes,
        base_channels=base_channels,
        channel_multipliers=multipliers,
    ).eval()


def useful_flops(model: NextScaleTransformer, rows: int, labels: int) -> float:
    """Multiplications and additions of one forward pass over `rows` sequences with `labels` different labels.

    Attention counts visible pairs only, and a modulation once per label, however often either is computed.
    """
    schedule, config = model.schedule, model.config
    width, layers, tokens = config["width"], config["num_layers"], schedule.num_tokens
    keys = schedule.lengths if model.is_markov else schedule.offsets[1:]
    pairs = sum(n * seen for n, seen in zip(schedule.lengths, keys, strict=True))
    per_token = layers * 12 * width**2 + config["codebook_dim"] * width + width * config["codebook_size"]
    per_label = layers * 6 * width**2 + 2 * width**2
    return 2.0 * (rows * (tokens * per_token + layers * 2 * width * pairs) + labels * per_label)


def checked(name: str, ours: Tensor, plain: Tensor) -> None:
    """Stop where the two implementations do not compute the same."""
    if not torch.allclose(ours, plain, atol=1e-3, rtol=1e-3):
        raise SystemExit(f"{name}: the plain implementation computes something else; its times mean nothing.")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n### {title}\n")
    for row in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def train(rounds: int) -> None:
    """Training steps: forward, backward, and the optimiser step apart."""
    for title, shape, batch in (
        ("Training at width 1024, 4 blocks and head, 680 tokens, batch 1", WIDE, 1),
        ("Training at width 384, 6 blocks and head, 130 tokens, batch 16", SMALL, 16),
    ):
        rows = []
        for scale_attention in ("markov", "causal"):
            for dtype in (torch.float32, torch.bfloat16) if bf16_speedup() >= 2 else (torch.float32,):
                rows.append(train_row(shape, scale_attention, batch, rounds, dtype))
        columns = (
            "attention, type", "products, GFLOP/s", "forward + backward, ms", "share of products", "against plain",
            "clip + AdamW + EMA", "whole step against plain",
        )  # fmt: skip
        table(title, columns, rows)


def train_row(shape: dict, scale_attention: str, batch: int, rounds: int, dtype: torch.dtype) -> list[str]:
    """Ours with products in `dtype`, against plain in float32; the share is of the products in `dtype`."""
    model = transformer(shape, scale_attention)
    plain = PlainTransformer(model)
    tokens, labels = model.schedule.num_tokens, torch.arange(batch) % 10
    scale_inputs = torch.randn(batch, tokens - 1, 32)
    token_ids = torch.randint(shape["codebook_size"], (batch, tokens))
    with torch.no_grad():
        checked("training", model(labels, scale_inputs).logits, plain(labels, scale_inputs))
    ours_optimizer, plain_optimizer = adamw(model, OptimConfig(learning_rate=1e-5)), default_adamw(plain)
    average = ExponentialMovingAverage(model, 0.999)

    def backward(logits: Callable[[], Tensor]) -> None:
        F.cross_entropy(logits().float().transpose(1, 2), token_ids).backward()

    def ours_backward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(labels, scale_inputs).logits
        weights = scale_weights("token-uniform", model.schedule.sizes)
        scales = range(model.schedule.num_scales)
        next_scale_loss(logits, token_ids, model.schedule, weights, scales=scales).total.backward()

    def step(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step_and_average() -> None:
        step(model, ours_optimizer)
        average.update(model)

    gemm = Gemm(batch * tokens, shape["width"], repeat=2, dtype=dtype)
    times = interleaved(
        {
            "gemm": gemm,
            "ours": ours_backward,
            "our step": step_and_average,
            "plain": lambda: backward(lambda: plain(labels, scale_inputs)),
            "plain step": lambda: step(plain, plain_optimizer),
        },
        rounds,
    )
    flops = 3 * useful_flops(model, batch, min(batch, 10))
    ours, theirs = times["ours"], times["plain"]
    return [
        f"{scale_attention}, {str(dtype).removeprefix('torch.')}",
        both(gemm.rate(times["gemm"]), ".0f"),
        ours.milliseconds(),
        both(gemm.share(flops, ours, times["gemm"]), ".0%"),
        "x" + both(theirs.ratio(ours), ".2f"),
        "+" + both(times["our step"].ratio(ours), ".1%"),
        "x" + both((theirs + times["plain step"]).ratio(ours + times["our step"]), ".2f"),
    ]


def train_tokenizer(rounds: int) -> None:
    """Whole steps of the small tokenizer at 32 px, batch 16, with and without folded pixels, in both types."""
    runs = {}
    for name, multipliers, fold in (("32, 32, 64 channels", (1, 1, 2), 1), ("64, 64 channels, folded", (2, 2), 2)):
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.channels_last, torch.contiguous_format):
                where = "channels last" if layout == torch.channels_last else "channels first"
                label = f"{name}, {str(dtype).removeprefix('torch.')}, {where}"
                runs[label] = tokenizer_step(multipliers, fold, dtype, layout)
    times = interleaved(runs, rounds)
    first = next(iter(times.values()))
    rows = [
        [label, t.milliseconds(), f"{16 / statistics.median(t.wall):.0f}", "x" + both(first.ratio(t), ".2f")]
        for label, t in times.items()
    ]
    table("Training the tokenizer at 32 px, batch 16", ("network", "step, ms", "images/s", "against the first"), rows)


def tokenizer_step(
    multipliers: Sequence[int], fold: int, dtype: torch.dtype, layout: torch.memory_format
) -> Callable[[], None]:
    torch.manual_seed(0)
    model = MultiScaleVQVAE(
        codebook_size=512, codebook_dim=16, scale_sizes=SCALES_32, base_channels=32, channel_multipliers=multipliers,
        num_res_blocks=1, pixel_unshuffle=fold,
    ).to(memory_format=layout)  # fmt: skip
    optimizer, average = adamw(model, OptimConfig()), ExponentialMovingAverage(model, 0.99)
    images = (torch.rand(16, 3, 32, 32) * 2 - 1).contiguous(memory_format=layout)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(images)
        losses = reconstruction_losses(output, images, None, TokenizerLoss(), commitment_weight=0.25)
        torch.stack([losses[name] for name in losses if name.startswith("weighted/")]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model)

    return step


def sample(rounds: int) -> None:
    """Sampling without pixels; the transformer alone for the share of the products."""
    rows = []
    for scale_attention in ("markov", "causal"):
        model = transformer(SMALL, scale_attention).eval()
        plain = PlainTransformer(model).eval()
        images = tokenizer(SMALL["codebook_size"], SCALES_32, 32, (1, 2, 2))
        labels, seeds = torch.arange(4), [(0, i) for i in range(4)]
        inputs = torch.randn(8, 129, 32).split([0, *model.schedule.lengths[1:]], dim=1)
        greedy = SamplingOptions(guidance_scale=GUIDANCE, top_k=1)
        ours = torch.cat(
            [s.token_ids for s in refined_scales(ScaleSampler(images, model, labels, seeds, greedy))], dim=1
        )
        theirs = torch.cat(plain.generate(images, labels, guidance=GUIDANCE, top_k=1, top_p=1.0), dim=1)
        if (ours != theirs).float().mean() > 0.02:  # untrained logits are close: a tie may fall either way
            raise SystemExit("sampling: the plain implementation draws other tokens; its times mean nothing.")
        options = SamplingOptions(guidance_scale=GUIDANCE, top_k=TOP_K, top_p=TOP_P)

        gemm = Gemm(8 * 130, SMALL["width"], repeat=6)
        times = interleaved(
            {
                "gemm": gemm,
                "stack": lambda a=(model, labels, inputs): all_scales(*a),
                "ours": lambda a=(images, model, labels, seeds, options): list(refined_scales(ScaleSampler(*a))),
                "plain": lambda p=plain, a=(images, labels): p.generate(
                    *a, guidance=GUIDANCE, top_k=TOP_K, top_p=TOP_P
                ),
            },
            rounds,
        )
        flops = useful_flops(model, 8, 5)
        rows.append(
            [
                scale_attention,
                both(gemm.rate(times["gemm"]), ".0f"),
                times["stack"].milliseconds(),
                both(gemm.share(flops, times["stack"], times["gemm"]), ".0%"),
                times["ours"].milliseconds(),
                both(gemm.share(flops, times["ours"], times["gemm"]), ".0%"),
                "x" + both(times["plain"].ratio(times["ours"]), ".2f"),
            ]
        )
    columns = (
        "attention", "products, GFLOP/s", "transformer, ms", "share of products", "with filters and draws, ms",
        "share of products", "against plain",
    )  # fmt: skip
    table("Sampling at width 384, 6 blocks, 130 tokens, batch 4, guided, without pixels", columns, rows)


def text(rounds: int) -> None:
    """What captions cost the small prior: whole steps of 16 images, and guided draws, against classes."""
    shape = {"scale_sizes": SCALES_32, "codebook_size": 512, "width": 192, "num_layers": 4, "num_heads": 3}
    encoder = new_encoder()
    whole = {"text_pooled_width": encoder.pooled_width, "num_classes": 0}
    kinds = {"classes": {}, "captions, as a whole": whole, "captions": {**whole, "text_width": encoder.text_width}}
    steps, draws = {}, {}
    images = tokenizer(shape["codebook_size"], SCALES_32, 32, (1, 2, 2))
    lengths = torch.linspace(9, 34, 16).long().tolist()  # of captions of avatars, 21 in the mean
    words = [torch.randint(1, 500, (length,)) for length in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(words, batch_first=True)
    for name, told in kinds.items():
        model = NextScaleTransformer(
            **shape, codebook_dim=32, scale_attention="markov", l2_attention=True, **{"num_classes": 10, **told}
        )
        steps[name] = text_step(model, new_encoder() if told else None, ids)
        options = SamplingOptions(guidance_scale=GUIDANCE, top_k=TOP_K, top_p=TOP_P)
        for batch in (1, 8):
            draws[f"{name}, draw of {batch}"] = text_draw(images, model, encoder if told else None, ids, options, batch)
    times = interleaved({f"{name}, step": step for name, step in steps.items()} | draws, rounds)
    rows = []
    for label, own in times.items():
        base = times["classes, " + label.rsplit(", ", 1)[1]]
        rows.append([label, own.milliseconds(), "x" + both(own.ratio(base), ".2f")])
    table("Captions of 9 to 34 words, width 192, 4 blocks, 130 tokens", ("what", "ms", "against classes"), rows)


def new_encoder() -> SmallTextEncoder:
    torch.manual_seed(0)
    return SmallTextEncoder(merges=[("a", "b")] * 1700, sum_words=True)


def text_step(model: NextScaleTransformer, encoder: SmallTextEncoder | None, ids: Tensor) -> Callable[[], None]:
    """Forward, backward, optimiser and average of 16 images, in bf16 where that is faster."""
    network = model if encoder is None else CaptionedTransformer(model, encoder)
    given = {} if encoder is None else {"words": ids, "mask": ids != 0}
    optimizer, average = adamw(network, OptimConfig(learning_rate=1e-5)), ExponentialMovingAverage(network, 0.999)
    labels = torch.zeros(16, dtype=torch.long)
    scale_inputs, token_ids = torch.randn(16, 129, 32), torch.randint(512, (16, 130))
    weights = scale_weights("token-uniform", model.schedule.sizes)
    scales = range(model.schedule.num_scales)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16_speedup() >= 2):
            logits = network(labels, scale_inputs, **given).logits
        next_scale_loss(logits, token_ids, model.schedule, weights, scales=scales).total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(network)

    return step


def text_draw(
    images: MultiScaleVQVAE,
    model: NextScaleTransformer,
    encoder: SmallTextEncoder | None,
    ids: Tensor,
    options: SamplingOptions,
    batch: int,
) -> Callable[[], None]:
    """Tokens of prompts, which are read each time as a call does it."""

    @torch.inference_mode()
    def draw() -> None:
        asked = None
        if encoder is not None:
            rows = torch.cat([ids[:batch], torch.zeros_like(ids[:1])])
            mask = rows != 0
            mask[:, 0] = True
            asked = AskedTexts(encoder(rows, mask), torch.arange(batch))
        seeds = [(0, i) for i in range(batch)]
        sampler = ScaleSampler(images, model, torch.zeros(batch, dtype=torch.long), seeds, options, texts=asked)
        list(refined_scales(sampler))

    return draw


@torch.inference_mode()
def all_scales(model: NextScaleTransformer, labels: Tensor, inputs: Sequence[Tensor]) -> None:
    """Logits of every scale for the labels and as many null rows: what sampling asks of the transformer."""
    batch = len(labels)
    once = model.condition(torch.cat([labels, labels.new_tensor([model.null_class_id])]))
    rows = torch.tensor([*range(batch), *[batch] * batch])
    conditioning = once.rows(rows)
    cache = model.new_cache(2 * batch)
    for scale, scale_input in enumerate(inputs):
        model.forward_scale(scale, scale_input, conditioning, cache)


def decode(rounds: int, quick: bool) -> None:
    """Features to pixels."""
    cases = [
        ("32 px, 32 channels, batch 16", tokenizer(512, SCALES_32, 32, (1, 2, 2)), 16),
        ("128 px, 32 channels, batch 4", tokenizer(1024, SCALES_32, 32, (1, 1, 2, 2, 4)), 4),
    ]
    if not quick:
        cases.append(("256 px, published size, batch 1", tokenizer(4096, SCALES_256, 160, (1, 1, 2, 2, 4)), 1))
    rows = []
    for name, ours, batch in cases:
        plain = plain_tokenizer(ours)
        features = torch.randn(batch, 32, ours.schedule.grid, ours.schedule.grid)
        fast = features.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            checked("decoding", ours.decode_features(fast), plain.decode_features(features))

        @torch.inference_mode()
        def run(model: MultiScaleVQVAE, maps: Tensor) -> None:
            model.decode_features(maps)

        times = interleaved(
            {
                "ours": lambda a=(ours, fast), run=run: run(*a),
                "same, NCHW": lambda a=(ours, features), run=run: run(*a),
                "plain": lambda a=(plain, features), run=run: run(*a),
            },
            min(rounds, 3) if "256" in name else rounds,
        )
        against = ["x" + both(times[other].ratio(times["ours"]), ".2f") for other in ("same, NCHW", "plain")]
        rows.append([name, times["ours"].milliseconds(), *against])
    table("Decoding pixels", ("decoder", "ours, ms", "against fused, NCHW", "against plain"), rows)


def memory() -> None:
    """Largest resident memory of fresh processes, beyond what they had with the model built."""
    rows = []
    for what, names in MEMORY.items():
        threads = str(torch.get_num_threads())
        peaks = {name: in_child("next_scale.py", "--threads", threads, "--memory-of", what, name)[0] for name in names}
        first = next(iter(peaks.values()))
        rows += [[what, name, f"{peak:,.0f}", f"{peak / first:.2f}"] for name, peak in peaks.items()]
    table("Peak memory", ("what", "variant", "MiB beyond the built model", "of the first"), rows)


# largest first: the worst draw of three scales, the mildest that has the last scale, the smallest scales
SUBSETS = {
    "all six scales": None,
    "scales 4, 6, 8": (3, 4, 5),
    "scales 1, 2, 8": (0, 1, 5),
    "scales 1, 2, 3": (0, 1, 2),
}
MEMORY = {"sampling, batch 32": ("causal", "markov"), "training, markov, batch 32": tuple(SUBSETS)}


def memory_child(what: str, variant: str) -> float:
    """MiB that one sampling call, or two training steps, add to this process."""
    from isthmus.next_scale.train_prior import select_scales

    if what.startswith("sampling"):
        model, images = transformer(SMALL, variant).eval(), tokenizer(1024, SCALES_32, 32, (1, 2, 2))
        before = peak_mib()
        options = SamplingOptions(guidance_scale=GUIDANCE, top_k=TOP_K, top_p=TOP_P)
        list(refined_scales(ScaleSampler(images, model, torch.arange(32) % 10, [(0, i) for i in range(32)], options)))
        return peak_mib() - before
    model = transformer(SMALL, "markov")
    scales = SUBSETS[variant] or tuple(range(model.schedule.num_scales))
    inputs = select_scales(torch.randn(32, 129, 32), model.schedule, scales, first=1)
    token_ids = select_scales(torch.randint(1024, (32, 130)), model.schedule, scales)
    before = peak_mib()
    for _ in range(2):
        logits = model(torch.arange(32) % 10, inputs, scales=scales).logits
        F.cross_entropy(logits.transpose(1, 2), token_ids).backward()
        model.zero_grad(set_to_none=True)
    return peak_mib() - before


def attention(rounds: int) -> None:
    """Attention alone, forward and backward, in the layout that the projections give."""
    for name, sizes, batch, num_heads in (
        ("680 tokens, batch 1", SCALES_256, 1, 16),
        ("130 tokens, batch 16", SCALES_32, 16, 6),
    ):
        lengths = ScaleSchedule(sizes, (0,) * len(sizes)).lengths
        qkv = torch.randn(batch, sum(lengths), 3, num_heads, 64, requires_grad=True)
        upstream = torch.randn(batch, sum(lengths), num_heads, 64).transpose(1, 2)
        for kind, attends in variants(lengths).items():

            def run(attend: Attend, qkv: Tensor = qkv, upstream: Tensor = upstream) -> Tensor:
                q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
                return torch.autograd.grad(attend(q, k, v, 0.125), qkv, upstream)[0]

            expected = run(attends["dense mask"])
            for attend in attends.values():
                checked("attention", run(attend), expected)
            times = interleaved({n: lambda a=a, run=run: run(a) for n, a in attends.items()}, 2 * rounds)
            rows = [[n, t.milliseconds(), "x" + both(times["dense mask"].ratio(t), ".2f")] for n, t in times.items()]
            table(f"Attention alone, {kind}, {name}", ("variant", "forward + backward, ms", "against the mask"), rows)


def start(rounds: int) -> None:
    """From the command to the first token, in fresh processes."""
    from isthmus.next_scale.pipeline import NextScalePipeline

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        NextScalePipeline(
            tokenizer(1024, SCALES_32, 32, (1, 2, 2)), transformer(SMALL, "markov").eval()
        ).save_pretrained(model)
        runs = [in_child("first_token.py", str(model), str(time.time())) for _ in range(rounds)]
    names = (
        "`import isthmus.cli`",
        "`import torch`",
        "`import isthmus.pipelines.loading`",
        "folder loaded",
        "first token",
    )
    # two columns per mark, wall and CPU seconds since the start of the process
    marks = [[0.0, 0.0], *zip(*[iter(statistics.median(c) for c in zip(*runs, strict=True))] * 2, strict=True)]
    rows = [
        [name, both((1e3 * (now[0] - last[0]), 1e3 * (now[1] - last[1])), ",.0f"), both((now[0], now[1]), ".2f")]
        for name, (last, now) in zip(names, pairwise(marks), strict=True)
    ]
    table("From `isthmus sample` to the first token", ("until", "ms", "seconds in all"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, and no decoder of the published size")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    parser.add_argument(
        "--only", default="train,tokenizer,sample,text,decode,memory,attention,start", help="sections to run"
    )
    parser.add_argument("--memory-of", nargs=2, help="measure one variant in this process and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(memory_child(*arguments.memory_of))
        return
    print(machine())
    rounds = 2 if arguments.quick else 5
    sections = {
        "train": lambda: train(rounds),
        "tokenizer": lambda: train_tokenizer(rounds),
        "sample": lambda: sample(2 * rounds),
        "text": lambda: text(4 * rounds),
        "decode": lambda: decode(rounds, arguments.quick),
        "memory": memory,
        "attention": lambda: attention(rounds),
        "start": lambda: start(rounds),
    }
    for name in arguments.only.split(","):
        sections[name]()
    print(f"\n{machine()}, {time.process_time():,.0f} CPU seconds")


if __name__ == "__main__":
    main()

"""Speed and memory of drawing tokens with a next-token prior, against `transformers.generate`, as ratios of one run.

    python benchmarks/dar_prior.py [--quick] [--threads N] [--only products,small,...] [--model FOLDER]

Weights are random, which changes no time. Every section prints a Markdown table; cells with two figures are wall time /
CPU time of the process. How to read them: docs/benchmarks.md.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from measure import Times, both, in_child, interleaved, machine, peak_mib
from next_scale import table
from torch import Tensor
from transformers import LlamaForCausalLM

from isthmus.dar.llama_decoding import Int8Product, LlamaDecoder, fastest_product
from isthmus.dar.prior import TokenLayout, new_prior, next_token_inputs
from isthmus.dar.sampling import AskedWords, generate_tokens
from isthmus.dar.train_prior import NextTokenObjective
from isthmus.pipelines.options import SamplingOptions

# the small preset, a laptop's 256 tokens, and the published L
SIZES = {
    "small": (TokenLayout(512, 4, 32), {"width": 192, "num_layers": 4, "num_heads": 3, "feed_forward_width": 512}),
    "middle": (TokenLayout(4096, 10, 256), {"width": 384, "num_layers": 6, "num_heads": 6}),
    "L": (TokenLayout(16384, 1000, 256), {"width": 1024, "num_layers": 24, "num_heads": 16}),
}
GUIDANCE = 4.0


def prior(size: str) -> tuple[LlamaForCausalLM, TokenLayout]:
    layout, shape = SIZES[size]
    torch.manual_seed(0)
    model = new_prior(layout, **shape).eval()
    with torch.no_grad():  # as if trained: tokens are not all equally likely
        model.lm_head.weight[: layout.codebook_size].normal_(std=0.05)
    return model, layout


def read_bytes(model: LlamaForCausalLM, layout: TokenLayout) -> int:
    """Bytes of weights that one token reads: all blocks, and the head's rows of codes."""
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    return 4 * (blocks + layout.codebook_size * model.config.hidden_size)


def ours(model: LlamaForCausalLM, layout: TokenLayout, decoder: LlamaDecoder, batch: int, num_tokens: int) -> Tensor:
    labels = torch.arange(batch) % max(layout.num_classes, 1)
    options = SamplingOptions(guidance_scale=GUIDANCE)
    seeds = [(0, i) for i in range(batch)]
    (tokens,) = generate_tokens(model, layout, labels, seeds, options, stops=[num_tokens], decoder=decoder)
    return tokens


def stock(model: LlamaForCausalLM, layout: TokenLayout, rows: int, num_tokens: int) -> Tensor:
    """`generate` with a static cache on as many rows as guidance needs, without mixing them: a little less work."""
    prompt = layout.class_token(torch.arange(rows) % max(layout.num_classes, 1)).unsqueeze(1)
    with torch.inference_mode():
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=True,
            top_k=0,
            cache_implementation="static",
            disable_compile=True,
            suppress_tokens=list(range(layout.codebook_size, layout.vocab_size)),
        )


class Reading:
    """How fast memory can be read: the sum of a tensor that no cache holds."""

    def __init__(self, size: int = 2**28):
        self.data = torch.ones(size // 4)

    def __call__(self) -> None:
        self.data.sum()

    def bytes_per_second(self, times: Times) -> tuple[float, float]:
        return tuple(4 * self.data.numel() / statistics.median(t) for t in (times.wall, times.cpu))


def loop(size: str, batches: Sequence[int], num_tokens: int, rounds: int) -> None:
    """Milliseconds per token of the whole loop: network, guidance, draw."""
    model, layout = prior(size)
    num_tokens = min(num_tokens, layout.num_tokens)
    started = time.process_time()
    decoder = LlamaDecoder(model, layout)
    packing = time.process_time() - started
    decoders = {"ours": decoder, "ours, int8": LlamaDecoder(model, layout, int8=True)}
    rows = []
    for batch in batches:
        reading = Reading()
        runs: dict[str, Callable[[], object]] = {
            "transformers": lambda batch=batch: stock(model, layout, 2 * batch, num_tokens),
            **{
                name: lambda batch=batch, decoder=decoder: ours(model, layout, decoder, batch, num_tokens)
                for name, decoder in decoders.items()
            },
            "reading": reading,
        }
        times = interleaved(runs, rounds)
        rate = reading.bytes_per_second(times["reading"])
        for name in ("transformers", *decoders):
            per_token = [statistics.median(t) / num_tokens for t in (times[name].wall, times[name].cpu)]
            share = tuple(read_bytes(model, layout) / t / r for t, r in zip(per_token, rate, strict=True))
            rows.append(
                [
                    str(batch),
                    name,
                    both(tuple(1e3 * t for t in per_token), ",.2f"),
                    "x" + both(times["transformers"].ratio(times[name]), ".2f"),
                    # eight-bit weights are a quarter of these bytes
                    "" if "int8" in name else both(share, ".0%"),
                ]
            )
    parameters = sum(p.numel() for p in model.parameters())
    title = f"{size}: {parameters / 1e6:,.1f}M parameters, {num_tokens} tokens, guided (two rows per image)"
    columns = ("images", "loop", "ms per token", "against transformers", "bytes of weights, of the reading rate")
    table(title, columns, rows)
    print(f"\nLaying out the weights: {1e3 * packing:,.0f} ms of CPU time, once per call.")


def products(rounds: int) -> None:
    """One matrix at a time, with distinct copies that no cache holds together."""
    for n_in, n_out in ((1024, 3072), (1024, 1024), (1024, 5632), (2816, 1024), (384, 1152), (1024, 384)):
        copies = max(2, 2**28 // (4 * n_in * n_out))
        weights = [torch.randn(n_out, n_in) for _ in range(copies)]
        transposed = [w.t().contiguous() for w in weights]
        variants = {
            "module's layout": [lambda x, w=w: F.linear(x, w) for w in weights],
            "(in, out)": [lambda x, w=w: torch.mm(x, w) for w in transposed],
            "int8": [Int8Product(w) for w in weights],
        }
        rows = []
        for count in (1, 2, 8):
            x = torch.randn(count, n_in)
            variants["what the decoder takes"] = [fastest_product(w, count) for w in weights]
            runs = {name: lambda x=x, many=many: [one(x) for one in many] for name, many in variants.items()}
            with torch.inference_mode():
                times = interleaved(runs, 2 * rounds)
            base = times["module's layout"]
            for name, t in times.items():
                rate = tuple(copies * 4e-9 * n_in * n_out / statistics.median(s) for s in (t.wall, t.cpu))
                rows.append(
                    [str(count), name, "" if name == "int8" else both(rate, ".1f"), "x" + both(base.ratio(t), ".2f")]
                )
        table(f"Products {n_in} -> {n_out}", ("rows", "weights", "GB/s", "against the module's layout"), rows)


def int8(rounds: int, folder: str | None) -> None:
    """What 8 bits cost: the divergence from the whole weights' distribution, along images drawn with those."""
    del rounds
    if folder is None:
        model, layout = prior("middle")
        name, images, guidance = "middle, random weights", 4, 1.0
    else:
        from isthmus.pipelines.loading import load_pipeline

        pipeline = load_pipeline(folder, device="cpu")
        model, layout, name, images, guidance = pipeline.transformer, pipeline.token_layout, folder, 64, 1.0
    labels = torch.arange(images) % max(layout.num_classes, 1)
    whole, eight = LlamaDecoder(model, layout), LlamaDecoder(model, layout, int8=True)
    options = SamplingOptions(guidance_scale=guidance)
    (tokens,) = generate_tokens(
        model, layout, labels, [(0, i) for i in range(images)], options, stops=[layout.num_tokens], decoder=whole
    )
    inputs = next_token_inputs(layout, labels, tokens)
    caches = [decoder.new_cache(images) for decoder in (whole, eight)]
    divergence, entropy, agree, spread, error = [], [], [], [], []
    for p in range(layout.num_tokens):
        a, b = (
            decoder.prefill(inputs[:, :1], cache) if p == 0 else decoder.step(inputs[:, p], cache)
            for decoder, cache in zip((whole, eight), caches, strict=True)
        )
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        divergence.append((log_a.exp() * (log_a - log_b)).sum(-1).mean().item())
        entropy.append(-(log_a.exp() * log_a).sum(-1).mean().item())
        agree.append((a.argmax(-1) == b.argmax(-1)).float().mean().item())
        spread.append(a.std(-1).mean().item())
        error.append((a - b).std(-1).mean().item())
    mean = statistics.fmean
    row = [
        name, f"{mean(spread):.3f}", f"{mean(error):.4f}", f"{mean(entropy):.4f}", f"{mean(divergence):.6f}",
        f"{mean(agree):.1%}",
    ]  # fmt: skip
    columns = (
        "prior",
        "spread of logits",
        "error of logits",
        "nats per token",
        "divergence, nats per token",
        "same likeliest code",
    )
    table("Eight-bit weights against whole ones", columns, [row])


def text(rounds: int) -> None:
    """What words before the tokens cost, with as many as captions of avatars have: 9 to 34, 21 in the mean."""
    model, layout = prior("small")
    told = replace(layout, num_words=2000, prompt_length=48)
    torch.manual_seed(0)
    reader = new_prior(told, **SIZES["small"][1]).eval()
    images, lengths = 32, torch.linspace(9, 34, 32).long().tolist()
    tokens = torch.randint(layout.codebook_size, (images, layout.num_tokens))
    prompts = [torch.randint(told.num_words, (length,)).tolist() for length in lengths]
    labels, none = torch.arange(images) % layout.num_classes, torch.full((images,), layout.null_class_id)
    plain, worded = NextTokenObjective(model, layout), NextTokenObjective(reader, told)
    longest = [*prompts[1:], [0] * told.prompt_length]

    def step(objective: NextTokenObjective, labels: Tensor, words: Sequence[Sequence[int]] | None = None) -> None:
        padded = None if words is None else objective.layout.padded(words)
        objective(labels, tokens, words=padded).total.backward()

    def draw(model: LlamaForCausalLM, layout: TokenLayout, batch: int, decoder: LlamaDecoder, **texts: object) -> None:
        options, seeds = SamplingOptions(guidance_scale=GUIDANCE), [(0, i) for i in range(batch)]
        chosen = none[:batch] if texts else labels[:batch]
        stops = [layout.num_tokens]
        [*generate_tokens(model, layout, chosen, seeds, options, stops=stops, decoder=decoder, **texts)]

    runs: dict[str, Callable[[], object]] = {
        "step of 32 images, classes": lambda: step(plain, labels),
        "step of 32 images, words": lambda: step(worded, none, prompts),
        "step of 32 images, words filled up to 48": lambda: step(worded, none, longest),
    }
    for batch in (1, 8):
        by_class, by_words = (
            LlamaDecoder(model, layout, num_rows=2 * batch),
            LlamaDecoder(reader, told, num_rows=2 * batch),
        )
        asked = AskedWords(prompts[12 : 12 + batch])
        runs[f"draw of {batch}, classes"] = lambda b=batch, d=by_class: draw(model, layout, b, d)
        runs[f"draw of {batch}, words"] = lambda b=batch, d=by_words, a=asked: draw(reader, told, b, d, texts=a)
    times, rows = interleaved(runs, rounds), []
    for name, own in times.items():
        base = times[name.split(",")[0] + ", classes"]
        rows.append([name, own.milliseconds(), "x" + both(own.ratio(base), ".2f")])
    table("Words before the tokens, small, guided draws", ("what", "ms", "against classes"), rows)


def memory() -> None:
    """Peak memory of a process that loads L from a folder and draws 16 tokens of one guided image."""
    model, layout = prior("L")
    weights = 4 * sum(p.numel() for p in model.parameters()) / 2**20
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        for kind in ("whole", "int8"):
            threads = str(torch.get_num_threads())
            imports, loaded, peak = in_child("dar_prior.py", "--threads", threads, "--memory-of", folder, kind)
            rows.append(
                [kind, f"{weights:,.0f}", f"{imports:,.0f}", f"{loaded:,.0f}", f"{peak:,.0f}", f"{peak / weights:.2f}"]
            )
    columns = ("blocks", "weights, MiB", "peak after imports", "after loading", "after drawing", "of the weights")
    table("Peak memory, L, one image", columns, rows)


def memory_child(folder: str, kind: str) -> tuple[float, float, float]:
    layout = SIZES["L"][0]
    imports = peak_mib()
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    loaded = peak_mib()
    ours(model, layout, LlamaDecoder(model, layout, int8=kind == "int8"), 1, 16)
    return imports, loaded, peak_mib()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, and 16 tokens of L instead of 64")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    parser.add_argument("--only", default="products,small,middle,L,int8,text,memory", help="sections to run")
    parser.add_argument("--model", help="a D-AR pipeline folder for the section int8; default: random weights")
    parser.add_argument("--memory-of", nargs=2, help="measure one variant in this process and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(*memory_child(*arguments.memory_of))
        return
    print(machine())
    rounds = 2 if arguments.quick else 5
    sections = {
        "products": lambda: products(rounds),
        "small": lambda: loop("small", (1, 4), 32, 2 * rounds),
        "middle": lambda: loop("middle", (1, 4), 64 if arguments.quick else 256, rounds),
        "L": lambda: loop("L", (1,), 16 if arguments.quick else 64, rounds),
        "int8": lambda: int8(rounds, arguments.model),
        "text": lambda: text(rounds),
        "memory": memory,
    }
    for name in arguments.only.split(","):
        sections[name]()
    print(f"\n{machine()}, {time.process_time():,.0f} CPU seconds")


if __name__ == "__main__":
    main()

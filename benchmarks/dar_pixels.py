"""Speed of D-AR's pixel decoder: one solver step against the same step done plainly, and when a first preview comes.

    python benchmarks/dar_pixels.py [--quick] [--threads N]

Weights are random, which changes no time. Every section prints a Markdown table; cells with two figures are wall time /
CPU time of the process. How to read them: docs/benchmarks.md.
"""

import argparse
import math
import statistics
import time

import torch
import torch.nn.functional as F
from measure import Gemm, Times, both, interleaved, machine
from next_scale import table
from torch import Tensor

from isthmus.dar.attention import grid_rotary_table, plain_norm, rotate
from isthmus.dar.decoder import FlowDecoder
from isthmus.dar.decoding import SolverPlan, flow_steps, image_noise
from isthmus.dar.prior import TokenLayout, new_prior
from isthmus.dar.sampling import generate_tokens
from isthmus.dar.scheduler import FlowMatchingScheduler, time_waves
from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.pipelines.options import SamplingOptions

# two of the twelve blocks of the published decoder; a middle size; the small preset without its canvas
SIZES = {
    "published width, 2 blocks, 256 px": ({"width": 768, "num_layers": 2, "condition_width": 768}, 256, 1),
    "384 wide, 4 blocks, 64 px, batch 4": (
        {"width": 384, "num_layers": 4, "condition_width": 384, "patch_size": 4},
        64,
        4,
    ),
    "64 wide, 4 blocks, 32 px, batch 16": (
        {"width": 64, "num_layers": 4, "condition_width": 64, "patch_size": 4, "head_width": 32},
        32,
        16,
    ),
}
TOKENS_PER_GROUP = 32


def useful_flops(decoder: FlowDecoder, patches: int, batch: int) -> float:
    """Products of one step with times and keys at hand: linear layers, both attentions, patches in and out."""
    width, layers = decoder.config["width"], decoder.config["num_layers"]
    channels = 3 * decoder.config["patch_size"] ** 2
    # modulation 6, self-attention 4, feed-forward 8, queries and projection of the cross-attention 2
    linear = layers * 2 * patches * width**2 * (6 + 4 + 8 + 2) + 2 * 2 * patches * channels * width
    attention = layers * 4 * patches * width * (patches + TOKENS_PER_GROUP)
    return float(batch * (linear + attention))


@torch.inference_mode()
def plain_velocity(decoder: FlowDecoder, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """The same network written straightforwardly: times and keys at every step, attention maps written out."""
    patch, head_width = decoder.config["patch_size"], decoder.config["head_width"]
    rotary = grid_rotary_table(x_t.shape[2] // patch, x_t.shape[3] // patch, head_width, 10_000.0, device=x_t.device)

    def heads(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, head_width)).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2) / math.sqrt(head_width)).softmax(dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    c = plain_norm(decoder.condition_embedding(condition))
    x = decoder.patch_embedding(F.pixel_unshuffle(x_t, patch).flatten(2).transpose(1, 2))
    for block in decoder.blocks:
        time_embedding = block.time_embedding(time_waves(t, decoder.config["width"]))
        cross, own = block.cross_attention, block.attention
        k, v = cross.kv(plain_norm(block.condition_embedding(c))).chunk(2, dim=-1)
        q = rotate(cross.q_norm(heads(cross.q(plain_norm(x)))), rotary)
        found = cross.proj(attend(q, cross.k_norm(heads(k)), heads(v)))
        signal = F.silu(time_embedding.unsqueeze(1) + found)
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(signal).chunk(6, dim=-1)
        q, k, v = own.qkv(plain_norm(x) * (1 + scale1) + shift1).chunk(3, dim=-1)
        q, k = rotate(own.q_norm(heads(q)), rotary), rotate(own.k_norm(heads(k)), rotary)
        x = x + gate1 * own.proj(attend(q, k, heads(v)))
        x = x + gate2 * block.feed_forward(plain_norm(x) * (1 + scale2) + shift2)
    rows = decoder.head(plain_norm(x)).transpose(1, 2).unflatten(2, (x_t.shape[2] // patch, -1))
    return F.pixel_shuffle(rows, patch)


def steps(rounds: int) -> None:
    """One solver step with times and keys computed ahead, against everything at every step."""
    rows = []
    for name, (shape, side, batch) in SIZES.items():
        torch.manual_seed(0)
        decoder = FlowDecoder(**shape, init_gate=0.3, modulation_std=0.1).eval()
        torch.nn.init.normal_(decoder.head.weight, std=0.05)
        x, t = torch.randn(batch, 3, side, side), torch.full((batch,), 0.3)
        condition = torch.randn(batch, TOKENS_PER_GROUP, shape["condition_width"])
        with torch.inference_mode():
            times, keys = decoder.embed_times(t[:1]), decoder.attend_to(condition)
        patches = (side // decoder.config["patch_size"]) ** 2
        products = Gemm(batch * patches, shape["width"], repeat=1)

        @torch.inference_mode()
        def ours(decoder=decoder, x=x, times=times, keys=keys) -> Tensor:
            return decoder.velocity(x, times, keys)

        torch.testing.assert_close(ours(), plain_velocity(decoder, x, t, condition), atol=1e-4, rtol=1e-4)
        runs = {
            "ours": ours,
            "plain": lambda decoder=decoder, x=x, t=t, c=condition: plain_velocity(decoder, x, t, c),
            "products": products,
        }
        timed = interleaved(runs, rounds)
        share = products.share(useful_flops(decoder, patches, batch), timed["ours"], timed["products"])
        rows.append(
            [
                name,
                both(products.rate(timed["products"]), ".0f"),
                timed["ours"].milliseconds(),
                both(share, ".0%"),
                "x" + both(timed["plain"].ratio(timed["ours"]), ".2f"),
            ]
        )
    columns = ["decoder", "products, GFLOP/s", "one step, ms", "share of products", "against plain"]
    table("One solver step of the pixel decoder", columns, rows)


def first_preview(rounds: int) -> None:
    """When the previews of one image come, as shares of the whole: tokens are drawn and pixels formed in turn."""
    torch.manual_seed(0)
    layout = TokenLayout(512, 4, 64)
    tokenizer = DiffusionTokenizer(
        image_size=64, patch_size=8, width=128, num_layers=1, condition_width=256, num_condition_layers=2,
        num_tokens=64, num_groups=8, codebook_size=512, table_rows=None,
    ).eval()  # fmt: skip
    decoder = FlowDecoder(patch_size=4, width=256, num_layers=4, condition_width=256).eval()
    prior = new_prior(layout, width=256, num_layers=6, num_heads=4).eval()
    scheduler = FlowMatchingScheduler(num_tokens=64, tokens_per_step=8)
    plan = SolverPlan.of(scheduler)
    arrivals, call = [], Times()
    condition = torch.randn(1, 8, 256)
    for _ in range(rounds + 1):
        start, seconds = time.perf_counter(), []
        tokens = generate_tokens(
            prior, layout, torch.tensor([1]), [(0, 0)], SamplingOptions(guidance_scale=2.0), stops=plan.stops
        )
        for _ in flow_steps(tokenizer, decoder, scheduler, plan, tokens, image_noise([(0, 0)], 64, 64)):
            seconds.append(time.perf_counter() - start)
        arrivals.append(seconds)
        start = time.perf_counter()
        with torch.inference_mode():
            decoder(torch.randn(1, 3, 64, 64), torch.zeros(1), condition)
        call.wall.append(time.perf_counter() - start)
    whole = statistics.median(seconds[-1] for seconds in arrivals[1:])
    rows = [
        [str(k + 1), f"{1e3 * statistics.median(s[k] for s in arrivals[1:]):.0f}",
         f"{statistics.median(s[k] for s in arrivals[1:]) / whole:.1%}"]
        for k in range(8)
    ]  # fmt: skip
    one_call = statistics.median(call.wall[1:])
    table(
        "Previews of one 64 px image, guided: 64 tokens in 8 groups",
        ["preview", "ms after the start", "share of the whole"],
        rows,
    )
    print(
        f"One decoder call is {one_call / whole:.1%} of the whole; an eighth and one call are "
        f"{1 / 8 + one_call / whole:.1%}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rounds instead of seven")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(machine(), end="\n\n")
    rounds = 2 if options.quick else 7
    steps(rounds)
    first_preview(rounds)


if __name__ == "__main__":
    main()

"""What editing is worth, and what it costs, on held-out images:  python benchmarks/editing.py MODEL --out DIR

Inside the hole: PSNR (dB), and the lite0 distance of the whole pasted image from the original (`Lite0Distance`, the
perceptual distance of evaluation and of the studies, on 8-bit pictures), lower is nearer. Every row draws the same
images with the same seeds. "painted over" is the hole filled from around without any model. Needs the demo extra.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import interleaved

from isthmus.data.opening import open_source
from isthmus.evaluation.held_out import as_floats
from isthmus.next_scale.canvas import fill_unknown
from isthmus.nn.perceptual import Lite0Distance
from isthmus.pictures import save_picture, table, to_pil, to_uint8
from isthmus.pipelines.labels import names_in_order
from isthmus.pipelines.loading import load_pipeline
from isthmus.studies.srdd import holes, psnr_inside

BATCH = 32
RULES = {
    "coverage": {},
    "coverage, unguided": {"labels": False},
    "coverage, kept up to 1/4": {"max_unknown": 0.25},
    "coverage, kept only if all known": {"max_unknown": 0.0},
    "coverage, 1 jump": {"jumps": 1},
    "coverage, 2 jumps": {"jumps": 2},
    "published": {"keeping": "published"},
}


def held_out(pipe, data: str, number: int) -> tuple[torch.Tensor, list[int]]:
    classes = names_in_order(pipe.class_names)
    source = open_source(data, image_size=pipe.image_size, split="val", classes=classes)
    chosen = np.random.default_rng(0).permutation(len(source))[:number]
    pixels = np.stack([source.load(int(index)) for index in chosen])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, source.labels[chosen].tolist()


def with_interval(values: torch.Tensor) -> str:
    return f"{values.mean():.2f} +- {1.96 * values.std() / len(values) ** 0.5:.2f}"


@torch.no_grad()
def distances(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    network = Lite0Distance()
    pairs = zip(images.split(BATCH), originals.split(BATCH), strict=True)
    return torch.cat([network(as_floats(to_uint8(made)), as_floats(to_uint8(own))) for made, own in pairs])


def in_batches(edit, images: torch.Tensor, labels: list[int], *more: torch.Tensor) -> tuple[torch.Tensor, int]:
    parts, forwards = [], 0
    for start in range(0, len(images), BATCH):
        cut = slice(start, start + BATCH)
        index = list(range(start, min(start + BATCH, len(images))))
        result = edit(images[cut], *(one[cut] for one in more), labels[cut], seed=0, image_index=index)
        parts.append(result.images * 2 - 1)
        forwards = result.num_forwards
    return torch.cat(parts), forwards


def inpainting(pipe, images, labels, out: Path) -> None:
    shown = {}
    for kind in ("centre", "random"):
        mask = holes(kind, len(images), images.shape[-1])
        print(f"\n{kind} masks ({100 * mask.mean():.0f} % of the pixels), {len(images)} held-out images")
        print(f"{'rule':<34} {'PSNR in the hole':>18} {'lite0 distance':>18} {'forwards':>9}")
        painted = torch.where(mask > 0, fill_unknown(images, mask), images)
        rows = {"painted over": (painted, 0)}
        for name, rule in RULES.items():
            rule = dict(rule)
            asked = labels if rule.pop("labels", True) else [None] * len(labels)

            def edit(part, hole, own, rule=rule, **given):
                return pipe.inpaint(part, hole, own, output_type="pt", seam_px=0, **rule, **given)

            rows[name] = in_batches(edit, images, asked, mask)
        for name, (made, forwards) in rows.items():
            psnr, far = with_interval(psnr_inside(made, images, mask)), with_interval(distances(made, images))
            print(f"{name:<34} {psnr:>18} {far:>18} {forwards:>9}")
        shown[kind] = [images, torch.where(mask > 0, torch.ones_like(images), images), *(m for m, _ in rows.values())]
        columns = [to_pil(one[:8]) for one in shown[kind]]
        titles = ["image", "hole", *rows]
        save_picture(table(list(zip(*columns, strict=True)), column_names=titles, min_side_px=96), out / f"{kind}.png")


def super_resolution(pipe, images, labels) -> None:
    print(f"\n{'super-resolution':<34} {'PSNR':>18} {'lite0 distance':>18} {'forwards':>9}")
    side = images.shape[-1]
    for factor in (2, 4):
        small = F.interpolate(images, size=(side // factor,) * 2, mode="area")
        bicubic = F.interpolate(small, size=(side, side), mode="bicubic", align_corners=False).clamp(-1, 1)
        rows = {f"{factor}x bicubic": (bicubic, 0)}
        for paste in (False, True):

            def edit(part, own, paste=paste, **given):
                return pipe.super_resolve(part, own, output_type="pt", paste=paste, **given)

            rows[f"{factor}x {'mended' if paste else 'as drawn'}"] = in_batches(edit, small, labels)
        for name, (made, forwards) in rows.items():
            psnr = with_interval(psnr_inside(made, images, torch.ones_like(images[:, :1])))
            print(f"{name:<34} {psnr:>18} {with_interval(distances(made, images)):>18} {forwards:>9}")


def cost(pipe, images, labels, rounds: int) -> None:
    """Interleaved rounds: sampling, inpainting without jumps, and its parts."""
    part, own = images[:BATCH], labels[:BATCH]
    mask = holes("centre", len(part), images.shape[-1])
    times = interleaved(
        {
            "sample": lambda: pipe(own, seed=0, output_type="latent"),
            "inpaint": lambda: pipe.inpaint(part, mask, own, seed=0, output_type="latent", max_unknown=0.2),
            "encode": lambda: pipe.image_tokenizer.latents(part),
            "sample with pixels": lambda: pipe(own, seed=0, output_type="pt"),
            "inpaint with pixels": lambda: pipe.inpaint(part, mask, own, seed=0, output_type="pt", max_unknown=0.2),
        },
        rounds,
    )
    print(f"\ncost of {BATCH} images, ms wall / CPU (medians of {rounds} interleaved rounds)")
    for name, seconds in times.items():
        print(f"{name:<34} {seconds.milliseconds():>18}")
    loop = [a - b for a, b in zip(times["inpaint"].cpu, times["encode"].cpu, strict=True)]
    ratio = statistics.median(a / b for a, b in zip(loop, times["sample"].cpu, strict=True))
    print(f"the editing loop without encoding: {ratio:.3f} of sampling (CPU time)")
    for ours, theirs in (("inpaint", "sample"), ("inpaint with pixels", "sample with pixels")):
        print(f"{ours} / {theirs}: {times[ours].ratio(times[theirs])[1]:.3f} (CPU time)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", default="openmoji")
    parser.add_argument("--num", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["tables", "cost"])
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe, start = load_pipeline(given.model, device="cpu"), time.perf_counter()
    images, labels = held_out(pipe, given.data, given.num)
    if given.only != "cost":
        inpainting(pipe, images, labels, given.out)
        super_resolution(pipe, images, labels)
    if given.only != "tables":
        cost(pipe, images, labels, given.rounds)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

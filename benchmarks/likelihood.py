"""The law on a trained model, and what its scales hold: elbo against log_prob, bits and signal-to-noise per scale.

python benchmarks/likelihood.py MODEL --data openmoji --classes face,flag --out scales.png
"""

import argparse
from pathlib import Path

import torch

from isthmus.data.batches import EvaluationImages
from isthmus.data.opening import open_source
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.pipelines.loading import load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", default="openmoji")
    parser.add_argument("--classes", default="")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("scales.png"))
    asked = parser.parse_args()
    pipe = load_pipeline(asked.model)
    assert isinstance(pipe, NextScalePipeline)
    names = tuple(asked.classes.split(",")) if asked.classes else None
    views = EvaluationImages(
        open_source(asked.data, image_size=pipe.image_size, split="val", classes=names), pipe.image_size
    )
    rows = [views[i] for i in range(min(asked.num, len(views)))]
    images = torch.stack([torch.as_tensor(row["image"]) for row in rows])
    labels = [int(row["class_label"]) for row in rows]

    log_p, elbo = pipe.log_prob(images, labels), pipe.elbo(images, labels)
    bits = pipe.bits_per_token(images, labels)
    per_token = torch.stack([part.mean() for part in bits.split(list(pipe.schedule.lengths), dim=1)])
    noise = pipe.signal_to_noise(images)
    print(
        f"{len(rows)} held-out images: log p {log_p.mean():.3f} nats, elbo {elbo.mean():.3f} nats, largest difference"
    )
    print(f"of one image {(log_p - elbo).abs().max():.1e} nats; {bits.mean():.3f} bits per token,")
    print(f"{pipe.bits_per_pixel(images, labels).mean():.4f} bits per pixel of the token pyramid\n")
    print("| scale | tokens | bits per token | signal to noise, dB |\n|---|---|---|---|")
    for k, side in enumerate(pipe.schedule.sizes):
        print(f"| {side} x {side} | {pipe.schedule.lengths[k]} | {per_token[k]:.2f} | {noise[k]:.2f} |")
    plot(pipe.schedule.sizes, noise.tolist(), per_token.tolist(), asked.out)


def plot(sides: tuple[int, ...], noise: list[float], bits: list[float], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, values, name in zip(axes, (noise, bits), ("signal to noise (dB)", "bits per token"), strict=True):
        axis.plot(range(len(sides)), values, marker="o", color="#00796b")
        axis.set_xticks(range(len(sides)), [f"{side}²" for side in sides])
        axis.set(xlabel="scale", ylabel=name)
        axis.grid(alpha=0.3)
    figure.savefig(out, format="png", dpi=120)  # else a name without a suffix gets one
    print(f"\nplot: {out}")


if __name__ == "__main__":
    main()

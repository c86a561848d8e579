"""How much of a prompt a text model draws: attributes of avatars, read back:  python benchmarks/attributes.py MODEL

Prompts are captions of drawings that nobody trained on, and of drawings with a pair of attributes that no training
image has. A small network reads what the samples show (isthmus/evaluation/attributes.py; trained at the first call and
kept in the cache). Beside every share stands its ceiling: what it reads right of fresh renders. Needs the extra `demo`.
"""

import argparse
from collections import Counter

import torch

from isthmus.data.avatars import AVATAR_STYLES, Avatars
from isthmus.evaluation.attributes import Found, attribute_reader, attributes_found
from isthmus.evaluation.statistics import wilson_interval
from isthmus.pipelines.loading import load_pipeline

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder of a next-scale model that reads prompts")
    parser.add_argument("--styles", default=",".join(AVATAR_STYLES), help="those it was trained on")
    parser.add_argument("--num", type=int, default=280, help="prompts of each split")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipe, styles = load_pipeline(arguments.model), tuple(arguments.styles.split(","))
    reader, ceiling = attribute_reader(pipe.image_size, styles)
    print(f"{arguments.model}, seed {arguments.seed}, {arguments.num} prompts of each split, {pipe.defaults.words()}\n")
    print("| prompts | style | attributes right | 95 % | ceiling | all of an image right |\n|---|---|---|---|---|---|")
    for split in ("val", "combinations"):
        source = Avatars(
            styles, image_size=pipe.image_size, split=split, num_images=10 * max(arguments.num, len(styles))
        )
        asked, prompts = source.attributes[: arguments.num], source.captions[: arguments.num]
        shown = []
        for first in range(0, len(asked), BATCH):
            part = prompts[first : first + BATCH]
            made = pipe(prompt=part, seed=arguments.seed, image_index=first, output_type="pt").images
            names = [one["style"] for one in asked[first : first + BATCH]]
            shown += reader.read(torch.as_tensor(made) * 2 - 1, names)
        for style in ("all", *styles):
            rows = [row for row, one in enumerate(asked) if style in ("all", one["style"])]
            if rows:
                print(line(split, style, [asked[row] for row in rows], [shown[row] for row in rows], ceiling))


def line(split: str, style: str, asked: list, shown: list, ceiling: dict) -> str:
    found = attributes_found(asked, shown)
    right, total = sum(one.right for one in found.values()), sum(one.asked for one in found.values())
    # of the attributes as often as they were asked for here
    best = sum(ceiling[key].share * one.asked for key, one in found.items() if key in ceiling) / total
    pairs = zip(asked, shown, strict=True)
    whole = Counter(all(seen.get(name) == value for name, value in one.items()) for one, seen in pairs)
    interval = wilson_interval(right, total)
    shares = f"{Found(right, total).share:.1%} | {interval.low:.1%} to {interval.high:.1%} | {best:.1%}"
    return f"| {split} | {style} | {shares} | {whole[True] / len(asked):.1%} |"


if __name__ == "__main__":
    main()

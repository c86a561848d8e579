"""`isthmus demo`: images, tokenizer, prior, samples and a report, on a laptop, without a network."""

import logging
from pathlib import Path

from isthmus.data.opening import open_source
from isthmus.demo.options import DemoOptions
from isthmus.demo.stages import IMAGE_SIZE_PX, Clock
from isthmus.files import alone_in

logger = logging.getLogger("isthmus")


@alone_in("options.folder")
def run_demo(options: DemoOptions) -> Path:
    """Run every stage that is not finished yet and write `report.md`; returns the folder.

    Raises:
        UserError: an unknown class, or the folder holds something else.
    """
    clock = Clock(options.folder / "seconds.json")
    logger.info("1/4 images: openmoji at %d px", IMAGE_SIZE_PX)
    train, held_out = clock.time(
        "images",
        lambda: tuple(
            open_source("openmoji", image_size=IMAGE_SIZE_PX, split=split, classes=options.chosen_classes)
            for split in ("train", "val")
        ),
    )
    logger.info("    %d images to train on, %d held out: %s", len(train), len(held_out), ", ".join(train.class_names))
    # imported here: each brings a training loop of its own
    if options.family == "dar":
        from isthmus.demo.dar import run_dar_demo as run_family
    else:
        from isthmus.demo.next_scale import run_next_scale_demo as run_family
    run_family(options, train, held_out, clock)
    logger.info("done in %.0f s: see %s", sum(clock.seconds.values()), options.folder / "report.md")
    return options.folder

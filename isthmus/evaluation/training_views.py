"""Images as training sees them: fresh augmented views, which say how much a search for copies can find."""

import numpy as np

from isthmus.data.cache import sha256_of_parts
from isthmus.data.source import ImageSource
from isthmus.data.views import random_view
from isthmus.evaluation.image_sets import ImageSet, Picture
from isthmus.functional.draws import AUGMENT, stream

# marks the streams of these views: training's own have one number after the purpose
_MEASURED = 1


def training_views(source: ImageSource, image_size: int, count: int, *, seed: int = 0) -> ImageSet:
    """`count` fresh views of images that are evenly spread over the split, with the set's own augmentation.

    Args:
        source: a split: training images as training sees them, or held-out ones changed alike.
        image_size: side in pixels.
        count: how many views; an image is seen again where there are more of them than images.
        seed: view k is drawn from (seed, k).
    """
    chosen = np.arange(count) * len(source) // count

    def at(index: int) -> Picture:
        generator = stream(seed, AUGMENT, index, _MEASURED)
        return random_view(source, int(chosen[index]), image_size, source.augmentation, generator)

    return ImageSet(
        "views",
        sha256_of_parts(source.fingerprint, image_size, repr(source.augmentation), count, seed),
        source.labels[chosen] if source.class_names else None,
        source.class_names,
        count,
        lambda: (at(index) for index in range(count)),
        at,
    )


def view_words(source: ImageSource) -> str:
    """What training does to the images of a split, in words."""
    augment, done = source.augmentation, []
    if type(source).draw is not ImageSource.draw:
        done.append("cut afresh")
    if augment.resize_ratio > 1:
        done.append("cropped")
    if augment.max_shift > 0:
        done.append("shifted")
    if augment.flip and bool(source.flip.any()):
        done.append("mirrored")
    listed = " and ".join(filter(None, (", ".join(done[:-1]), *done[-1:])))
    return "training images as training sees them" + (f", {listed}" if listed else "")

"""Real images measured once for many models."""

import numpy as np

from isthmus.evaluation.real_side import RealSides, choose_reference, measure_real_side, open_splits
from tests.evaluation.tiny_evaluation import mean_colour
from tests.training.tiny_runs import write_images


def test_what_is_used_again_is_what_would_be_measured(tmp_path):
    network, sides = mean_colour(), RealSides()
    specs = [write_images(tmp_path / f"{seed}.npz", count=200, num_classes=2, seed=seed) for seed in (0, 1)]
    splits = [open_splits(spec, image_size=8, classes=(), wanted=()) for spec in specs]
    references = [choose_reference(one, None, size=(8, 8)) for one in splits]

    def measured(which: int, n: int):
        return sides.measure(references[which], splits[which], network, n)

    first = measured(0, 2)
    assert measured(0, 2) is first
    for which, n in ((0, 1), (1, 2)):
        other = measured(which, n)
        assert other is not first
        direct = measure_real_side(references[which], splits[which], network, n)
        assert other.reference is not None and direct.reference is not None
        assert np.array_equal(other.reference.reference["colour"], direct.reference.reference["colour"])
        assert np.array_equal(other.reference.ruined["colour"], direct.reference.ruined["colour"])
    # another order of the classes is another numbering of the labels
    turned = open_splits(specs[0], image_size=8, classes=tuple(reversed(splits[0].class_names)), wanted=())
    assert sides.measure(references[0], turned, network, 2) is not first

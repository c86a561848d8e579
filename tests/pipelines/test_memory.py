"""What is said where memory runs out, and how much is asked for."""

import pytest
import torch

from isthmus.errors import UserError
from isthmus.pipelines.free_memory import images_that_fit
from isthmus.pipelines.memory import naming_next_batch_size


@pytest.mark.parametrize(("batch_size", "advice"), [(8, "--batch-size 4"), (3, "--batch-size 1"), (1, "bfloat16")])
def test_running_out_of_memory_names_the_next_batch_size(batch_size, advice):
    with pytest.raises(UserError, match=f"at batch size {batch_size}.*{advice}"), naming_next_batch_size(batch_size):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="must match"), naming_next_batch_size(8):
        torch.zeros(2) + torch.zeros(3)


def test_at_least_one_image_is_tried():
    assert images_that_fit(torch.device("cpu"), 2**62) == 1
    assert images_that_fit(torch.device("cpu"), 1) == 64

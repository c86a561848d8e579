"""What is said where memory runs out, and how much is asked for."""

import pytest
import torch

from isthmus.errors import UserError
from isthmus.pipelines.memory import container_bytes, images_that_fit, naming_next_batch_size


def test_running_out_of_memory_names_the_next_batch_size():
    for size, advice in ((8, "--batch-size 4"), (3, "--batch-size 1"), (1, "bfloat16")):
        with pytest.raises(UserError, match=f"at batch size {size}.*{advice}"), naming_next_batch_size(size):
            torch.empty(2**60, dtype=torch.uint8)
    # other errors stay what they are
    with pytest.raises(RuntimeError, match="must match"), naming_next_batch_size(8):
        torch.zeros(2) + torch.zeros(3)


def test_at_least_one_image_is_tried():
    assert images_that_fit(torch.device("cpu"), 2**62) == 1
    assert images_that_fit(torch.device("cpu"), 1) == 64


def test_the_limits_of_a_container_count(tmp_path):
    def group(folder, limit, used):
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "sys/fs/cgroup" / folder / "memory.current").write_text(f"{used}\n")
        (tmp_path / "sys/fs/cgroup" / folder / "memory.stat").write_text("anon 1\ninactive_file 5\n")

    assert container_bytes(tmp_path) == []
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/job\n")
    group("pod", "100", "30")
    group("pod/job", "max", "20")
    assert container_bytes(tmp_path) == [75]
    # a container sees its own group as the tree
    group("", "60", "50")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    assert container_bytes(tmp_path) == [15]

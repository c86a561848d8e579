import torch

from isthmus.nn.precision import bf16_speedup, faster_type


def test_auto_is_bf16_where_it_is_twice_as_fast_and_says_so():
    choice = faster_type(torch.device("cpu"))
    assert choice.bf16 == (bf16_speedup() >= 2)
    assert (
        choice.why.startswith("bf16: " if choice.bf16 else "float32: ") and f"{bf16_speedup():.1f} times" in choice.why
    )
    # one process measures once
    assert bf16_speedup() == bf16_speedup() and faster_type(torch.device("cpu")) == choice

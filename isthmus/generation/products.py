"""Products of a few rows with a large matrix, the arithmetic of decoding: what counts is how weights are read.

A token's product with a matrix reads every weight once and does little with it, so the layout and the number of bytes
decide the speed, not the arithmetic. MKL, which torch uses on CPUs, reads them at half its rate as soon as there are
two rows, as guidance has them. What helps against that was measured (benchmarks/dar_prior.py, docs/benchmarks.md).
"""

import torch
from jaxtyping import Float
from torch import Tensor


class WholeProduct:
    """The matrix as it is.

    On a CPU, a matrix with more outputs than inputs is stored (in, out), which MKL reads 1.2 to 1.6 times as fast; with
    fewer outputs than inputs the module's own layout is as fast, and nothing is copied.

    Args:
        weight: as in `torch.nn.Linear`.
    """

    def __init__(self, weight: Float[Tensor, "out in"]):
        wide = weight.shape[0] > weight.shape[1] and weight.device.type == "cpu"
        self.weight = weight.t().contiguous() if wide else weight.t()

    def __call__(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """X times the matrix."""
        return torch.mm(x, self.weight)

    def added(self, to: Float[Tensor, "rows out"], x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """The product added to something."""
        return torch.addmm(to, x, self.weight)


class PackedProduct:
    """The matrix in the order in which oneDNN's own kernel reads it, for large fp32 matrices on a CPU.

    From 2 to 8 rows it takes 1.3 to 2.9 times less time than the module's layout, for one row more.

    Args:
        weight: as in `torch.nn.Linear`.
    """

    SMALLEST = 2**18
    """Weights of a matrix below which `WholeProduct` is as fast."""

    def __init__(self, weight: Float[Tensor, "out in"]):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 2)

    @classmethod
    def pays(cls, weight: Float[Tensor, "out in"], num_rows: int) -> bool:
        """Whether this is the fastest way here, and torch has it (Inductor uses the same two operators)."""
        fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= cls.SMALLEST
        operators = ("_reorder_linear_weight", "_linear_pointwise")
        present = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)
        return num_rows > 1 and fits and present

    def __call__(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """X times the matrix."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")

    def added(self, to: Float[Tensor, "rows out"], x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """The product added to something."""
        return to + self(x)


class Int8Product:
    """The matrix in 8 bits, symmetric, with one scale per output; a quarter of the bytes of fp32.

    Rows are multiplied in bf16 by torch's own kernel for 8-bit weights, however many they are: a row's result depends
    on no other, so neither batch size nor the length of a prefix changes an image. From some hundred rows on (a long
    prefix of many images) the matrix written out in fp32 would be twice as fast.

    Args:
        weight: as in `torch.nn.Linear`.
    """

    def __init__(self, weight: Float[Tensor, "out in"]):
        scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
        # the kernel takes scales in bf16: rounded before the weights are divided by them, they cost no precision
        self.scale = scale.bfloat16()
        steps = weight.float() / self.scale.float().unsqueeze(1)
        self.weight = steps.round_().clamp_(-127, 127).to(torch.int8)

    def __call__(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """X times the matrix."""
        return torch._weight_int8pack_mm(x.bfloat16(), self.weight, self.scale).to(x.dtype)

    def added(self, to: Float[Tensor, "rows out"], x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """The product added to something."""
        return to + self(x)


Product = WholeProduct | PackedProduct | Int8Product


def fastest_product(weight: Float[Tensor, "out in"], num_rows: int) -> Product:
    """The matrix as it is, in the layout that is fastest for about this many rows."""
    return PackedProduct(weight) if PackedProduct.pays(weight, num_rows) else WholeProduct(weight)

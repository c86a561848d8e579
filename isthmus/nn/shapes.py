"""The legend of dimension letters and value ranges that every signature in Isthmus uses.

========  =====================================================================================================
letter    meaning
========  =====================================================================================================
``b``     images in a batch
``c``     channels of a map (3 for pixels)
``h w``   rows and columns of a map
``grid``  side of the latent map, which is the side of the last scale
``d``     `codebook_dim`, the width of one code
``k``     `codebook_size`, the number of codes
``s``     side of one scale; a scale holds ``s * s`` tokens, row by row
``l``     tokens in a sequence (of one scale, or of all scales together: the signature says which)
``n``     tokens of an image, or of a part of it; in a signature without tokens: rows, times
``v``     logits per token (= `codebook_size`)
``width`` width of the transformer
``heads`` attention heads
``pairs`` pairs of channels that a rotary position turns together (half the width of a head)
``seen``  tokens that an attention looks at, where these are not the ones that ask
========  =====================================================================================================

Images are float, NCHW, in [-1, 1]; a name that ends in ``_uint8`` holds 0..255. Scales are counted from 0.
Flow time t is in [0, 1], 0 = noise and 1 = image; `raw_t` is the same before the scheduler's shift.
"""

from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "b 3 h w"]
"""Images in [-1, 1]."""

FeatureMap = Float[Tensor, "b d h w"]
"""A map of codes at any side."""

LatentMap = Float[Tensor, "b d grid grid"]
"""A map at the side of the last scale: encoder output (`latents`) or the sum of the scales so far (`features`)."""

ScaleTokens = Int[Tensor, "b l"]
"""Token ids of one scale, row by row."""

# every entry has a length of its own, so none may be bound to a letter
TokenPyramid = list[Int[Tensor, "b _"]]
"""Token ids of every scale, coarse to fine: entry i has s_i * s_i columns."""

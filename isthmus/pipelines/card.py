"""The README.md of a saved pipeline: what it is, what it was trained on and on what terms, how to load it."""

import json
from collections.abc import Mapping
from typing import Any

from isthmus.generation.options import SamplingOptions
from isthmus.pipelines.labels import listed_names, names_in_order


def model_card(
    *,
    kind: str,
    version: str,
    image_size: int,
    class_names: Mapping[str, str],
    num_classes: int,
    layout: str,
    num_parameters: Mapping[str, int],
    sampling: SamplingOptions,
    data: Mapping[str, Any],
    protocol: str,
) -> str:
    """Markdown with the front matter the hub reads.

    Args:
        kind: what the model is, in a few words.
        version: of Isthmus.
        image_size: pixels.
        class_names: index (as text) -> name.
        num_classes: 0 for unlabelled models.
        layout: how tokens are laid out, as a sentence.
        num_parameters: per component.
        sampling: the defaults saved with the model.
        data: `name` and `attribution` of the training data.
        protocol: how the model was trained and measured.
    """
    names = names_in_order(class_names)
    shown = listed_names(names) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    classes = f"{num_classes} ({shown})" if names else str(num_classes) if num_classes else "none (unlabelled)"
    # a JSON string is a Python string, in the quotes that the rest of the card has
    first = json.dumps(names[0], ensure_ascii=False) if names else "0"
    argument = f"class_labels=[{first}], " if num_classes else ""
    sizes = "; ".join(f"{name} {count / 1e6:.2f}M" for name, count in num_parameters.items())
    attribution = data.get("attribution") or "unknown. Find out before you publish this model or its images."
    return f"""---
library_name: isthmus
pipeline_tag: unconditional-image-generation
license: other
tags:
- isthmus
- image-generation
- autoregressive
---

# {kind}

Images of {image_size} x {image_size} pixels. Classes: {classes}.
{layout} Parameters: {sizes}.

## Load

```python
from isthmus import load_pipeline

pipe = load_pipeline("path/to/this/folder")
pipe({argument}num_images=4, seed=0).images[0].save("sample.png")
```

or `isthmus sample path/to/this/folder --num 16 --out samples`. Saved with Isthmus {version}.

With diffusers (`pip install "isthmus[diffusers]"`; its own `DiffusionPipeline.from_pretrained` knows no Isthmus):

```python
from isthmus.diffusers import from_pretrained

pipe = from_pretrained("path/to/this/folder")  # a DiffusionPipeline
pipe({argument}seed=0).images[0].save("sample.png")
```

Defaults saved with the model: {sampling.words()}.

## Data and licence

Trained on: {data.get("name") or "unknown"}.
Licence: {attribution}

## Protocol

{protocol or "Not recorded."}
"""

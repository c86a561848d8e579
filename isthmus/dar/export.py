"""The prior of a D-AR model as a folder of its own: a Llama that stock transformers, vLLM and SGLang load."""

from pathlib import Path

from transformers import GenerationConfig

import isthmus
from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.prior import TokenLayout
from isthmus.errors import UserError
from isthmus.nn.stored_llama import no_progress_bars
from isthmus.pipelines.folder import written_whole
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.options import SamplingOptions


def export_llama(model: str | Path | DARPipeline, out: str | Path) -> Path:
    """Write the Llama of a D-AR pipeline for readers that know nothing of Isthmus; the folder appears whole or not.

    Beside the weights it holds a generation_config.json (as many tokens as an image has, no class ever drawn, the
    filters saved with the model) and a README.md with the exact flags for transformers, vLLM and SGLang. Raises
    UserError where there is no such model, it is of the other family, or `out` is neither new nor empty.
    """
    out = Path(out)
    with written_whole(out) as folder:
        pipeline = model if isinstance(model, DARPipeline) else load_pipeline(model, device="cpu")
        if not isinstance(pipeline, DARPipeline):
            raise UserError(f"only D-AR models have a Llama to export, {model} is a {type(pipeline).__name__}.")
        with no_progress_bars():
            pipeline.transformer.save_pretrained(folder)
        settings = generation_config(pipeline.token_layout, pipeline.defaults)
        settings.save_pretrained(folder)
        (folder / "README.md").write_text(readme(pipeline, settings), encoding="utf-8")
        for weights in folder.glob("*.safetensors"):
            # safetensors writes for the owner alone; a model is as readable as the rest of its folder
            weights.chmod((folder / "config.json").stat().st_mode)
    return out


def generation_config(layout: TokenLayout, sampling: SamplingOptions) -> GenerationConfig:
    """How stock transformers draws: all tokens of an image, and none of the classes.

    Guidance is left out: a schedule over tokens means nothing there, and a constant one is an argument of the call.
    """
    return GenerationConfig(
        max_new_tokens=layout.num_tokens,
        # the rows of classes in the head are zero, so their logits are 0 and not -inf
        suppress_tokens=list(range(layout.codebook_size, layout.vocab_size)),
        do_sample=True,
        temperature=sampling.temperature_at(0),
        # spelled out where off: transformers would otherwise keep the 50 likeliest
        top_k=sampling.top_k or 0,
        top_p=1.0 if sampling.top_p is None else float(sampling.top_p),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def readme(pipeline: DARPipeline, settings: GenerationConfig) -> str:
    """The README.md of the exported folder."""
    layout = pipeline.token_layout
    return _README.format(
        version=isthmus.__version__,
        codes=layout.codebook_size,
        last_code=layout.codebook_size - 1,
        null=layout.vocab_size - 1,
        tokens=layout.num_tokens,
        positions=layout.num_tokens + 1,
        temperature=settings.temperature,
        vllm_top_k=settings.top_k,
        sglang_top_k=settings.top_k or -1,
        top_p=settings.top_p,
        classes=_classes(pipeline),
        attribution=pipeline.config["data"].get("attribution") or "unknown. Find out before you publish this model.",
    )


def _classes(pipeline: DARPipeline) -> str:
    layout = pipeline.token_layout
    if not layout.num_classes:
        return f"The model has no classes: every prompt is the one id {layout.codebook_size}."
    first, last = layout.codebook_size, layout.vocab_size - 2
    named = ", ".join(f"{first + i} {pipeline.label_name(i)}" for i in range(min(layout.num_classes, 20)))
    more = ", ..." if layout.num_classes > 20 else ""
    return f"Class c is id {first} + c ({first}..{last}: {named}{more}); the null class is {last + 1}."


_README = """---
library_name: transformers
license: other
tags:
- isthmus
- image-generation
---

# The Llama of a D-AR image model

A stock `LlamaForCausalLM` whose words are image tokens, exported with Isthmus {version}.
Ids 0..{last_code} are codes of the image tokenizer. {classes}

A prompt is one id, the class. The {tokens} tokens that follow are an image; there is no end-of-sequence token. Classes
are never predicted: their rows of the head are zero, which makes their logits 0, so they must be left out when drawing.
There is no text and no text tokenizer. Pixels are made by the model this folder came from:

```python
from isthmus import load_pipeline

images = load_pipeline("path/to/the/pipeline").decode(token_ids)   # (n, {tokens}) ints
```

## transformers

`generation_config.json` asks for {tokens} new tokens and leaves the classes out.

```python
import torch
from transformers import LlamaForCausalLM

llama = LlamaForCausalLM.from_pretrained("path/to/this/folder")
prompt = torch.tensor([[{codes}]])
drawn = llama.generate(prompt, attention_mask=torch.ones_like(prompt))
guided = llama.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    guidance_scale=2.0,
    negative_prompt_ids=torch.full_like(prompt, {null}),
)
token_ids = guided[:, 1:]
```

`do_sample=False` gives the tokens that Isthmus draws with `top_k=1`, at constant guidance. Guidance that changes over
the tokens needs a logits processor of one's own there.

## vLLM

```python
from vllm import LLM, SamplingParams

llm = LLM("path/to/this/folder", skip_tokenizer_init=True, max_model_len={positions}, dtype="float32")
params = SamplingParams(
    max_tokens={tokens}, min_tokens={tokens}, ignore_eos=True, detokenize=False,
    allowed_token_ids=list(range({codes})), temperature={temperature}, top_k={vllm_top_k}, top_p={top_p},
)
outputs = llm.generate([{{"prompt_token_ids": [{codes}]}}], params)
token_ids = [list(output.outputs[0].token_ids) for output in outputs]
```

As a server: `vllm serve path/to/this/folder --skip-tokenizer-init --max-model-len {positions} --dtype float32`, and
requests to `/v1/completions` with `"prompt": [{codes}]`, `"max_tokens": {tokens}`, `"ignore_eos": true`,
`"return_token_ids": true` and the same `"allowed_token_ids"`.

## SGLang

```bash
python -m sglang.launch_server --model-path path/to/this/folder --skip-tokenizer-init \\
    --context-length {positions} --dtype float32
```

```python
import requests

drawn = requests.post("http://localhost:30000/generate", json={{
    "input_ids": [[{codes}]],
    "sampling_params": {{
        "max_new_tokens": {tokens}, "ignore_eos": True,
        "temperature": {temperature}, "top_k": {sglang_top_k}, "top_p": {top_p},
        "logit_bias": {{str(i): -1e9 for i in range({codes}, {null} + 1)}},
    }},
}}).json()
token_ids = [answer["output_ids"] for answer in drawn]
```

Neither server guides (there is no second, unlabelled row), so images look as with a guidance scale of 1. The flags are
written for vLLM 0.10.2 and SGLang 0.5 but were never run by Isthmus: check them against your server's documentation.

## Licence

{attribution}
"""

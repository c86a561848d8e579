"""The prior of a D-AR model as a folder of its own: a Llama that stock transformers, vLLM and SGLang load."""

import json
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
from isthmus.text.tokenizer import TextTokenizer


def export_llama(model: str | Path | DARPipeline, out: str | Path) -> Path:
    """Write the Llama of a D-AR pipeline for readers that know nothing of Isthmus; the folder appears whole or not.

    Beside the weights it holds a generation_config.json (as many tokens as an image has, no class and no word ever
    drawn, the filters saved with the model), of a model that reads text a tokenizer.json, and a README.md with the
    exact flags for transformers, vLLM and SGLang. Raises
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
        if pipeline.text_tokenizer is not None:
            text = prompt_tokenizer(pipeline.token_layout, pipeline.text_tokenizer)
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(readme(pipeline, settings), encoding="utf-8")
        for weights in folder.glob("*.safetensors"):
            # safetensors writes for the owner alone; a model is as readable as the rest of its folder
            weights.chmod((folder / "config.json").stat().st_mode)
    return out


def generation_config(layout: TokenLayout, sampling: SamplingOptions) -> GenerationConfig:
    """How stock transformers draws: all tokens of an image, and none of the classes and words.

    Guidance is left out: a schedule over tokens means nothing there, and a constant one is an argument of the call.
    """
    return GenerationConfig(
        max_new_tokens=layout.num_tokens,
        # the rows of classes and words in the head are zero, so their logits are 0 and not -inf
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


def prompt_tokenizer(layout: TokenLayout, words: TextTokenizer) -> str:
    """A tokenizer.json of the `tokenizers` library that makes whole prompts of texts, in ids of the vocabulary.

    It cuts what is too long, sets the null class behind, which begins an image, and fills up on the left.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    described, start = json.loads(words.model.to_str()), layout.first_word - 1
    # what is no word has a name all the same: no id is without one
    names = [f"<code {i}>" for i in range(layout.codebook_size)] + [f"<class {i}>" for i in range(layout.num_classes)]
    vocabulary = {name: i for i, name in enumerate([*names, _START])}
    vocabulary |= {word: layout.first_word + i for word, i in described["model"]["vocab"].items()}
    described["model"]["vocab"] = vocabulary
    tokenizer = Tokenizer.from_str(json.dumps(described))
    template = TemplateProcessing(single=f"$A {_START}", special_tokens=[(_START, start)])
    tokenizer.post_processor = template  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.enable_truncation(layout.prompt_length + 1)
    tokenizer.enable_padding(direction="left", pad_id=start, pad_token=_START)
    return tokenizer.to_str(pretty=True)


def readme(pipeline: DARPipeline, settings: GenerationConfig) -> str:
    """The README.md of the exported folder."""
    layout, words = pipeline.token_layout, pipeline.text_tokenizer
    null, ids, about, code = layout.first_word - 1, [layout.codebook_size], _OF_CLASSES, _FROM_CLASSES
    example = pipeline.config["data"].get("prompt") or "a picture"
    if words is not None:
        ids = [*(layout.first_word + word for word in words.words([example], warn=False)[0]), null]
        about, code = _OF_WORDS, _FROM_WORDS
    values = {
        "version": isthmus.__version__,
        "codes": layout.codebook_size,
        "last_code": layout.codebook_size - 1,
        "null": null,
        "last_id": layout.vocab_size - 1,
        "first_word": layout.first_word,
        "longest": layout.prompt_length,
        "example": json.dumps(example, ensure_ascii=False),
        "prompt": ids,
        "start_or_class": f"{null}, or in its place a class" if layout.num_classes else f"{null}",
        "tokens": layout.num_tokens,
        "positions": layout.num_positions,
        "temperature": settings.temperature,
        "vllm_top_k": settings.top_k,
        "sglang_top_k": settings.top_k or -1,
        "top_p": settings.top_p,
        "classes": _classes(pipeline),
        "attribution": pipeline.config["data"].get("attribution") or "unknown. Find out before you publish this model.",
    }
    return _README.format(about=about.format(**values), code=code.format(**values), **values)


def _classes(pipeline: DARPipeline) -> str:
    layout = pipeline.token_layout
    first, null = layout.codebook_size, layout.first_word - 1
    if not layout.num_classes:
        ends = "ends with" if layout.num_words else "is"
        return f"The model has no classes: every prompt {ends} the one id {first}."
    named = ", ".join(f"{first + i} {pipeline.label_name(i)}" for i in range(min(layout.num_classes, 20)))
    more = ", ..." if layout.num_classes > 20 else ""
    return f"Class c is id {first} + c ({first}..{null - 1}: {named}{more}); the null class is {null}."


# name of the null class in a tokenizer.json
_START = "<start>"

_OF_CLASSES = """
A prompt is one id, the class. The {tokens} tokens that follow are an image; there is no end-of-sequence token. Classes
are never predicted: their rows of the head are zero, which makes their logits 0, so they must be left out when drawing.
There is no text and no text tokenizer. Pixels are made by the model this folder came from:"""

_OF_WORDS = """Ids {first_word}..{last_id} are words.

A prompt is the words of a text, at most {longest}, and behind them {start_or_class}. {example} is

    {prompt}

and `tokenizer.json` makes these ids. {null} alone asks for nothing. The {tokens} tokens that follow are an image; there
is no end-of-sequence token. Classes and words are never predicted: their rows of the head are zero, which makes their
logits 0, so they must be left out when drawing. Pixels are made by the model this folder came from:"""

_FROM_CLASSES = """import torch
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
token_ids = guided[:, 1:]"""

_FROM_WORDS = """import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

llama = LlamaForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = Tokenizer.from_file("path/to/this/folder/tokenizer.json")
texts = tokenizer.encode_batch([{example}, ""])  # rows of one length, filled up on the left
prompt = torch.tensor([text.ids for text in texts])
mask = torch.tensor([text.attention_mask for text in texts])
drawn = llama.generate(prompt, attention_mask=mask)
guided = llama.generate(
    prompt,
    attention_mask=mask,
    guidance_scale=2.0,
    negative_prompt_ids=torch.full_like(prompt[:, :1], {null}),
)
token_ids = guided[:, prompt.shape[1]:]"""

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
{about}

```python
from isthmus import load_pipeline

images = load_pipeline("path/to/the/pipeline").decode(token_ids)   # (n, {tokens}) ints
```

## transformers

`generation_config.json` asks for {tokens} new tokens and leaves out every id that is no code.

```python
{code}
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
outputs = llm.generate([{{"prompt_token_ids": {prompt}}}], params)
token_ids = [list(output.outputs[0].token_ids) for output in outputs]
```

As a server: `vllm serve path/to/this/folder --skip-tokenizer-init --max-model-len {positions} --dtype float32`, and
requests to `/v1/completions` with `"prompt": {prompt}`, `"max_tokens": {tokens}`, `"ignore_eos": true`,
`"return_token_ids": true` and the same `"allowed_token_ids"`.

## SGLang

```bash
python -m sglang.launch_server --model-path path/to/this/folder --skip-tokenizer-init \\
    --context-length {positions} --dtype float32
```

```python
import requests

drawn = requests.post("http://localhost:30000/generate", json={{
    "input_ids": [{prompt}],
    "sampling_params": {{
        "max_new_tokens": {tokens}, "ignore_eos": True,
        "temperature": {temperature}, "top_k": {sglang_top_k}, "top_p": {top_p},
        "logit_bias": {{str(i): -1e9 for i in range({codes}, {last_id} + 1)}},
    }},
}}).json()
token_ids = [answer["output_ids"] for answer in drawn]
```

Neither server guides (there is no second, unlabelled row), so images look as with a guidance scale of 1. The flags are
written for vLLM 0.10.2 and SGLang 0.5 but were never run by Isthmus: check them against your server's documentation.

## Licence

{attribution}
"""

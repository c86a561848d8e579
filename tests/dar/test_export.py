import ast
import json
import re

import pytest
import torch
from transformers import LlamaForCausalLM

from isthmus.dar.export import export_llama
from isthmus.dar.sampling import generate_tokens
from isthmus.errors import UserError
from isthmus.pipelines.options import SamplingOptions
from tests.pipelines.tiny import tiny_pipeline
from tests.pipelines.tiny_dar import WORDS, tiny_dar

LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(scope="module")
def pipeline():
    return tiny_dar(sampling_defaults=SamplingOptions(top_k=5, temperature=0.9))


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    return export_llama(pipeline, tmp_path_factory.mktemp("exported") / "llama")


@pytest.fixture(scope="module")
def llama(folder):
    return LlamaForCausalLM.from_pretrained(folder)


def ours(pipeline, guidance):
    """Greedy tokens by our own loop."""
    options = SamplingOptions(guidance_scale=guidance, top_k=1)
    layout = pipeline.token_layout
    (tokens,) = generate_tokens(
        pipeline.transformer, layout, LABELS, [(0, i) for i in range(3)], options, stops=[layout.num_tokens]
    )
    return tokens


def generated(llama, layout, **options):
    prompt = layout.class_token(LABELS).unsqueeze(1)
    return llama.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, 1:]


def test_stock_transformers_draws_our_greedy_tokens_also_with_constant_guidance(pipeline, llama):
    assert type(llama) is LlamaForCausalLM
    layout = pipeline.token_layout
    plain = generated(llama, layout, do_sample=False)
    assert torch.equal(plain, ours(pipeline, 1.0))
    null = torch.full((3, 1), layout.vocab_size - 1)
    for guidance in (0.5, 3.0):
        tokens = generated(llama, layout, do_sample=False, guidance_scale=guidance, negative_prompt_ids=null)
        assert torch.equal(tokens, ours(pipeline, guidance)) and not torch.equal(tokens, plain)


def test_drawn_tokens_are_codes_and_as_many_as_an_image_has(pipeline, llama):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = generated(llama, pipeline.token_layout, temperature=5.0)
    assert tokens.shape == (3, pipeline.token_layout.num_tokens)
    assert int(tokens.max()) < pipeline.token_layout.codebook_size


def test_the_folder_says_how_to_draw(folder, pipeline):
    written = json.loads((folder / "generation_config.json").read_text())
    expected = {"max_new_tokens": 16, "suppress_tokens": [16, 17, 18, 19], "do_sample": True, "top_k": 5}
    assert {name: written[name] for name in expected} == expected
    assert written["temperature"] == pytest.approx(0.9)
    assert not {"bos_token_id", "eos_token_id", "pad_token_id"} & {k for k, v in written.items() if v is not None}
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    readme = (folder / "README.md").read_text()
    assert "Class c is id 16 + c (16..18: 16 face, 17 flag, 18 hand); the null class is 19." in readme
    assert "allowed_token_ids=list(range(16))" in readme and "--context-length 17" in readme
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        ast.parse(block)


def test_filters_that_are_off_stay_off_and_unlabelled_models_have_one_prompt(tmp_path):
    folder = export_llama(tiny_dar(num_classes=0), tmp_path / "out")
    written = json.loads((folder / "generation_config.json").read_text())
    assert (written["top_k"], written.get("top_p", 1.0)) == (0, 1.0)
    assert "every prompt is the one id 16" in (folder / "README.md").read_text()


@pytest.mark.parametrize("num_classes", [0, 3])
def test_stock_transformers_draws_our_greedy_tokens_of_prompts(tmp_path, num_classes):
    """As the README says: a padded batch, whose rows are those of single prompts and of our loop."""
    pipe = tiny_dar(num_classes=num_classes, words=WORDS, data={"prompt": "a critter with a dome body"})
    folder = export_llama(pipe, tmp_path / "llama")
    prompts, label = ["a critter with a dome body", ""], 1 if num_classes else None
    readme, layout = (folder / "README.md").read_text(), pipe.token_layout
    ids = [layout.first_word + word for word in WORDS.words(prompts)[0]] + [layout.first_word - 1]
    assert f"    {ids}\n" in readme and f'"prompt": {ids}' in readme
    assert f"range(16, {layout.vocab_size - 1} + 1)" in readme
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    for block in blocks:
        ast.parse(block)
    greedy = json.loads((folder / "generation_config.json").read_text()) | {"do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(greedy))
    done = {}
    exec(blocks[1].replace("path/to/this/folder", str(folder)), done)
    assert done["prompt"][0].tolist() == ids and done["mask"].sum(dim=1).tolist() == [len(ids), 1]
    for guidance, drawn in ((1.0, done["drawn"]), (2.0, done["guided"])):
        ours = pipe(prompt=prompts, seed=0, top_k=1, guidance_scale=guidance).token_ids
        assert torch.equal(drawn[:, len(ids) :], ours)
    llama = done["llama"]
    for row in range(2):
        own = done["prompt"][row : row + 1, len(ids) - done["mask"][row].sum() :]
        alone = llama.generate(own, attention_mask=torch.ones_like(own))
        assert torch.equal(alone[0, own.shape[1] :], done["drawn"][row, len(ids) :])
    if label is not None:
        done["prompt"][:, -1] = layout.codebook_size + label
        classes = llama.generate(done["prompt"], attention_mask=done["mask"])[:, len(ids) :]
        assert torch.equal(classes, pipe(label, prompt=prompts, seed=0, top_k=1, guidance_scale=1).token_ids)


def test_from_a_saved_pipeline(pipeline, tmp_path, folder):
    pipeline.save_pretrained(tmp_path / "model")
    out = export_llama(tmp_path / "model", tmp_path / "out")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    assert not list(tmp_path.glob(".*"))


def test_the_other_family_and_full_folders_are_refused(pipeline, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "var")
    with pytest.raises(UserError, match="only D-AR models"):
        export_llama(tmp_path / "var", tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        export_llama(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="new or empty"):
        export_llama(pipeline, tmp_path / "var")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))

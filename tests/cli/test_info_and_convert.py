import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.nn.guidance import GuidanceSchedule
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.options import SamplingOptions
from tests.parity.published_dar_files import write_published_files
from tests.text.test_pretrained import write_network, write_tokenizer

TOKENIZER, PRIOR = "var/vqvae_state.safetensors", "var/var_base_state.safetensors"
SWITTI = "switti/main_state.safetensors"


def test_a_model_in_a_few_lines(isthmus, model, dar_model):
    both = ("3: face, flag, hand", "guidance_scale 2.0", "top_k 8", "CC0", "8 px", "16 codes of width 4")
    dar = ("(patches of 2)", "16 in 4 groups", "4, adams-bashforth", "width 16, 2 layers, 2 heads")
    for folder, own in ((model, ("markov", "(stride 2)", "1, 2, 4 (21 tokens)")), (dar_model, dar)):
        said = isthmus("info", folder).out
        for part in (*both, *own):
            assert part in said


def test_the_card_lists_what_would_be_sent(isthmus, refused, model, dar_model):
    for folder in (model, dar_model):
        said = isthmus("info", folder, "--card").out
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert said.startswith("---\nlibrary_name: isthmus") and all(name in said for name in files)
        assert "Nothing was sent." in said
    assert "card" in refused("info", "data", "--card")


def test_data_and_presets(isthmus, refused, tmp_path):
    assert "OpenMoji" in isthmus("info", "data").out and "CC BY-SA 4.0" in isthmus("info", "data").out
    assert "var-d16" in isthmus("info", "presets").out and "310.28M" in isthmus("info", "presets").out
    assert "is empty" in refused("info", tmp_path)


def test_published_var_weights_become_a_pipeline(isthmus, refused, golden, tmp_path):
    files = ("--tokenizer", golden.path(TOKENIZER), "--prior", golden.path(PRIOR))
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(10)) + "\n")
    for attention, more in (("causal", ()), ("markov", ("--class-names", tmp_path / "names.txt"))):
        out = tmp_path / attention
        result = isthmus("convert", "var", *files, "--scale-attention", attention, *more, "--out", out)
        assert result.code == 0, result.err
        for key in ("quantize.ema_vocab_hit_SV", "lvl_1L", "attn_bias_for_masking", "blocks.1.attn.zero_k_bias"):
            assert key in result.err
        pipe = load_pipeline(out)
        assert pipe.transformer.config.scale_attention == attention
        guidance = GuidanceSchedule("linear", 1.0, 2.5)
        assert pipe.defaults == SamplingOptions(guidance_scale=guidance, top_k=64, top_p=0.96)
        assert pipe.class_names.get("9") == ("class 9" if more else None)
        assert isthmus("sample", out, "--classes", "3", "--num", 2, "--out", tmp_path / f"{attention} drawn").code == 0
    assert "new or empty" in refused("convert", "var", *files, "--out", tmp_path / "causal")


@pytest.fixture
def clip_folders(golden, tmp_path):
    """Two tiny text encoders with tokenizers, in the order of the published ones."""
    for name in ("l", "g"):
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name).mkdir(exist_ok=True)
            shutil.copy(golden.path(f"switti/text_encoder_{name}/{file}"), tmp_path / name)
        write_tokenizer(tmp_path / name)
    return "--text-encoder", tmp_path / "l", "--text-encoder-2", tmp_path / "g"


def test_published_switti_weights_become_a_pipeline(isthmus, golden, clip_folders, tmp_path):
    files = ("--tokenizer", golden.path(TOKENIZER), "--prior", golden.path(SWITTI), *clip_folders)
    pipes = []
    for name, more in (("whole", ()), ("alone", ("--no-keep-text-encoder",))):
        result = isthmus("convert", "switti", *files, *more, "--out", tmp_path / name)
        assert result.code == 0, result.err
        for key in ("quantize.ema_vocab_hit_SV", "lvl_1L", "attn_bias_for_masking"):
            assert key in result.err
        pipes.append(load_pipeline(tmp_path / name))
    whole, alone = pipes
    assert whole.transformer.is_markov and whole.transformer.config.num_heads == 2
    assert whole.defaults.words() == "guidance linear:1:7, top-k 64, top-p 0.95"
    assert alone.text_encoder is None
    prompts = ["a red cat on the house", "", "the dog"]
    drawn, same = whole(prompt=prompts, seed=7), alone(text=whole.text_encoder.encode(prompts), seed=7)
    assert all(map(torch.equal, drawn.token_ids, same.token_ids))
    assert not torch.equal(drawn.token_ids[-1][0], drawn.token_ids[-1][2])


def test_what_a_switti_file_does_not_tell_is_in_its_config_or_named(isthmus, refused, golden, clip_folders, tmp_path):
    raw = load_file(golden.path(SWITTI))
    (tmp_path / "prior").mkdir()
    save_file({k: v for k, v in raw.items() if k != "attn_bias_for_masking"}, tmp_path / "prior" / "model.safetensors")
    (tmp_path / "prior" / "config.json").write_text('{"depth": 2, "rope_theta": 100, "rope_size": 16}')
    words = ("convert", "switti", "--tokenizer", golden.path(TOKENIZER), "--prior", tmp_path / "prior", *clip_folders)
    assert "markov for Switti" in refused(*words, "--out", tmp_path / "m")
    named = ("--scale-attention", "causal", "--num-heads", 4, "--rope-extent", 32)
    assert isthmus(*words, *named, "--out", tmp_path / "m").code == 0
    config = load_pipeline(tmp_path / "m").transformer.config
    assert (config.scale_attention, config.num_heads) == ("causal", 4)
    assert (config.rope_base, config.rope_extent) == (100.0, 32.0)


@pytest.mark.slow
def test_published_dar_weights_become_a_pipeline(isthmus, golden, tmp_path):
    tokenizer, prior = write_published_files(golden, tmp_path)
    words = ("convert", "dar", "--tokenizer", tokenizer, "--prior", prior, "--num-heads", 4, "--out", tmp_path / "m")
    result = isthmus(*words)
    assert result.code == 0, result.err
    assert "repa_out" in result.err and "alignment head" in result.err
    assert isthmus("sample", tmp_path / "m", "--classes", 3, "--num", 2, "--out", tmp_path / "o").code == 0
    assert re.search(r"^classes +10\b", isthmus("info", tmp_path / "m").out, re.MULTILINE)


def test_bare_dar_weights_need_the_settings_that_shapes_do_not_tell(isthmus, golden, tmp_path):
    names = {"--tokenizer": "dar/tok_a_weights.safetensors", "--prior": "dar/gpt_weights.safetensors"}
    files = [word for option, name in names.items() for word in (option, golden.path(name))]
    settings = ("--num-heads", 4, "--num-tokens", 32, "--image-size", 32)
    assert isthmus("convert", "dar", *files, *settings, "--out", tmp_path / "m").code == 0
    pipe = load_pipeline(tmp_path / "m")
    assert pipe.token_layout.num_tokens == 32 and pipe.scheduler.config["data_std"] == 0.6
    published = load_file(tmp_path / "m" / "transformer" / "model.safetensors")
    assert len(published["lm_head.weight"]) == 139


def test_files_that_do_not_belong_together_are_refused(refused, golden, clip_folders, tmp_path):
    raw = load_file(golden.path(TOKENIZER))
    codebook, phi = "quantize.embedding.weight", "quantize.quant_resi.qresi_ls."
    own_phi = {key.replace(phi, "quantize.quant_resi."): value for key, value in raw.items() if "ema_vocab" not in key}
    states = {
        "half": raw | {codebook: raw[codebook][:32].clone()},
        "longer": raw | {"quantize.ema_vocab_hit_SV": torch.zeros(5, 64)},
        "fewer": {key: value for key, value in own_phi.items() if "quant_resi.3." not in key},
    }
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    (tmp_path / "names.txt").write_text("one\n")
    tokenizer, prior = golden.path(TOKENIZER), golden.path(PRIOR)
    dar_tokenizer, dar_prior = write_published_files(golden, tmp_path)
    heads = ("--num-heads", 4)
    switti, clip_l, clip_g = golden.path(SWITTI), clip_folders[1], clip_folders[3]
    projected = write_network("clip_with_projection", tmp_path / "projected")
    swapped = ("--text-encoder", clip_g, "--text-encoder-2", clip_l)
    for family, first, second, more, said in [
        ("var", tmp_path / "half.safetensors", prior, (), "codebook_size"),
        ("var", tmp_path / "longer.safetensors", prior, (), "scales K"),
        ("var", tmp_path / "fewer.safetensors", prior, (), "phi"),
        ("var", tmp_path / "nowhere.pth", prior, (), "does not exist"),
        ("var", prior, tokenizer, (), "it is a VAR tokenizer"),
        ("var", tokenizer, prior, ("--class-names", tmp_path / "names.txt"), "10 classes, got 1"),
        ("var", tokenizer, prior, ("--class-names", tmp_path), "--class-names must be a text file"),
        ("var", tokenizer, switti, (), "it is a Switti prior"),
        ("switti", tokenizer, prior, clip_folders, "it is a VAR prior"),
        ("switti", tmp_path / "half.safetensors", switti, clip_folders, "codebook_size"),
        ("switti", tokenizer, switti, clip_folders[:2], "text_width of the transformer, 40, got 16"),
        ("switti", tokenizer, switti, ("--text-encoder", projected), "CLIPTextModelWithProjection in one of"),
        ("switti", tokenizer, switti, swapped, "text_pooled_width of the transformer, 24, got 16"),
        ("dar", dar_prior, dar_tokenizer, heads, "it is a D-AR prior"),
        ("dar", golden.path("dar/tok_b_weights.safetensors"), dar_prior, heads, "codebook_size"),
        ("dar", dar_tokenizer, dar_prior, (*heads, "--class-names", tmp_path / "names.txt"), "10 classes, got 1"),
    ]:
        out = ("--out", tmp_path / "m")
        assert said in refused("-q", "convert", family, "--tokenizer", first, "--prior", second, *more, *out)
    assert not (tmp_path / "m").exists()


def test_the_prior_leaves_as_a_stock_llama(isthmus, refused, dar_model, model, tmp_path):
    result = isthmus("export", "llama", dar_model, "--out", tmp_path / "llama")
    assert result.code == 0 and "README" in result.err
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= {
        path.name for path in (tmp_path / "llama").iterdir()
    }
    assert "only D-AR models" in refused("export", "llama", model, "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()

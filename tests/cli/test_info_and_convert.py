import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.nn.guidance import GuidanceSchedule
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.options import SamplingOptions

TOKENIZER, PRIOR = "var/vqvae_state.safetensors", "var/var_base_state.safetensors"


def test_a_model_in_a_few_lines(isthmus, model):
    said = isthmus("info", model).out
    for part in ("markov", "8 px (stride 2)", "1, 2, 4 (21 tokens)", "16 codes of width 4", "face, flag, hand", "CC0"):
        assert part in said
    assert "guidance_scale 2.0" in said and "top_k 8" in said


def test_the_card_lists_what_would_be_sent(isthmus, refused, model):
    said = isthmus("info", model, "--card").out
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert said.startswith("---\nlibrary_name: isthmus") and all(name in said for name in files)
    assert "Nothing was sent." in said
    assert "no pipeline" not in said and "card" in refused("info", "data", "--card")


def test_data_and_presets(isthmus, refused, tmp_path):
    assert "OpenMoji" in isthmus("info", "data").out and "CC BY-SA 4.0" in isthmus("info", "data").out
    assert "var-d16" in isthmus("info", "presets").out and "310.28M" in isthmus("info", "presets").out
    assert "is empty" in refused("info", tmp_path)


@pytest.mark.parametrize("attention", ["causal", "markov"])
def test_published_weights_become_a_pipeline(isthmus, golden, tmp_path, attention):
    result = isthmus(
        "convert", "var", "--tokenizer", golden.path(TOKENIZER), "--prior", golden.path(PRIOR), "--out", tmp_path / "m",
        "--scale-attention", attention,
    )  # fmt: skip
    assert result.code == 0, result.err
    for key in ("quantize.ema_vocab_hit_SV", "lvl_1L", "attn_bias_for_masking", "blocks.1.attn.zero_k_bias"):
        assert key in result.err
    pipe = load_pipeline(tmp_path / "m")
    assert pipe.transformer.config.scale_attention == attention
    assert pipe.defaults == SamplingOptions(guidance_scale=GuidanceSchedule("linear", 1.0, 2.5), top_k=64, top_p=0.96)
    assert isthmus("sample", tmp_path / "m", "--classes", "3", "--num", 2, "--out", tmp_path / "o").code == 0


def test_class_names_come_from_a_file(isthmus, refused, golden, tmp_path):
    words = (
        "convert",
        "var",
        "--tokenizer",
        golden.path(TOKENIZER),
        "--prior",
        golden.path(PRIOR),
        "--out",
        tmp_path / "m",
    )
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(10)) + "\n")
    (tmp_path / "short.txt").write_text("one\n")
    assert "10 classes, got 1" in refused(*words, "--class-names", tmp_path / "short.txt")
    assert not (tmp_path / "m").exists()
    assert isthmus(*words, "--class-names", tmp_path / "names.txt").code == 0
    assert load_pipeline(tmp_path / "m").class_names["9"] == "class 9"
    assert "new or empty" in refused(*words)


def test_pairs_that_do_not_belong_together_are_refused(refused, golden, tmp_path):
    raw = load_file(golden.path(TOKENIZER))
    codebook, phi = "quantize.embedding.weight", "quantize.quant_resi.qresi_ls."
    half = raw | {codebook: raw[codebook][:32].clone()}
    longer = raw | {"quantize.ema_vocab_hit_SV": torch.zeros(5, 64)}
    own_phi = {key.replace(phi, "quantize.quant_resi."): value for key, value in raw.items() if "ema_vocab" not in key}
    fewer = {key: value for key, value in own_phi.items() if "quant_resi.3." not in key}
    for name, state, said in [("half", half, "codebook_size"), ("longer", longer, "scales K"), ("fewer", fewer, "phi")]:
        save_file(state, tmp_path / f"{name}.safetensors")
        line = refused(
            "convert", "var", "--tokenizer", tmp_path / f"{name}.safetensors", "--prior", golden.path(PRIOR),
            "--out", tmp_path / "m",
        )  # fmt: skip
        assert said in line and not (tmp_path / "m").exists()


def test_files_that_are_none(refused, golden, tmp_path):
    def convert(tokenizer, prior):
        return refused("convert", "var", "--tokenizer", tokenizer, "--prior", prior, "--out", tmp_path / "m")

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(golden.path(PRIOR).read_bytes()[:5000])
    assert "does not exist" in convert(tmp_path / "nowhere.pth", golden.path(PRIOR))
    assert "cannot be read" in convert(golden.path(TOKENIZER), cut)
    assert "it is a VAR tokenizer" in convert(golden.path(PRIOR), golden.path(TOKENIZER))
    assert not (tmp_path / "m").exists()

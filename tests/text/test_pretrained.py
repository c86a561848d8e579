import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.errors import UserError
from isthmus.nn.saved_model import without_values
from isthmus.nn.stored_llama import fingerprint
from isthmus.text.pretrained import PretrainedTextEncoder
from tests.testers import assert_parity

WORDS = "a the red blue green cat dog bird on in house tree".split()
PROMPTS = ["a red cat on the house", "", "the dog", "a blue bird in a tree"]
KINDS = ["t5", "clip", "clip_with_projection", "bert"]


def write_tokenizer(folder, *, begins=True, vocabulary=100):
    """Whole words; the last number begins a prompt and the one before it ends it, or as golden CLIP has them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    begin, end = vocabulary - 2, vocabulary - 1
    words = {"[UNK]": 0} | {word: number for number, word in enumerate(WORDS, 1)}
    words |= {f"[{number}]": number for number in range(len(words), begin)} | {"<s>": begin, "</s>": end}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if begins else "$A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def write_network(kind, folder):
    """A tiny network of that kind with random weights, as transformers saves it, and its tokenizer."""
    import transformers as hub

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 77}
    torch.manual_seed(KINDS.index(kind))
    if kind == "t5":
        config = hub.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2)
        network = hub.T5EncoderModel(config)
    elif kind == "bert":
        network = hub.BertModel(hub.BertConfig(**sizes))
    else:
        config = hub.CLIPTextConfig(**sizes, projection_dim=12, bos_token_id=38, eos_token_id=39)
        network = (hub.CLIPTextModel if kind == "clip" else hub.CLIPTextModelWithProjection)(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    write_tokenizer(folder, begins=kind != "t5", vocabulary=40)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind of network -> its folder."""
    return {kind: write_network(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module", params=[*KINDS, "clip beside t5"])
def encoder(request, folders):
    return PretrainedTextEncoder.from_folders(*(folders[kind] for kind in request.param.split(" beside ")))


def test_published_features_of_two_clips_side_by_side(golden, tmp_path):
    for one in "lg":
        for file in ("config.json", "model.safetensors"):
            (tmp_path / one).mkdir(exist_ok=True)
            shutil.copyfile(golden.path(f"switti/text_encoder_{one}/{file}"), tmp_path / one / file)
        write_tokenizer(tmp_path / one)
    encoder = PretrainedTextEncoder.from_folders(tmp_path / "l", tmp_path / "g")
    io = golden.tensors("switti/text_io.safetensors")
    mask = io["in.text_mask"]
    features = encoder([(io[f"in.{one}.token_ids"].long(), mask) for one in "lg"])
    assert torch.equal(features.mask, mask)
    assert_parity(features.hidden[mask], io["out.text_hidden"][mask], 2e-5)
    assert_parity(features.pooled, io["out.text_pooled"], 2e-5)
    assert (features.hidden.shape[-1], features.pooled.shape[-1]) == (encoder.text_width, encoder.pooled_width)
    # rows that are only as long as the prompts give the same
    short = mask.sum(dim=1) < 20
    longest = int(mask[short].sum(dim=1).max())
    cut = [(io[f"in.{one}.token_ids"].long()[short, :longest], mask[short, :longest]) for one in "lg"]
    assert_parity(encoder(cut).padded(77).hidden[mask[short]], io["out.text_hidden"][short][mask[short]], 2e-5)


def test_a_prompt_alone_is_the_prompt_among_others(encoder):
    together = encoder.encode(PROMPTS)
    length = int(together.mask.sum(dim=1).max())
    assert together.hidden.shape == (4, length, encoder.text_width)
    assert together.pooled.shape == (4, encoder.pooled_width)
    assert not together.hidden[~together.mask].any()
    for row, prompt in enumerate(PROMPTS):
        alone, own = encoder.encode([prompt]), together.rows(slice(row, row + 1))
        assert alone.mask.all() and torch.equal(own.mask, alone.padded(length).mask)
        torch.testing.assert_close(own.hidden[own.mask], alone.hidden[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own.pooled, alone.pooled, rtol=1e-5, atol=1e-5)


def test_what_was_saved_reads_prompts_the_same_way(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    again = PretrainedTextEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(PROMPTS).hidden, encoder.encode(PROMPTS).hidden)
    assert torch.equal(again.encode(PROMPTS).pooled, encoder.encode(PROMPTS).pooled)
    assert fingerprint(again) == fingerprint(encoder) and again.read_from is not None
    half = PretrainedTextEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.encode(PROMPTS).hidden.dtype == torch.bfloat16
    with without_values():
        shapes = PretrainedTextEncoder.from_pretrained(tmp_path)
    assert {name: t.shape for name, t in shapes.state_dict().items()} == {
        name: t.shape for name, t in encoder.state_dict().items()
    }


def test_it_is_never_trained(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder.encode(PROMPTS)
    assert features.hidden.dtype == torch.float32 and not features.hidden.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_layer_within_is_what_transformers_has_there(kind, folders):
    encoder = PretrainedTextEncoder.from_folders(folders[kind], hidden_layers=[2])
    ids, mask = encoder.word_ids(PROMPTS[:1])[0]
    inside = encoder.networks[0](input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    features = encoder.encode(PROMPTS[:1])
    assert torch.equal(features.hidden, inside.hidden_states[2])
    if kind == "clip_with_projection":
        assert torch.equal(features.pooled, inside.text_embeds)
    elif kind == "clip":
        assert torch.equal(features.pooled, inside.last_hidden_state[:, -1])  # the end word
    else:
        torch.testing.assert_close(features.pooled, inside.hidden_states[2].mean(dim=1))


def test_the_text_half_of_a_whole_clip(folders, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel

    text = CLIPTextModel.from_pretrained(folders["clip"])
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(text_config=text.config, vision_config={**sizes, "image_size": 8, "patch_size": 4}))
    whole.text_model.load_state_dict(text.state_dict())
    whole.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, vocabulary=40)
    half = PretrainedTextEncoder.from_folders(tmp_path)
    expected = PretrainedTextEncoder.from_folders(folders["clip"])
    assert torch.equal(half.encode(PROMPTS).hidden, expected.encode(PROMPTS).hidden)
    assert torch.equal(half.encode(PROMPTS).pooled, expected.encode(PROMPTS).pooled)


def test_long_prompts_are_cut_and_it_is_said_where(folders, caplog):
    encoder = PretrainedTextEncoder.from_folders(folders["clip"], max_length=5)
    features = encoder.encode(["a red cat on the house"])
    assert "more than the 5 words that are read: it is cut before 'on the house', after 'a red cat'" in caplog.text
    torch.testing.assert_close(features.hidden, encoder.encode(["a red cat"]).hidden)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_nothing_in_a_folder_is_executed(file, folders, tmp_path):
    folder, trace = shutil.copytree(folders["bert"], tmp_path / "bert"), tmp_path / "trace"
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Own: pass\n")
    config = json.loads((folder / file).read_text())
    names = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    config |= {"auto_map": names, "attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
    (folder / file).write_text(json.dumps(config))
    loaded = PretrainedTextEncoder.from_folders(folder)
    with without_values():
        PretrainedTextEncoder.from_folders(folder)
    assert loaded.networks[0].config._attn_implementation in ("eager", "sdpa")
    assert not trace.exists()


def without_a_weight(folder):
    state = load_file(folder / "model.safetensors")
    state.pop(next(key for key in state if "layer_norm1" in key))
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def of_another_network(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2Model"]}')


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def damaged(folder):
    state = load_file(folder / "model.safetensors")
    next(iter(state.values()))[0] = torch.nan
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def with_setting(name, value):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shutil.rmtree, "is no folder"),
        (with_setting("hidden_size", "wide"), "cannot be read .*hidden_size"),
        (with_setting("num_attention_heads", 0), "cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (of_another_network, "got gpt2"),
        (without_a_weight, "missing .*layer_norm1"),
        (without_tokenizer, "files of its tokenizer"),
        (pickled, "as safetensors"),
        (damaged, "finite"),
        (lambda folder: write_tokenizer(folder, vocabulary=41), "41 words and its CLIPTextModel knows 40"),
    ],
)
def test_folders_that_are_no_text_encoder(change, said, folders, tmp_path):
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    change(folder)
    with pytest.raises(UserError, match=said):
        PretrainedTextEncoder.from_folders(folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"hidden_layers": [3]}, "1 to 2"),
        ({"hidden_layers": [0]}, "1 to 2"),
        ({"hidden_layers": [1, 2]}, "one hidden layer .* got 1 and 2"),
        ({"max_length": 2}, "at least 3"),
        ({"max_length": 78}, "room for 77"),
    ],
)
def test_encoders_that_cannot_be_built(arguments, said, folders):
    with pytest.raises(UserError, match=said):
        PretrainedTextEncoder.from_folders(folders["clip"], **arguments)


def test_saved_encoders_that_were_changed(folders, tmp_path):
    PretrainedTextEncoder.from_folders(folders["bert"]).save_pretrained(tmp_path)
    tokenizer = tmp_path / "network_1" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"cat"', '"cow"'))
    with pytest.raises(UserError, match="tokenizers it was saved with"):
        PretrainedTextEncoder.from_pretrained(tmp_path)
    tokenizer.unlink()
    with pytest.raises(UserError, match="which is missing"):
        PretrainedTextEncoder.from_pretrained(tmp_path)

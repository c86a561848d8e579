import copy
import json
import os
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from isthmus.dar.attention import llama_angles
from isthmus.dar.llama_decoding import LlamaDecoder
from isthmus.dar.prior import TokenLayout, new_prior
from isthmus.dar.scheduler import FlowMatchingScheduler
from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.errors import UserError
from isthmus.nn.saved_model import Config, Recorded, SavedModel, records_arguments, without_values
from isthmus.nn.stored_llama import StoredLlama, fingerprint, llama_shapes

SIZES = {
    "image_size": 8, "patch_size": 4, "width": 8, "num_layers": 1, "condition_width": 8, "num_condition_layers": 1,
    "num_tokens": 4, "num_groups": 2, "codebook_size": 16, "codebook_dim": 4, "head_width": 4,
}  # fmt: skip


class Pair(Recorded):
    @records_arguments
    def __init__(self, left: int, right: tuple[int, ...] = (1, 2), *, name: str = "pair"):
        self.total = left + sum(right)


def test_arguments_are_recorded_with_their_defaults():
    assert Pair(3).config == {"left": 3, "right": (1, 2), "name": "pair"}
    assert Pair(3, name="other").config.name == "other"
    with pytest.raises(TypeError, match="left"):
        Pair()


def test_a_configuration_cannot_be_changed_and_can_be_copied():
    config = Config(width=8, sizes=(1, 2))
    for change in (lambda: config.__setitem__("width", 4), lambda: setattr(config, "width", 4)):
        with pytest.raises(TypeError, match="width"):
            change()
    with pytest.raises(AttributeError, match="'depth'"):
        config.depth  # noqa: B018
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config and type(again) is Config


def test_what_is_saved_comes_back(tmp_path):
    Pair(3, (4, 5)).save_pretrained(tmp_path)
    again = Pair.from_pretrained(tmp_path)
    assert again.total == 12 and list(again.config.right) == [4, 5]
    with pytest.raises(UserError, match="must hold a FlowMatchingScheduler, got Pair"):
        FlowMatchingScheduler.from_pretrained(tmp_path)


def test_networks_without_values_have_the_same_shapes_and_take_no_random_numbers():
    before = torch.get_rng_state()
    with without_values():
        empty = DiffusionTokenizer(**SIZES)
    assert torch.equal(torch.get_rng_state(), before)
    real = DiffusionTokenizer(**SIZES)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in real.state_dict().items()}
    assert empty.device.type == "meta"


def test_a_type_is_for_weights_alone(tmp_path):
    # the norm of the latents counts its batches in whole numbers
    model = DiffusionTokenizer(**SIZES, latent_norm=True)
    model.save_pretrained(tmp_path)
    loaded = DiffusionTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    assert loaded.latent_batch_norm.num_batches_tracked.dtype == torch.int64
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(loaded.state_dict()[name].dtype)), name


LAYOUT = TokenLayout(codebook_size=16, num_classes=2, num_tokens=8)


@pytest.fixture(scope="module")
def prior():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = new_prior(LAYOUT, width=16, num_layers=2, num_heads=2, feed_forward_width=32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def folder(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    return tmp_path


def test_shapes_are_those_of_the_stock_network():
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "vocab_size": 11}
    for settings in ({"num_key_value_heads": 1}, {"head_dim": 24, "num_hidden_layers": 3}):
        config = LlamaConfig(**sizes | settings)
        with torch.device("meta"):
            stock = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
        assert llama_shapes(config.to_dict()) == stock


def test_angles_are_those_of_the_stock_network():
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=300)
    positions = torch.arange(300)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions.unsqueeze(0))
    angles = llama_angles(positions, 32, 10_000.0)
    assert torch.equal(cos[0, :, :16], angles.cos()) and torch.equal(sin[0, :, :16], angles.sin())


def test_a_folder_becomes_the_same_network(prior, folder):
    stored = StoredLlama.from_pretrained(folder)
    assert stored.dtype == torch.float32 and fingerprint(stored) == fingerprint(prior)
    weight = stored["model.norm.weight"]
    ids = torch.randint(LAYOUT.vocab_size, (2, 9))
    assert torch.equal(stored.module(input_ids=ids).logits, prior(input_ids=ids).logits)
    # on the same memory, and the same network from now on
    assert stored["model.norm.weight"].data_ptr() == weight.data_ptr() and stored.module is stored.module
    assert fingerprint(stored) == fingerprint(prior)


def test_decoding_reads_the_same_from_a_module_and_from_a_folder(prior, folder):
    ids = torch.randint(LAYOUT.vocab_size, (2, 3))
    logits = []
    for llama in (prior, StoredLlama.from_pretrained(folder)):
        decoder = LlamaDecoder(llama, LAYOUT)
        logits.append(decoder.prefill(ids, decoder.new_cache(2)))
    assert torch.equal(*logits)


def test_casting_is_the_same_before_and_after_the_module_is_made(folder):
    early, late = (StoredLlama.from_pretrained(folder) for _ in range(2))
    assert late.module is not None
    for stored in (early, late):
        assert stored.to(torch.bfloat16) is stored and stored.dtype == torch.bfloat16
    assert all(torch.equal(early[name], late[name]) for name in early.state_dict())
    # its angles stay whole
    assert early.module.model.rotary_emb.inv_freq.dtype == torch.float32


def test_settings_of_another_version_are_read_by_transformers(prior, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["head_dim"]
    path.write_text(json.dumps(config | {"transformers_version": "5.0.0", "of_another_version": 1}))
    assert StoredLlama.from_pretrained(folder).config["head_dim"] == 8
    path.write_text(json.dumps(config | {"wishes": 1}))
    with pytest.raises(UserError, match="wishes"):
        StoredLlama.from_pretrained(folder)


class Wide(SavedModel):
    """17 MB: enough to be remembered."""

    @records_arguments
    def __init__(self, width: int = 2100):
        super().__init__()
        self.linear = nn.Linear(2048, width, bias=False)


def test_the_fingerprint_of_large_weights_is_worked_out_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    model = Wide()
    model.save_pretrained(tmp_path / "model")
    first = Wide.from_pretrained(tmp_path / "model")
    assert fingerprint(first) == fingerprint(model)
    # in bf16 it is another, and so is that of weights that were changed, cast, or exchanged after they were read
    assert fingerprint(Wide.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)) != fingerprint(model)
    assert fingerprint(Wide.from_pretrained(tmp_path / "model").to(torch.bfloat16).float()) != fingerprint(model)
    with torch.no_grad():
        first.linear.weight[0, 0] += 1
    assert fingerprint(first) != fingerprint(model)
    other = Wide.from_pretrained(tmp_path / "model")
    other.linear = nn.Linear(2048, 2100, bias=False)
    assert fingerprint(other) != fingerprint(model)


def test_what_is_remembered_of_a_file_holds_until_it_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    Wide().save_pretrained(tmp_path / "model")
    before = fingerprint(Wide.from_pretrained(tmp_path / "model"))
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    with open(file, "r+b") as opened:
        opened.seek(-4, 2)
        opened.write(b"\0\0\xc0\x7f")  # NaN
    # only to show that nothing is read again: no program changes a file and keeps its time
    os.utime(file, ns=times)
    assert fingerprint(Wide.from_pretrained(tmp_path / "model")) == before
    os.utime(file)
    with pytest.raises(UserError, match="finite"):
        Wide.from_pretrained(tmp_path / "model")

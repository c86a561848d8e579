import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from isthmus.dar.attention import llama_angles
from isthmus.dar.llama_decoding import LlamaDecoder
from isthmus.dar.prior import TokenLayout, new_prior
from isthmus.errors import UserError
from isthmus.nn.stored_llama import StoredLlama, fingerprint, llama_shapes

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


@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 1}, {"head_dim": 24}, {"num_hidden_layers": 3}])
def test_shapes_are_those_of_the_stock_network(settings):
    config = LlamaConfig(
        **{"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "vocab_size": 11} | settings
    )
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

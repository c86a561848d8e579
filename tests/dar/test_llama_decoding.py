import itertools

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from isthmus.dar.llama_decoding import Int8Product, LlamaDecoder, PackedProduct, WholeProduct, fastest_product
from isthmus.dar.prior import TokenLayout, llama_config, new_prior, next_token_inputs, next_token_logits
from isthmus.errors import UserError
from tests.dar.tiny_prior import LAYOUT, tiny_prior
from tests.testers import NETWORK, needs_compiler, run_compiled

LABELS = torch.tensor([0, 2, 3])
TOKENS = torch.randint(24, (3, 12), generator=torch.Generator().manual_seed(0))


def decoded(decoder: LlamaDecoder, known: int) -> torch.Tensor:
    """Logits after `known` tokens at once and after every later one alone."""
    inputs = next_token_inputs(LAYOUT, LABELS, TOKENS)
    cache = decoder.new_cache(3)
    logits = [decoder.prefill(inputs[:, : known + 1], cache)]
    logits += [decoder.step(inputs[:, p], cache) for p in range(known + 1, 13)]
    assert cache.length == 13
    return torch.stack(logits, dim=1)


def with_fixed_step(prior: LlamaForCausalLM, **options) -> LlamaDecoder:
    """A decoder that runs what would be compiled, without the compiler."""
    decoder = LlamaDecoder(prior, LAYOUT, **options)
    decoder._fixed_step = decoder._at_position
    return decoder


@pytest.fixture(scope="module")
def prior():
    return tiny_prior(num_layers=3)


@pytest.fixture(scope="module")
def stock(prior):
    """Logits of the module itself, all positions at once."""
    with torch.no_grad():
        return next_token_logits(prior, LAYOUT, LABELS, TOKENS)


BUILDS = (lambda prior, **options: LlamaDecoder(prior, LAYOUT, **options), with_fixed_step)


def test_logits_are_those_of_the_stock_module(prior, stock):
    before = {name: (value.data_ptr(), value.clone()) for name, value in prior.state_dict().items()}
    for build, known in itertools.product(BUILDS, (0, 1, 5, 12)):
        assert_close(decoded(build(prior), known), stock[:, known:], **NETWORK)
    # and the module is left alone
    for name, value in prior.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1]), name


def test_shared_key_heads():
    config = llama_config(LAYOUT, width=32, num_layers=2, num_heads=4)
    config.num_key_value_heads = 2
    torch.manual_seed(0)
    prior = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        expected = next_token_logits(prior, LAYOUT, LABELS, TOKENS)
    for build in BUILDS:
        assert_close(decoded(build(prior), 4), expected[:, 4:], **NETWORK)


def test_half_precision_and_8_bits_are_near(prior, stock):
    half = tiny_prior(num_layers=3).to(torch.bfloat16)
    # bf16 keeps 8 bits, and three blocks add up what is lost
    for build, (weights, options) in itertools.product(BUILDS, ((half, {}), (prior, {"int8": True}))):
        logits = decoded(build(weights, **options), 3)
        assert logits.dtype == torch.float32
        assert float((logits - stock[:, 3:]).std()) < 0.05 * float(stock.std())


@pytest.mark.slow
def test_logits_of_a_prior_with_large_matrices():
    layout = TokenLayout(codebook_size=1024, num_classes=3, num_tokens=6)
    torch.manual_seed(0)
    prior = new_prior(layout, width=1024, num_layers=1, num_heads=16).eval()
    with torch.no_grad():
        prior.lm_head.weight.normal_(std=0.02)
    ids = next_token_inputs(layout, LABELS, TOKENS[:, :6])
    decoder = LlamaDecoder(prior, layout, num_rows=3)
    if not isinstance(decoder._head, PackedProduct):
        pytest.skip("this build of torch has no oneDNN")
    cache = decoder.new_cache(3)
    logits = [decoder.prefill(ids[:, :3], cache), *(decoder.step(ids[:, p], cache) for p in range(3, 7))]
    with torch.no_grad():
        expected = next_token_logits(prior, layout, LABELS, TOKENS[:, :6])
    assert_close(torch.stack(logits, dim=1), expected[:, 2:], **NETWORK)


def test_leading_rows_go_on_alone(prior, stock):
    """After the last guided token the null rows are left behind."""
    inputs = next_token_inputs(LAYOUT, LABELS, TOKENS)
    for build in BUILDS:
        decoder = build(prior)
        cache = decoder.new_cache(3)
        decoder.prefill(inputs[:, :4], cache)
        decoder.step(inputs[:, 4], cache)
        for p in range(5, 13):
            logits = decoder.step(inputs[:2, p], cache)
            assert_close(logits, stock[:2, p], **NETWORK)


def assert_linear(product, weight, x, **tolerance):
    """`product` is x times the matrix in float64, and what it is added to comes on top."""
    expected = (x.double() @ weight.double().T).float()
    residual = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    assert_close(product(x), expected, **tolerance)
    assert_close(product(x, residual), residual + expected, **tolerance)


def test_whole_products_are_linear_layers():
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 24), (24, 8), (16, 16)):
        weight, x = torch.randn(shape, generator=generator), torch.randn(3, shape[1], generator=generator)
        assert_linear(WholeProduct(weight), weight, x)


def test_large_products_are_linear_layers_too():
    generator = torch.Generator().manual_seed(0)
    # sums with a spread of 1
    weight = torch.randn(1536, 768, generator=generator) / 768**0.5
    product = fastest_product(weight, num_rows=2)
    if not isinstance(product, PackedProduct):
        pytest.skip("this build of torch has no oneDNN")
    for num_rows in (1, 2, 5, 40):
        assert_linear(product, weight, torch.randn(num_rows, 768, generator=generator), atol=1e-5, rtol=0)
    assert isinstance(fastest_product(weight, num_rows=1), WholeProduct)
    assert isinstance(fastest_product(weight.bfloat16(), num_rows=2), WholeProduct)
    assert isinstance(fastest_product(weight[:256], num_rows=2), WholeProduct)


def test_an_int8_product_is_off_by_its_rounding():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 32, generator=generator), torch.randn(40, 32, generator=generator)
    product = Int8Product(weight)
    assert product.weight.dtype == torch.int8
    step = product.scale.float()[:, None]
    stored = product.weight * step
    # half a step; a scale rounded down lets the largest weight of its row stick out by what that took
    assert bool(((stored - weight).abs() <= 0.5 * step + weight.abs() / 256).all())
    many, exact = product(x), x @ stored.T
    # activations and results in bf16
    assert_close(many, exact, atol=0.02 * float(exact.abs().max()), rtol=0)
    # a row's result depends on no other row, however many there are
    assert all(torch.equal(torch.cat([product(rows) for rows in x.split(size)]), many) for size in (1, 2, 16, 17))
    assert torch.equal(product(x[:2], many[:2]), many[:2] + product(x[:2]))


def test_int8_is_refused_where_it_does_not_run(prior):
    with torch.device("meta"):
        elsewhere = LlamaForCausalLM(prior.config)
    with pytest.raises(UserError, match="8-bit weights are for CPUs"):
        LlamaDecoder(elsewhere, LAYOUT, int8=True)


COMPILED = """
import torch
from tests.dar.tiny_prior import LAYOUT, tiny_prior
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.dar.llama_decoding import LlamaDecoder
from isthmus.dar.sampling import generate_tokens
from isthmus.pipelines.options import SamplingOptions

prior = tiny_prior(num_layers=1)
options = SamplingOptions(guidance_scale=GuidanceSchedule("linear", 1, 3, last_guided_step=6), top_k=9)
labels, seeds = torch.tensor([0, 2, 1]), [(0, 0), (0, 1), (0, 2)]
for decoder in (LlamaDecoder(prior, LAYOUT), LlamaDecoder(prior, LAYOUT, compiled=True)):
    (tokens,) = generate_tokens(prior, LAYOUT, labels, seeds, options, stops=[12], decoder=decoder)
    print(tokens.tolist())
"""


@pytest.mark.slow
@needs_compiler
def test_the_compiled_step_draws_the_same_tokens(tmp_path):
    eager, compiled = run_compiled(COMPILED, tmp_path).splitlines()
    assert eager == compiled

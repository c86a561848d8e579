import copy

import pytest
import torch
import torch.nn.functional as F

from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.errors import UserError
from tests.testers import NETWORK, ModelLaws, randomized

ARGUMENTS = {
    "image_size": 8,
    "patch_size": 4,
    "width": 16,
    "num_layers": 2,
    "condition_width": 8,
    "num_condition_layers": 2,
    "num_tokens": 8,
    "num_groups": 4,
    "codebook_size": 24,
    "codebook_dim": 4,
    "table_rows": None,
    "query_rank": 3,
    "head_width": 8,
}


def images(batch: int = 3, height: int = 8, width: int = 8, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


def token_ids(batch: int = 3, n: int = 8) -> torch.Tensor:
    return torch.randint(24, (batch, n), generator=torch.Generator().manual_seed(2))


def build(**changes) -> DiffusionTokenizer:
    return randomized(DiffusionTokenizer(**ARGUMENTS | changes))


class TestDiffusionTokenizer(ModelLaws):
    @pytest.fixture(
        params=[
            {},
            {"table_rows": 12, "low_rank_queries": False, "num_condition_layers": 0, "rotary_base": 500.0}
            | {"position_table": True, "latent_norm": True, "tokens_per_step": 4},
            {"quantized": False, "num_groups": 1, "linear_query_rank": 3, "linear_query_side": 4},
        ],
        ids=["plain", "switches", "continuous"],
    )
    def model(self, request):
        return build(**request.param)

    @pytest.fixture
    def inputs(self):
        return (images(),)

    def floats(self, output):
        return output.condition

    def loss(self, output):
        return output.condition.square().mean() + output.codebook_errors.mean() + output.commitment_errors.mean()

    def test_a_batch_equals_its_images_alone(self, model, inputs):
        together = model(*inputs)
        for i, image in enumerate(inputs[0]):
            alone = model(image[None])
            assert together.token_ids is None or torch.equal(alone.token_ids[0], together.token_ids[i])
            torch.testing.assert_close(alone.condition[0], together.condition[i], **NETWORK)

    def test_a_new_group_through_the_cache_is_the_whole_prefix(self, model, inputs):
        latents = model.latents(*inputs)
        whole, cache, seen = model.condition_vectors(latents), model.new_cache(3), 0
        # one group, then all the others at once
        for part in latents.split([model.tokens_per_group, 8 - model.tokens_per_group], dim=1):
            if not part.shape[1]:
                continue
            with torch.no_grad():
                condition = model.condition_vectors(part, cache)
            torch.testing.assert_close(condition, whole[:, seen : seen + part.shape[1]], **NETWORK)
            seen += part.shape[1]
        assert cache.length == seen == 8
        # conditions of a prefix do not wait for later tokens
        for n in range(model.tokens_per_group, 9, model.tokens_per_group):
            torch.testing.assert_close(model.condition_vectors(latents[:, :n]), whole[:, :n], **NETWORK)

    def test_latents_are_unit_vectors_in_fp32_under_autocast_and_in_half_precision(self, model, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(*inputs)
        assert output.latents.dtype == output.quantized.dtype == output.codebook_errors.dtype == torch.float32
        torch.testing.assert_close(output.latents.norm(dim=-1), torch.ones(3, 8))
        assert (output.latents - model(*inputs).latents).abs().mean() < 0.1
        half = copy.deepcopy(model).to(torch.bfloat16)(*inputs)
        assert half.condition.dtype == torch.bfloat16 and half.latents.dtype == torch.float32
        torch.testing.assert_close(half.latents.norm(dim=-1), torch.ones(3, 8))

    def test_gradient_checkpointing_gives_the_same_gradients(self, model, inputs):
        plain, saving = copy.deepcopy(model), copy.deepcopy(model)
        saving.enable_gradient_checkpointing()
        for candidate in (plain, saving):
            candidate.train()
            self.loss(candidate(*inputs)).backward()
        for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)

    def test_continuous_warm_up_passes_the_latents_on(self, model, inputs):
        output = model(*inputs, quantize=False)
        assert output.token_ids is None
        assert torch.equal(output.quantized, output.latents)
        assert not output.codebook_errors.any() and not output.commitment_errors.any()
        assert torch.equal(output.condition, model.condition_vectors(output.latents))


def test_codes_found_are_the_most_similar():
    tokenizer = build()
    encoded = tokenizer.encode(images())
    similarity = encoded.latents @ F.normalize(tokenizer.codebook.weight, dim=-1).T
    assert torch.equal(encoded.token_ids, similarity.argmax(dim=-1))
    assert torch.equal(encoded.quantized, tokenizer.lookup(encoded.token_ids))
    torch.testing.assert_close(encoded.quantized.norm(dim=-1), torch.ones(3, 8))
    # whatever the length of a code
    with torch.no_grad():
        tokenizer.codebook.weight.mul_(torch.arange(1.0, 25)[:, None])
    assert torch.equal(tokenizer.encode(images()).token_ids, encoded.token_ids)


def test_search_is_fp32_under_autocast():
    tokenizer = build()
    latents = tokenizer.latents(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = tokenizer.lookup(token_ids())
        found = tokenizer(images())
    assert codes.dtype == torch.float32
    similarity = found.latents @ F.normalize(tokenizer.codebook.weight, dim=-1).T
    assert torch.equal(found.token_ids, similarity.argmax(dim=-1))
    assert latents.dtype == torch.float32


def test_training_output_is_what_decoding_uses():
    tokenizer = build()
    output, encoded = tokenizer(images()), tokenizer.encode(images())
    assert torch.equal(output.token_ids, encoded.token_ids)
    # latent + (code - latent) rounds once more than the code itself
    torch.testing.assert_close(output.quantized, encoded.quantized)
    torch.testing.assert_close(output.condition, tokenizer.condition(encoded.token_ids), **NETWORK)
    errors = (encoded.quantized - encoded.latents).square().mean(dim=-1)
    torch.testing.assert_close(output.codebook_errors, errors)
    torch.testing.assert_close(output.commitment_errors, errors)


def test_which_gradient_goes_where():
    tokenizer = build().train()
    codebook, encoder = tokenizer.codebook.weight, tokenizer.to_code.weight
    for term, reaches_codebook, reaches_encoder in (
        (lambda out: out.condition.square().mean(), False, True),
        (lambda out: out.codebook_errors.mean(), True, False),
        (lambda out: out.commitment_errors.mean(), False, True),
    ):
        tokenizer.zero_grad()
        term(tokenizer(images())).backward()
        assert (codebook.grad is not None and bool(codebook.grad.any())) == reaches_codebook
        assert (encoder.grad is not None and bool(encoder.grad.any())) == reaches_encoder


def test_queries_see_patches_and_earlier_queries_only():
    tokenizer = build(low_rank_queries=False)
    before = tokenizer.latents(images())
    with torch.no_grad():
        tokenizer.query_table[5] += torch.randn(16, generator=torch.Generator().manual_seed(3))  # norms hide a constant
    after = tokenizer.latents(images())
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert all((after[:, i] - before[:, i]).abs().max() > 1e-4 for i in range(5, 8))
    # every query sees every patch
    other = images()
    other[:, :, -1, -1] *= -1
    assert ((tokenizer.latents(other) - after).abs().amax(dim=(0, 2)) > 1e-5).all()


def test_rows_and_columns_are_not_exchanged():
    # equal rotations for both axes would make an image and its transpose alike up to the patch embedding
    tokenizer = build(patch_size=1)
    image = images(1, 2, 4)  # of any sides that the patch divides
    assert (tokenizer.latents(image) - tokenizer.latents(image.transpose(2, 3))).abs().max() > 1e-3


def test_unused_rows_of_the_tables_change_nothing():
    tokenizer = build(table_rows=12)
    before = tokenizer(images()).condition
    with torch.no_grad():
        tokenizer.query_table[8:] += 1
        tokenizer.token_position[8:] += 1
    assert torch.equal(tokenizer(images()).condition, before)


def test_latent_norm_learns_its_statistics_in_training_alone():
    tokenizer = build(latent_norm=True)
    before = tokenizer.latent_batch_norm.running_mean.clone()
    tokenizer(images())
    assert torch.equal(tokenizer.latent_batch_norm.running_mean, before)
    tokenizer.train()(images())
    assert not torch.equal(tokenizer.latent_batch_norm.running_mean, before)


def test_published_start():
    tokenizer = DiffusionTokenizer(**ARGUMENTS | {"init_gate": 0.25, "query_std": 0.1, "table_rows": 1024})
    assert (
        tokenizer.encoder[0].gate1.unique().tolist() == tokenizer.condition_layers[1].gate2.unique().tolist() == [0.25]
    )
    torch.testing.assert_close(tokenizer.codebook.weight.norm(dim=-1), torch.ones(24))
    # a normal cut at two standard deviations keeps 0.88 of its spread
    assert tokenizer.query_table.std().item() == pytest.approx(0.088, rel=0.1)
    assert tokenizer.token_position.std().item() == pytest.approx(0.02, rel=0.1)
    assert not tokenizer.encoder[0].attention.qkv.bias.any()


def test_the_published_size():
    with torch.device("meta"):
        tokenizer = DiffusionTokenizer()
    assert sum(p.numel() for p in tokenizer.parameters()) == 114_970_112


def test_what_does_not_fit_is_named():
    for changes, message in [
        ({"patch_size": 3}, "multiple of patch_size"),
        ({"num_groups": 3}, "multiple of num_groups"),
        ({"table_rows": 7}, "at least num_tokens"),
    ]:
        with pytest.raises(UserError, match=message):
            DiffusionTokenizer(**ARGUMENTS | changes)
    tokenizer = build()
    with pytest.raises(UserError, match=r"multiples of 4 .* got 9 x 8"):
        tokenizer.encode(images(1, 9, 8))
    with pytest.raises(UserError, match="8 x 8 .* got 8 x 16"):
        build(position_table=True).encode(images(1, 8, 16))
    for n in (0, 1, 3):
        with pytest.raises(UserError, match=f"whole groups of 2 and be at most 8 in all, got {n} after 0"):
            tokenizer.condition(token_ids(n=n))
    with pytest.raises(UserError, match="got 10 after 0"):
        tokenizer.condition(token_ids(n=10))
    cache = tokenizer.new_cache(3)
    tokenizer.condition(token_ids(n=6), cache)
    with pytest.raises(UserError, match="got 4 after 6"):
        tokenizer.condition(token_ids(n=4), cache)
    assert cache.length == 6


def test_ids_out_of_range_are_named():
    tokenizer = build()
    tokenizer.check_token_ids(token_ids())
    tokenizer.check_token_ids(token_ids(n=0))
    for wrong in (-1, 24):
        with pytest.raises(UserError, match=rf"0\.\.23 .* got .*{wrong}"):
            tokenizer.check_token_ids(torch.tensor([[0, wrong]]))


def test_continuous_tokens_have_no_ids():
    tokenizer = build(quantized=False)
    for call in (lambda: tokenizer.encode(images()), lambda: tokenizer.condition(token_ids())):
        with pytest.raises(UserError, match="keeps its tokens continuous"):
            call()
    assert tokenizer.condition_vectors(tokenizer.latents(images())).shape == (3, 8, 8)

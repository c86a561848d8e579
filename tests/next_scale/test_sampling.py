import pytest
import torch
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.next_scale.refinement import refined_scales
from isthmus.next_scale.sampling import AskedTexts, ScaleSampler, shared_schedule
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.nn.draws import token_uniforms
from isthmus.nn.guidance import GuidanceSchedule, guidance_values
from isthmus.nn.sampling import draw_tokens, filter_logits
from isthmus.pipelines.options import SamplingOptions, SmoothSchedule
from isthmus.text.encoders import TextFeatures
from tests.pipelines.tiny import tiny_pipeline, tiny_text_pipeline
from tests.testers import token_hashes

SEEDS = [(7, i) for i in range(5)]
LABELS = torch.tensor([0, 2, 3, 1, 0])


def tokens_of(pipe, options, labels=LABELS, seeds=SEEDS):
    scales = refined_scales(ScaleSampler(pipe.image_tokenizer, pipe.transformer, labels, seeds, options))
    return [scale.token_ids for scale in scales]


@torch.no_grad()
def tokens_by_definition(pipe, guidance, labels, seeds, **filters):
    """Teacher-forced from the start at every scale, both halves at every scale: slow and plain."""
    tokenizer, transformer = pipe.image_tokenizer, pipe.transformer
    null = torch.full_like(labels, transformer.null_class_id)
    drawn = []
    for k, scale_value in enumerate(guidance_values(guidance, len(tokenizer.schedule.sizes))):
        known = drawn + [torch.zeros(len(labels), n, dtype=torch.long) for n in tokenizer.schedule.lengths[k:]]
        inputs = tokenizer.scale_inputs(known)
        cut = slice(tokenizer.schedule.offsets[k], tokenizer.schedule.offsets[k + 1])
        cond, uncond = (transformer(ids, inputs).logits[:, cut] for ids in (labels, null))
        logits = filter_logits(uncond + scale_value * (cond - uncond), **filters)
        drawn.append(draw_tokens(logits, token_uniforms(seeds, k, tokenizer.schedule.lengths[k])))
    return drawn


@pytest.mark.parametrize("attention", ["markov", "causal"])
def test_cache_and_left_out_null_rows_change_nothing(attention):
    pipe, linear = tiny_pipeline(scale_attention=attention), GuidanceSchedule("linear", 1.0, 4.0)
    for guidance in (1.0, 2.0, linear, (1.0, 3.0, 1.0), (2.0, 1.0, 1.0), (2.0, 1.0, 0.0)):
        drawn = tokens_of(pipe, SamplingOptions(guidance_scale=guidance, top_k=9, top_p=0.95))
        expected = tokens_by_definition(pipe, guidance, LABELS, SEEDS, top_k=9, top_p=0.95)
        assert all(torch.equal(ours, plain) for ours, plain in zip(drawn, expected, strict=True)), guidance


@pytest.mark.parametrize(("attention", "smooth"), [("markov", True), ("causal", False)])
def test_an_image_depends_on_its_own_seed_alone(attention, smooth):
    pipe = tiny_pipeline(scale_attention=attention)
    options = SamplingOptions(guidance_scale=2.0, top_k=9, top_p=0.9, temperature=1.2, smooth=smooth)

    def draw(rows):
        labels, seeds = LABELS[rows], [SEEDS[i] for i in rows]
        scales = list(refined_scales(ScaleSampler(pipe.image_tokenizer, pipe.transformer, labels, seeds, options)))
        return [s.token_ids for s in scales], pipe.image_tokenizer.decode_features(scales[-1].features)

    together, images = draw([0, 1, 2, 3, 4])
    for order in ([4, 2, 0, 1, 3], [3], [1, 0]):
        tokens, pictures = draw(order)
        for ours, theirs in zip(tokens, together, strict=True):
            assert torch.equal(ours, theirs[order])
        assert_close(pictures, images[order], atol=1e-4, rtol=0)


def test_guidance_of_one_is_no_guidance_and_whole_filters_are_none():
    pipe = tiny_pipeline()
    plain = tokens_of(pipe, SamplingOptions())
    for same in (
        SamplingOptions(top_k=16),
        SamplingOptions(top_p=1.0),
        SamplingOptions(guidance_scale=(1.0, 1.0, 1.0)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(plain, tokens_of(pipe, same), strict=True))
    guided = tokens_of(pipe, SamplingOptions(guidance_scale=3.0))
    assert not all(torch.equal(a, b) for a, b in zip(plain, guided, strict=True))


def test_top_k_of_one_is_greedy_whatever_the_seed():
    pipe = tiny_pipeline()
    labels = LABELS[:1]
    first = tokens_of(pipe, SamplingOptions(top_k=1), labels, [(1, 0)])
    second = tokens_of(pipe, SamplingOptions(top_k=1), labels, [(2, 9)])
    assert token_hashes(first) == token_hashes(second)


def test_temperature_near_zero_is_greedy():
    pipe = tiny_pipeline()
    cold = tokens_of(pipe, SamplingOptions(temperature=1e-4))
    assert token_hashes(cold) == token_hashes(tokens_of(pipe, SamplingOptions(top_k=1)))


def test_null_labels_are_not_guided():
    pipe = tiny_pipeline()
    labels = torch.full((2,), pipe.transformer.null_class_id)
    plain, guided = (tokens_of(pipe, SamplingOptions(guidance_scale=s), labels, SEEDS[:2]) for s in (1.0, 4.0))
    assert token_hashes(plain) == token_hashes(guided)


def test_smooth_changes_features_after_scale_0_but_draws_tokens_all_the_same():
    pipe = tiny_pipeline()
    hard, soft = (
        list(
            refined_scales(
                ScaleSampler(pipe.image_tokenizer, pipe.transformer, LABELS, SEEDS, SamplingOptions(smooth=smooth))
            )
        )
        for smooth in (False, True)
    )
    assert torch.equal(hard[0].token_ids, soft[0].token_ids)
    assert not torch.allclose(hard[-1].features, soft[-1].features)


def features_of(pipe, options, texts=None):
    labels = LABELS if texts is None else torch.zeros_like(LABELS)
    sampler = ScaleSampler(pipe.image_tokenizer, pipe.transformer, labels, SEEDS, options, texts=texts)
    return [scale.features for scale in refined_scales(sampler)]


def test_temperature_and_smoothing_by_scale():
    pipe = tiny_pipeline()
    plain = tokens_of(pipe, SamplingOptions())
    late = tokens_of(pipe, SamplingOptions(temperature=(1.0, 1.0, 1e-4)))
    greedy = tokens_of(pipe, SamplingOptions(temperature=1e-4))
    assert token_hashes(tokens_of(pipe, SamplingOptions(temperature=(1.0, 1.0, 1.0)))) == token_hashes(plain)
    assert all(map(torch.equal, late[:2], plain[:2])) and not torch.equal(late[2], plain[2])
    assert not torch.equal(greedy[1], plain[1])

    def smoothed(smooth):
        return features_of(pipe, SamplingOptions(smooth=smooth, top_k=3))

    hard, soft = smoothed(False), smoothed(True)
    assert all(map(torch.equal, smoothed(SmoothSchedule()), soft))
    assert all(map(torch.equal, smoothed(SmoothSchedule(first=3)), hard))
    middle, unfiltered = smoothed(SmoothSchedule(1, 1)), smoothed(SmoothSchedule(filtered=False))
    assert torch.equal(middle[0], hard[0]) and not torch.equal(middle[1], hard[1])
    # at scale 0 the noise decides alone, and what the filters would drop may be drawn
    assert not torch.equal(unfiltered[1], soft[1])


def test_smoothing_of_a_shortened_schedule_counts_the_scales_of_the_whole():
    tokenizer, prior = tokenizer_and_prior((1, 2, 3, 4), (1, 3, 4))

    def features(smooth):
        options = SamplingOptions(smooth=smooth)
        return list(refined_scales(ScaleSampler(tokenizer, prior, torch.tensor([1]), [(0, 0)], options)))

    hard, soft = features(False), features(SmoothSchedule(2, 2))
    assert torch.equal(hard[0].features, soft[0].features) and not torch.equal(hard[1].features, soft[1].features)


@pytest.mark.parametrize("attention", ["markov", "causal"])
@torch.no_grad()
def test_guidance_between_two_scales_is_away_from_the_null_text(attention):
    pipe = tiny_text_pipeline(scale_attention=attention)
    texts, rows = pipe.text_encoder.encode(["a cat", "two dogs in a row", ""]), torch.tensor([0, 1, 1, 0, 2])
    other = pipe.text_encoder.encode(["a bird"])
    asked, elsewhere = (
        AskedTexts(TextFeatures.joined([texts, null]), rows) for null in (texts.rows(slice(2, 3)), other)
    )

    def drawn(guidance, texts):
        return features_of(pipe, SamplingOptions(guidance_scale=guidance, top_k=9), texts)

    plain, same = drawn(1.0, asked), drawn(1.0, elsewhere)
    assert all(map(torch.equal, plain, same))
    last, middle = drawn((1.0, 1.0, 3.0), asked), drawn(GuidanceSchedule("constant", 1.0, 3.0, 1, 1), asked)
    assert all(map(torch.equal, last[:2], plain[:2])) and not torch.equal(last[2], plain[2])
    # nothing leads away from the null text: that image is drawn as before
    assert torch.equal(last[2][4], plain[2][4])
    assert torch.equal(middle[0], plain[0]) and not torch.equal(middle[1], plain[1])
    # the null rows that were left out behind the last guided scale change nothing
    rest = drawn((1.0, 3.0, 1.0 + 1e-12), asked)
    for ours, expected in zip(middle, rest, strict=True):
        assert_close(ours, expected, atol=1e-4, rtol=0)
    assert not all(map(torch.equal, drawn(2.0, asked), drawn(2.0, elsewhere)))


def tokenizer_and_prior(sizes, prior_sizes, **changed):
    tokenizer = MultiScaleVQVAE(
        codebook_size=16,
        codebook_dim=4,
        scale_sizes=sizes,
        base_channels=32,
        channel_multipliers=(1,),
        num_res_blocks=1,
    )
    shape = {"codebook_size": 16, "codebook_dim": 4} | changed
    prior = NextScaleTransformer(scale_sizes=prior_sizes, width=16, num_layers=1, num_heads=2, num_classes=2, **shape)
    return tokenizer, prior


def test_a_prior_on_some_of_the_scales_uses_their_phi():
    tokenizer, prior = tokenizer_and_prior((1, 2, 3, 4), (1, 3, 4))
    schedule = shared_schedule(tokenizer, prior)
    assert schedule.sizes == (1, 3, 4)
    assert schedule.phi_indices == tuple(tokenizer.schedule.phi_indices[k] for k in (0, 2, 3))
    options = SamplingOptions(guidance_scale=GuidanceSchedule("linear", 1.0, 2.0))
    scales = list(refined_scales(ScaleSampler(tokenizer, prior, torch.tensor([1]), [(0, 0)], options)))
    assert [s.token_ids.shape[1] for s in scales] == [1, 9, 16]


def test_strangers_are_refused():
    for prior_sizes, changed, said in [
        ((1, 2), {}, "scale_sizes"),
        ((1, 2, 4), {"codebook_size": 8}, "codebook_size"),
        ((1, 2, 4), {"codebook_dim": 8}, "codebook_dim"),
    ]:
        with pytest.raises(UserError, match=said):
            shared_schedule(*tokenizer_and_prior((1, 2, 3, 4), prior_sizes, **changed))


@pytest.mark.parametrize("smooth", [False, True])
def test_what_is_added_is_fp32_whatever_the_weights(smooth):
    pipe = tiny_pipeline()
    tokenizer, transformer = pipe.image_tokenizer.to(torch.bfloat16), pipe.transformer.to(torch.bfloat16)
    options = SamplingOptions(guidance_scale=2.0, top_k=9, smooth=smooth)
    sampler = ScaleSampler(tokenizer, transformer, LABELS, SEEDS, options)
    features = sampler.start()
    for scale in range(3):
        drawn = sampler.draw(scale, sampler.predict(scale, features))
        features = sampler.add(scale, features, drawn.codes)
        assert drawn.codes.dtype == drawn.logits.dtype == features.dtype == torch.float32
    if smooth:
        # mixtures of bf16 codes that bf16 cannot hold
        assert not torch.equal(drawn.codes, drawn.codes.to(torch.bfloat16).float())

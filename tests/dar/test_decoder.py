import copy

import pytest
import torch

from isthmus.dar.decoder import FlowDecoder
from isthmus.errors import UserError
from tests.testers import NETWORK, ModelLaws, randomized

ARGUMENTS = {"patch_size": 2, "width": 16, "num_layers": 2, "condition_width": 6, "head_width": 8}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(**changes) -> FlowDecoder:
    return randomized(FlowDecoder(**ARGUMENTS | changes))


class TestFlowDecoder(ModelLaws):
    @pytest.fixture(
        params=[
            {},
            {"shared_time_embedding": True, "adaptive_head": True, "rotary_base": 500.0, "position_table": 4},
        ],
        ids=["plain", "switches"],
    )
    def model(self, request):
        return build(**request.param)

    @pytest.fixture
    def inputs(self):
        return normal(3, 3, 8, 8), torch.tensor([0.0, 0.3, 1.0]), normal(3, 5, 6, seed=1)

    # keys are looked at without a position: a bias common to all of them moves no score against another
    without_gradient = ("cross_attention.k_norm.bias",)

    def floats(self, output):
        return output

    def test_what_is_computed_ahead_gives_the_same_velocity(self, model, inputs):
        x_t, t, condition = inputs
        together, times, keys = model(*inputs), model.embed_times(t), model.attend_to(condition)
        assert torch.equal(model.velocity(x_t, times, keys), together)
        for i, one in enumerate(t):
            alone = model(*(part[i : i + 1] for part in inputs))
            torch.testing.assert_close(alone[0], together[i], **NETWORK)
            # one time for all is the same time for each
            torch.testing.assert_close(model.velocity(x_t, times.at(i), keys), model(x_t, one.expand(3), condition))
        # the order of the tokens in a group means nothing, and keys of two groups are keys of both: windows that
        # overlap are put together from groups
        torch.testing.assert_close(model(x_t, t, condition.flip(1)), together, **NETWORK)
        parts = zip(*(model.attend_to(part) for part in condition.split([2, 3], dim=1)), strict=True)
        joined = tuple(tuple(torch.cat(pair, dim=2) for pair in zip(*block, strict=True)) for block in parts)
        torch.testing.assert_close(model.velocity(x_t, times, joined), together)
        # tokens and time change the velocity
        assert (model(x_t, t, condition + 1 + normal(3, 5, 6, seed=5)) - together).abs().max() > 1e-3
        assert (model(x_t, t * 0.5 + 0.1, condition) - together).abs().max() > 1e-3

    def test_gradient_checkpointing_gives_the_same_gradients(self, model, inputs):
        plain, saving = copy.deepcopy(model), copy.deepcopy(model)
        saving.enable_gradient_checkpointing()
        for candidate in (plain, saving):
            candidate.train()
            candidate(*inputs).square().mean().backward()
        for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)

    def test_times_are_fp32_under_autocast_and_in_half_precision(self, model, inputs):
        times = torch.tensor([0.333, 0.3335])
        expected = model.embed_times(times).blocks[-1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = model.embed_times(times).blocks[-1]
            velocity = model(*inputs)
        assert torch.equal(under_autocast, expected)
        assert (velocity.float() - model(*inputs)).abs().mean() < 0.1 * model(*inputs).abs().mean()
        half = copy.deepcopy(model).to(torch.bfloat16)
        embedded = half.embed_times(times)
        assert embedded.t.dtype == embedded.blocks[0].dtype == torch.float32
        # a thousand times 0.0005: in bf16 the two times would be one
        assert not torch.equal(embedded.blocks[-1][0], embedded.blocks[-1][1])
        assert (half(*inputs).float() - model(*inputs)).abs().mean() < 0.2 * model(*inputs).abs().mean()

    def test_features_are_the_state_between_blocks(self, model, inputs):
        x_t, t, condition = inputs
        times, keys, seen = model.embed_times(t), model.attend_to(condition), []
        hooks = [block.register_forward_hook(lambda *call: seen.append(call[-1])) for block in model.blocks]
        for layer in range(3):
            velocity, features = model.velocity_and_features(x_t, times, keys, layer=layer)
            assert torch.equal(velocity, model(*inputs))
            assert features.shape == (3, 16, 4, 4)
            if layer:
                assert torch.equal(features.flatten(2).transpose(1, 2), seen[layer - 1])
        for hook in hooks:
            hook.remove()
        with pytest.raises(UserError, match=r"0\.\.2"):
            model.velocity_and_features(x_t, times, keys, layer=3)


class TestFlowDecoderWithCanvas(ModelLaws):
    @pytest.fixture
    def model(self):
        return build(canvas_tokens=6, canvas_side=4, canvas_rank=3, prediction="image")

    @pytest.fixture
    def inputs(self, model):
        condition = normal(3, 6, 6, seed=1)
        canvas = model.paint(condition, 0).sum(dim=1).detach()
        return normal(3, 3, 8, 8), torch.tensor([0.0, 0.3, 1.0]), condition[:, 4:], canvas

    def floats(self, output):
        return output

    def test_gradients_reach_every_parameter(self, model, inputs):
        x_t, t, condition, _ = inputs
        model.zero_grad()
        model(x_t, t, condition, model.paint(condition, 0).sum(dim=1)).square().mean().backward()
        silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert all(name.endswith("cross_attention.k_norm.bias") for name in silent)

    def test_groups_painted_apart_are_all_painted_at_once(self, model):
        condition = normal(3, 6, 6, seed=1)
        apart = [model.paint(part, first) for part, first in zip(condition.split(2, dim=1), (0, 2, 4), strict=True)]
        torch.testing.assert_close(torch.cat(apart, dim=1), model.paint(condition, 0))
        # every token has a brush of its own
        painted = model.paint(normal(1, 1, 6).expand(1, 2, 6), 2)
        assert (painted[:, 0] - painted[:, 1]).abs().max() > 1e-2

    def test_an_image_prediction_corrects_the_canvas_and_a_velocity_does_not(self, model, inputs):
        x_t, t, condition, canvas = inputs
        plain = build(canvas_tokens=6, canvas_side=4, canvas_rank=3)
        for decoder in (model, plain):
            torch.nn.init.zeros_(decoder.head.weight)
            torch.nn.init.zeros_(decoder.head.bias)
        assert not plain(*inputs).any()
        small = torch.nn.functional.interpolate(canvas, size=8, mode="bilinear")
        velocity = model(*inputs)
        torch.testing.assert_close(x_t[:2] + (1 - t[:2, None, None, None]) * velocity[:2], small[:2])

    def test_a_canvas_goes_with_canvas_tokens(self, model, inputs):
        with pytest.raises(UserError, match="canvas_tokens 6"):
            model(*inputs[:3])
        with pytest.raises(UserError, match="canvas_tokens None"):
            build()(*inputs)
        assert build().paint(inputs[2], 0) is None


def test_images_of_any_sides_that_the_patch_divides():
    for height, width in ((4, 8), (2, 2), (8, 6)):
        velocity = build()(normal(2, 3, height, width), torch.tensor([0.1, 0.9]), normal(2, 4, 6))
        assert velocity.shape == (2, 3, height, width)


def test_patches_go_in_and_out_in_the_same_order():
    # one block at the identity, and a head that undoes the embedding: the normalised patches come back in their place
    decoder = FlowDecoder(**ARGUMENTS | {"num_layers": 1})
    weight = torch.linalg.qr(normal(16, 12))[0]
    with torch.no_grad():
        decoder.patch_embedding.weight.copy_(weight)
        decoder.patch_embedding.bias.zero_()
        decoder.head.weight.copy_(weight.T)
    x = normal(2, 3, 4, 6)
    y = decoder(x, torch.tensor([0.2, 0.4]), normal(2, 4, 6))
    patches = torch.nn.functional.pixel_unshuffle(x, 2).permute(0, 2, 3, 1) @ weight.T
    normed = torch.nn.functional.layer_norm(patches, (16,), eps=1e-6) @ weight
    torch.testing.assert_close(y, torch.nn.functional.pixel_shuffle(normed.permute(0, 3, 1, 2), 2))


def test_image_prediction_is_a_velocity_that_jumps_to_the_image():
    decoder = build(prediction="image")
    plain = FlowDecoder(**ARGUMENTS)
    plain.load_state_dict(decoder.state_dict())
    x_t, t, condition = normal(3, 3, 8, 8), torch.tensor([0.0, 0.5, 0.95]), normal(3, 5, 6)
    image, velocity = plain.eval()(x_t, t, condition), decoder(x_t, t, condition)
    left = (1 - t).view(3, 1, 1, 1)
    torch.testing.assert_close((x_t + left * velocity)[:2], image[:2])
    torch.testing.assert_close(velocity[2], ((image - x_t) / 0.1)[2])


def test_published_start():
    decoder = FlowDecoder(**ARGUMENTS)
    x_t, t, condition = normal(2, 3, 8, 8), torch.tensor([0.1, 0.9]), normal(2, 4, 6)
    assert not decoder(x_t, t, condition).any()  # the head is zero
    assert not decoder.blocks[0].modulation.weight.any() and not decoder.blocks[0].modulation.bias.any()
    open_gates = FlowDecoder(**ARGUMENTS | {"init_gate": 1.0, "modulation_std": 0.1})
    bias = open_gates.blocks[0].modulation.bias.view(6, 16)
    assert bias.mean(dim=1).tolist() == [0, 0, 1, 0, 0, 1]
    assert open_gates.blocks[0].modulation.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_the_published_size():
    with torch.device("meta"):
        decoder = FlowDecoder()
    # with the tokenizer's 114,970,112 and the alignment head's 7,344,896 these are the published 307,444,672
    assert sum(p.numel() for p in decoder.parameters()) == 307_444_672 - 114_970_112 - 7_344_896


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match="Set shared_time_embedding"):
        FlowDecoder(**ARGUMENTS | {"adaptive_head": True})
    t, condition = torch.tensor([0.5]), normal(1, 4, 6)
    with pytest.raises(UserError, match="multiples of 2 .* got 8 x 7"):
        build()(normal(1, 3, 8, 7), t, condition)
    with pytest.raises(UserError, match="8 x 8 .* got 8 x 16"):
        build(position_table=4)(normal(1, 3, 8, 16), t, condition)

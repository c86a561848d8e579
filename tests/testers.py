"""Laws that every model keeps, as mixins: a test class gives `model` and `inputs`, and inherits the tests."""

import copy
import hashlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.next_scale.pyramid import next_scale_input
from isthmus.nn.stored_llama import fingerprint

# How far two fp32 routes to one number may end apart. Each operation rounds by up to u = 2^-24 = 6e-8 of its result,
# and in which order a sum is taken is up to the instruction set, the batch size and the number of processes.
#
# One sum of n terms around 1 is off by sqrt(n) u as a rule and by n u at most. What assert_close grants of its own
# accord, 1e-5, holds 160 terms at worst; one layer of the tests' networks has 64.
#
# Behind a whole network up to 50 such sums follow each other: 50 sqrt(64) u = 2.4e-5, and twice that for the norms and
# gates between them. What a slip does to a network with random weights starts at 1e-3.
NETWORK = {"atol": 5e-5, "rtol": 1e-5}
PARITY_ATOL = NETWORK["atol"]
# A gradient comes back through the same sums, and through longer ones over positions: 100 sums of 600 terms, sqrt(600)
# u each, 1.5e-4 of its size at worst and a tenth of that where errors cancel as they do.
GRADIENT_RTOL = 1e-4
# A gradient that is 0 in exact arithmetic (a bias in front of a group norm) is a sum of 128 terms of up to 0.1 that
# cancel, each rounded: 128 * 0.1 u = 8e-7.
GRADIENT_FLOOR = 1e-6
# A Kullback-Leibler divergence of distributions that are one: the difference of two numbers around 3, each of them a
# sum over 16 codes of products that round: 2 * 3 * 16 u = 6e-6. Of distributions that differ it is 1e-2.
NO_DIVERGENCE = 1e-5
# A number that a training logs is a mean of terms around 1, whether or not they cancel: one step is off by 1e-7 of a
# term. Steps hand it on and Adam makes a step of one size of a gradient of any, so it grows: tenfold in ten steps, as
# measured. The same again for another processor. A part of the batch left out, or counted twice, changes 1e-2.
LOGGED = {"rel": 1e-4, "abs": 1e-5}
# The weights themselves: a hundredth of one step of Adam at the tests' learning rate, 1e-3, which no gradient exceeds.
TRAINED_ATOL = 1e-5


def assert_parity(actual: Tensor, expected: Tensor, atol: float = PARITY_ATOL) -> None:
    """Equal to a golden tensor: integers exactly, floats within `atol`, shapes and types alike."""
    if not expected.is_floating_point():
        atol = 0.0
    torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=0.0)


def assert_gradient(actual: Tensor, expected: Tensor) -> None:
    """A whole gradient: the norm of the difference within `GRADIENT_RTOL` of the norm."""
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= GRADIENT_RTOL * float(expected.norm()) + GRADIENT_FLOOR


def assert_gradient_summary(name: str, grad: Tensor, norm: float, total: float) -> None:
    """Norm and sum of a gradient that lies within `GRADIENT_RTOL` of the published one.

    A difference of norm d in n numbers changes their sum by up to sqrt(n) d, however small the sum is.
    """
    assert float(grad.norm()) == pytest.approx(norm, rel=GRADIENT_RTOL, abs=GRADIENT_FLOOR), name
    rounding = math.sqrt(grad.numel()) * GRADIENT_RTOL * norm + GRADIENT_FLOOR
    assert float(grad.sum()) == pytest.approx(total, rel=0, abs=rounding), name


def published_names(raw: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, str]:
    """Our key -> published key, found by the memory that the converter passed through unchanged."""
    home = {tensor.data_ptr(): key for key, tensor in raw.items() if tensor.numel()}
    return {key: home[tensor.data_ptr()] for key, tensor in ours.items()}


def token_hashes(token_ids: Sequence[Tensor]) -> list[str]:
    """SHA-256 (hex) of the token ids of every image, over all steps (b, l), as little-endian int32."""
    rows = zip(*(ids.cpu().numpy().astype("<i4") for ids in token_ids), strict=True)
    return [hashlib.sha256(b"".join(step.tobytes() for step in row)).hexdigest() for row in rows]


def randomized(model: nn.Module, seed: int = 0) -> Any:
    """The model with no weight near zero, so that a slip anywhere shows; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.add_(1)
    return model.eval()


def run_compiled(statements: str, cache: Path) -> str:
    """What the statements print, in a process of its own: the shape checks around every function cannot be compiled."""
    # torch's compiler ignores this variable when it writes code, which with "default" does not compile, and when it
    # names what it keeps: code made with another value is taken from the cache, and draws other tokens
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    root, command = Path(__file__).resolve().parents[1], [sys.executable, "-c", statements]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")


class ModelLaws:
    """A subclass has fixtures `model` (in eval mode) and `inputs` (arguments of forward), and `floats(output)`."""

    without_gradient: tuple[str, ...] = ()
    """How names of parameters end whose gradient is zero in exact arithmetic."""

    def floats(self, output: Any) -> Tensor:
        """The float tensor of an output that depends on every weight."""
        raise AssertionError("a test class says which tensor of its output is compared")

    def test_save_and_load_gives_the_same_output_each_time(self, model, inputs, tmp_path):
        before = self.floats(model(*inputs))
        model.save_pretrained(tmp_path)
        assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
        loaded = type(model).from_pretrained(tmp_path).eval()
        for one in (loaded, model):
            assert torch.equal(self.floats(one(*inputs)), before)
        # settings and weights
        assert fingerprint(loaded) == fingerprint(model)

    def test_fingerprint_sees_the_weights(self, model):
        before, names = fingerprint(model), list(model.state_dict())
        for name in names[:: len(names) // 3]:
            other = copy.deepcopy(model)
            other.state_dict()[name].flatten()[-1] += 1
            assert fingerprint(other) != before, name

    def test_gradients_reach_every_parameter(self, model, inputs):
        model.zero_grad()
        self.loss(model(*inputs)).backward()
        silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        assert not {name for name in silent if not name.endswith(self.without_gradient)}

    def loss(self, output: Any) -> Tensor:
        """A scalar that depends on every weight."""
        return self.floats(output).square().mean()


class TokenizerLaws(ModelLaws):
    """A subclass has fixtures `model` (a `MultiScaleVQVAE`) and `inputs` ((images,))."""

    def floats(self, output: Any) -> Tensor:
        return output.images

    def loss(self, output: Any) -> Tensor:
        return output.images.square().mean() + output.codebook_loss + output.commitment_loss

    def test_decode_equals_decoding_the_features(self, model, inputs):
        encoded, last = model.encode(*inputs), model.schedule.num_scales - 1
        assert [tuple(ids.shape) for ids in encoded.token_ids] == [(len(inputs[0]), n) for n in model.schedule.lengths]
        assert all(0 <= ids.min() and ids.max() < model.config.codebook_size for ids in encoded.token_ids)
        images = model.decode(encoded.token_ids)
        assert images.shape == inputs[0].shape
        assert -1 <= images.min() and images.max() <= 1
        assert torch.equal(images, model.decode_features(model.features_up_to(encoded.token_ids, last)))

    def test_training_output_is_the_same_reconstruction(self, model, inputs):
        output, encoded = model(*inputs), model.encode(*inputs)
        assert all(map(torch.equal, output.token_ids, encoded.token_ids))
        # latents + (features - latents) rounds once more than the features themselves
        torch.testing.assert_close(output.images.clamp(-1, 1), model.decode(encoded.token_ids), **NETWORK)

    def test_scale_inputs_are_what_the_generator_reads(self, model, inputs):
        token_ids, schedule, parts = model.encode(*inputs).token_ids, model.schedule, []

        def choose(scale, features):
            if scale:
                parts.append(next_scale_input(features, schedule, scale))
            return token_ids[scale], model.lookup(token_ids[scale])

        list(model.residual_scales(choose, inputs[0]))
        empty = torch.zeros(len(inputs[0]), 0, model.config.codebook_dim)
        scale_inputs = model.scale_inputs(token_ids)
        assert scale_inputs.shape[1] == schedule.num_tokens - schedule.lengths[0]
        assert torch.equal(scale_inputs, torch.cat([empty, *parts], dim=1))

    def test_a_batch_equals_its_images_alone(self, model, inputs):
        (images,) = inputs
        together = model.encode(images)
        for i in range(len(images)):
            alone = model.encode(images[i : i + 1])
            assert all(torch.equal(a[0], b[i]) for a, b in zip(alone.token_ids, together.token_ids, strict=True))
            decoded = model.decode(alone.token_ids)[0], model.decode(together.token_ids)[i]
            torch.testing.assert_close(*decoded, **NETWORK)

    def test_search_is_fp32_under_autocast(self, model, inputs):
        latents = model.encode(*inputs).latents
        plain = model.requantize(latents)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = model.requantize(latents)
            scale_inputs = model.scale_inputs(plain)
        assert all(map(torch.equal, plain, under_autocast))
        assert scale_inputs.dtype == torch.float32
        assert torch.equal(scale_inputs, model.scale_inputs(plain))

    def test_half_precision_keeps_the_features_in_fp32(self, model, inputs):
        half = copy.deepcopy(model).to(torch.bfloat16)
        token_ids = model.encode(*inputs).token_ids
        assert half.scale_inputs(token_ids).dtype == torch.float32
        images = half.decode(token_ids)
        assert images.dtype == torch.bfloat16
        assert (images.float() - model.decode(token_ids)).abs().mean() < 0.1

    def test_warm_up_decodes_the_latents(self, model, inputs):
        output = model(*inputs, quantize=False)
        assert output.token_ids == [] and output.codebook_loss == 0 and output.commitment_loss == 0
        assert torch.equal(output.images.clamp(-1, 1), model.decode_features(output.latents))


class PriorLaws(ModelLaws):
    """A subclass has fixtures `model` (a `NextScaleTransformer`) and `inputs`.

    Those are (class_labels, scale_inputs), and the text behind them where the model reads one.
    """

    def floats(self, output: Any) -> Tensor:
        return output.logits

    def generated(self, model, class_labels, scale_inputs, *text) -> Tensor:
        """Logits of all scales, one `forward_scale` after the other."""
        conditioning, cache = model.condition(class_labels, *text), model.new_cache(len(class_labels))
        lengths = model.schedule.lengths
        parts = scale_inputs.split([0, *lengths[1:]], dim=1)
        return torch.cat([model.forward_scale(k, part, conditioning, cache) for k, part in enumerate(parts)], dim=1)

    def test_scale_by_scale_equals_teacher_forcing(self, model, inputs):
        torch.testing.assert_close(self.generated(model, *inputs), model(*inputs).logits, **NETWORK)

    def test_a_batch_equals_its_images_alone(self, model, inputs):
        labels, scale_inputs, *text = inputs
        together = model(*inputs).logits
        for i in range(len(labels)):
            own = (one.rows(slice(i, i + 1)) for one in text)
            alone = model(labels[i : i + 1], scale_inputs[i : i + 1], *own).logits
            torch.testing.assert_close(alone[0], together[i], **NETWORK)

    def test_a_hidden_scale_changes_nothing(self, model, inputs):
        labels, scale_inputs, *text = inputs
        scale_inputs = scale_inputs.clone().requires_grad_()
        lengths = model.schedule.lengths
        for scale, logits in enumerate(model(labels, scale_inputs, *text).logits.split(list(lengths), dim=1)):
            if not scale_inputs.numel():
                continue  # one scale alone reads no features
            (grad,) = torch.autograd.grad(logits.square().sum(), scale_inputs, retain_graph=True)
            for other, part in enumerate(grad.split(list(lengths[1:]), dim=1), start=1):
                visible = other == scale if model.is_markov else other <= scale
                assert bool(part.abs().sum() > 0) == visible, (scale, other)

    def test_leading_scales_are_rows_of_the_full_pass(self, model, inputs):
        labels, scale_inputs, *text = inputs
        full, offsets = model(*inputs).logits, model.schedule.offsets
        for count in range(1, model.schedule.num_scales + 1):
            part = scale_inputs[:, : offsets[count] - offsets[1]]
            logits = model(labels, part, *text, scales=range(count)).logits
            torch.testing.assert_close(logits, full[:, : offsets[count]], **NETWORK)

    def test_gradient_checkpointing_gives_the_same_gradients(self, model, inputs):
        plain, saving = copy.deepcopy(model), copy.deepcopy(model)
        saving.enable_gradient_checkpointing()
        for candidate in (plain, saving):
            candidate.train()
            self.loss(candidate(*inputs)).backward()
        for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)

    def test_keep_factors_act_per_image_and_layer(self, model, inputs):
        labels, scale_inputs = inputs
        keep = torch.ones(len(labels), model.config.num_layers, 2)
        keep[0] = 0
        dropped = model(*inputs, keep=keep).logits
        torch.testing.assert_close(dropped[1:], model(*inputs).logits[1:])
        # an image whose branches are all dropped is its embedding under the head
        conditioning = model.condition(labels)
        x = model.embed(conditioning.start, scale_inputs, range(model.schedule.num_scales))
        scale, shift = conditioning.head.unsqueeze(2).unbind(1)
        bare = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=model.config.norm_eps) * (1 + scale) + shift
        torch.testing.assert_close(dropped[0], model.head(bare)[0], **NETWORK)

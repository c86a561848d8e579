import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.nn import draws
from isthmus.nn.draws import DRAW_STREAMS, EDIT_STREAMS, stream, token_gumbels, token_uniforms

SEEDS = st.integers(0, 2**40)


@given(SEEDS, st.lists(st.integers(0, 2**31), max_size=4))
def test_a_stream_is_a_function_of_its_path(seed, path):
    assert np.array_equal(stream(seed, *path).random(4), stream(seed, *path).random(4))
    assert not np.array_equal(stream(seed, *path).random(4), stream(seed, *path, 0).random(4))
    assert not np.array_equal(stream(seed, *path).random(4), stream(seed + 1, *path).random(4))


def test_purposes_are_distinct():
    purposes = [value for name, value in vars(draws).items() if name.isupper()]
    assert len(purposes) >= 10 and len(set(purposes)) == len(purposes)


def test_edits_share_no_number_with_draws():
    for round_index in (0, 1):
        uniforms, gumbels = (
            [made([(3, 0)], 2, *shape, round_index=round_index, purpose=purpose) for purpose in purposes]
            for made, shape, purposes in (
                (token_uniforms, (64,), (DRAW_STREAMS.uniforms, EDIT_STREAMS.uniforms)),
                (token_gumbels, (8, 8), (DRAW_STREAMS.gumbels, EDIT_STREAMS.gumbels)),
            )
        )
        for ours, theirs in (uniforms, gumbels):
            assert not set(ours.flatten().tolist()) & set(theirs.flatten().tolist())


def test_streams_leave_the_global_generators_alone():
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    stream(0, 1).random()
    token_uniforms([(0, 0)], 0, 3)
    token_gumbels([(0, 0)], 0, 3, 4)
    assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), torch_state)


@given(st.lists(st.tuples(SEEDS, st.integers(0, 1000)), min_size=1, max_size=5), st.integers(0, 9), st.integers(1, 9))
def test_numbers_of_an_image_do_not_depend_on_its_batch(pairs, scale, num_tokens):
    together = token_uniforms(pairs, scale, num_tokens)
    assert together.shape == (len(pairs), num_tokens) and together.dtype == torch.float32
    assert (together >= 0).all() and (together < 1).all()
    gumbels = token_gumbels(pairs, scale, num_tokens, 6)
    assert gumbels.shape == (len(pairs), num_tokens, 6)
    for i, pair in enumerate(pairs):
        assert torch.equal(token_uniforms([pair], scale, num_tokens)[0], together[i])
        assert torch.equal(token_gumbels([pair], scale, num_tokens, 6)[0], gumbels[i])


def test_uniforms_differ_in_every_coordinate():
    base = {"seed": 1, "index": 2, "scale": 3, "round_index": 4}
    changed = [base] + [base | {name: 9} for name in base]
    found = [token_uniforms([(c["seed"], c["index"])], c["scale"], 8, round_index=c["round_index"]) for c in changed]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_uniforms_and_gumbels_are_what_they_are_called():
    count = 20_000
    uniforms = token_uniforms([(3, 0)], 0, count)[0]
    histogram = torch.histc(uniforms, bins=10, min=0, max=1) / count
    assert (histogram - 0.1).abs().max() < 5 * (0.09 / count) ** 0.5
    gumbels = token_gumbels([(3, 0)], 0, count // 10, 10).flatten()
    # mean: Euler's constant; variance: pi^2 / 6; five standard errors
    assert abs(float(gumbels.mean()) - 0.57722) < 5 * (1.645 / count) ** 0.5
    assert abs(float(gumbels.var()) - 1.645) < 0.1

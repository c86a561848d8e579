import pytest
import torch

from isthmus.errors import UserError
from isthmus.training.codebook import CodebookUsage, code_counts


def one_hot(*hits):
    return torch.tensor(hits, dtype=torch.float32)


def test_counts_are_per_scale():
    token_ids = [torch.tensor([[3], [3]]), torch.tensor([[0, 1, 1, 2], [2, 2, 2, 2]])]
    assert code_counts(token_ids, 5).tolist() == [[0, 0, 0, 2, 0], [1, 2, 5, 0, 0]]


def test_counts_of_parts_add_up():
    # what processes of a distributed run rely on
    ids = torch.randint(7, (6, 4), generator=torch.Generator().manual_seed(0))
    parts = code_counts([ids[:2]], 7) + code_counts([ids[2:]], 7)
    assert torch.equal(parts, code_counts([ids], 7))


def test_constant_hits_are_their_own_average_from_the_first_step():
    usage = CodebookUsage(num_scales=2, codebook_size=3)
    counts = one_hot([1, 0, 0], [1, 2, 1])
    assert usage.hits().sum() == 0 and not usage.used().any()
    for step in range(1, 6):
        usage.update(counts)
        assert usage.step == step
        torch.testing.assert_close(usage.hits(), counts)


def test_average_by_hand():
    usage = CodebookUsage(num_scales=1, codebook_size=2, decay=0.5)
    usage.update(one_hot([4, 0]))
    usage.update(one_hot([0, 4]))
    # (0.5 * 0.5 * 4, 0.5 * 4) / (1 - 0.25)
    torch.testing.assert_close(usage.hits(), one_hot([4 / 3, 8 / 3]))


def test_perplexity_of_known_distributions():
    usage = CodebookUsage(num_scales=3, codebook_size=4)
    usage.update(one_hot([8, 0, 0, 0], [2, 2, 0, 0], [1, 1, 1, 1]))
    torch.testing.assert_close(usage.perplexity(), one_hot(1, 2, 4))
    assert usage.used().sum(dim=1).tolist() == [1, 2, 4]


def test_threshold_follows_the_tokens_of_the_scale():
    # 100 and 10,000 tokens over 4 codes: alike would be 25 and 2,500 hits, 8 % of that 2 and 200
    usage = CodebookUsage(num_scales=2, codebook_size=4)
    usage.update(one_hot([47, 49, 3, 1], [4_700, 4_990, 300, 10]))
    assert usage.used().tolist() == [[True, True, True, False]] * 2


def test_saved_usage_goes_on_as_if_never_interrupted():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 9, (2, 5), generator=generator).float() for _ in range(6)]
    straight, first, second = (CodebookUsage(num_scales=2, codebook_size=5) for _ in range(3))
    for counts in batches:
        straight.update(counts)
    for counts in batches[:3]:
        first.update(counts)
    state = first.state_dict()
    first.update(batches[3])  # what was saved is a copy
    second.load_state_dict(state)
    for counts in batches[3:]:
        second.update(counts)
    assert torch.equal(second.hits(), straight.hits()) and second.step == straight.step


@pytest.mark.parametrize("state", [{}, {"average": torch.zeros(1, 5), "step": torch.tensor(3)}])
def test_state_of_another_tokenizer_is_refused(state):
    with pytest.raises(UserError, match="codebook usage"):
        CodebookUsage(num_scales=2, codebook_size=5).load_state_dict(state)

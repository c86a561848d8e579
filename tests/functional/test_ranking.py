import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.functional.ranking import area_under_roc

ROWS = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), min_size=2, max_size=30)


@given(rows=ROWS)
def test_the_area_is_the_share_of_pairs_in_order(rows):
    scores, positive = torch.tensor([score for score, _ in rows]), torch.tensor([kind for _, kind in rows])
    pairs = [(a > b) + (a == b) / 2 for a, yes in rows for b, no in rows if yes and not no]
    found = area_under_roc(scores, positive)
    if pairs:
        assert found == pytest.approx(sum(pairs) / len(pairs))
        assert area_under_roc(-scores, positive) == pytest.approx(1 - found)
    else:
        assert math.isnan(found)

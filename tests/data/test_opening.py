import pytest

from isthmus.data.opening import open_source, parse_spec
from isthmus.errors import UserError


def test_unknown_data_are_refused_with_the_nearest(tmp_path):
    assert parse_spec("folder:/a:b/c") == ("folder", "/a:b/c")
    for spec, said in [
        ("openmojis", "Did you mean openmoji"),
        ("foto", "Did you mean photos"),
        ("foldr:here", "Did you mean folder:"),
        ("folder:", "needs a place"),
        ("avatar", "Did you mean avatars"),
        ("avatars:", "needs styles"),
        ("", "must be one of"),
        (str(tmp_path), f"Write folder:{tmp_path}"),
    ]:
        with pytest.raises(UserError, match=said):
            parse_spec(spec)
    for options, said in [
        ({"split": "test"}, "train, val, got 'test'"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"max_images": 9}, "only avatars"),
    ]:
        with pytest.raises(UserError, match=said):
            open_source("photos", image_size=8, **options)

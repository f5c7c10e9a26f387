"""The patch of transformers' masks is taken off again, and fails loudly where transformers has other names."""

import pytest
from transformers import masking_utils

from fedpeft.models.masks import SHORTCUTS, every_mask_made

pytestmark = pytest.mark.fast


def test_the_shortcuts_are_off_inside_and_put_back_whatever_happens() -> None:
    own = [getattr(masking_utils, name) for name in SHORTCUTS]
    with every_mask_made():
        assert [getattr(masking_utils, name)(None, query_length=4) for name in SHORTCUTS] == [False, False]
    with pytest.raises(ArithmeticError), every_mask_made():
        raise ArithmeticError
    assert [getattr(masking_utils, name) for name in SHORTCUTS] == own


def test_a_transformers_without_them_is_an_error_and_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(masking_utils, SHORTCUTS[1])
    own = getattr(masking_utils, SHORTCUTS[0])
    with pytest.raises(AttributeError, match=SHORTCUTS[1]), every_mask_made():
        pytest.fail("it went on")
    assert getattr(masking_utils, SHORTCUTS[0]) is own

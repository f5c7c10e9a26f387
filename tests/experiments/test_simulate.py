"""`fedpeft run` before its first round."""

import pytest

from experiments.simulate import _few
from fedpeft.config import load
from fedpeft.setting import open_setting


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (["privacy=example", "clients=100", "cohort=10"], True),
        (["privacy=example", "clients=6", "cohort=6"], False),
        (["privacy=client", "clients=100", "cohort=10"], False),
        (["clients=100"], False),
    ],
)
def test_who_hides_one_of_very_few_examples_is_told_what_to_expect(words: list[str], warned: bool) -> None:
    setting = open_setting(load([*words, "model.epochs=1"]))
    said = _few(setting)
    assert (said is not None) == warned
    if said is not None:
        half = sorted(len(rows) for rows in setting.split.clients)[50]
        assert f"half of the clients have at most {half} examples" in said

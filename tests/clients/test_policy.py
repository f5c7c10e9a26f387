"""A site's policy holds whatever the server asks, and what is the site's own is not the server's to say."""

import pytest

from clients.policy import Policy, is_own, own, refused, refused_base
from fedpeft.config import load

ASKED = load(["rounds=20", "strategy=ffa"])


@pytest.mark.fast
def test_a_policy_that_says_nothing_allows_all() -> None:
    assert refused(Policy(), ASKED) == []
    assert refused_base(Policy(), "abc") == []


@pytest.mark.fast
@pytest.mark.parametrize(
    ("policy", "fault"),
    [
        (Policy(rounds=19), "rounds=20: this site's policy allows 19"),
        (Policy(strategies=("fedavg", "flora")), "strategy=ffa: this site's policy allows fedavg, flora"),
        (Policy(strategies=()), "strategy=ffa: this site's policy allows none"),
        (Policy(adapters=("head",)), "adapter=lora: this site's policy allows head"),
        (Policy(epsilon=8.0), "privacy=none: this site's policy allows epsilon 8 of an example; needed is privacy=example"),
    ],
)
def test_what_it_does_not_allow_is_refused_with_both_values(policy: Policy, fault: str) -> None:
    assert refused(policy, ASKED) == [fault]


@pytest.mark.fast
def test_all_faults_are_told_at_once() -> None:
    assert len(refused(Policy(rounds=1, strategies=(), adapters=(), epsilon=1.0), ASKED)) == 4


@pytest.mark.fast
def test_what_it_allows_is_not_refused() -> None:
    assert refused(Policy(rounds=20, strategies=("ffa",), adapters=("lora",)), ASKED) == []


@pytest.mark.fast
def test_seeded_noise_is_refused_by_every_policy() -> None:
    assert "seeded-insecure" in refused(Policy(), load(["privacy=example", "privacy.noise=seeded-insecure"]))[0]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("asked", "spent", "allowed"),
    [
        ("privacy.epsilon=3", 0.0, True),
        ("privacy.epsilon=3", 5.0, True),
        ("privacy.epsilon=3", 5.5, False),
        ("privacy.epsilon=inf", 0.0, False),
    ],
)
def test_the_epsilon_of_all_runs_together_stays_below_the_policys(asked: str, spent: float, allowed: bool) -> None:
    config = load(["privacy=example", asked, "privacy.noise_multiplier=1.0"])
    assert (refused(Policy(epsilon=8.0), config, spent=spent) == []) is allowed


@pytest.mark.fast
@pytest.mark.parametrize("privacy", ["client", "as-published"])
def test_an_epsilon_that_is_not_the_clients_own_noise_or_no_valid_claim_does_not_count(privacy: str) -> None:
    assert "needed is privacy=example" in refused(Policy(epsilon=100.0), load([f"privacy={privacy}"]))[0]


@pytest.mark.fast
def test_a_base_model_that_is_not_named_is_refused() -> None:
    assert refused_base(Policy(fingerprints=("abc",)), "abc") == []
    assert "fingerprint def: this site's policy allows abc" in refused_base(Policy(fingerprints=("abc",)), "def")[0]


@pytest.mark.fast
def test_paths_and_devices_of_the_server_are_not_heard_and_the_sites_words_win() -> None:
    asked = ["rounds=3", "data.path=/etc", "run.dir=/tmp/x", "engine.wave=64", "model.id=/root/model", "data.text=a", "train.lr=0.1"]
    assert own({"data.path": "mine", "data.text": "b"}, asked) == ["rounds=3", "train.lr=0.1", "data.path=mine", "data.text=b"]


@pytest.mark.fast
def test_a_sign_before_a_key_does_not_carry_it_past() -> None:
    assert own({}, ["++data.path=/etc", "~run.dir", "+run.device=cuda"]) == []


@pytest.mark.fast
def test_every_field_that_names_a_place_is_the_sites_own() -> None:
    """Of all presets: what a server could set to have a client read or write where it likes."""
    from fedpeft.config import app_folder, presets_of

    conf = app_folder() / "experiments" / "conf"
    for family in ("data", "model"):
        for preset in presets_of(family, conf):
            fields = getattr(load([f"{family}={preset}"]), family)
            for name in {"path", "id", "train", "test", "name", "revision", "folder", "dir", "file"} & set(fields):
                assert is_own(f"{family}.{name}"), f"{family}={preset} has {family}.{name}"


def test_columns_and_cuts_of_the_data_are_the_sites_own_and_who_owns_what_is_the_runs() -> None:
    """Else a server could choose what it is told of: a column as the label, a slice of few rows."""
    asked = ["data.label=illness", "data.limit=3", "data.partition.alpha=0.1", "data.min_examples=4"]
    assert own({}, asked) == asked[2:]


@pytest.mark.parametrize(
    ("delta", "most", "refused_"), [("null", None, False), ("1e-6", None, False), ("1e-3", None, True), ("1e-3", 1e-2, False)]
)
def test_a_policy_of_epsilon_has_a_delta(delta: str, most: float | None, refused_: bool) -> None:
    config = load(["privacy=example", "privacy.epsilon=2", f"privacy.delta={delta}"])
    assert bool(refused(Policy(epsilon=4.0, delta=most), config)) is refused_

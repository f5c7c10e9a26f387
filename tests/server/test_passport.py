"""The handshake: before round 1 every client shows that it stands on what the server stands on."""

from dataclasses import replace

import pytest

from clients.memory import Memory
from clients.site import serve, site_of
from fedpeft.codecs.raw import Raw
from fedpeft.config import ConfigError, load
from fedpeft.passport import Passport
from fedpeft.setting import open_setting
from fedpeft.simulation import InProcessGrid
from server.exchange import connect
from strategies.fedavg import FedAvg

pytestmark = pytest.mark.fast

OWN = Passport("0.1.0", 1, "base", "float32", "reads", "layout", "main: q.A float32 2x5 (1)", rank=4)


def meet(clients, joined, *said, needs=lambda client: OWN):
    """Clients 0, 1, ... that say what `said` holds: a passport, or facts."""
    facts = [one.facts() if isinstance(one, Passport) else one for one in said]
    return joined(clients(FedAvg(), says=lambda client: facts[client]), len(said), needs=needs)


def test_clients_that_fit_are_taken_and_what_they_said_is_kept(clients, joined):
    said = [replace(OWN, rank=8, examples=100), replace(OWN, examples=10)]
    assert meet(clients, joined, *said).passports == dict(enumerate(said))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": "other"}, "base: the server has base, client 1 has other"),
        ({"fedpeft": "0.0.9"}, r"fedpeft: the server has 0\.1\.0, client 1 has 0\.0\.9"),
        (
            {"layout": "other", "modules": "main: k.A float32 2x5 (1)"},
            r"layout: only the server has main: q\.A .* only client 1 has main: k\.A",
        ),
        ({"reads": "other"}, "reads: the server has reads, client 1 has other"),
    ],
)
def test_a_client_that_stands_on_something_else_is_refused_by_name(clients, joined, change, words):
    with pytest.raises(ConfigError, match=rf"client 1 does not fit this run:\n{words}"):
        meet(clients, joined, OWN, replace(OWN, **change), OWN)


def test_a_rank_that_a_client_cannot_take_is_refused(clients, joined):
    ranks = {0: 4, 1: 2}
    needs = lambda client: replace(OWN, rank=ranks[client])  # noqa: E731  one line says it
    meet(clients, joined, OWN, replace(OWN, rank=2), needs=needs)
    with pytest.raises(ConfigError, match="rank: the server sends rank 4, client 0 takes at most 2"):
        meet(clients, joined, replace(OWN, rank=2), replace(OWN, rank=2), needs=needs)


def test_an_older_client_that_says_nothing_of_itself_is_refused(clients, joined):
    with pytest.raises(ConfigError, match=r"client 1 does not fit this run:\nit does not say its asks, base, classes, .* an older fedpeft"):
        meet(clients, joined, OWN, {})


@pytest.mark.parametrize("change", [{"base": 1}, {"rank": "4"}, {"examples": -5}, {"modules": [1, 2]}])
def test_a_malformed_fact_is_refused_and_no_crash(clients, joined, change):
    (name,) = change
    with pytest.raises(ConfigError, match=f"client 0 does not fit this run:\nits {name} is "):
        meet(clients, joined, OWN.facts() | change)


def test_the_first_that_does_not_fit_is_told_in_full_and_the_others_are_named(clients, joined):
    other = replace(OWN, base="other", dtype="float16")
    with pytest.raises(ConfigError) as fault:
        meet(clients, joined, OWN, other, OWN, other, {})
    assert str(fault.value).count("\n") == 3
    assert str(fault.value).endswith("\nnor do clients: 3, 4")


def test_two_nodes_with_one_index_are_refused_whatever_they_stand_on(clients, joined):
    with pytest.raises(ConfigError, match="two nodes say they are client 0"):
        joined(clients(FedAvg(), indices=lambda node: 0, says=lambda client: OWN.facts()), 2, needs=lambda client: OWN)


def test_a_node_beyond_the_clients_may_stand_on_anything(clients):
    serve = clients(FedAvg(), says=lambda client: (OWN if client < 2 else replace(OWN, base="other")).facts())
    assert sorted(connect(InProcessGrid(serve, 3), Raw(), 2, needs=lambda client: OWN).nodes) == [0, 1]


def test_a_site_fits_its_own_setting_and_no_other_base(tmp_path):
    """In one process the costly facts are worked out once, however many clients it has."""
    setting = open_setting(load(["clients=4", "cohort=2", "train.steps=1", "model.epochs=1", "rounds=2"]))
    other = open_setting(load(["clients=4", "cohort=2", "train.steps=1", "model.epochs=1", "rounds=2", "seed=1"]))
    site = site_of(setting, Memory(tmp_path))
    grid = InProcessGrid(serve(site, {InProcessGrid.FIRST + client: client for client in range(4)}), 4)
    said = connect(grid, Raw(), 4, needs=setting.passport).passports
    sizes = [len(rows) for rows in setting.split.clients]
    assert [one.examples for one in said.values()] == [10 ** (len(str(size)) - 1) for size in sizes]
    assert {id(one.base) for one in said.values()} == {id(setting.base.fingerprint)}
    with pytest.raises(ConfigError, match="base: the server has"):
        connect(grid, Raw(), 4, needs=other.passport)

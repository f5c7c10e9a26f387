"""Drills on real processes come out as declared. One is played by every test run, the others by `make test-deploy`."""

from collections.abc import Iterator

import pytest

from experiments.drill.declared import DEPLOYED, QUICK
from experiments.drill.deployed import Deployed
from experiments.drill.event import play
from experiments.drill.simulation import Simulation

BY_NAME = {one.name: one for one in DEPLOYED}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    with Deployed(tmp_path_factory.mktemp("d")) as made:
        yield made


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    return Simulation(tmp_path_factory.mktemp("s"))


@pytest.mark.slow
def test_a_killed_server_is_resumed_to_the_adapter_of_the_simulation(deployed: Deployed, simulation: Simulation) -> None:
    made = play(BY_NAME[QUICK], deployed, simulation)
    assert made.wrong == (), made.happened


@pytest.mark.slow
@pytest.mark.deploy
@pytest.mark.parametrize("name", [one.name for one in DEPLOYED if one.name != QUICK])
def test_a_drill_that_takes_its_time_comes_out_as_declared(name: str, deployed: Deployed, simulation: Simulation) -> None:
    made = play(BY_NAME[name], deployed, simulation)
    assert made.wrong == (), made.happened

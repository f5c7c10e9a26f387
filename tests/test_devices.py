"""Devices: who gets which rank, on paper, on the command line, and at the opening of a run."""

from collections import Counter

import pytest

from fedpeft.config import ConfigError, load
from fedpeft.devices import Device, devices
from fedpeft.setting import open_setting, strategy_of

PHONE, LAPTOP, SERVER = Device(2), Device(8, 16.0), Device(4)
TWO = {"phone": {"rank": 2, "share": 0.7}, "laptop": {"rank": 8, "alpha": 16, "share": 0.3}}


@pytest.mark.fast
def test_without_devices_all_clients_are_alike():
    assert devices(None, clients=5, seed=0) is None


@pytest.mark.fast
def test_a_list_is_given_out_in_turn():
    assert devices([2, 4, 8], clients=7, seed=0) == tuple(Device(rank) for rank in (2, 4, 8, 2, 4, 8, 2))
    assert devices([4], clients=2, seed=9) == (Device(4), Device(4))
    assert devices([2, 4, 8], clients=2, seed=0) == (Device(2), Device(4))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("shares", "clients", "counts"),
    [
        ((0.7, 0.3), 10, (7, 3)),
        ((0.7, 0.3), 100, (70, 30)),
        ((0.5, 0.25, 0.25), 8, (4, 2, 2)),
        ((0.1,) * 10, 20, (2,) * 10),  # ten times 0.1 is a little less than 1
        ((1.0,), 3, (3,)),
        ((0.5, 0.5), 3, (2, 1)),
        ((0.9, 0.1), 4, (4, 0)),  # half a client is none
        ((0.33, 0.33, 0.33), 9, (3, 3, 3)),  # what is missing is less than half a client
    ],
)
def test_classes_have_their_shares_of_the_clients(shares, clients, counts):
    spec = {f"class{i}": {"rank": i + 1, "share": share} for i, share in enumerate(shares)}
    got = Counter(device.rank for device in devices(spec, clients=clients, seed=0))
    assert tuple(got[i + 1] for i in range(len(shares))) == counts


@pytest.mark.fast
def test_who_is_in_a_class_follows_from_the_seed_alone():
    drawn = [devices(TWO, clients=40, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0], key=lambda device: device.rank) == sorted(drawn[2], key=lambda device: device.rank)
    assert drawn[0] != tuple(sorted(drawn[0], key=lambda device: device.rank))  # not the first clients


@pytest.mark.fast
def test_a_class_may_list_its_clients():
    spec = {"phone": {"rank": 2, "clients": [0, 3]}, "laptop": {"rank": 8, "alpha": 16, "clients": [1, 2]}}
    assert devices(spec, clients=4, seed=0) == (PHONE, LAPTOP, LAPTOP, PHONE)
    assert devices({"phone": {"rank": 2, "clients": 0}}, clients=1, seed=0) == (PHONE,)


@pytest.mark.fast
def test_shares_are_drawn_among_the_clients_that_no_list_has():
    spec = TWO | {"server": {"rank": 4, "clients": [5, 0]}}
    for seed in range(3):
        made = devices(spec, clients=12, seed=seed)
        assert (made[0], made[5]) == (SERVER, SERVER)
        assert Counter(made) == {SERVER: 2, PHONE: 7, LAPTOP: 3}
    fewer = {"phone": {"rank": 2, "share": 0.5}, "server": {"rank": 4, "clients": list(range(5))}}
    assert devices(fewer, clients=10, seed=0) == (SERVER,) * 5 + (PHONE,) * 5


@pytest.mark.fast
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ([2, "x"], r"devices\[1\]=x: needed is a whole number of at least 1"),
        ([0], r"devices\[0\]=0: needed is a whole number of at least 1"),
        ([2.0], r"devices\[0\]=2\.0: needed is a whole number"),
        ([True], r"devices\[0\]=True: needed is a whole number"),
        ([], r"devices=\[\]: needed is null, a list of ranks as \[2,4,8\], or classes as \{phone: "),
        ({}, r"devices=\{\}: needed is null, a list"),
        (8, r"devices=8: needed is null, a list"),
        ("phone", r"devices=phone: needed is null, a list"),
        ({"phone": 2}, r"devices\.phone=2: needed are rank, perhaps alpha, and either share \(of the clients\) or clients \(a list\)"),
        ({"phone": {"rank": 2}}, r"devices\.phone=\{'rank': 2\}: needed are rank, .* either share"),
        ({"phone": {"rank": 2, "share": 1, "clients": [0]}}, r"devices\.phone=.*either share"),
        ({"phone": {"rank": 2, "part": 1}}, r"devices\.phone=\{'rank': 2, 'part': 1\}: needed are"),
        ({"phone": {"share": 1}}, r"devices\.phone\.rank=None: needed is a whole number of at least 1"),
        ({"phone": {"rank": 0, "share": 1}}, r"devices\.phone\.rank=0: needed is"),
        ({"phone": {"rank": 2, "alpha": 0, "share": 1}}, r"devices\.phone\.alpha=0: needed is a number more than 0"),
        ({"phone": {"rank": 2, "alpha": "big", "share": 1}}, r"devices\.phone\.alpha=big: needed is a number"),
        ({"phone": {"rank": 2, "alpha": float("inf"), "share": 1}}, r"devices\.phone\.alpha=inf: needed is a number"),
        ({"phone": {"rank": 2, "share": 0}}, r"devices\.phone\.share=0: needed is a share of the clients, more than 0"),
        ({"phone": {"rank": 2, "share": float("nan")}}, r"devices\.phone\.share=nan: needed is a share"),
        ({"phone": {"rank": 2, "share": None}}, r"devices\.phone\.share=None: needed is a share"),
        ({"phone": {"rank": 2, "share": 0.7}, "laptop": {"rank": 4, "share": 0.7}}, r"devices: the shares add up to 1\.4, .* at most 1"),
        ({"phone": {"rank": 2, "share": 0.7}}, r"the shares add up to 0\.7, which leaves about 3 clients in no class; raise a share"),
        ({"phone": {"rank": 2, "clients": [10]}}, r"devices\.phone\.clients=\[10\]: needed are clients from 0 to 9, each in one class"),
        ({"phone": {"rank": 2, "clients": [-1]}}, r"devices\.phone\.clients=\[-1\]: needed"),
        ({"phone": {"rank": 2, "clients": [0, 0]}}, r"devices\.phone\.clients=\[0, 0\]: .* each in one class"),
        ({"a": {"rank": 2, "clients": [0]}, "b": {"rank": 4, "clients": [1, 0]}}, r"devices\.b\.clients=\[1, 0\]: .* each in one class"),
        ({"phone": {"rank": 2, "clients": "all"}}, r"devices\.phone\.clients=all: needed are clients"),
        ({"phone": {"rank": 2, "clients": [0, 1]}}, r"devices: client 2 and 7 more are in no class; give one class a share"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_field_as_it_was_written(spec, said):
    with pytest.raises(ValueError, match=said):
        devices(spec, clients=10, seed=0)


# On the command line


@pytest.mark.fast
@pytest.mark.parametrize(
    ("override", "made"),
    [
        ("devices=[2,4,8]", (Device(2), Device(4), Device(8), Device(2))),
        ("devices={phone: {rank: 2, clients: [0, 2]}, laptop: {rank: 8, alpha: 16, share: 0.5}}", (PHONE, LAPTOP, PHONE, LAPTOP)),
        ("devices={phone:{rank:2,clients:[0,1,2]},server:{rank:4,clients:3}}", (PHONE, PHONE, PHONE, SERVER)),
    ],
)
def test_both_forms_are_read_on_the_command_line(override, made):
    config = load(["clients=4", "cohort=2", override])
    assert devices(config.devices, clients=4, seed=0) == made


@pytest.mark.fast
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["devices=[2,16]"], "devices=[2, 16]: rank 16 is more than adapter.rank=8, which the server keeps; raise adapter.rank"),
        (["devices=[4]", "adapter.rank=2"], "devices=[4]: rank 4 is more than adapter.rank=2"),
        (["devices=[2,0]"], "devices[1]=0: needed is a whole number of at least 1"),
        (["devices={phone: {rank: 2, share: 2}}"], "devices: the shares add up to 2, needed is at most 1"),
        (["devices={phone: {rank: 2, clients: [100]}}"], "devices.phone.clients=[100]: needed are clients from 0 to 99"),
        (["devices=[2,4]", "adapter=bottleneck"], "adapter=bottleneck has no rank that clients could differ in; set adapter=lora"),
        (["devices=2"], "devices=2: needed is null, a list of ranks as [2,4,8], or classes"),
    ],
)
def test_a_config_with_devices_that_cannot_be_is_refused(overrides, said):
    with pytest.raises(ConfigError) as fault:
        load(overrides)
    assert said in str(fault.value)
    assert len(str(fault.value).splitlines()) == 1


# At the opening of a run

SMALL = ["clients=4", "cohort=2", "model.epochs=1", "rounds=4", "adapter.rank=4"]


@pytest.fixture(scope="module")
def bare():
    setting = open_setting(load(SMALL))
    setting.off()
    return setting.base


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["strategy=fedavg"], "strategy=fedavg sends it rank 4"),
        (["strategy=ffa"], "strategy=ffa sends it rank 4"),
        (["strategy=fedex"], "strategy=fedex sends it rank 4"),
        (["strategy=ravan"], "strategy=ravan trains an adapter of its own (heads)"),
        (["strategy=fed_sb"], "strategy=fed_sb trains an adapter of its own (core)"),
        (["strategy=fed_sb", "strategy.start=sign"], "strategy=fed_sb trains an adapter of its own (whole)"),
        (["strategy=slora"], "strategy=slora trains an adapter of its own (sparse)"),  # LoRA of one rank follows
        (["strategy=slora", "strategy.share=0"], "strategy=slora sends it rank 4"),
    ],
)
def test_a_strategy_that_cannot_mix_ranks_is_refused_with_those_that_can(overrides, what, bare):
    with pytest.raises(ConfigError) as fault:
        open_setting(load([*SMALL, "devices=[4,2]", *overrides]), base=bare)
    can = "Those that can: flexlora, flora, florist, hetlora"
    assert str(fault.value) == f"client 1 has a device of rank 2, {what}: it cannot mix ranks. {can}"
    assert not any(hasattr(inner, "base_layer") for inner in bare.module.modules())  # another run may have the base


@pytest.mark.parametrize("strategy", ["flexlora", "flora", "florist", "hetlora"])
def test_strategies_that_can_mix_ranks_send_each_client_its_own(strategy, bare):
    config = load([*SMALL, "devices=[1,4,2]", f"strategy={strategy}"])
    setting = open_setting(config, base=bare)
    made = strategy_of(config)
    state = made.init(setting.starts())
    for client, rank in enumerate((1, 4, 2, 1)):
        sent = made.broadcast(state, 0, client).tensors
        assert {len(t) for name, t in sent.items() if name.endswith(".A")} == {rank}
        assert {t.shape[1] for name, t in sent.items() if name.endswith(".B")} == {rank}
    setting.off()


def test_devices_of_the_adapters_own_rank_mix_nothing(bare):
    setting = open_setting(load([*SMALL, "devices=[4]"]), base=bare)
    assert setting.devices == (Device(4),) * 4
    setting.off()


@pytest.mark.parametrize("adapter", ["lora", "rslora"])
def test_an_alpha_of_its_own_scales_b_and_without_one_the_adapters_scale_stays(adapter, bare):
    spec = "devices={phone: {rank: 2, alpha: 6, share: 0.5}, laptop: {rank: 4, clients: [0, 1]}}"
    setting = open_setting(load([*SMALL, spec, "strategy=flora", f"adapter={adapter}", "adapter.rank=4", "adapter.alpha=16"]), base=bare)
    adapted = setting.adapted
    own = adapted.scales
    assert setting.scales(0, adapted) == own
    assert set(own.values()) == {16 / (2 if adapter == "rslora" else 4)}
    assert setting.scales(3, adapted) == dict.fromkeys(own, 6 / (2**0.5 if adapter == "rslora" else 2))
    setting.off()

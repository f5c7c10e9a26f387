from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedpeft.config import FAMILIES, Config, ConfigError, Evaluation, Run, Training, app_folder, build, check, load, presets_of
from fedpeft.strategy import Federation

pytestmark = pytest.mark.fast
CONF = app_folder() / "experiments" / "conf"


def refused(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as fault:
        load(overrides)
    return str(fault.value).splitlines()


def together(rows: Iterable[tuple]) -> list[list[tuple]]:
    """The rows in few groups in which no two set the same key or one inside the other: one load costs 0.1 s and can check a whole group."""
    groups: list[list[tuple]] = []
    for row in rows:
        key = row[0].partition("=")[0]
        for group in groups:
            others = [other[0].partition("=")[0] for other in group]
            if not any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in others):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


@pytest.fixture(scope="module")
def default() -> Config:
    return load([])


# Defaults


def test_the_defaults_are_those_of_the_file_and_of_the_dataclasses(default):
    assert (default.rounds, default.clients, default.cohort, default.seed, default.min_clients, default.deadline) == (
        40,
        100,
        10,
        0,
        1,
        None,
    )
    assert (default.train, default.evaluate, default.run) == (Training(), Evaluation(), Run())
    assert dict(default.choices) == {
        "strategy": "fedavg", "adapter": "lora", "model": "tiny_vit", "data": "digits", "codec": "raw", "privacy": "none",
        "downlink": "raw", "select": "all", "mean": "weighted",
    }  # fmt: skip
    assert check(default) == []
    assert load([]) == default


def test_every_field_can_be_overridden_because_the_file_lists_it(default):
    tree = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    assert set(tree) - {"defaults"} | set(FAMILIES) | {"choices"} == set(asdict(default))
    for part in ("train", "evaluate", "run"):
        assert set(tree[part]) == set(asdict(getattr(default, part)))


@pytest.mark.parametrize("chosen", list(zip_longest(*(presets_of(family, CONF) for family in FAMILIES))), ids=str)
def test_every_preset_loads_with_three_rounds(chosen):
    names = {family: name for family, name in zip(FAMILIES, chosen, strict=True) if name}
    config = load(["rounds=3", *(f"{family}={name}" for family, name in names.items())])
    assert config.rounds == 3
    for family, name in names.items():
        assert config.choices[family] == name
        assert dict(getattr(config, family)) == OmegaConf.to_container(OmegaConf.load(CONF / family / f"{name}.yaml"))


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_preset_names_its_target_only_at_the_top(path: Path):
    plain = OmegaConf.to_container(OmegaConf.load(path))
    assert "_target_" in plain or path.parent.name == "privacy"
    assert all("_target_" not in str(value) for key, value in plain.items() if key != "_target_")


@pytest.mark.parametrize(
    "path",
    [path for family in ("strategy", "codec", "select", "mean") for path in sorted((CONF / family).glob("*.yaml"))],
    ids=lambda path: path.stem,
)
def test_a_preset_that_needs_no_data_is_built(path):
    assert build(OmegaConf.to_container(OmegaConf.load(path)), run=Federation(optimizer="sgd")) is not None


def test_other_presets_can_be_loaded_from_a_folder(tmp_path):
    for source in CONF.rglob("*.yaml"):
        there = tmp_path / source.relative_to(CONF)
        there.parent.mkdir(exist_ok=True)
        there.write_text(source.read_text())
    (tmp_path / "strategy" / "mine.yaml").write_text("_target_: strategies.fedprox.fedprox\nmu: 0.5\n")
    assert load(["strategy=mine"], tmp_path).strategy["mu"] == 0.5


# Overrides

VALUES = [
    ("rounds=3", lambda c: c.rounds, 3), ("clients=200", lambda c: c.clients, 200), ("cohort=5", lambda c: c.cohort, 5),
    ("seed=7", lambda c: c.seed, 7), ("seed=-1", lambda c: c.seed, -1), ("min_clients=2", lambda c: c.min_clients, 2),
    ("deadline=30", lambda c: c.deadline, 30.0), ("deadline=2.5", lambda c: c.deadline, 2.5), ("deadline=null", lambda c: c.deadline, None),
    ("run.dir=runs/mine", lambda c: c.run.dir, "runs/mine"), ("run.dir=/tmp/my run", lambda c: c.run.dir, "/tmp/my run"),
    ("run.dir='/tmp/a,b=c'", lambda c: c.run.dir, "/tmp/a,b=c"), ("run.dir='2026'", lambda c: c.run.dir, "2026"),
    ("run.device=cuda:1", lambda c: c.run.device, "cuda:1"), ("run.threads=2", lambda c: c.run.threads, 2),
    ("run.keep=5", lambda c: c.run.keep, 5),
    ("train.lr=0.01", lambda c: c.train.lr, 0.01), ("train.lr=1e-3", lambda c: c.train.lr, 1e-3), ("train.lr=1", lambda c: c.train.lr, 1.0),
    ("train.head_lr=0.1", lambda c: c.train.head_lr, 0.1), ("train.batch=32", lambda c: c.train.batch, 32),
    ("train.clip=1", lambda c: c.train.clip, 1.0),
    ("train.optimizer=sgd", lambda c: c.train.optimizer, "sgd"), ("train.weight_decay=0.1", lambda c: c.train.weight_decay, 0.1),
    ("train={lr: 0.5}", lambda c: c.train, Training(lr=0.5)),
    ("evaluate.every=1", lambda c: c.evaluate.every, 1), ("evaluate.head_only=false", lambda c: c.evaluate.head_only, False),
    ("adapter.rank=4", lambda c: c.adapter["rank"], 4),
    ("adapter.targets=[query,value]", lambda c: c.adapter["targets"], ["query", "value"]),
    ("adapter.targets=null", lambda c: c.adapter["targets"], None), ("model.width=32", lambda c: c.model["width"], 32),
    ("data.partition.alpha=0.1", lambda c: c.data["partition"], {"scheme": "dirichlet", "alpha": 0.1, "shards": 2}),
    ("data.partition={scheme: iid}", lambda c: c.data["partition"], {"scheme": "iid", "alpha": 0.5, "shards": 2}),
    ("data.min_examples=5", lambda c: c.data["min_examples"], 5), ("data.split_seed=3", lambda c: c.data["split_seed"], 3),
    ("adapter.rank_pattern={query: 4}", lambda c: c.adapter["rank_pattern"], {"query": 4}),
    ("adapter.rank_pattern.query=4", lambda c: c.adapter["rank_pattern"], {"query": 4}),
]  # fmt: skip


@pytest.mark.parametrize("rows", together(VALUES), ids=lambda rows: f"{len(rows)} of them")
def test_an_override_sets_its_value_and_its_type(rows):
    config = load([override for override, _, _ in rows])
    for override, read, value in rows:
        assert (override, read(config)) == (override, value)
        assert type(read(config)) is type(value)


@pytest.mark.parametrize("override", ["seed=3", "train.lr=0.5", "codec=half"])
def test_an_override_sets_nothing_else(default, override):
    own = {override.partition("=")[0].partition(".")[0], "choices"}
    assert {k: v for k, v in asdict(load([override])).items() if k not in own} == {k: v for k, v in asdict(default).items() if k not in own}


@pytest.mark.parametrize(
    ("overrides", "read", "value"),
    [
        (["strategy=fedprox", "strategy.mu=0.1"], lambda c: c.strategy["mu"], 0.1),
        (["strategy.mu=0.1", "strategy=fedprox"], lambda c: c.strategy["mu"], 0.1),  # in any order
        (
            ["codec=half", "codec.dtype=fp16", "mean=trimmed", "mean.trim=0.25"],
            lambda c: (c.codec["dtype"], c.mean["trim"]),
            ("fp16", 0.25),
        ),
        (["model=hf_encoder", "model.id=org/name"], lambda c: c.model["id"], "org/name"),
        (["data=files", "data.path=/a/b.csv", "data.text=body"], lambda c: (c.data["path"], c.data["text"]), ("/a/b.csv", "body")),
        (
            ["adapter=peft", "adapter.type=IA3", "adapter.options.r=4", "adapter.options.x=[a]"],
            lambda c: c.adapter["options"],
            {"r": 4, "x": ["a"]},
        ),
        (["adapter=peft", "adapter.options={r: 4, deep: {x: 1}}"], lambda c: c.adapter["options"], {"r": 4, "deep": {"x": 1}}),
        (["rounds=3", "rounds=4"], lambda c: c.rounds, 4),
        (
            ["strategy=ffa", "strategy=rolora"],
            lambda c: (c.choices["strategy"], c.strategy["_target_"]),
            ("rolora", "strategies.rolora.rolora"),
        ),
        (["train.steps=null", "train.epochs=1"], lambda c: (c.train.steps, c.train.epochs), (None, 1.0)),
        (["train.optimizer=sgd", "train.momentum=0.9", "clients=3", "cohort=3"], lambda c: (c.train.momentum, c.cohort), (0.9, 3)),
    ],
)
def test_overrides_go_together(overrides, read, value):
    assert read(load(overrides)) == value


@pytest.mark.parametrize("words", ["data=banking77", "data=files codec.density=0.1", "data=sick privacy=none"])
def test_texts_are_ternary(words):
    assert load(words.split()).choices["codec"] == "ternary"


OTHER_CODECS = ["raw", "raw data=banking77 codec=raw", "half codec=half data=sick", "raw data=files data.task=language data.label=null"]


@pytest.mark.parametrize("row", [*OTHER_CODECS, "raw data=tinyshakespeare", "raw data=banking77 privacy=client"])
def test_all_else_is_what_it_says_or_raw(row):
    codec, *words = row.split()
    assert load(words).choices["codec"] == codec


# Faults

NO_KEYS = [
    ("rounds", "rounds: needed is key=value"),
    ("--rounds=3", "no such key"),
    ("+x=1", "keys cannot be added or removed"),
    ("++rounds=3", "keys cannot be added or removed"),
    ("~train", "needed is key=value"),
    ("~train=1", "keys cannot be added or removed"),
    ("=3", "no such key"),
    ("round=3", "did you mean rounds?"),
    ("startegy=ffa", "did you mean strategy?"),
    ("train.batchsize=3", "did you mean train.batch?"),
    ("adapter.rnak=3", "did you mean adapter.rank?"),
    ("data.partition.aplha=3", "did you mean data.partition.alpha?"),
    ("train.lr.x=3", "train.lr has no fields"),
    ("rounds.x=3", "rounds has no fields"),
    ("strategy=fa", "did you mean strategy=ffa? There are fed_sb, fedavg"),
    ("strategy=", "there is no such strategy"),
    ("mean=average", "There are median, trimmed, weighted"),
    ("codec=../codec/raw", "there is no such codec"),
    ("data={path: x}", "there is no such data"),
    ("hydra.searchpath=[x]", "no such key"),
    ("hydra/launcher=x", "no such key"),
    ("strategy@adapter=lora", "no such key"),
    ("defaults=[]", "no such key"),
    ("choices={}", "no such key"),
    ("model.id=org/name", "model has width"),  # tiny_vit has no id
]


def test_a_key_or_preset_that_there_is_not_is_refused_with_what_there_is():
    said = refused(*(override for override, _ in NO_KEYS))
    assert len(said) == len(NO_KEYS)  # one line each
    for override, words in NO_KEYS:
        assert any(words in line for line in said), (override, said)


WRONG_TYPES = [
    *((f"rounds={text}", f"rounds={read}: needed is a whole number") for text, read in [
        ("three", "three"), ("2.5", 2.5), ("1e1", 10.0), ("true", True), ("null", None), ("", ""), ("[3]", [3]), ("???", "???")
    ]),
    ("seed={a: 1}", "seed={'a': 1}: needed is a whole number"),
    ("train.lr=fast", "train.lr=fast: needed is a number"),
    ("train.lr=true", "train.lr=True: needed is a number"),
    ("train.steps=2.5", "train.steps=2.5: needed is a whole number or null"),
    ("train.head_lr=x", "train.head_lr=x: needed is a number or null"),
    ("evaluate.head_only=1", "evaluate.head_only=1: needed is true or false"),
    ("run.dir=3", "run.dir=3: needed is text or null"),
    ("run.device=3", "run.device=3: needed is text"),
    ("train=5", "train=5: needed are fields, such as train.steps="),
    ("train=null", "train=None: needed are fields"),
    ("run=here", "run=here: needed are fields"),
    ("data.min_examples=few", "data.min_examples=few: needed is a number"),
    ("data.min_examples=null", "data.min_examples=None: needed is a number"),
    ("data.min_examples=2.5", "data.min_examples=2.5: needed is a whole number"),
    ("data.partition=iid", "data.partition=iid: needed are fields, such as data.partition.scheme="),
    ("data.partition.alpha=low", "data.partition.alpha=low: needed is a number"),
    ("adapter.rank=[4,8]", "adapter.rank=[4, 8]: needed is a number"),
    ("adapter.rank=true", "adapter.rank=True: needed is a number"),
    ("adapter.dora=1", "adapter.dora=1: needed is true or false"),
    ("adapter.rank_pattern=4", "adapter.rank_pattern=4: needed are fields"),
]  # fmt: skip


@pytest.mark.parametrize("rows", together(WRONG_TYPES), ids=lambda rows: f"{len(rows)} of them")
def test_values_of_the_wrong_type_are_refused_all_at_once(rows):
    assert len(said := refused(*(override for override, _ in rows))) == len(rows)
    for _, words in rows:
        assert any(line.startswith(words) for line in said), (words, said)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rounds", 0, "rounds=0: needed is at least 1"),
        ("clients", 0, "clients=0: needed is at least 1"),
        ("cohort", -1, "cohort=-1: needed is at least 1"),
        ("min_clients", 0, "min_clients=0: needed is at least 1"),
        ("cohort", 101, "cohort=101 is more than clients=100"),
        ("clients", 9, "cohort=10 is more than clients=9"),
        ("min_clients", 11, "min_clients=11 is more than cohort=10"),
        ("train.epochs", 1.0, "set one and make the other null"),
        ("train.steps", None, "set one and make the other null"),
        ("train.steps", 0, "train.steps=0: needed is at least 1"),
        ("train.batch", 0, "train.batch=0: needed is at least 1"),
        ("train.optimizer", "adam", "train.optimizer=adam: needed is adamw or sgd"),
        ("train.lr", 0.0, "train.lr=0.0: needed is a positive number"),
        ("train.lr", float("nan"), "train.lr=nan: needed is a positive number"),
        ("train.lr", float("inf"), "train.lr=inf: needed is a positive number"),
        ("train.head_lr", -1.0, "train.head_lr=-1.0: needed is a positive number"),
        ("train.clip", 0.0, "train.clip=0.0: needed is a positive number"),
        ("train.momentum", 1.0, "train.momentum=1.0: needed is a number in [0, 1)"),
        ("train.momentum", 0.9, "train.momentum=0.9: adamw has none; set train.optimizer=sgd"),
        ("train.weight_decay", -1.0, "train.weight_decay=-1.0: needed is"),
        ("train.weight_decay", float("nan"), "train.weight_decay=nan: needed is"),
        ("evaluate.every", 0, "evaluate.every=0"),
        ("evaluate.batch", 0, "evaluate.batch=0"),
        ("run.threads", 0, "run.threads=0"),
        ("run.keep", 0, "run.keep=0"),
        ("deadline", 0.0, "deadline=0.0: needed is a positive number of seconds"),
        ("deadline", float("nan"), "deadline=nan: needed is a positive number of seconds"),
        ("data", {"min_examples": 0}, "data.min_examples=0: needed is at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused(default, field, value, said):
    part, _, inside = field.partition(".")
    new = replace(getattr(default, part), **{inside: value}) if inside else value
    faults = check(replace(default, **{part: new}))
    assert any(said in fault for fault in faults), faults


def test_fewer_clients_than_the_usual_cohort_take_part_all_but_a_cohort_that_is_said_is_held_against_them():
    assert [load([word]).cohort for word in ("clients=4", "clients=12")] == [4, 10]
    assert refused("clients=9", "cohort=10")[0].startswith("cohort=10 is more than clients=9: a round cannot draw more")


def test_all_kinds_of_fault_are_reported_at_once_each_in_its_line():
    words = [
        "bar:",
        "strategy=nope",
        "strategy._target_=x",
        "train.rl:",
        "rounds=-1",
        "train.lr=fast",
        "cohort=200",
        "run.threads=x",
        "seed=1,2",
    ]
    said = refused(
        "bar", "strategy=nope", "strategy._target_=x", "train.rl=1", "rounds=-1", "train.lr=fast", "cohort=200", "run.threads=x", "seed=1,2"
    )
    assert len(said) == len(words)
    for word in words:
        assert sum(word in line for line in said) == 1, (word, said)


def test_what_hydra_cannot_place_is_a_config_error_that_names_it():
    assert any("train={foo: 1}" in line for line in refused("train={foo: 1}"))


def test_a_value_that_stands_elsewhere_is_refused(monkeypatch):
    """It would mean another thing on each machine; and a client reads the server's overrides, so `oc.env` would tell its secrets."""
    monkeypatch.setenv("FEDPEFT_SECRET", "org/secret")
    elsewhere = ["model.id=${oc.env:FEDPEFT_SECRET}", "rounds=${nope}", "train.lr=${train.batch}", "run.dir='a${oc.env:FEDPEFT_SECRET}'"]
    said = refused("model=hf_encoder", *elsewhere)
    assert len(said) == len(elsewhere)
    assert all("needed is a plain value" in line and "org/secret" not in line for line in said)


def test_what_hydra_cannot_read_is_told_to_be_quoted():
    signs = ["rounds=1,2", "seed=[", "clients='3", "run.dir=/tmp/a=b", "run.device=a,b", "cohort=]", "data.min_examples={"]
    said = refused(*signs)
    assert len(said) == len(signs)
    for override, line in zip(signs, said, strict=True):
        assert line.startswith(f"{override}: ")
        assert "quote" in line


TARGETS = [
    "strategy._target_=os.system", "adapter={_target_: os.system}", "train._target_=os.system", "_target_=os.system",
    "+strategy._target_=x",
    "++strategy._target_=x", "~strategy._target_=x", "adapter.options={_target_: os.system}", "adapter.options.x={_target_: os.system}",
    "adapter.options._target_=os.system", "run.dir=_target_", "data.partition={scheme: iid, _target_: os.system}",
    "model.id=${strategy._target_}",
    "adapter.options=[{_target_: os.system}]", "strategy=_target_",
]  # fmt: skip


def test_a_target_is_refused_in_every_position():
    said = refused(*TARGETS, "adapter=peft")
    assert len(said) == len(TARGETS)
    for override, line in zip(TARGETS, said, strict=True):
        assert line.startswith(f"{override}: ")
        assert "_target_ is read only from the installed presets" in line or "cannot be added" in line


@pytest.mark.parametrize("target", ["os.system", "fedpeft_evil.x", "clients.site.serve", "torch.load", "fedpeftx.y"])
def test_a_target_outside_of_fedpeft_is_not_built(target):
    with pytest.raises(ConfigError, match="not one of fedpeft's own"):
        build({"_target_": target})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"_target_": "strategies.fedprox.fedprox", "mu": -1}, "strategy.mu=-1"),
        ({"_target_": "strategies.fedprox.fedprox", "mu": [1]}, "fedprox: "),
        ({"_target_": "strategies.fedprox.fedprox", "nu": 1}, "fedprox.*nu"),
        ({"_target_": "strategies.fedopt.FedOpt", "optimizer": "sgd"}, "needed is momentum, adam or yogi"),
        ({"_target_": "fedpeft.codecs.raw.Half", "dtype": "fp8"}, r"Half: dtype=fp8"),
    ],
)
def test_what_an_object_refuses_is_a_fault_of_the_config(spec, said):
    with pytest.raises(ConfigError, match=said):
        build(spec)


def test_lists_become_tuples_on_their_way_into_an_object():
    assert build({"_target_": "fedpeft.config.Run", "dir": [1, {"a": [2]}]}) == Run(dir=(1, {"a": (2,)}))
    assert build({"_target_": "fedpeft.config.Run", "dir": 3, "device": 4}, leaves_out=["dir"]) == Run(device=4)


def test_an_id_of_the_hub_goes_inside_the_model():
    said = refused("model=org/name", "data=/my/file.csv")
    assert "hf_encoder" in said[0]
    assert "model.id=" in said[0]
    assert "data.path=" in said[1]

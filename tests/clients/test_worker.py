"""The worker answers one client's messages by the site's own file: the same bytes as a simulation, whatever else the server asks."""

import contextlib
import os
import socket
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from clients import frames
from clients.engine import Engine
from clients.faults import Told
from clients.forward import plain
from clients.launch import SiteFile, answers
from clients.memory import Memory
from clients.policy import Policy
from clients.site import site_of
from clients.worker import Worker, serve
from experiments.drill.spoiled import full_disk
from fedpeft.config import ConfigError, load
from fedpeft.messages import Broadcast
from fedpeft.records import Packer, from_records, to_records
from fedpeft.setting import Setting, open_setting

SMALL = ["clients=4", "cohort=2", "train.steps=1", "model.epochs=1", "rounds=2", "engine.wave=1", "engine.lanes=1"]
ASKED = " ".join(SMALL)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return open_setting(load(SMALL))


def asked(setting: Setting, overrides: str = ASKED, kind: str = "train") -> tuple[dict[str, object], bytes]:
    packed = Packer().pack(Broadcast(setting.adapted.read()))
    head, payload = plain(to_records(packed.payload, {"round": 0, "digest": packed.digest}))
    return head | {"kind": kind, "run": 7, "overrides": overrides}, payload


def worker(state: Path, **more: object) -> Worker:
    state.mkdir(exist_ok=True)
    return Worker(SiteFile(1, state, insecure=True, **more))  # type: ignore[arg-type]  # of a test


def test_it_answers_as_a_simulated_client_does(setting: Setting, tmp_path: Path) -> None:
    head, payload = asked(setting)
    said, data = worker(tmp_path / "here").answer(head, payload)
    content = to_records(Packer().pack(Broadcast(setting.adapted.read())).payload, dict(head["facts"]))  # type: ignore[call-overload]
    there = site_of(setting, Memory(tmp_path / "there")).answer(1, "train", content)
    assert data == from_records(there).data
    alike = set(said["metrics"]) - {"seconds"}
    assert {name: said["metrics"][name] for name in alike} == {name: there["metrics"][name] for name in alike}
    assert said["facts"]["client"] == 1


def test_a_worker_that_was_ended_answers_again_with_the_same_bytes_and_trains_nothing(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = worker(tmp_path).answer(*asked(setting))
    monkeypatch.setattr(Engine, "train", lambda *_, **__: pytest.fail("it trained again"))
    assert worker(tmp_path).answer(*asked(setting)) == first


def test_what_a_run_keeps_is_not_another_runs(setting: Setting, tmp_path: Path) -> None:
    here = worker(tmp_path)
    assert here.folder(ASKED) != here.folder(f"{ASKED} run.dir=b")
    here.answer(*asked(setting, f"{ASKED} run.dir={tmp_path / 'elsewhere'}"))
    assert not (tmp_path / "elsewhere").exists()  # that folder is the server's


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("strategy._target_=os.system", "_target_ is read only from the installed presets"),
        ("strategy={_target_:os.system,command:id}", "_target_ is read only from the installed presets"),
        ("train.lr='${oc.env:HOME}'", "needed is a plain value"),
        ("strategy=nothing", "there is no such strategy"),
        ("rounds=9", "rounds=9: this site's policy allows 5"),
        ("strategy=flora", "strategy=flora: this site's policy allows fedavg"),
        ("privacy=example privacy.noise=seeded-insecure", "seeded-insecure"),
        ("clients=1 cohort=1", "this site is client 1, the run has clients=1"),
    ],
)
def test_what_may_not_be_is_a_fault_and_nothing_is_run(
    setting: Setting, tmp_path: Path, more: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    here = worker(tmp_path, policy=Policy(rounds=5, strategies=("fedavg",)))
    made, data = here.answer(*asked(setting, f"{ASKED} {more}"))
    assert fault in made["fault"]
    assert data == b""
    assert not (tmp_path / "runs").exists()


def test_a_base_model_that_the_site_does_not_know_trains_on_nothing(setting: Setting, tmp_path: Path) -> None:
    made, _ = worker(tmp_path, policy=Policy(fingerprints=("abc",))).answer(*asked(setting))
    assert f"fingerprint {setting.base.fingerprint}: this site's policy allows abc" in made["fault"]


def test_a_path_of_the_servers_is_not_read(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("text,label\nkey,1\n")
    here = worker(tmp_path / "state")
    made, _ = here.answer(*asked(setting, f"{ASKED} data=files data.path={tmp_path / 'secret.csv'}"))
    assert "secret" not in made["fault"]
    assert "data.path is not set" in here.done["fault"]


TEXTS = f"{ASKED} data=files model=tiny_llama model.epochs=0 model.layers=1 data.partition.scheme=iid"


def of_texts(tmp_path: Path, *rows: str, **more: object) -> Worker:
    """A site whose own file has these rows."""
    (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"{row}\n" for row in rows))
    data = {"path": str(tmp_path / "mine.csv"), "class_names": ["a", "b", "c"]} | dict(more.pop("data", {}))  # type: ignore[call-overload]  # a dict
    return worker(tmp_path / "state", data=data, whole=True, **more)


@pytest.mark.parametrize("more", ["", "privacy=example"])
def test_neither_a_row_nor_a_path_leaves_with_what_went_wrong(setting: Setting, tmp_path: Path, more: str) -> None:
    here = of_texts(tmp_path, *["good,a"] * 9, "John Doe,HIV")
    made, _ = here.answer(*asked(setting, f"{TEXTS} {more}", kind="query"))
    assert made == {"fault": "its data and model cannot be opened; the reason stands in the client's log (worker.log)"}
    assert "row 10 of mine.csv has the label HIV, which is not one of data.class_names" in here.done["fault"]  # of `fedpeft status`, here


def test_a_fault_of_the_sites_own_file_is_not_told_in_its_words(setting: Setting, tmp_path: Path) -> None:
    made, _ = of_texts(tmp_path, "x,a", data={"colour": "/home/doe"}).answer(*asked(setting, TEXTS))
    assert made["fault"].startswith("what site.yaml says does not fit this run; the reason stands")


def test_whatever_goes_wrong_is_a_fault_without_its_words_and_the_worker_lives(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = worker(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(Worker, "_site", lambda *_: [].index("row 3: John Doe") if _ else {}["no"])
        made, _ = here.answer(*asked(setting))
    assert made == {"fault": "its message was not answered; the reason stands in the client's log (worker.log)"}
    assert "metrics" in here.answer(*asked(setting))[0]


def test_a_fault_in_training_is_told_by_its_kind_alone(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = worker(tmp_path)
    monkeypatch.setattr(Engine, "train", lambda self, phase, jobs, **_: [ValueError("row 3: John Doe") for _ in jobs])
    assert here.answer(*asked(setting))[0]["fault"] == "training failed; the reason stands in the client's log (worker.log)"
    assert here.done["fault"] == "row 3: John Doe"
    monkeypatch.setattr(Engine, "train", lambda self, phase, jobs, **_: [Told("the loss became nan") for _ in jobs])
    assert here.answer(*asked(setting))[0]["fault"] == "the loss became nan"


def test_what_a_site_says_of_its_head_does_not_follow_from_its_rows(setting: Setting, tmp_path: Path) -> None:
    said = []
    for number, rows in enumerate((["x,a", "y,b"] * 4, ["x,a"] * 8)):
        (tmp_path / str(number)).mkdir()
        made, _ = of_texts(tmp_path / str(number), *rows).answer(*asked(setting, TEXTS, kind="query"))
        said.append({name: made["facts"][name] for name in ("layout", "modules", "classes", "reads")})
    assert said[0] == said[1]
    assert said[0]["classes"].startswith("3 named ")


@pytest.mark.parametrize(("whole", "more"), [(True, ""), (False, "privacy=example")])
def test_a_site_that_does_not_name_its_classes_takes_part_in_nothing(setting: Setting, tmp_path: Path, whole: bool, more: str) -> None:
    here = of_texts(tmp_path, *["x,a", "y,b"] * 9, data={"class_names": None})
    here.site = replace(here.site, whole=whole)
    assert "does not say data.class_names" in here.answer(*asked(setting, f"{TEXTS} {more}"))[0]["fault"]


def test_all_rows_are_a_clients_own_however_many_a_dealt_split_would_need(setting: Setting, tmp_path: Path) -> None:
    made, _ = of_texts(tmp_path, *["x,a", "y,b"] * 4).answer(*asked(setting, f"{TEXTS} data.min_examples=1000", kind="query"))
    assert made["facts"]["examples"] == 1  # six of eight are left after the held-out ones


def test_all_of_the_sites_rows_are_its_own_if_it_says_so(setting: Setting, tmp_path: Path) -> None:
    rows = len(setting.dataset.train.labels)
    for whole, own in ((False, len(setting.split.clients[1])), (True, rows)):
        made, _ = worker(tmp_path / str(whole), whole=whole).answer(*asked(setting))
        assert made["metrics"]["weight"] == own
    assert own > len(setting.split.clients[1])


@pytest.mark.parametrize(
    "head", [{}, {"kind": "train"}, {"kind": "exec", "facts": {}, "overrides": ""}, {"kind": "train", "facts": [], "overrides": ""},
             {"kind": "train", "facts": {}, "overrides": 3}],
)  # fmt: skip
def test_a_message_that_is_none_is_a_fault(tmp_path: Path, head: dict[str, object]) -> None:
    made, _ = worker(tmp_path).answer(head, b"")
    assert "does not know" in made["fault"]


def test_after_a_fault_the_next_message_is_answered(setting: Setting, tmp_path: Path) -> None:
    here = worker(tmp_path)
    head, payload = asked(setting)
    assert "fault" in here.answer(head, payload[:100])[0]
    assert "metrics" in here.answer(head, payload)[0]
    assert here.done["messages"] == 2
    assert here.done["fault"] is None


def test_a_full_disk_is_a_fault_that_is_told_and_what_status_shows_may_wait(setting: Setting, tmp_path: Path) -> None:
    here = worker(tmp_path)
    head, payload = asked(setting)
    here.answer(head | {"kind": "query"}, b"")  # the run is open
    with full_disk():
        assert "fault" in here.answer(head, payload)[0]
    assert "metrics" in here.answer(head, payload)[0]


def test_the_epsilon_of_other_runs_is_found_on_disk(tmp_path: Path) -> None:
    here = worker(tmp_path)
    for run, epsilon in (("a/memory/000001", 1.5), ("b/memory/000001", 2.0), ("b/memory/000000", 0.25)):
        file = tmp_path / "runs" / run / "privacy.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(f'{{"epsilon": 0.5, "delta": 1e-5}}\n{{"epsilon": {epsilon}, "delta": 1e-5}}\n{{"epsi')
    assert here.spent() == 3.75
    assert here.spent(but=tmp_path / "runs" / "b" / "memory" / "000001") == 1.75  # what it spent as another client counts


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """The socket of a worker that answers in a thread until the tests end."""
    here = worker(tmp_path)
    threading.Thread(target=serve, args=(here, here.site.socket), daemon=True).start()
    for _ in range(1000):
        with socket.socket(socket.AF_UNIX) as link, contextlib.suppress(OSError):
            link.connect(str(here.site.socket))
            return here.site.socket
        threading.Event().wait(0.01)
    raise AssertionError("the worker does not listen")


def test_only_its_user_can_open_the_socket(served: Path) -> None:
    assert stat.S_IMODE(served.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(served.stat().st_mode)


def test_who_only_looks_whether_it_answers_is_not_taken_for_a_lost_message(served: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert answers(served)
    with socket.socket(socket.AF_UNIX) as link:  # one after the other: the first is over when this one is answered
        link.settimeout(20)
        link.connect(str(served))
        frames.send(link, {"kind": "hello"})
        frames.receive(link)
    assert "a message was lost" not in caplog.text


def test_who_hangs_up_or_talks_nonsense_does_not_end_it(served: Path) -> None:
    for said in (b"", b"nonsense that is long enough to be a head", frames.LENGTHS.pack(frames.MAGIC, 10, 10)):
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(served))
            link.sendall(said)
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(20)
        link.connect(str(served))
        frames.send(link, {"kind": "hello"})
        assert "does not know" in frames.receive(link)[0]["fault"]


def test_one_client_has_one_worker(served: Path) -> None:
    with pytest.raises(ConfigError, match="another worker answers"):
        serve(worker(served.parent), served)


def test_a_site_without_an_epsilon_is_warned_where_its_worker_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Ends(Exception):
        pass

    for policy, warned in ((Policy(), True), (Policy(epsilon=3.0), False)):
        caplog.clear()
        here = worker(tmp_path / str(warned), policy=policy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "accept", lambda *_: (_ for _ in ()).throw(Ends))
            with pytest.raises(Ends):
                serve(here, here.site.socket)
        assert ("without differential privacy" in caplog.text) is warned

"""The worker answers one client's messages by the site's own file: the same bytes as a simulation, whatever else the server asks."""

import contextlib
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from clients import frames
from clients.engine import Engine
from clients.forward import plain
from clients.launch import SiteFile
from clients.memory import Memory
from clients.policy import Policy
from clients.site import site_of
from clients.worker import Worker, serve
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
    made, _ = worker(tmp_path / "state").answer(*asked(setting, f"{ASKED} data=files data.path={tmp_path / 'secret.csv'}"))
    assert "data.path" in made["fault"]
    assert "secret" not in made["fault"]


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


def test_the_epsilon_of_other_runs_is_found_on_disk(tmp_path: Path) -> None:
    here = worker(tmp_path)
    for run, epsilon in (("a", 1.5), ("b", 2.0)):
        file = tmp_path / "runs" / run / "memory" / "000001" / "privacy.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(f'{{"epsilon": 0.5}}\n{{"epsilon": {epsilon}}}\n{{"epsi')
    assert here.spent() == 3.5
    assert here.spent(but=tmp_path / "runs" / "b") == 1.5


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

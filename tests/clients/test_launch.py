"""site.yaml: what it says is checked before anything starts, and what starts is Flower's own command."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from clients import launch
from clients.launch import REFUSED, SiteFile, _refused, own_code, read, supernode
from clients.policy import Policy
from fedpeft.config import ConfigError, load
from fedpeft.deployment import Tls
from fedpeft.processes import Processes


def written(folder: Path, text: str) -> Path:
    (folder / "site.yaml").write_text(text)
    return folder / "site.yaml"


@pytest.mark.fast
def test_paths_begin_at_the_file_and_lists_are_the_policys(tmp_path: Path) -> None:
    for name in ("ca.crt", "north"):
        (tmp_path / name).touch()
    site = read(written(tmp_path, """
client: 2
state: state
superlink: fl.example.org:9092
tls: {ca: ca.crt, key: north}
whole: true
data: {path: mine/train.csv, text: question}
model: {id: models/bert}
run: {device: cuda, threads: 4}
policy: {rounds: 50, epsilon: 4, strategies: [fedavg, ffa]}
"""))  # fmt: skip
    assert site.tls == Tls(ca=tmp_path / "ca.crt", key=tmp_path / "north")
    assert site.socket == tmp_path / "state" / "worker.sock"
    assert site.policy == Policy(rounds=50, epsilon=4, strategies=("fedavg", "ffa"))
    assert site.overrides == {
        "engine.wave": "1", "engine.lanes": "1", "data.partition.scheme": "iid", "data.path": str(tmp_path / "mine/train.csv"),
        "data.text": "question", "model.id": "models/bert", "run.device": "cuda", "run.threads": "4",
    }  # fmt: skip


@pytest.mark.fast
def test_what_a_site_says_reaches_the_config_as_it_was_written() -> None:
    said = {"path": "/data/it's a, folder=x", "label": "a b", "limit": 5, "drop_unseen": True, "group": None}
    site = SiteFile(0, Path("s"), data=said)
    config = load(["data=files", *(f"{key}={value}" for key, value in site.overrides.items())])
    assert {name: config.data[name] for name in said} == said


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("client: 0\nstate: s", "tls.ca is missing: `fedpeft certs` makes it"),
        ("client: 0\nstate: s\ntls: {ca: ca.crt, key: k}", "ca.crt is not there; `fedpeft certs` makes it"),
        ("client: 0\nstate: s\nsuperlink: 10.0.0.5:9092\ninsecure: true", "superlink=10.0.0.5:9092 can be reached from other machines"),
        ("client: 0\nstate: s\nsuperlink: example.org:9092\ninsecure: true", "can be reached from other machines"),
        ("client: 0\nstate: s\nsuperlink: '9092'\ninsecure: true", "needed is host:port"),
        ("state: s\ninsecure: true", "client is missing"),
        ("client: -1\nstate: s\ninsecure: true", "client=-1: needed is the client's index"),
        ("client: 0\nstate: s\ninsecure: true\npolice: {}", "police: there is no such field; did you mean policy?"),
        ("client: 0\nstate: s\ninsecure: true\npolicy: {round: 3}", "policy.round: there is no such field; did you mean rounds?"),
        ("client: 0\nstate: s\ninsecure: true\ndata: FOLDER", "data=FOLDER: needed are fields"),
        (f"client: 0\nstate: {'s' * 100}\ninsecure: true", "choose another folder"),
        ("- client", "needed are fields"),
        ("client: [", "is no YAML"),
    ],
)
def test_a_fault_names_the_field_and_the_next_step(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(fault)):
        read(written(tmp_path, text))


@pytest.mark.fast
def test_insecure_on_the_command_line_is_for_loopback_too(tmp_path: Path) -> None:
    assert read(written(tmp_path, "client: 0\nstate: s"), insecure=True).insecure
    with pytest.raises(ConfigError, match="other machines"):
        read(written(tmp_path, "client: 0\nstate: s\nsuperlink: 10.0.0.5:9092"), insecure=True)


@pytest.mark.fast
def test_a_file_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"docs/deploy\.md"):
        read(tmp_path / "site.yaml")


@pytest.mark.fast
def test_the_supernode_is_flowers_with_the_clients_index_key_and_worker() -> None:
    command = shlex.join(supernode(SiteFile(3, Path("/s"), "fl.example.org:9092", Tls(Path("/ca.crt"), None, Path("/north")))))
    assert "flower-supernode --root-certificates /ca.crt --auth-supernode-private-key /north --superlink fl.example.org:9092" in command
    assert """--node-config 'partition-id=3 worker="/s/worker.sock"'""" in command
    assert "--host 127.0.0.1" in command
    assert "--insecure" not in command


def test_a_supernode_finds_no_program_that_would_run_the_servers_code(tmp_path: Path) -> None:
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

    folder = own_code(tmp_path)
    assert {path.name for path in folder.iterdir()} == set(TASK_TYPE_TO_COMMAND.values())
    for name in REFUSED:
        done = subprocess.run([folder / name, "--token", "x"], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "nothing but its own ClientApp" in done.stderr


@pytest.mark.fast
def test_up_says_that_what_a_site_file_says_now_is_not_what_the_worker_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, "client: 0\nstate: s\ninsecure: true")
    site, runs = read(path), set[str]()

    def start(_: Processes, name: str, *__: object) -> bool:
        begun = name not in runs
        runs.add(name)
        return begun

    monkeypatch.setattr(Processes, "start", start)
    monkeypatch.setattr(Processes, "running", lambda _, name: 5 if name in runs else None)
    monkeypatch.setattr(launch, "answers", lambda _: True)
    monkeypatch.setattr(launch, "_ended", lambda *_: False)
    assert launch.up(path, site) == ["worker", "supernode"]
    assert launch.up(path, site) == []
    assert not caplog.records
    path.write_text("client: 0\nstate: s\ninsecure: true\npolicy: {rounds: 5}")
    assert launch.up(path, read(path)) == []
    assert f"{path} has changed since this client began" in caplog.text
    caplog.clear()
    runs.discard("worker")  # it alone is started again: the SuperNode is still of the old file
    assert launch.up(path, read(path)) == ["worker"]
    assert f"{path} has changed since this client began" in caplog.text
    caplog.clear()
    runs.clear()
    assert launch.up(path, read(path)) == ["worker", "supernode"]
    assert launch.up(path, read(path)) == []
    assert not caplog.records


@pytest.mark.fast
def test_a_certificate_of_another_authority_is_named_and_no_other_end_is_taken_for_one() -> None:
    site = SiteFile(0, Path("s"), superlink="fl.example.org:9092", tls=Tls(Path("/certs/ca.crt"), None, Path("/certs/north")))
    said = b"INFO: Starting\nHandshake failed: CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate\nINFO: Shutting down\n"
    why = _refused(said, site)
    assert "unable to get local issuer certificate" in why
    assert "/certs/ca.crt" in why
    assert "fl.example.org:9092" in why
    assert _refused(b"[code: 2004] Failed to activate SuperNode.\n", site) == ""

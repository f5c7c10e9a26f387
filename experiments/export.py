"""`fedpeft export`: the last checkpoint of a run as a plain PEFT adapter, or merged into its base."""

from pathlib import Path

from fedpeft import checkpoint
from fedpeft.config import ConfigError
from fedpeft.ledger import write_text
from fedpeft.setting import open_setting, strategy_of
from server.app import known_classes
from server.card import card, spent_of
from server.export import export_as
from server.folder import reopen


def export_run(run_dir: Path, to: Path, *, rank: int | None, merge: bool) -> str:
    """Writes the model of the run's last checkpoint to the folder `to`; gives a line that says what was written."""
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: needed is at least 1")
    if to.exists() and any(to.iterdir()):
        raise ConfigError(f"{to} is not empty; give a folder that is, or does not exist yet")
    folder, config = reopen(run_dir)
    saved = checkpoint.found(folder.checkpoints)
    if not saved:
        raise ConfigError(f"{run_dir} has no checkpoint yet; run at least one round")
    setting, strategy = open_setting(config), strategy_of(config)
    found = checkpoint.read(saved[-1], known_classes(strategy.init(setting.starts())))
    name = strategy.phase(found.round).adapter
    state, _ = found.state
    sent = strategy.broadcast(state, found.round, None)
    error = export_as(setting, name, sent, to, rank=rank, merge=merge)
    if not merge:
        facts = found.facts
        accuracy = {"zero_shot": facts["zero_shot"], "final": facts["accuracy"]}
        text = card(config, setting, to, **accuracy, measure=facts["measure"], spent=spent_of(facts))
        write_text(to / "README.md", text)
    what = "the base with the adapter merged in" if merge else "a PEFT adapter"
    cut = "" if rank is None else f", cut to rank {rank}: relative error {error:.3g}"
    return f"{to}: {what} after round {found.round} of {config.rounds}{cut}"

"""Help: what `fedpeft run --help` and `fedpeft sweep --help` teach, made of the presets' and studies' own files."""

import itertools
import textwrap
from collections.abc import Sequence

import yaml  # type: ignore[import-untyped]  # it has no types

from fedpeft.config import FAMILIES, app_folder, presets_of

CONF = app_folder() / "experiments" / "conf"


def _presets() -> str:
    return "\n\n".join(f"\b\n  {family}=\n{_wrapped(presets_of(family, CONF))}" for family in FAMILIES)


def _wrapped(names: Sequence[str]) -> str:
    return textwrap.fill(" ".join(names), width=76, initial_indent="      ", subsequent_indent="      ")


def _numbers() -> str:
    """The part of the config that is not presets, with its comments, as it stands in the file."""
    text = (CONF / "config.yaml").read_text()
    return "\b\n" + textwrap.indent(text[text.index("rounds:") :].replace("\n\n", "\n"), "  ")


# A line with \b alone keeps the lines after it as they are.
RUN_HELP = f"""Federate an adapter: simulate all clients on this machine.

OVERRIDES are key=value. A family takes the name of a preset; a preset's own fields are set inside it (model.id= data.path=
data.partition.alpha= adapter.rank= codec.dtype= strategy.mu= mean.trim=); `fedpeft presets FAMILY` has them all. Presets:

{_presets()}

Everything else, with its usual value (train.lr=0.01 sets one inside):

{_numbers()}

\b
Examples:
  fedpeft run
  fedpeft run strategy=ffa rounds=20 adapter.rank=4
  fedpeft run model=minilm data=banking77 data.path=FOLDER clients=10 cohort=10
  fedpeft run --resume runs/2026-01-31-120000-fedavg
"""


def _studies() -> str:
    """Each study's name and tasks, and what the comment that it begins with says."""
    found = []
    for path in sorted((CONF.parent / "studies").glob("*.yaml")):
        text = path.read_text()
        tasks = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)).get("tasks", {})
        said = " ".join(line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
        found.append(f"\b\n  study={path.stem}  (task={', '.join(tasks)})\n{_wrapped([said])}")
    return "\n\n".join(found)


SWEEP_HELP = f"""Run a study: many runs in parallel processes, then a table and a picture with means and 95 % intervals.

WORDS are study=NAME and fields of the study: task=, seeds=, methods=, partitions=, late=, common= (overrides added to every run; lists in
brackets). Stopped at any moment, the same command goes on where it was. Studies:

{_studies()}

\b
Examples:
  fedpeft sweep study=aggregation
  fedpeft sweep study=aggregation 'methods=[fedavg,flora]' 'seeds=[0,1]'
  fedpeft sweep study=aggregation task=sick 'common=[data.path=FOLDER]'
"""

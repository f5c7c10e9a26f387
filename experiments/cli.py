"""The command line: where config, server and clients meet."""

import errno
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import click
import typer
import typer.core
from click.core import ParameterSource
from rich.console import Console

from experiments import deploy
from experiments.certs import app as certs
from experiments.help import CONF, RUN_HELP, SWEEP_HELP
from fedpeft.config import ConfigError

typer.core.HAS_RICH = False  # else it escapes the brackets of its plain help, too
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
privacy = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Differential privacy: what it costs, before and after a run.")
app.add_typer(privacy, name="privacy")
app.add_typer(certs, name="certs")
app.add_typer(deploy.server, name="server")
app.add_typer(deploy.client, name="client")
app.command()(deploy.status)


@app.callback()
def fedpeft() -> None:
    """Federated parameter-efficient fine-tuning: the data stay, adapters travel."""


@app.command(help=RUN_HELP)
def run(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...", show_default=False)] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.", show_default=False)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only the result, as one JSON object.")] = False,
) -> None:
    """`RUN_HELP` is what the user sees."""
    from experiments.progress import Progress
    from experiments.report import write_report
    from experiments.simulate import simulate

    began = time.perf_counter()
    with Progress(silent=quiet or as_json) as progress:
        summary = simulate(overrides or [], resume=resume, watch=progress.watch, begin=progress.begin)
    head_only = summary.head_only.final if summary.head_only else None
    result = summary.outcome.result(summary.folder, seconds=time.perf_counter() - began, head_only=head_only)
    write_report(summary.folder, result)
    if as_json:
        print(json.dumps(result))
    else:
        progress.finish(result)


@app.command()
def presets(
    words: Annotated[list[str] | None, typer.Argument(help="FAMILY or FAMILY=NAME ...; default all families.", show_default=False)] = None,
) -> None:
    """What each family has to choose from, and with FAMILY or FAMILY=NAME the fields inside, their usual values and what they mean.

    \b
    Examples:
      fedpeft presets
      fedpeft presets strategy=fedopt privacy
    """
    from experiments.presets import described

    print(described(words or [], CONF))


@app.command()
def doctor() -> None:
    """Look at this machine: versions, device, memory, disk, and how many clients would fit."""
    from experiments.doctor import examine

    raise typer.Exit(examine(Console()))


@app.command()
def drill(
    names: Annotated[list[str] | None, typer.Argument(help="Drills; default all.", show_default=False)] = None,
    grpc: Annotated[bool, typer.Option("--grpc", help="On real processes of this machine; some drills take minutes.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Only say which there are, and what each must come to.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table with what was declared: docs/drills.md.")] = False,
) -> None:
    """Break one thing after another in a small federation, simulated or real; exit code 1 if what follows is not what was declared.

    \b
    Examples:
      fedpeft drill --list
      fedpeft drill killed nan
      fedpeft drill --grpc superlink
    """
    from experiments.drill.table import drill as play
    from experiments.drill.table import listed as say_listed

    if listed:
        say_listed(names or [], grpc=grpc)
        return

    raise typer.Exit(play(names or [], grpc=grpc, markdown=markdown))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    picture: Annotated[Path | None, typer.Option(help="Draw only the curves, into this .svg, .png or .pdf.", show_default=False)] = None,
) -> None:
    """Write report.html of a finished run again, or draw its curves."""
    from experiments.report import draw, read_result, write_report

    if picture:
        draw(run_dir, picture)
    print(picture or write_report(run_dir, read_result(run_dir)))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    to: Annotated[Path, typer.Option("--to", "-o", help="The folder to write.")],
    rank: Annotated[int | None, typer.Option(help="Cut every layer to the best approximation of this rank.", show_default=False)] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the base model with the adapter in its weights.")] = False,
) -> None:
    """Write a run's model as one plain PEFT LoRA adapter, what strategies added to the base included; or merged into the base.

    The model is that of the run's last checkpoint.

    \b
    Examples:
      fedpeft export runs/2026-01-31-120000-flora -o exact
      fedpeft export runs/2026-01-31-120000-flora -o small --rank 16
      fedpeft export runs/2026-01-31-120000-flora -o whole --merge
    """
    from experiments.export import export_run

    print(export_run(run_dir, to, rank=rank, merge=merge))


@app.command()
def audit(
    ctx: typer.Context,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ... of the run that --run audits.", show_default=False)] = None,
    noise_multiplier: Annotated[float, typer.Option(help="Standard deviation of a sum's noise over the clip.")] = 5.0,
    clip: Annotated[float, typer.Option(help="Largest norm of one contribution.")] = 1.0,
    expected: Annotated[float, typer.Option(help="Contributions that a sum is divided by.")] = 64.0,
    steps: Annotated[int, typer.Option(help="Sums that are released.")] = 50,
    delta: Annotated[float, typer.Option(help="Of the claim.")] = 1e-5,
    canaries: Annotated[
        int | None, typer.Option(help="Known contributions; more see more. Default 2000; of a run 200, or few beside its noise.")
    ] = None,
    leak: Annotated[bool, typer.Option("--leak", help="Instead: which tokens a client's update names.")] = False,
    of_run: Annotated[bool, typer.Option("--run", help="Instead: a run with privacy=client, with canaries among its clients.")] = False,
) -> None:
    """Try to refute what the private mechanism claims, with canaries through its clip and noise. Exit code 1 if it is refuted.

    --run simulates the run that OVERRIDES describe, as for `fedpeft run`, with canaries in every round, and estimates what it spent.
    Its model is not kept.

    \b
    Examples:
      fedpeft audit
      fedpeft audit --run privacy=client clients=50 cohort=50
    """
    numbers = {"noise_multiplier": noise_multiplier, "clip": clip, "expected": expected, "delta": delta}
    given = [name for name in (*numbers, "steps", "leak") if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    if of_run and given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} says nothing of a run; set privacy.noise_multiplier=, privacy.clip= and the like"
        )
    if overrides and not of_run:
        raise ConfigError(f"{' '.join(overrides)}: overrides describe a run; add --run")
    if of_run:
        from experiments.audit_run import audit_run
        from experiments.progress import Progress

        with Progress(silent=False) as progress:
            code = audit_run(Console(), overrides or [], canaries=canaries, watch=progress.watch)
        raise typer.Exit(code)
    from experiments.audit import audit as refute
    from experiments.audit import leak as show

    many = 2000 if canaries is None else canaries
    raise typer.Exit(show(Console()) if leak else refute(Console(), steps=steps, canaries=many, **numbers))


@privacy.command()
def plan(
    unit: Annotated[str, typer.Option(help="Hide one example of a client, or one client: example, client.")] = "example",
    epsilon: Annotated[float | None, typer.Option(help="The budget.", show_default=False)] = None,
    delta: Annotated[float | None, typer.Option(help="Default min(1e-5, 1/(10 N)).", show_default=False)] = None,
    noise: Annotated[float | None, typer.Option(help="Noise multiplier: standard deviation over clip.", show_default=False)] = None,
    rounds: Annotated[int | None, typer.Option(help="That a client takes part in.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps a round; default as in a run.", show_default=False)] = None,
    batch: Annotated[int | None, typer.Option(help="Expected examples of a step.", show_default=False)] = None,
    examples: Annotated[int | None, typer.Option(help="N, of the smallest client.", show_default=False)] = None,
    clients: Annotated[int | None, typer.Option(help="N, of unit client.", show_default=False)] = None,
    cohort: Annotated[int | None, typer.Option(help="Expected clients of a round.", show_default=False)] = None,
    poisson: Annotated[bool, typer.Option("--poisson", help="Secret coins choose a round's clients.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw epsilon over rounds into this .svg, .png or .pdf.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only the plan, as one JSON object.")] = False,
) -> None:
    """Of epsilon, noise, rounds and batch (or cohort), give all but one: the plan solves for that.

    Epsilon is an upper bound by the privacy loss distributions of all releases; RDP's looser bound stands beside it.

    \b
    Examples:
      fedpeft privacy plan --epsilon 8 --rounds 40 --batch 32 --examples 600
      fedpeft privacy plan --noise 1.0 --rounds 40 --batch 32 --examples 600 --picture epsilon.svg
      fedpeft privacy plan --epsilon 8 --noise 1.0 --rounds 40 --examples 600
      fedpeft privacy plan --unit client --epsilon 8 --noise 5 --clients 1000
      fedpeft privacy plan --unit client --epsilon 8 --rounds 100 --clients 1000 --cohort 50 --poisson
    """
    from experiments.privacy import Asked, as_dict, check_picture, draw, show
    from experiments.privacy import plan as solve

    check_picture(picture)
    found = solve(Asked(unit, epsilon, delta, noise, rounds, steps, batch, examples, clients, cohort, poisson))
    if picture:
        draw(found, picture)
    if as_json:
        print(json.dumps(as_dict(found)))
    else:
        show(found, Console())


@app.command()
def compress(
    adapter: Annotated[Path, typer.Argument(help="A folder with adapter_config.json and adapter_model.safetensors.")],
    to: Annotated[Path, typer.Option("--to", "-o", help="The file to write.")],
    density: Annotated[float, typer.Option(help="Share of the entries that are kept.")] = 0.2,
    scale: Annotated[str, typer.Option(help="mean (of the kept magnitudes: least squares) or std (as published).")] = "mean",
    alpha: Annotated[float, typer.Option(help="Times the scale.")] = 1.0,
) -> None:
    """Compress a PEFT adapter: the sign of its largest entries, one scale, entropy-coded (ComPEFT). Whole modules stay as they are.

    It is lossy: `relative error` is what is lost of the update's norm. Measure the accuracy; a higher density keeps more.

    \b
    Example:
      fedpeft compress runs/2026-01-31-120000-fedavg/adapter -o adapter.ternary --density 0.1
    """
    from experiments.compress import compress as press
    from fedpeft.codecs.ternary import Ternary

    try:
        codec = Ternary(density, scale=scale, alpha=alpha)  # type: ignore[arg-type]  # checked there
    except ValueError as fault:
        raise ConfigError(str(fault).replace("codec.", "--")) from fault
    print(f"{to}: {press(adapter, to, codec)}")


@app.command()
def decompress(
    file: Annotated[Path, typer.Argument(help="What `fedpeft compress` wrote.")],
    to: Annotated[Path, typer.Option("--to", "-o", help="The folder to write.")],
) -> None:
    """Write a compressed adapter as a folder that stock peft loads."""
    from experiments.compress import decompress as unpress

    print(f"{to}: {unpress(file, to)} tensors")


@app.command(help=SWEEP_HELP)
def sweep(
    words: Annotated[list[str], typer.Argument(help="study=NAME key=value ...", show_default=False)],
    to: Annotated[Path | None, typer.Option("--to", "-o", help="The folder; default runs/NAME-TASK.", show_default=False)] = None,
    processes: Annotated[int | None, typer.Option(help="Runs at a time; default one per core.", show_default=False)] = None,
) -> None:
    """`SWEEP_HELP` is what the user sees."""
    from experiments.progress import Count
    from experiments.sweep import read_study
    from experiments.sweep import sweep as run_study

    name, study = read_study(words)
    with Count(name) as count:
        folder = run_study(
            words, to or Path("runs") / f"{name}-{study['task']}", processes=processes or os.cpu_count() or 1, watch=count.watch
        )
    print((folder / "table.md").read_text())
    print(f"{folder / 'table.md'}, table.json, picture.svg")


@privacy.command("report")
def privacy_report(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run with privacy=example or privacy=client.")],
    picture: Annotated[Path | None, typer.Option(help="Draw epsilon over the rounds (.svg, .png or .pdf).", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only one JSON object.")] = False,
) -> None:
    """What a run has spent, client by client, and what its epsilon means: also of a run that was stopped."""
    from experiments.privacy_report import show

    show(run_dir, as_json=as_json, picture=picture)


def main() -> None:
    """Runs the command; exit code 2 for what the user can fix in the command, 1 for a run that failed."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    try:
        code = app(prog_name="fedpeft", standalone_mode=False)  # typer gives the code of an Exit back, and 130 for Ctrl-C
        if code == 130:
            _say("stopped; continue with `fedpeft run --resume` and the run's folder", 130)
        sys.exit(code or 0)
    except ConfigError as fault:
        _say(str(fault), 2)
    except click.exceptions.NoArgsIsHelpError as fault:
        print(fault.format_message())
        sys.exit(0)
    except click.ClickException as fault:
        _say(f"{fault.format_message()} `fedpeft --help` lists commands and options.", 2)
    except Exception as fault:
        from server.rounds import RoundFailed  # here, so that a command that needs no torch does not wait for it

        if not isinstance(fault, RoundFailed | OSError):
            raise
        _say(_taught(fault), 1)


def _taught(fault: Exception) -> str:
    from fedpeft.checkpoint import FREE

    if isinstance(fault, OSError) and fault.errno is not None:
        where = f" at {fault.filename}" if fault.filename else ""
        full = f" {FREE}" if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        return f"writing or reading failed{where}: {fault.strerror}.{full}"
    return str(fault)


def _say(text: str, code: int) -> None:
    for line in text.splitlines():
        print(f"fedpeft: {line}", file=sys.stderr)
    sys.exit(code)

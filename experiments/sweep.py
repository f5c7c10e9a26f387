"""`fedpeft sweep`: a study is many runs, a table and a picture.

Every run is one line in `runs.jsonl` of the study's folder as soon as it ends, so a study that was stopped goes on where it was.
"""

import json
import multiprocessing
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.benchmarks.accuracy import interval
from fedpeft.config import ConfigError, app_folder
from fedpeft.ledger import Ledger, write_text
from server.folder import versions

STUDIES = app_folder() / "experiments" / "studies"


@dataclass(frozen=True)
class Cell:
    """One run of a study: a method on a partition, with a learning rate and a seed."""

    method: str
    partition: str
    rate: float
    seed: int
    overrides: tuple[str, ...]

    @property
    def key(self) -> str:
        """What says that two runs are the same."""
        return json.dumps([self.method, self.partition, self.rate, self.seed, self.overrides])


@dataclass(frozen=True)
class Found:
    """What a run reached: means over late rounds; bytes are those of a round, both ways, of all its clients together."""

    accuracy: float
    own: float | None  # accuracy on test sets with each client's labels
    error: float | None  # aggregation error
    up: float
    down: float
    seconds: float  # of all rounds
    zero_shot: float
    epsilon: float | None = None  # spent by the client that spent most


Watch = Callable[[int, int, str], None]  # (runs done, runs in all, what ended)


def read_study(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(name, study) of `study=NAME` and overrides of its fields. Raises `ConfigError` for what it does not have."""
    from omegaconf import OmegaConf

    names = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    given = dict(word.partition("=")[::2] for word in words)
    name = given.pop("study", "")
    if name not in names:
        raise ConfigError(f"study={name}: there is no such study; there are {', '.join(names)}")
    tree: Any = OmegaConf.load(STUDIES / f"{name}.yaml")
    study: Any = OmegaConf.to_container(tree)
    for key, value in sorted(given.items(), key=lambda item: item[0] != "task"):  # other fields are those of the task
        if key not in ("task", "seeds", "methods", "partitions", "tune_seed", "common", "late"):
            raise ConfigError(f"{key}={value}: a study takes task, seeds, methods, partitions, tune_seed, late and common")
        read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"]))
        study |= _chosen(study, key, read[key])
    return name, study


def sweep(words: Sequence[str], folder: Path, *, processes: int, watch: Watch) -> Path:
    """Runs the study and writes table.md, table.json and picture.svg into `folder`; gives the folder."""
    name, study = read_study(words)
    folder.mkdir(parents=True, exist_ok=True)
    task = study["tasks"][study["task"]]
    tuning = [] if all(len(rates) == 1 for rates in _rates(study).values()) else _cells(study, [study["tune_seed"]])
    done = _known(folder)
    todo = [cell for cell in tuning if cell.key not in done]
    final = _cells(study, study["seeds"])
    whole = len(tuning) + len({(cell.method, cell.partition, cell.seed) for cell in final})
    ended = len(tuning) - len(todo)
    for cell, result in _worked(todo, task["late"], processes, folder):
        done[cell.key] = result
        watch(ended := ended + 1, whole, _said(cell, result))
    best = _best(tuning, done)
    chosen = [cell for cell in final if not tuning or best.get((cell.method, cell.partition)) == cell.rate]
    todo = [cell for cell in chosen if cell.key not in done]
    ended = whole - len(todo)
    for cell, result in _worked(todo, task["late"], processes, folder):
        done[cell.key] = result
        watch(ended := ended + 1, whole, _said(cell, result))
    rows = _rows(study, chosen, done)
    facts = {"study": name, "words": list(words), "seeds": study["seeds"], "tune_seed": study["tune_seed"], "rates": _rates(study),
             "common": task["common"], "late": task["late"], "versions": versions(), "machine": platform.machine()}  # fmt: skip
    write_text(folder / "table.json", json.dumps({"facts": facts, "rows": rows}, indent=2) + "\n")
    write_text(folder / "table.md", table(rows, list(task["partitions"])))
    draw = {"pareto": pareto, "lines": across}.get(study.get("picture", ""), picture)
    draw(rows, list(task["partitions"]), folder / "picture.svg")
    return folder


def _cells(study: Mapping[str, Any], seeds: Sequence[int]) -> list[Cell]:
    task, made = study["tasks"][study["task"]], []
    rates = _rates(study)
    for method, spec in study["methods"].items():
        for partition, split in task["partitions"].items():
            for rate in rates[spec.get("rates", "adamw")]:
                own = any(word.startswith("adapter=") for word in spec["run"])  # fields of the task's adapter are no fields of this one
                common = [word for word in task["common"] if not (own and word.startswith("adapter."))]
                for seed in seeds:
                    words = (*common, *split, *spec["run"], f"train.lr={rate}", f"seed={seed}")
                    made.append(Cell(method, partition, rate, seed, words))
    return made


def _rates(study: Mapping[str, Any]) -> dict[str, list[float]]:
    """The learning rates of each optimizer: the task's own where it has some."""
    return {**study["rates"], **study["tasks"][study["task"]].get("rates", {})}


def _chosen(study: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The field `key` of a study with `value`: names of methods or partitions choose among those there are."""
    if key == "task" and value not in study["tasks"]:
        raise ConfigError(f"task={value}: there is no such task; there are {', '.join(study['tasks'])}")
    if key != "task" and not isinstance(value, list) and key != "tune_seed":
        raise ConfigError(f"{key}={value}: needed is a list, as in {key}=[...]")
    if key in ("methods", "partitions"):
        there = study["methods"] if key == "methods" else study["tasks"][study["task"]]["partitions"]
        if missing := [name for name in value if name not in there]:
            raise ConfigError(f"{key}: there is no {missing[0]}; there are {', '.join(there)}")
    if key == "methods":
        return {key: {name: study["methods"][name] for name in value}}
    if key in ("partitions", "common", "late"):
        tasks = dict(study["tasks"])
        task = tasks[study["task"]]
        more = value
        if key == "partitions":
            more = {name: task["partitions"][name] for name in value}
        elif key == "common":
            more = [*task["common"], *value]
        tasks[study["task"]] = {**task, key: more}
        return {"tasks": tasks}
    return {key: value}


def _known(folder: Path) -> dict[str, Found | str]:
    path, done = folder / "runs.jsonl", dict[str, Found | str]()
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        if "found" in entry:  # what failed is tried again
            done[entry["key"]] = Found(**entry["found"])
    return done


def _worked(cells: Sequence[Cell], late: Sequence[int], processes: int, folder: Path) -> Any:
    """(cell, what it reached or why it failed), as they end, each written down first."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_run, cell.overrides, tuple(late)): cell for cell in cells}
        for future in as_completed(futures):
            cell, result = futures[future], future.result()
            kind = {"fault": result} if isinstance(result, str) else {"found": asdict(result)}
            with (folder / "runs.jsonl").open("a") as file:
                file.write(json.dumps({"key": cell.key, **asdict(cell), **kind}) + "\n")
            yield cell, result


def _run(overrides: tuple[str, ...], late: tuple[int, ...]) -> Found | str:
    from experiments.simulate import simulate

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "run"
        try:
            summary = simulate([*overrides, f"run.dir={path}", "engine.lanes=1", "evaluate.head_only=false", "run.keep=1"])
        except Exception as fault:  # one run's failure is a line of the table, not the study's end
            return f"{type(fault).__name__}: {fault}"
        entries = Ledger(path / "ledger.jsonl").entries()
    seen: list[Any] = [entry for entry in entries if int(str(entry["round"])) + 1 in late]
    errors = [entry["aggregation"]["error"] for entry in seen if entry["aggregation"]["error"] is not None]
    owns = [entry["own_accuracy"] for entry in seen if entry["own_accuracy"] is not None]
    mean = statistics.mean
    return Found(
        mean(entry["accuracy"] for entry in seen), mean(owns) if owns else None, mean(errors) if errors else None,
        summary.outcome.bytes_up / len(entries), summary.outcome.bytes_down / len(entries),
        sum(float(str(entry["round_seconds"])) for entry in entries), summary.outcome.zero_shot,
        summary.outcome.epsilon,
    )  # fmt: skip


def _best(tuning: Sequence[Cell], done: Mapping[str, Found | str]) -> dict[tuple[str, str], float]:
    """The rate of each method and partition with the highest accuracy on the tuning seed."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for cell in tuning:
        found = done[cell.key]
        if isinstance(found, Found):
            key = (cell.method, cell.partition)
            best[key] = max(best.get(key, (-1.0, 0.0)), (found.accuracy, cell.rate))
    return {key: rate for key, (_, rate) in best.items()}


def _rows(study: Mapping[str, Any], chosen: Sequence[Cell], done: Mapping[str, Found | str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for method in study["methods"]:
        row: dict[str, Any] = {"method": method}
        for cell in (c for c in chosen if c.method == method):
            part = row.setdefault(cell.partition, {"rate": cell.rate, "faults": [], "runs": []})
            result = done[cell.key]
            (part["faults"] if isinstance(result, str) else part["runs"]).append(result if isinstance(result, str) else asdict(result))
        for name, part in row.items():
            if name != "method" and part["runs"]:
                each = {key: [run[key] for run in part["runs"] if run[key] is not None] for key in part["runs"][0]}
                part |= {key: interval(values) for key, values in each.items() if key in ("accuracy", "own") and values}
                part |= {key: statistics.mean(each[key]) for key in ("error", "up", "down", "seconds", "zero_shot") if each[key]}
                part |= {"epsilon": max(each["epsilon"])} if each["epsilon"] else {}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]], partitions: Sequence[str]) -> str:
    """The rows as markdown; accuracies on own labels only if they were measured."""
    own = any("own" in row.get(name, {}) for row in rows for name in partitions)
    head = ["method"]
    for name in partitions:
        head += [f"{name}: accuracy", *(["on own labels"] if own else []), "lr"]
    head += ["kB up", "kB down", "s", "aggregation error"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    first: Mapping[str, Any] = next((row[name] for row in rows for name in partitions if "zero_shot" in row.get(name, {})), {})
    for row in rows:
        cells = [row["method"]]
        for name in partitions:
            part = row.get(name, {})
            if part.get("faults"):
                cells += [f"failed: {part['faults'][0][:60]}", *([""] if own else []), ""]
            else:
                cells += [_pm(part.get("accuracy")), *([_pm(part.get("own"))] if own else []), f"{part['rate']:g}" if part else ""]
        parts = [row[name] for name in partitions if "up" in row.get(name, {})]
        for key, form in (("up", "{:.0f}"), ("down", "{:.0f}"), ("seconds", "{:.1f}")):
            scale = 1000 if key != "seconds" else 1
            cells.append(form.format(statistics.mean(part[key] for part in parts) / scale) if parts else "")
        errors = [part["error"] for part in parts if "error" in part]
        cells.append(_error(statistics.mean(errors)) if errors else "n/a")
        lines.append("| " + " | ".join(cells) + " |")
    if first:
        lines.append(f"\nBefore training (no adapter): {first['zero_shot']:.3f}.")
    spent = [part["epsilon"] for row in rows for name in partitions if "epsilon" in (part := row.get(name, {}))]
    if spent:
        lines.append(f"\nEpsilon as the accountant counted it, largest of all runs: {max(spent):.3f}.")
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[Mapping[str, Any]], partitions: Sequence[str], to: Path) -> None:
    """Accuracies with their intervals, a line for each method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(partitions) + 2, 0.26 * len(rows) + 1), layout="constrained")
    axes = figure.subplots(1, len(partitions), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, partitions, strict=True):
        for place, row in enumerate(reversed(rows)):
            part = row.get(name, {})
            for key, mark, color in (("own", "D", "C1"), ("accuracy", "o", "C0")):
                if key in part:
                    axis.errorbar(part[key][0], place, xerr=part[key][1], fmt=mark, ms=4, color=color, capsize=2, lw=1)
        axis.set(title=name, xlabel="accuracy (blue), on own labels (orange)")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [row["method"] for row in reversed(rows)])
    figure.savefig(to, metadata={"Date": None})


def pareto(rows: Sequence[Mapping[str, Any]], partitions: Sequence[str], to: Path) -> None:
    """Accuracy against the bytes of a round's way up; the best for their bytes are joined."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(partitions), 4.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(partitions), squeeze=False)[0], partitions, strict=True):
        seen = sorted((row[name]["up"] / 1000, *row[name]["accuracy"], row["method"]) for row in rows if "accuracy" in row.get(name, {}))
        best = [point for i, point in enumerate(seen) if all(point[1] > other[1] for other in seen[:i])]
        axis.plot([point[0] for point in best], [point[1] for point in best], color="C0", lw=1)
        for size, mean, half, label in seen:
            axis.errorbar(size, mean, yerr=half, fmt="o", ms=4, color="C1" if "no feedback" in label else "C0", capsize=2, lw=1)
            axis.annotate(label, (size, mean), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.set(title=name, xlabel="kB up a round, all clients", ylabel="accuracy", xscale="log")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, metadata={"Date": None})


def across(rows: Sequence[Mapping[str, Any]], partitions: Sequence[str], to: Path) -> None:
    """Accuracy over the partitions in their order, a line for each method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.add_subplot()
    for many, row in enumerate(rows):
        seen = [(place + 0.06 * many, *row[name]["accuracy"]) for place, name in enumerate(partitions) if "accuracy" in row.get(name, {})]
        if seen:
            places, means, halves = zip(*seen, strict=True)
            axis.errorbar(places, means, yerr=halves, fmt="o-", ms=4, capsize=2, lw=1, label=row["method"])
    axis.set_xticks(range(len(partitions)), partitions)
    axis.set(ylabel="accuracy")
    axis.legend(frameon=False)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, metadata={"Date": None})


def _pm(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f} ± {value[1]:.3f}"


def _error(value: float) -> str:
    return "0" if value < 1e-6 else f"{value:.3f}"


def _said(cell: Cell, result: Found | str) -> str:
    what = result if isinstance(result, str) else f"accuracy {result.accuracy:.3f}, {result.seconds:.0f} s"
    return f"{cell.method}, {cell.partition}, lr {cell.rate:g}, seed {cell.seed}: {what}"

"""report.html: one self-contained page of a run: result, curves, bytes, who owned what, faults."""

import html
import io
import json
from pathlib import Path
from typing import Any

from experiments.progress import crossed, payloads
from fedpeft.config import ConfigError
from fedpeft.ledger import Ledger, write_text

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse}td,th{padding:.25rem 1rem .25rem 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}pre{background:#f4f4f4;padding:1rem;overflow:auto}"""
PAYLOADS = (
    "Payloads: headers and data of all training messages. Raw: the same tensors as they are. Entropy: what supports and signs (or values) "
    "need at the least, if what is sent of a tensor may lie anywhere in it. At the socket: all that crossed the port that clients call "
    "while rounds went on (payloads, TLS, HTTP/2, gRPC, signatures, polls), as the system counted it; a simulation has no socket."
)


def write_report(folder: Path, result: dict[str, Any]) -> Path:
    """Writes result.json and report.html into the run's folder."""
    write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    entries, baseline = _ledgers(folder)
    split = json.loads((folder / "split.json").read_text()) if (folder / "split.json").exists() else None
    page = _page(folder, result, entries, baseline, split)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a finished run."""
    try:
        found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    except (OSError, json.JSONDecodeError):
        raise ConfigError(f"{folder} holds no finished run (no result.json); finish it with `fedpeft run --resume {folder}`") from None
    return found


def draw(folder: Path, to: Path) -> None:
    """Draws the run's curves into the picture `to`; its ending (.svg, .png, .pdf) names the format."""
    entries, baseline = _ledgers(folder)
    figure = _curves(entries, baseline, read_result(folder)["accuracy"])
    figure.savefig(to, dpi=150, metadata={"Date": None} if to.suffix == ".svg" else None)


def _ledgers(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return Ledger(folder / "ledger.jsonl").entries(), Ledger(folder / "head_only" / "ledger.jsonl").entries()


def _page(folder: Path, result: dict[str, Any], entries: list[dict[str, Any]], baseline: list[dict[str, Any]], split: Any) -> str:
    accuracy = result["accuracy"]
    rows = [
        ("accuracy before training (zero-shot)", _percent(accuracy["zero_shot"])),
        ("federated, head only (one model for all)", _percent(accuracy["head_only"])),
        (f"federated, adapter and head ({accuracy['measure']} model)", _percent(accuracy["final"])),
        ("trained parameters", f"{result['parameters']:,}"),
        *payloads(entries),
        *crossed(entries),
        ("aggregation error, last round", _last_error(entries)),
        ("seconds", f"{result['seconds']:.1f}"),
        ("epsilon", "none: no differential privacy" if result["epsilon"] is None else f"{result['epsilon']:.3f}"),
    ]
    table = "".join(f"<tr><td>{html.escape(name)}</td><td class=n>{html.escape(value)}</td></tr>" for name, value in rows)
    faults = [(entry["round"], fault) for entry in entries for fault in entry["faults"]]
    listed = "".join(f"<li>round {r + 1}, client {f['client']}: {html.escape(f['reason'])}</li>" for r, f in faults) or "<li>none</li>"
    config = html.escape((folder / "config.yaml").read_text()) if (folder / "config.yaml").exists() else ""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>fedpeft {html.escape(folder.name)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(folder.name)}</h1><table>{table}</table><p>{PAYLOADS}</p>",
        f"<h2>Rounds</h2>{_svg(_curves(entries, baseline, accuracy))}",
        _privacy(result, entries),
        _aggregation(entries),
        f"<h2>Who owned what</h2><p>{html.escape(_described(split))}</p>{_histogram(split)}" if split and "histogram" in split else "",
        f"<h2>Faults</h2><ul>{listed}</ul><h2>Config</h2><pre>{config}</pre></html>",
    ]
    return "\n".join(parts) + "\n"


def _curves(entries: list[dict[str, Any]], baseline: list[dict[str, Any]], accuracy: dict[str, Any]) -> Any:
    figure, (left, middle, right) = _figure(3, (12, 3.4))
    for name, some, color in (("adapter and head", entries, "C0"), ("head only", baseline, "C1")):
        seen = [(entry["round"] + 1, entry["accuracy"]) for entry in some if entry["accuracy"] is not None]
        if seen:
            left.plot([0, *(r for r, _ in seen)], [accuracy["zero_shot"], *(a for _, a in seen)], "o-", ms=3, color=color, label=name)
        losses = [(entry["round"] + 1, entry["loss"]) for entry in some if entry["loss"] is not None]
        if losses:
            middle.plot(*zip(*losses, strict=True), color=color, label=name)
    for name, key, color in (("up", "total_up", "C2"), ("down", "total_down", "C3")):
        right.plot([e["round"] + 1 for e in entries], [e[key] / 1e6 for e in entries], color=color, label=name)
    for axis, title in ((left, "test accuracy"), (middle, "training loss"), (right, "payload megabytes, total")):
        axis.set(title=title, xlabel="round")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    left.set_ylim(0, 1)
    return figure


def _privacy(result: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """What epsilon means, and how it grew."""
    if result["epsilon"] is None:
        return ""
    figure, (axis,) = _figure(1, (6, 3.0))
    axis.plot([entry["round"] + 1 for entry in entries], [entry["epsilon"] for entry in entries], color="C4")
    axis.set(title="epsilon of the client that spent most", xlabel="round")
    axis.set_ylim(0)
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in result["privacy"])
    return f"<h2>Privacy</h2><ul>{listed}</ul>{_svg(figure)}"


def _aggregation(entries: list[dict[str, Any]]) -> str:
    """What was aggregated against the true weighted mean of the clients' products: over the rounds, and by layer in the last."""
    seen = [(entry["round"] + 1, entry["aggregation"]) for entry in entries if (entry.get("aggregation") or {}).get("error") is not None]
    if not seen:
        return "<h2>Aggregation error</h2><p>None to measure: the server does not see both factors, or the adapter has no pairs.</p>"
    figure, (left, right) = _figure(2, (12, 3.4))
    for axis, which, title in ((left, 0, "relative Frobenius error"), (right, 1, "cosine")):
        for layer in seen[-1][1]["layers"]:
            rounds = [(r, found["layers"][layer][which]) for r, found in seen if found["layers"].get(layer)]
            axis.plot(*zip(*rounds, strict=True), color="C7", lw=0.5, alpha=0.5)
        axis.plot([r for r, _ in seen], [found[("error", "cosine")[which]] for _, found in seen], color="C0", label="all layers")
        axis.set(title=title, xlabel="round")
        axis.legend(frameon=False)
    rows = "".join(
        f"<tr><td>{html.escape(layer)}</td>"
        + ("<td class=n>n/a</td><td class=n>n/a</td>" if pair is None else f"<td class=n>{pair[0]:.3g}</td><td class=n>{pair[1]:.6f}</td>")
        + "</tr>"
        for layer, pair in seen[-1][1]["layers"].items()
    )
    table = f"<table><tr><th>layer, last round</th><th>error</th><th>cosine</th></tr>{rows}</table>"
    return f"<h2>Aggregation error</h2>{_svg(figure)}<details><summary>By layer</summary>{table}</details>"


def _histogram(split: dict[str, Any]) -> str:
    counts = split["histogram"]
    figure, (axis,) = _figure(1, (12, 3.4))
    image = axis.imshow(list(zip(*counts, strict=True)), aspect="auto", cmap="Blues", interpolation="nearest")
    axis.set(xlabel="client", ylabel="label", title="examples of each label at each client")
    names = split["classes"]
    if 0 < len(names) <= 20:
        axis.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axis)
    return _svg(figure)


def _figure(axes: int, inches: tuple[float, float]) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    made = [figure.add_subplot(1, axes, i + 1) for i in range(axes)]
    for axis in made:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, made


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _described(split: dict[str, Any]) -> str:
    facts = split["describe"]
    return ", ".join(f"{name.replace('_', ' ')}: {round(value, 2) if isinstance(value, float) else value}" for name, value in facts.items())


def _last_error(entries: list[dict[str, Any]]) -> str:
    errors = [entry["aggregation"]["error"] for entry in entries if entry.get("aggregation")]
    return f"{errors[-1]:.2g}" if errors and errors[-1] is not None else "n/a"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"

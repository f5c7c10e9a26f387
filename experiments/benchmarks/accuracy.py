"""Accuracy over seeds: the mean and its 95 % interval (Student's t), beside the head-only and the no-adapter baselines.

    python -m experiments.benchmarks.accuracy --seeds 3
    python -m experiments.benchmarks.accuracy --seeds 3 strategy=ffa rounds=60

What follows the options is handed to `fedpeft run` as it is. A seed changes everything drawn: data split, partition, model, head, cohorts.
"""

import argparse
import json
import statistics
import tempfile
from importlib import metadata
from pathlib import Path

from scipy.stats import t as student

from experiments.simulate import simulate


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3)
    chosen, overrides = options.parse_known_args()
    seen: dict[str, list[float]] = {"zero_shot": [], "head_only": [], "final": [], "seconds_of_rounds": []}
    for seed in range(chosen.seeds):
        with tempfile.TemporaryDirectory() as place:
            summary = simulate([*overrides, f"seed={seed}", f"run.dir={Path(place) / 'run'}"])
        seen["zero_shot"].append(summary.outcome.zero_shot)
        seen["final"].append(summary.outcome.final)
        seen["seconds_of_rounds"].append(summary.outcome.seconds)
        if summary.head_only:
            seen["head_only"].append(summary.head_only.final)
        print(json.dumps({"seed": seed, **{name: round(values[-1], 4) for name, values in seen.items() if values}}), flush=True)
    facts = {"overrides": overrides, "seeds": chosen.seeds, "torch": metadata.version("torch")}
    print(json.dumps({name: interval(values) for name, values in seen.items() if values} | facts))


def interval(values: list[float]) -> list[float]:
    """[mean, half the width of its 95 % interval]; the width is 0 for one value, which has none."""
    if len(values) < 2:
        return [round(statistics.mean(values), 4), 0.0]
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return [round(statistics.mean(values), 4), round(half, 4)]


if __name__ == "__main__":
    main()

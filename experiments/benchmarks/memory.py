"""Peak memory of a simulation: PSS summed over the process tree, sampled while `fedpeft run` works.

    python -m experiments.benchmarks.memory --clients 1000 --rounds 3 --data FOLDER_OF_BANKING77

All clients train in every round (one step of two examples), so each of them holds what it was sent. The bound we promise is 1.5 GB for
1,000 clients of MiniLM with LoRA r=8 on query and value. Run again with fewer clients to see what one client costs.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clients", type=int, default=1000)
    options.add_argument("--cohort", type=int, help="clients a round; all of them if it is left out")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--strategy", default="fedavg")
    options.add_argument("--data", required=True, help="folder with banking77's train.csv.gz and test.csv.gz")
    chosen = options.parse_args()
    cohort = chosen.cohort or chosen.clients
    with tempfile.TemporaryDirectory() as place:
        command = [
            sys.executable, "-c", "from fedpeft.cli import main; main()", "run", "model=minilm", "data=banking77", "codec=raw",
            f"data.path={chosen.data}", "data.partition.scheme=iid", "adapter.targets=[query,value]", f"strategy={chosen.strategy}",
            f"clients={chosen.clients}", f"cohort={cohort}", f"rounds={chosen.rounds}", "train.steps=1", "train.batch=2",
            "evaluate.every=1000", "evaluate.head_only=false", f"run.dir={place}/run", "--json",
        ]  # fmt: skip
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree(process.pid))
            time.sleep(0.1)
        assert process.stdout is not None
        printed = process.stdout.read()
        if process.returncode:
            sys.exit(f"the run failed with exit code {process.returncode}")
        disk = sum(file.stat().st_size for file in Path(place).rglob("*") if file.is_file())
    result = {
        "clients": chosen.clients, "cohort": cohort, "rounds": chosen.rounds, "strategy": chosen.strategy, "peak_pss_mb": round(peak / 1e6),
        "disk_mb": round(disk / 1e6), "seconds": round(time.perf_counter() - began, 1), "bytes": json.loads(printed)["bytes"],
        "torch": metadata.version("torch"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }  # fmt: skip
    print(json.dumps(result))


def tree(pid: int) -> int:
    """Bytes of PSS of a process and everything below it (Linux)."""
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            rows = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += next(int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss:"))
            waiting += [int(child) for task in Path(f"/proc/{one}/task").iterdir() for child in (task / "children").read_text().split()]
        except (OSError, StopIteration):
            continue  # it ended while we looked
    return total


if __name__ == "__main__":
    main()

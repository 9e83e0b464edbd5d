"""What every bench says: on which machine, at which commit, in which table."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where numbers come from."""

    cpu: str
    cores: int
    """Cores that this process may use."""
    memory_bytes: int
    features: tuple[str, ...]
    """Instruction sets that matter here, of those that the CPU has."""
    python: str
    load: float
    """Processes that ran or waited in the last minute: far from 0 at the start means a machine that is not quiet."""


def this_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    """The machine that this runs on; what it does not tell is left out."""
    fields = _first_cpu(cpuinfo.read_text()) if cpuinfo.is_file() else {}
    flags = fields.get("flags", "").split()
    return Machine(
        cpu=fields.get("model name", platform.processor() or platform.machine()),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        features=tuple(feature for feature in _CPU_FEATURES if feature in flags),
        python=platform.python_version(),
        load=round(os.getloadavg()[0], 2),
    )


def _first_cpu(cpuinfo: str) -> dict[str, str]:
    lines = (line.partition(":") for line in cpuinfo.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def describe(machine: Machine) -> str:
    """One line for people."""
    features = " ".join(machine.features) or "no vector extensions known"
    return (
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, {features}; "
        f"Python {machine.python}; load before the run {machine.load}"
    )


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed distributions; those that are not installed are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that runs, with "-dirty" when tracked files were changed; "unknown" outside of a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well in a terminal: the first column to the left, all others to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def line_of(cells: Sequence[str]) -> str:
        padded = [
            f"{cell:>{width}}" if column else f"{cell:<{width}}"
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = (
        "|"
        + "|".join("-" * (width + 2) if not column else "-" * (width + 1) + ":" for column, width in enumerate(widths))
        + "|"
    )
    return "\n".join([line_of(head), rule, *(line_of(row) for row in lines[1:])])


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def write_json(path: Path, machine: Machine, results: Mapping[str, object]) -> None:
    """One JSON object: date, commit, machine, and the results."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"date": now, "commit": commit(), "machine": asdict(machine), **results}
    path.write_text(json.dumps(content, indent=2) + "\n")

"""Writes the tables of docs/capacity.md: what `rempart plan` says about the machines of each provider.

python deploy/capacity.py            writes them below the page's own words
python deploy/capacity.py --check    exit code 1 when they are not what would be written
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rempart_platform.plan.machines import Machine, read_machines

PAGE = Path(__file__).parents[1] / "docs/capacity.md"
MODELS = ("llama-3.1-8b", "llama-3.1-70b", "deepseek-v3.2")
MARK = "<!-- From here on written by deploy/capacity.py -->\n"
CONTEXT = 8192
MAX_MACHINES = 2
"""More of one kind for one replica is nothing that anybody should rent."""
_HEAD = (
    "| machine | per hour | weights | contexts | prefill | decode | input | output |",
    "|---|---:|---|---:|---:|---:|---:|---:|",
)


def plan(model: str, known: Sequence[Machine]) -> dict[str, dict[str, dict[str, object]]]:
    """machine -> section -> line -> value, and the section's title under ""."""
    asked = [flag for machine in known for flag in ("--machine", machine.name)]
    command = [sys.executable, "-m", "rempart_platform.cli", "plan", model, *asked, "--context", str(CONTEXT), "--json"]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found: dict[str, dict[str, dict[str, object]]] = {}
    for section in said["sections"]:
        lines = {"": section["title"]} | {line["key"]: line["value"] for line in section["lines"]}
        found.setdefault(section["machine"] or "", {})[section["key"]] = lines
    return found


def row(machine: Machine, sections: dict[str, dict[str, object]]) -> str | None:
    """None when it takes too many of this machine."""
    if "decode" not in sections:
        return None
    how = str(sections["decode"][""]).partition("decode bounds, ")[2]  # "fp8 weights on 2 of it"
    weights, _, number = how.partition(" weights on ")
    num_machines = 1 if number == "one" else int(number.split()[0])
    if num_machines > MAX_MACHINES:
        return None
    layout, prefill, decode = sections["layout"], sections["prefill"], sections["decode"]
    contexts = max(value for key, value in layout.items() if key.endswith("-contexts") and isinstance(value, int))
    full = max((key for key in decode if key.endswith("-rate")), key=lambda key: int(key.split("-")[1]))
    cells = (
        machine.type if num_machines == 1 else f"{num_machines} x {machine.type}",
        "unknown" if machine.price is None else f"{num_machines * machine.price.amount:.2f} {machine.price.currency}",
        weights,
        f"{contexts:,}",
        _rounded(prefill[f"{CONTEXT}-rate"]),
        _rounded(decode[full]),
        _money(prefill.get(f"{CONTEXT}-cost")),
        _money(decode.get(full.replace("-rate", "-cost"))),
    )
    return f"| {' | '.join(cells)} |"


def _rounded(value: object) -> str:
    assert isinstance(value, int | float)
    return f"{value:,.0f}"


def _money(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else ""


def tables() -> Iterator[str]:
    known = [machine for machine in read_machines() if machine.provider]  # that somebody lets
    for model in MODELS:
        said = plan(model, known)
        yield f"\n## {model}\n"
        for provider in sorted({machine.provider for machine in known}):
            rows = [row(machine, said.get(machine.name, {})) for machine in known if machine.provider == provider]
            yield f"\n{provider}:\n"
            yield "\n".join(("", *_HEAD, *(each for each in rows if each is not None), ""))


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of docs/capacity.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when they are not current")
    only_check = parser.parse_args().check
    words, mark, found = PAGE.read_text().partition(MARK)
    wanted = "".join(tables())
    if only_check:
        return 0 if mark and found == wanted else 1
    PAGE.write_text(words + MARK + wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())

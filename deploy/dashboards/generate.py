"""Writes the dashboards that the chart ships, from what `boards/*.toml` say.

python deploy/dashboards/generate.py            writes helm/rempart/dashboards/*.json
python deploy/dashboards/generate.py --check    exit code 1 when these are not what would be written
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also when run as a script

from deploy.dashboards.grafana import Dashboard

BOARDS = Path(__file__).with_name("boards")
FOLDER = Path(__file__).resolve().parents[2] / "helm/rempart/dashboards"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the dashboards that the chart ships.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when a file is not current")
    only_check = parser.parse_args().check
    boards = [Dashboard.read(file) for file in sorted(BOARDS.glob("*.toml"))]
    wanted = {FOLDER / f"{board.name}.json": json.dumps(board.to_json(), indent=1) + "\n" for board in boards}
    found = {path: path.read_text() for path in FOLDER.glob("*.json")}
    stale = sorted(path.name for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
    if only_check:
        sys.stdout.writelines(f"not current: {name}\n" for name in stale)
        return 1 if stale else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in found.keys() - wanted.keys():
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The page of capacity and cost says what `rempart plan` says."""

import subprocess
import sys

from tests.observe.rule_files import ROOT


def test_its_tables_are_current() -> None:
    command = [sys.executable, "deploy/capacity.py", "--check"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr or "run deploy/capacity.py"

"""Write the lock files of the images: every package that is installed in them, by version and SHA-256.

    python deploy/images/lock.py            (after a change of pyproject.toml or constraints.txt)

Torch, Triton and NVIDIA's libraries are not in them: they come from PyTorch's own index, by the versions that the
Dockerfile names.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {"router": "platform,fetch", "engine": "engine,fetch"}
_FROM_PYTORCH = ("torch", "triton", "nvidia-", "cuda-")


def resolve(extras: str) -> dict[str, tuple[str, str]]:
    """Version and SHA-256 of each package that pip would install, by name."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", "-"]
    command += ["-c", str(ROOT / "constraints.txt"), f"{ROOT}[{extras}]"]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    found = {}
    for package in report["install"]:
        name = package["metadata"]["name"].lower().replace("_", "-")
        if name == "rempart" or name.startswith(_FROM_PYTORCH):
            continue
        found[name] = (package["metadata"]["version"], package["download_info"]["archive_info"]["hashes"]["sha256"])
    return found


def main() -> None:
    """Writes all of them."""
    for image, extras in LOCKS.items():
        packages = resolve(extras)
        lines = [f"{name}=={version} --hash=sha256:{sha256}" for name, (version, sha256) in sorted(packages.items())]
        text = "# Written by deploy/images/lock.py for x86-64 and Python 3.11; not to be edited.\n" + "\n".join(lines)
        (ROOT / "deploy" / "images" / f"{image}.lock").write_text(text + "\n")


if __name__ == "__main__":
    main()

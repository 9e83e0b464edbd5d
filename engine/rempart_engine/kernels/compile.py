"""Compiles every kernel at every configuration that is shipped, for GPUs that need not be there.

    python -m rempart_engine.kernels.compile [--arch 80 90 100] [--only NAME ...] [--ends] [--json FILE] [--jobs N]

Prints registers, shared memory, spills and the tensor-core instructions of each, and ends with 1 if anything is
refused: see `compile_checks.py`.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.compile_checks import Row, problems, reasons, row_json, table
from rempart_engine.kernels.compile_one import Compiled, Failed, compile_one
from rempart_engine.kernels.target import INTERPRETED, SHIPPED, Target

_KERNELS = Path(__file__).parent
_PACKAGE = "rempart_engine.kernels"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One build to compile, and where it is found again in another process."""

    operation: str
    build: Build
    target: Target
    index: int


class NoBuildsError(Exception):
    """A kernel's module lists nothing to compile."""


def operations(kernels: Path = _KERNELS) -> list[str]:
    """Folders with kernels for GPUs."""
    return sorted(path.parent.name for path in kernels.glob("*/kernel.py"))


def module_of(operation: str) -> str:
    """Where its `builds` are."""
    return f"{_PACKAGE}.{operation}.kernel"


def builds_of(operation: str, target: Target) -> list[Wanted]:
    """All builds of one operation.

    Raises:
        NoBuildsError: there are none, or two have the same name.
    """
    list_builds = getattr(importlib.import_module(module_of(operation)), "builds", None)
    builds: list[Build] = list(list_builds(target)) if list_builds else []
    if not builds:
        raise NoBuildsError(f"{operation}: no builds for sm_{target.capability}")
    names = [build.name for build in builds]
    if twice := {name for name in names if names.count(name) > 1}:
        raise NoBuildsError(f"{operation}: several builds are called {', '.join(sorted(twice))}")
    return [Wanted(operation, build, target, index) for index, build in enumerate(builds)]


def ends_of(wanted: Sequence[Wanted]) -> list[Wanted]:
    """The first and the last of all that differ in constants alone: one kernel, the same types of arguments, one GPU.

    Kernels list their builds by size, so these are the extremes. What lies between is mostly like the one or the
    other, but may spill where they do not: before a kernel changes for good, compile everything.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, one in enumerate(wanted):
        types = tuple(sorted(one.build.arguments.items()))
        alike.setdefault((one.operation, id(one.build.kernel), types, one.target), []).append(place)
    return [wanted[place] for place in sorted({end for places in alike.values() for end in (places[0], places[-1])})]


def compile_all(wanted: Sequence[Wanted], num_jobs: int) -> Iterator[Row]:
    """In that many processes; in the order given."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(num_jobs, multiprocessing.get_context("spawn"), _prepare, (folder,)) as pool,
    ):
        running = [pool.submit(compile_one, module_of(one.operation), one.index, one.target) for one in wanted]
        for one, future in zip(wanted, tqdm(running, unit="build", disable=None), strict=True):
            yield Row(one.operation, one.build, one.target, _result(future))


def _prepare(folder: str) -> None:
    """Nothing comes from a cache: then ptxas would have nothing to say."""
    os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}


def _result(future: Future[Compiled | Failed]) -> Compiled | Failed:
    try:
        return future.result()
    except Exception as error:  # a compiler that dies takes its process, and the pool, with it
        return Failed(f"{type(error).__name__}: {error}")


def run(args: argparse.Namespace) -> list[str]:
    """Compiles, prints; returns what is refused."""
    targets = [target for target in SHIPPED if target.capability in args.arch]
    wanted: list[Wanted] = []
    refused: list[str] = []
    for operation in args.only:
        for target in targets:
            try:
                wanted += builds_of(operation, target)
            except NoBuildsError as error:
                refused.append(str(error))
    rows = list(compile_all(ends_of(wanted) if args.ends else wanted, args.jobs))
    refused += [problem for row in rows for problem in problems(row)]
    print(table(rows))
    if explained := reasons(rows):
        print("\nexplained:", *explained, sep="\n  ")
    print(f"\n{len(rows)} builds, {len(refused)} findings")
    if args.json:
        args.json.write_text(json.dumps([row_json(row) for row in rows], indent=1) + "\n")
    return refused


def main() -> None:
    """The command line."""
    known = operations()
    capabilities = [target.capability for target in SHIPPED]
    parser = argparse.ArgumentParser(description="Compile all kernels for GPUs.", allow_abbrev=False)
    parser.add_argument("--arch", type=int, nargs="+", choices=capabilities, default=capabilities)
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    parser.add_argument(
        "--ends", action="store_true", help="of builds that differ in constants alone, the first and last"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    args = parser.parse_args()
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 asks for the interpreter, whose kernels cannot be compiled: unset it")
    if refused := run(args):
        sys.exit("\n".join(["\nrefused:", *refused]))


if __name__ == "__main__":
    main()

"""Plots of a run on a GPU, where matplotlib is installed."""

import importlib.util
from pathlib import Path
from typing import Any

from bench.gpu_report import LAYER_AIM, Run, model_steps, pairs

_DPI = 150


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(run: Run, stem: Path) -> list[Path]:
    """Writes what there are numbers for, as `<stem>-<what>.png`."""
    import matplotlib as mpl

    mpl.use("Agg")
    drawn = {"floors": _floors(run), "sparse": _sparse(run), "steps": _steps(run)}
    written = []
    for what, figure in drawn.items():
        if figure is not None:
            written.append(stem.with_name(f"{stem.name}-{what}.png"))
            figure.savefig(written[-1], dpi=_DPI, bbox_inches="tight")
    return written


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _floors(run: Run) -> Any:
    """How near each operation comes to the best that is possible."""
    found = [one for one in run.timed if one.works]
    if not found:
        return None
    figure, axes = _figure(9, 1 + 0.2 * len(found))
    axes.barh([f"{one.group}: {one.name}" for one in found], [100 * one.of_floor(run.rates) for one in found])
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("% of what memory and arithmetic allow")
    axes.set_title(run.card)
    axes.tick_params(axis="y", labelsize=7)
    return figure


def _sparse(run: Run) -> Any:
    """How many times faster sparse attention is."""
    found = list(pairs(run))
    if not found:
        return None
    figure, axes = _figure(9, 1 + 0.25 * len(found))
    axes.barh([pair.name for pair in found], [pair.ratio for pair in found])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.axvline(LAYER_AIM, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("dense / sparse, one layer's attention (dashed: the aim at the longest context)")
    axes.set_title(run.card)
    return figure


def _steps(run: Run) -> Any:
    """Decode steps of the slice, with graphs and without, over their floor."""
    found = list(model_steps(run))
    if not found:
        return None
    figure, axes = _figure(7, 5)
    batches = [steps.batch for steps in found]
    axes.plot(batches, [1e3 * steps.with_graphs_s for steps in found], marker="o", label="CUDA graphs")
    launched = [(steps.batch, 1e3 * steps.without_graphs_s) for steps in found if steps.without_graphs_s is not None]
    if launched:
        axes.plot(*zip(*launched, strict=True), marker="o", label="no graphs")
    axes.plot(batches, [1e3 * steps.floor_s for steps in found], linestyle="--", label="floor")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequences that decode at once")
    axes.set_ylabel("ms a step")
    axes.set_title(run.card)
    axes.legend()
    return figure

"""`rempart plan`: flags in, a plan out."""

from pathlib import Path
from typing import Annotated

import typer

from rempart_platform.console.admin_view import stdout_console
from rempart_platform.plan.errors import PlanError


def show_plan(  # noqa: PLR0913 - a flag is a parameter
    model: Annotated[str, typer.Argument(help="A published shape by name, a Hugging Face folder, or a config.json.")],
    machine: Annotated[
        list[str] | None, typer.Option(help="Show all about this machine; may be repeated.", show_default=False)
    ] = None,
    machines: Annotated[
        Path | None, typer.Option(help="GPUs, machines and prices instead of the shipped ones (TOML).")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="fp8, bf16, int8 or int4; what takes the fewest machines when not given.")
    ] = None,
    cache: Annotated[str, typer.Option(help="fp8 or bf16.")] = "fp8",
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of a sequence; may be repeated, the longest must fit. 8192 and 131072."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Sequences at once; may be repeated. 1, 16 and as many as fit."),
    ] = None,
    overhead_gb: Annotated[
        float, typer.Option(help="Of each GPU, for its context, communication and a step's workspace.")
    ] = 4.0,
    utilisation: Annotated[float, typer.Option(help="Share of a bound that costs assume.")] = 0.3,
    mtp: Annotated[bool, typer.Option("--mtp", help="Hold the MTP layers and their cache too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what a model needs, which machines hold it, and how fast and at what cost they could serve it at most.

    Without --machine: the model, and one line for each machine known.
    With it: every format, layouts, bounds of prefill and decode, cost; and,
    where GPUs are too small, what host memory could still do.

    Every line carries its formula with the numbers put in.
    Times are "at least", tokens/s "at most": a GPU has to read its bytes and
    do its FLOP; communication, kernel launches and sampling are not counted.
    Nothing here is measured. Costs assume that --utilisation of the bound is
    reached, which is a guess until somebody measures it.
    """
    from rempart_platform.plan.attention import CacheFormat
    from rempart_platform.plan.machine_report import machine_sections, overview
    from rempart_platform.plan.machines import MACHINES_FILE, choose_machines, read_machines, read_support
    from rempart_platform.plan.model_report import model_sections
    from rempart_platform.plan.placement import Setup
    from rempart_platform.plan.question import ask, known_format
    from rempart_platform.plan.view import print_tables, to_json

    try:
        setup = Setup(known_format(CacheFormat, cache, "--cache"), overhead_gb * 1e9, with_mtp=mtp)
        question = ask(
            model, setup, weight_format=weights, contexts=context or (), batches=batch or (), utilisation=utilisation
        )
        known = read_machines(machines or MACHINES_FILE)
        chosen = choose_machines(known, machine or ())
        support = read_support()
    except PlanError as error:
        typer.echo(f"rempart plan: {error}", err=True)
        raise typer.Exit(2) from None
    sections = list(model_sections(question.model, question.contexts, setup.cache_format))
    for each in chosen:
        sections += machine_sections(question, each, support)
    if not chosen:
        sections.append(overview(question, known, support))
    if as_json:
        typer.echo(to_json(question.model.name, sections))
        return
    print_tables(stdout_console(), sections)
    typer.echo(support.note + ".")

"""The command line `rempart`: flags in, one call, an exit code out.

What is heavy to import is imported by the command that needs it.
"""

import os
import shlex
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rempart_platform.console import admin_commands, audit_commands, batch_commands, plan_commands
from rempart_platform.console.admin_view import DEFAULT_ADDRESS, Address, ApiKey
from rempart_platform.plan.command import show_plan
from rempart_platform.process_end import end_process

app = typer.Typer(
    help="Serve open-weight models to many tenants.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(admin_commands.tenants, name="tenant")
app.add_typer(admin_commands.keys, name="key")
app.add_typer(batch_commands.batches, name="batch")
app.add_typer(plan_commands.prices, name="price")
app.add_typer(audit_commands.audit, name="audit")

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_ENGINE_OPTIONS = "Options of every engine"


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _engine_option(text: str) -> object:
    return typer.Option(help=text, show_default=False, rich_help_panel=_ENGINE_OPTIONS)


@app.command()
def up(  # noqa: PLR0913 - a flag is a parameter
    model: Annotated[
        Path | None, typer.Option(help="GGUF file or Hugging Face folder; SmolLM2-135M-Instruct when not given.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What requests call the model.")] = None,
    engines: Annotated[int, typer.Option(min=1, help="Engines to start.")] = 1,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="OpenAI API; 0 picks a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC; 0 picks a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Prometheus; 0 picks a free one.")] = 8002,
    as_json: Annotated[bool, typer.Option("--json", help="When ready, print one line of JSON.")] = False,
    log_level: Annotated[LogLevel, typer.Option(help="Least level of the processes' logs.")] = LogLevel.WARNING,
    num_threads: Annotated[int | None, _engine_option("Threads; an equal share of the cores when not given.")] = None,
    dtype: Annotated[
        Dtype | None, _engine_option("Numbers to compute in; float32 for SmolLM2-135M-Instruct, else auto.")
    ] = None,
    max_model_len: Annotated[int | None, _engine_option("Most tokens of prompt and output together.")] = None,
    max_num_rows: Annotated[int | None, _engine_option("Most sequences that run at once.")] = None,
    max_step_tokens: Annotated[int | None, _engine_option("Most tokens computed in one step.")] = None,
    num_blocks: Annotated[int | None, _engine_option("KV blocks in the pool.")] = None,
    kv_cache_bytes: Annotated[int | None, _engine_option("Memory for KV blocks.")] = None,
    engine_flag: Annotated[
        list[str] | None,
        _engine_option("Any other of `rempart engine --help`, as NAME or NAME=VALUE; may be given again."),
    ] = None,
    require_manifest: Annotated[
        Path | None,
        typer.Option(
            help="Refuse to serve unless the model is as this manifest says; see `rempart verify`.", show_default=False
        ),
    ] = None,
    manifest_key: Annotated[
        Path | None,
        typer.Option(help="And the manifest is signed by the owner of this ed25519 public key.", show_default=False),
    ] = None,
    tenants_file: Annotated[
        Path | None,
        typer.Option(help="Plans, tenants, their keys and prices to begin with, TOML or JSON.", show_default=False),
    ] = None,
    audit_store: Annotated[
        str,
        typer.Option(
            help="Where to keep an audit log: file:///FOLDER or s3://BUCKET/PREFIX; see `rempart audit`.",
            show_default=False,
        ),
    ] = "",
    engine_module: Annotated[str, typer.Option(hidden=True)] = "rempart_engine",
) -> None:
    """Start everything on this machine: Redis, engines, a router, a demo tenant."""
    from rempart_platform.local.config import LocalConfig, LocalConfigError, served_name, to_engine_flag
    from rempart_platform.local.demo_model import DEMO_MODEL_NAME, DemoModelMissingError, find_demo_model
    from rempart_platform.local.up import up as run_up

    if model is None and dtype is None:
        dtype = Dtype.FLOAT32  # the smaller a model, the more often rounding decides between its words
    options = {
        "--dtype": dtype,
        "--max-model-len": max_model_len,
        "--max-num-rows": max_num_rows,
        "--max-step-tokens": max_step_tokens,
        "--num-blocks": num_blocks,
        "--kv-cache-bytes": kv_cache_bytes,
    }
    given = {flag: str(value) for flag, value in options.items() if value is not None}
    try:
        engine_args = (*(part for pair in given.items() for part in pair), *map(to_engine_flag, engine_flag or ()))
        path = model or find_demo_model()
        config = LocalConfig(
            model=path,
            model_name=served_model_name or (served_name(path) if model else DEMO_MODEL_NAME),
            num_engines=engines,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            num_threads=num_threads,
            engine_args=engine_args,
            require_manifest=require_manifest,
            manifest_key=manifest_key,
            tenants_file=tenants_file,
            audit_store=audit_store,
            log_level=log_level,
            engine_module=engine_module,
        )
    except (DemoModelMissingError, LocalConfigError) as error:
        typer.echo(f"rempart up: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(run_up(config, os.environ, _program(), as_json=as_json))


@app.command(context_settings=_PASS_ON)
def engine(context: typer.Context) -> None:
    """Run one engine; its own options follow, see `rempart engine --help`."""
    _become("rempart_engine", context.args)


@app.command(context_settings=_PASS_ON)
def router(context: typer.Context) -> None:
    """Run one router; its own options follow, see `rempart router --help`."""
    _become("rempart_platform", context.args)


@app.command(context_settings=_PASS_ON)
def fetch(context: typer.Context) -> None:
    """Bring a model from object storage to a folder; see `rempart fetch --help`."""
    _become("rempart_engine.fetch", context.args)


@app.command(context_settings=_PASS_ON)
def verify(context: typer.Context) -> None:
    """Check a model's files against a manifest, or write one; see `rempart verify --help`."""
    _become("rempart_engine.manifest", context.args)


@app.command()
def chat(
    key: ApiKey,
    address: Address = DEFAULT_ADDRESS,
    model: Annotated[str | None, typer.Option(help="The router's first when not given.", show_default=False)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default=False)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.", show_default=False)] = None,
) -> None:
    """Talk with a model; from a pipe, one question a line."""
    from rempart_platform.console import chat as console_chat

    settings = console_chat.ChatSettings(address, key, model, temperature, max_tokens)
    raise typer.Exit(console_chat.chat(settings, sys.stdin, sys.stdout, sys.stderr))


app.command("usage")(admin_commands.show_usage)
app.command("plan")(show_plan)


def _program() -> str:
    """How this shell calls us: by name when that is on PATH."""
    return "rempart" if shutil.which("rempart") else shlex.quote(sys.argv[0])


def _become(module: str, args: list[str]) -> None:
    """This process becomes that module's, so that signals and the exit code are its own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *args])


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's own log lines are not for the person at the console
    try:
        app()
    except SystemExit as ended:  # Typer ends so, whatever became of the command
        if not isinstance(ended.code, int):
            raise
        end_process(ended.code)


if __name__ == "__main__":
    main()

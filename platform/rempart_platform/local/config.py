"""What `rempart up` starts: its settings, and the command lines that follow from them."""

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rempart_platform.local.child_process import ChildCommand
from rempart_platform.object_store import ObjectStoreUrlError, open_object_store

VERIFY = "verify"
"""The process that compares the model with its manifest."""
HOST = "127.0.0.1"
"""The platform of one machine speaks without TLS and listens to that machine alone."""
_SECRET_BYTES = 32
# The engines compute on every core, and Redis has to wait for its turn.
_REDIS_TIMEOUT_S = "2"
_OWN_ENGINE_FLAGS = frozenset(
    {
        "--model",
        "--served-model-name",
        "--require-manifest",
        "--manifest-key",
        "--host",
        "--port",
        "--metrics-port",
        "--num-threads",
        "--log-level",
    }
)
"""Of an engine, but decided by `rempart up`."""


class LocalConfigError(ValueError):
    """A setting that cannot be served; the message names the flag."""


@dataclass(frozen=True, slots=True)
class LocalConfig:
    """Settings of one run.

    Raises:
        LocalConfigError: a value is out of its range, or there is no such model.
    """

    model: Path
    model_name: str
    num_engines: int = 1
    http_port: int = 8000
    """0 picks a free one, as for the others."""
    grpc_port: int = 8001
    metrics_port: int = 8002
    num_threads: int | None = None
    """Of each engine; None shares the cores among them."""
    engine_args: tuple[str, ...] = ()
    """Further flags for every engine."""
    require_manifest: Path | None = None
    """Nothing of the model is parsed by any process unless it is as this manifest says."""
    manifest_key: Path | None = None
    """Whose owner must have signed the manifest."""
    tenants_file: Path | None = None
    """Plans, tenants and prices to begin with."""
    audit_store: str = ""
    """Where the router keeps its audit log, see `object_store.py`; "" keeps none."""
    log_level: str = "warning"
    engine_module: str = "rempart_engine"

    def __post_init__(self) -> None:
        if not self.model.exists():
            raise LocalConfigError(f"--model: there is no {self.model}")
        if self.manifest_key is not None and self.require_manifest is None:
            raise LocalConfigError("--manifest-key goes with --require-manifest")
        if not self.model_name or "=" in self.model_name:
            raise LocalConfigError(f"--served-model-name {self.model_name!r} must not be empty or hold '='")
        if self.tenants_file is not None and not self.tenants_file.is_file():
            raise LocalConfigError(f"--tenants-file: there is no {self.tenants_file}")
        if self.num_engines < 1:
            raise LocalConfigError("--engines must be at least 1")
        named = [port for port in self.ports.values() if port]
        if len(set(named)) < len(named):
            raise LocalConfigError(f"{', '.join(self.ports)} must differ")

    @property
    def ports(self) -> dict[str, int]:
        """By flag."""
        return {
            "--http-port": self.http_port,
            "--grpc-port": self.grpc_port,
            "--metrics-port": self.metrics_port,
        }


@dataclass(frozen=True, slots=True)
class LocalSecrets:
    """Drawn anew for every run, and kept nowhere."""

    admin_key: str = field(default_factory=lambda: secrets.token_hex(_SECRET_BYTES), repr=False)
    key_pepper: str = field(default_factory=lambda: secrets.token_hex(_SECRET_BYTES), repr=False)
    cache_secret: str = field(default_factory=lambda: secrets.token_hex(_SECRET_BYTES), repr=False)


def to_engine_flag(text: str) -> str:
    """A flag for every engine from a person's NAME or NAME=VALUE.

    Raises:
        LocalConfigError: that flag is decided here.
    """
    flag = "--" + text.removeprefix("--")
    name = flag.partition("=")[0]
    if name in _OWN_ENGINE_FLAGS:
        raise LocalConfigError(f"--engine-flag {text}: rempart up decides {name} itself")
    return flag


def served_name(model: Path) -> str:
    """The name to serve a model under when none is given: that of its folder, or of its file without the ending."""
    return model.stem if model.is_file() else model.resolve().name


def require_free_ports(config: LocalConfig) -> None:
    """Raises LocalConfigError, before anything is started, when a port is taken."""
    for flag, port in config.ports.items():
        try:
            socket.create_server((HOST, port)).close()
        except (OSError, OverflowError) as error:
            raise LocalConfigError(
                f"{flag} {port}: cannot listen there ({error}); name another port, or 0 for a free one"
            ) from error


def require_audit_store(config: LocalConfig) -> None:
    """Raises LocalConfigError, before anything is started, when there can be no audit log where it is to be."""
    try:
        if config.audit_store:
            open_object_store(config.audit_store)
    except ObjectStoreUrlError as error:
        raise LocalConfigError(f"--audit-store: {error}") from None


def verify_command(config: LocalConfig, environ: Mapping[str, str]) -> ChildCommand | None:
    """What compares the model with its manifest; None when none is required."""
    if config.require_manifest is None:
        return None
    key = () if config.manifest_key is None else ("--public-key", str(config.manifest_key))
    args = (str(config.model), "--manifest", str(config.require_manifest), *key)
    return ChildCommand(VERIFY, "rempart_engine.manifest", args, environ)


def engine_command(config: LocalConfig, number: int, environ: Mapping[str, str]) -> ChildCommand:
    """The engine of that number, from 1."""
    num_threads = config.num_threads or threads_per_engine(len(os.sched_getaffinity(0)), config.num_engines)
    args = {
        "--model": str(config.model),
        "--served-model-name": config.model_name,
        "--host": HOST,
        "--port": "0",
        "--metrics-port": "0",
        "--num-threads": str(num_threads),
        "--log-level": config.log_level,
        **_given({"--require-manifest": config.require_manifest, "--manifest-key": config.manifest_key}),
    }
    return ChildCommand(f"engine {number}", config.engine_module, (*_flat(args), *config.engine_args), environ)


def router_command(
    config: LocalConfig,
    engines: Sequence[str],
    redis_url: str,
    batch_folder: Path,
    own_secrets: LocalSecrets,
    environ: Mapping[str, str],
) -> ChildCommand:
    """The router over the engines at these addresses."""
    args = {
        "--model": f"{config.model_name}={config.model}",
        "--engines": ",".join(engines),
        "--host": HOST,
        **{flag: str(port) for flag, port in config.ports.items()},
        "--redis-timeout-s": _REDIS_TIMEOUT_S,
        "--batch-store": batch_folder.absolute().as_uri(),
        "--log-level": config.log_level,
        **_given({"--tenants-file": config.tenants_file}),
        **({"--audit-store": config.audit_store} if config.audit_store else {}),
    }
    own_environ = {
        "REMPART_ADMIN_KEY": own_secrets.admin_key,
        "REMPART_KEY_PEPPER": own_secrets.key_pepper,
        "REMPART_CACHE_SECRET": own_secrets.cache_secret,
        "REMPART_REDIS_URL": redis_url,
    }
    return ChildCommand("router", "rempart_platform", _flat(args), {**environ, **own_environ})


def threads_per_engine(num_cores: int, num_engines: int) -> int:
    """An equal share for each, and at least one."""
    return max(1, num_cores // num_engines)


def _given(args: Mapping[str, Path | None]) -> dict[str, str]:
    return {flag: str(value) for flag, value in args.items() if value is not None}


def _flat(args: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(part for pair in args.items() for part in pair)

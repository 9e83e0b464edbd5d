"""A router's configuration: parsed once, frozen, and refused at the start when anything in it is unknown or malformed.

Flags: one per field, those of nested values with the field's name before theirs (`--http-max-connections`).
`--help` explains each by the string below its field. Secrets come from the environment (`_ENVIRONMENT`), never by flag.
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from rempart_platform.aliases import Alias, parse_alias
from rempart_platform.apis.grpc_limits import GrpcLimits
from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.audit.values import AuditConfig
from rempart_platform.batch.config import BatchConfig
from rempart_platform.bounds import OutOfBoundsError, require_positive
from rempart_platform.chat.format import CHAT_FORMATS
from rempart_platform.cluster.leadership import LeaseConfig, parse_lease_name
from rempart_platform.endpoints.discovery import DiscoveryConfig
from rempart_platform.endpoints.pick import PickConfig
from rempart_platform.endpoints.service_name import ServiceName, parse_services
from rempart_platform.endpoints.session import SessionConfig
from rempart_platform.endpoints.static import parse_address, parse_addresses
from rempart_platform.field_texts import field_texts
from rempart_platform.holding import HoldConfig
from rempart_platform.oidc.values import OidcConfig
from rempart_platform.request_limits import RequestLimits
from rempart_platform.tenancy.money import parse_money
from rempart_platform.tenancy.queue_values import QueueConfig
from rempart_platform.tenancy.quota import QuotaConfig
from rempart_platform.tenancy.redis_url import parse_redis_url

_MIN_SECRET_CHARS = 16
_PORTS = ("http_port", "grpc_port", "metrics_port")
_USAGE = """rempart router --model NAME=PATH [--model ...]
                      (--engines ... | --engines-dns ... | --engines-kubernetes ...) [other options]"""
_ENVIRONMENT = """\
environment, for what is secret; all four must be set:
  REMPART_ADMIN_KEY     the admin key, a bearer token; at least 16 characters
  REMPART_KEY_PEPPER    pepper of the API keys' digests, at least 16 characters; all routers of one Redis share it
  REMPART_CACHE_SECRET  key of the prefix caches' salts, at least 16 characters; all routers of one engine share it
  REMPART_REDIS_URL     redis://[USER:PASSWORD@]HOST:PORT[/DB], rediss:// with TLS, redis+sentinel:// or redis+cluster://
"""
_T = TypeVar("_T")


class ConfigError(ValueError):
    """What is wrong, with the name of the flag or variable."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to serve: the engines' name for it, and where its tokenizer is (a Hugging Face folder or GGUF file)."""

    name: str
    path: Path
    chat_format: str | None = None
    """--chat-format NAME=FORMAT; the one that the model itself shows, when None."""
    max_model_len: int | None = None
    """--max-model-len NAME=TOKENS; what holds until an engine says it, which matters when requests wait for one."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Everything about a router that is not a secret."""

    models: tuple[ModelSource, ...]
    """--model NAME=PATH, once per model."""
    engines: tuple[str, ...] = ()
    """--engines HOST:PORT,HOST:PORT. Engines are named in exactly one of three ways."""
    engines_dns: tuple[str, int] | None = None
    """--engines-dns NAME:PORT, whose addresses are looked up again and again."""
    engines_kubernetes: tuple[ServiceName, ...] = ()
    """--engines-kubernetes NAMESPACE/SERVICE[:PORTNAME],..."""
    aliases: tuple[Alias, ...] = ()
    """--alias NAME=MODEL:WEIGHT,MODEL:WEIGHT, once per alias."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    http_port: int = 8000
    """Of OpenAI's API; 0 picks a free one."""
    grpc_port: int = 8001
    """0 picks a free one."""
    metrics_port: int = 8002
    """Of Prometheus' page; 0 picks a free one."""
    drain_delay_s: float = 0.0
    """After SIGTERM, for how long new requests are still taken while load balancers notice."""
    drain_timeout_s: float = 30.0
    """How long running streams may take after that."""
    default_timeout_s: float = 600.0
    """Deadline of a request that brings none."""
    max_attempts: int = 2
    """Endpoints that one request may be handed to."""
    max_concurrent_rpcs: int = 4096
    """gRPC calls at a time; further ones are refused."""
    max_tenant_labels: int = 500
    """Tenants that metrics name; further ones count as "other"."""
    tenants_file: str = ""
    """Plans, tenants, their keys and prices to begin with, TOML or JSON; README, Limits, shows one."""
    redis_timeout_s: float = 1.0
    """For a connection, and for an answer; of many scripts, which come in order, for the next one. A router that is
    busy for longer takes a Redis that has answered to be away, but for scripts."""
    redis_max_connections: int = 64
    """One of them is for the scripts of quotas and queue, which it has under way together."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    limits: RequestLimits = RequestLimits()
    http: HttpLimits = HttpLimits()
    grpc: GrpcLimits = GrpcLimits()
    session: SessionConfig = SessionConfig()
    pick: PickConfig = PickConfig()
    discovery: DiscoveryConfig = DiscoveryConfig()
    hold: HoldConfig = HoldConfig()
    leader_lease: tuple[str, str] | None = None
    """--leader-lease NAMESPACE/NAME, a Lease of Kubernetes that is made when it is not there; without it all lead."""
    leader: LeaseConfig = LeaseConfig()
    quota: QuotaConfig = QuotaConfig()
    queue: QueueConfig = QueueConfig()
    batch: BatchConfig = BatchConfig()
    audit: AuditConfig = AuditConfig()
    oidc: OidcConfig = OidcConfig()

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"--model {name} is given twice")
        _check_aliases(self.aliases, names)
        for port in _PORTS:
            if not 0 <= getattr(self, port) <= 0xFFFF:
                raise OutOfBoundsError(port, "between 0 and 65535")
        require_positive(self, or_zero=(*_PORTS, "drain_delay_s", "drain_timeout_s", "max_tenant_labels"))

    @staticmethod
    def from_args(args: Sequence[str]) -> "RouterConfig":
        """Parses command-line flags; prints usage and exits with code 2 when one is unknown or malformed."""
        parser = argparse.ArgumentParser(
            prog="rempart router",
            usage=_USAGE,
            description="Serve tenants over gRPC and the OpenAI API.",
            epilog=_ENVIRONMENT,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument(
            "--model",
            dest="models",
            action="append",
            required=True,
            type=_model_source,
            metavar="NAME=PATH",
            help="a model as engines call it, and where its tokenizer is: a Hugging Face folder or a GGUF file; "
            "once for each model",
        )
        parser.add_argument(
            "--chat-format",
            dest="chat_formats",
            action="append",
            default=[],
            type=_chat_format,
            metavar="NAME=FORMAT",
            help=f"of a model, when it does not show it: {', '.join(CHAT_FORMATS)}",
        )
        parser.add_argument(
            "--max-model-len",
            dest="max_model_lens",
            action="append",
            default=[],
            type=_max_model_len,
            metavar="NAME=TOKENS",
            help="of a model, until an engine says it",
        )
        parser.add_argument(
            "--leader-lease",
            default=argparse.SUPPRESS,
            type=_listed(parse_lease_name),
            metavar="NAMESPACE/NAME",
            help="a Lease of Kubernetes, by which one of the routers does what only one should",
        )
        engines = parser.add_mutually_exclusive_group(required=True)
        engines.add_argument(
            "--engines",
            default=argparse.SUPPRESS,
            type=_listed(parse_addresses),
            metavar="HOST:PORT,...",
            help="a fixed list",
        )
        engines.add_argument(
            "--engines-dns",
            default=argparse.SUPPRESS,
            type=_listed(parse_address),
            metavar="NAME:PORT",
            help="every address of the name, such as a headless Service's",
        )
        engines.add_argument(
            "--engines-kubernetes",
            default=argparse.SUPPRESS,
            type=_listed(parse_services),
            metavar="NAMESPACE/SERVICE[:PORTNAME],...",
            help="every endpoint of these Services; the port is named grpc unless said otherwise",
        )
        parser.add_argument(
            "--alias",
            dest="aliases",
            action="append",
            default=[],
            type=_alias,
            metavar="NAME=MODEL:WEIGHT,...",
            help="another name for a model, or for several by weight; limits and prices are of models alone",
        )
        explains = not {"-h", "--help"}.isdisjoint(args)  # reading sources takes a start's time
        for flag in _flags(RouterConfig, field_texts if explains else _no_texts):
            flag.add_to(parser)
        given = vars(parser.parse_args(args))
        try:
            given["aliases"] = tuple(given["aliases"])
            given["models"] = _with_chat_formats(given["models"], given.pop("chat_formats"))
            given["models"] = _with_max_model_lens(given["models"], given.pop("max_model_lens"))
            return _build(RouterConfig, given)
        except ValueError as error:
            parser.error(str(error))


@dataclass(frozen=True, slots=True)
class RouterSecrets:
    """What a router must not show."""

    admin_key: str = field(repr=False)
    key_pepper: bytes = field(repr=False)
    cache_secret: bytes = field(repr=False)
    redis_url: str = field(repr=False)

    @staticmethod
    def from_environ(environ: Mapping[str, str]) -> "RouterSecrets":
        """Raises ConfigError naming the variable that is missing or too short."""
        return RouterSecrets(
            admin_key=_secret(environ, "REMPART_ADMIN_KEY"),
            key_pepper=_secret(environ, "REMPART_KEY_PEPPER").encode(),
            cache_secret=_secret(environ, "REMPART_CACHE_SECRET").encode(),
            redis_url=_redis_url(environ),
        )


def config_digest(config: RouterConfig) -> str:
    """Equal for routers that are set alike. SHA-256, hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(config, order="sorted", enc_hook=str)).hexdigest()


def _secret(environ: Mapping[str, str], name: str) -> str:
    secret = environ.get(name, "")
    if len(secret) < _MIN_SECRET_CHARS:
        raise ConfigError(f"{name} must be set, to at least {_MIN_SECRET_CHARS} characters")
    return secret


def _redis_url(environ: Mapping[str, str]) -> str:
    url = environ.get("REMPART_REDIS_URL", "")
    try:
        parse_redis_url(url)
    except ValueError as error:
        raise ConfigError(f"REMPART_REDIS_URL must say where Redis is: {error}") from None
    return url


@dataclass(frozen=True, slots=True)
class _Flag:
    """One flag for one field, which may be nested."""

    name: str
    kind: Any
    default: object
    text: str
    """What it is for."""

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        flag = "--" + self.name.replace("_", "-")
        default = "none" if self.default in (None, "") else self.default
        text = f"{self.text} (default: {default})".replace("%", "%%").strip()
        if get_origin(self.kind) is Literal:
            parser.add_argument(flag, choices=get_args(self.kind), default=argparse.SUPPRESS, help=text)
        elif "money_per_" in self.name:
            parser.add_argument(flag, type=_listed(parse_money), default=argparse.SUPPRESS, help=text, metavar="AMOUNT")
        else:
            parser.add_argument(
                flag, type=_parser(self.kind), default=argparse.SUPPRESS, help=text, metavar=self.kind.__name__
            )


def _no_texts(_: type) -> dict[str, str]:
    return {}


def _flags(of: type, texts_of: Callable[[type], Mapping[str, str]], prefix: str = "") -> Iterator[_Flag]:
    """A flag for every field that has a default; nested values give their fields' flags."""
    hints, texts = get_type_hints(of), texts_of(of)
    for spec in fields(of):
        default = _default(spec)
        if default is MISSING or get_origin(_without_none(hints[spec.name])) is tuple:
            continue  # what lists things is parsed by itself
        if is_dataclass(hints[spec.name]):
            yield from _flags(hints[spec.name], texts_of, f"{prefix}{spec.name}_")
        else:
            yield _Flag(prefix + spec.name, _without_none(hints[spec.name]), default, texts.get(spec.name, ""))


def _build(of: type[_T], given: Mapping[str, object], prefix: str = "") -> _T:
    """The value with the given fields; all others keep their defaults."""
    hints = get_type_hints(of)
    values: dict[str, object] = {}
    for spec in fields(of):  # type: ignore[arg-type]  # every type given here is a dataclass
        name = prefix + spec.name
        if is_dataclass(hints[spec.name]):
            values[spec.name] = _build(hints[spec.name], given, f"{name}_")
        elif name in given:
            values[spec.name] = given[name]
    try:
        return of(**values)
    except OutOfBoundsError as error:
        raise ConfigError(f"--{(prefix + error.name).replace('_', '-')} must be {error.bound}") from None


def _default(spec: Field[Any]) -> object:
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


def _without_none(hint: Any) -> Any:
    if isinstance(hint, UnionType):
        (hint,) = (member for member in get_args(hint) if member is not NoneType)
    return hint


def _parser(kind: type[str] | type[int] | type[float]) -> Callable[[str], object]:
    """Every number of ours is a count, a size or a time."""

    def parse(text: str) -> object:
        value = kind(text)
        if not isinstance(value, str) and not 0 <= value < math.inf:
            raise ValueError
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its message
    return parse


def _model_source(text: str) -> ModelSource:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return ModelSource(name, Path(path))


def _chat_format(text: str) -> tuple[str, str]:
    name, _, chat_format = text.partition("=")
    if not name or chat_format not in CHAT_FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FORMAT with a format of {', '.join(CHAT_FORMATS)}")
    return name, chat_format


def _with_chat_formats(
    models: Sequence[ModelSource], chat_formats: Sequence[tuple[str, str]]
) -> tuple[ModelSource, ...]:
    named = dict(chat_formats)
    for name in named:
        if all(model.name != name for model in models):
            raise ConfigError(f"--chat-format names {name}, which no --model does")
    return tuple(replace(model, chat_format=named.get(model.name)) for model in models)


def _alias(text: str) -> Alias:
    try:
        return parse_alias(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _check_aliases(aliases: Sequence[Alias], models: Sequence[str]) -> None:
    names = [*models, *(alias.name for alias in aliases)]
    for alias in aliases:
        if names.count(alias.name) > 1:
            raise ConfigError(f"--alias {alias.name} is the name of a model or of another alias")
        for share in alias.shares:
            if share.model not in models:
                raise ConfigError(f"--alias {alias.name} names {share.model}, which no --model does")


def _max_model_len(text: str) -> tuple[str, int]:
    name, _, tokens = text.partition("=")
    if not name or not tokens.isdecimal() or int(tokens) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=TOKENS")
    return name, int(tokens)


def _with_max_model_lens(models: Sequence[ModelSource], lens: Sequence[tuple[str, int]]) -> tuple[ModelSource, ...]:
    named = dict(lens)
    for name in named:
        if all(model.name != name for model in models):
            raise ConfigError(f"--max-model-len names {name}, which no --model does")
    return tuple(replace(model, max_model_len=named.get(model.name)) for model in models)


def _listed(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    def parse_flag(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_flag

"""Where Redis is, in one URL: a server, Sentinels that know the server of the moment, or a cluster.

    redis://[user:password@]host:port[/db]        rediss:// with TLS        unix:///path
    redis+sentinel://[user:password@]host:port,host:port/MASTER_NAME[/db]   rediss+sentinel://
    redis+cluster://[user:password@]host:port,host:port                     rediss+cluster://

User and password are those of the data servers. Options behind a `?` of the last two: with TLS ssl_ca_certs,
ssl_certfile, ssl_keyfile (paths); of Sentinels sentinel_username and sentinel_password, where they ask for one. The
first three take what redis-py takes.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

_PLAIN = ("redis", "rediss", "unix")
_SEVERAL = ("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_TLS_OPTIONS = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
_SENTINEL_OPTIONS = frozenset({"sentinel_username", "sentinel_password"})
_DEFAULT_PORTS = {"sentinel": 26379, "cluster": 6379}


@dataclass(frozen=True, slots=True)
class RedisServers:
    """Several servers behind one URL. What is secret stays out of `repr`."""

    kind: Literal["sentinel", "cluster"]
    hosts: tuple[tuple[str, int], ...]
    is_tls: bool
    master_name: str = ""
    """Of a Sentinel."""
    db: int = 0
    credentials: dict[str, str] = field(default_factory=dict, repr=False)
    """username and password, where they are given."""
    options: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def tls(self) -> dict[str, str | bool]:
        """Keyword arguments of a connection."""
        return (
            {"ssl": True, **{key: self.options[key] for key in _TLS_OPTIONS & set(self.options)}} if self.is_tls else {}
        )

    @property
    def sentinel_credentials(self) -> dict[str, str]:
        names = _SENTINEL_OPTIONS & set(self.options)
        return {name.removeprefix("sentinel_"): self.options[name] for name in names}


def parse_redis_url(url: str) -> RedisServers | None:
    """Several servers, or None for a URL of one, which redis-py reads itself.

    Raises:
        ValueError: it is malformed; the message never holds the password.
    """
    scheme, _, _ = url.partition("://")
    if scheme in _PLAIN and "://" in url:
        return None
    if scheme not in _SEVERAL:
        raise ValueError(f"it must begin with one of {', '.join(f'{each}://' for each in (*_PLAIN, *_SEVERAL))}")
    try:
        parts = urlsplit(url)
    except ValueError:  # whose text may hold the password
        raise ValueError("it cannot be read as a URL") from None
    is_tls = scheme.startswith("rediss")
    kind: Literal["sentinel", "cluster"] = "sentinel" if scheme.endswith("sentinel") else "cluster"
    user_info, _, host_list = parts.netloc.rpartition("@")
    master_name, db = _path(parts.path, kind)
    return RedisServers(
        kind=kind,
        hosts=tuple(_host(number, entry, _DEFAULT_PORTS[kind]) for number, entry in enumerate(host_list.split(","), 1)),
        is_tls=is_tls,
        master_name=master_name,
        db=db,
        credentials=_credentials(user_info),
        options=_options(
            parts.query, (_TLS_OPTIONS if is_tls else set()) | (_SENTINEL_OPTIONS if kind == "sentinel" else set())
        ),
    )


def _path(path: str, kind: str) -> tuple[str, int]:
    master_name, _, db = path.strip("/").partition("/")
    if kind == "cluster":
        if path.strip("/"):
            raise ValueError("a cluster has neither master name nor database")
        return "", 0
    if not master_name:
        raise ValueError("a Sentinel URL names its master: redis+sentinel://HOST:PORT/MASTER_NAME")
    if db and not db.isdecimal():
        raise ValueError("the database is no number")
    return unquote(master_name), int(db or 0)


def _host(number: int, entry: str, default_port: int) -> tuple[str, int]:
    host, colon, port = entry.rpartition(":")
    if entry.endswith("]") or not colon:  # an IPv6 without port, or a bare name
        host, port = entry, str(default_port)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"what it names as host {number} is not HOST:PORT")  # it may be a password without its @
    return host.strip("[]"), int(port)


def _credentials(user_info: str) -> dict[str, str]:
    user, _, password = user_info.partition(":")
    given = {"username": unquote(user), "password": unquote(password)}
    return {name: value for name, value in given.items() if value}


def _options(query: str, known: Set[str]) -> dict[str, str]:
    options = dict(parse_qsl(query))
    if options.keys() - known:
        raise ValueError(f"the options that it may have are {', '.join(sorted(known)) or 'none'}")
    return options

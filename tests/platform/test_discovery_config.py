"""The flags that say where engines are, who waits for them, and who leads."""

from pathlib import Path

import pytest

from rempart_platform.config import ModelSource, RouterConfig
from rempart_platform.endpoints.service_name import ServiceName

MODEL = ("--model", "a=/models/a")


def test_engines_are_services_of_kubernetes() -> None:
    config = RouterConfig.from_args((*MODEL, "--engines-kubernetes", "llm/big,llm/small:engine"))
    assert config.engines_kubernetes == (ServiceName("llm", "big"), ServiceName("llm", "small", "engine"))
    assert (config.engines, config.engines_dns) == ((), None)


def test_engines_are_the_addresses_of_a_name() -> None:
    config = RouterConfig.from_args((*MODEL, "--engines-dns", "engines.llm.svc:50051"))
    assert config.engines_dns == ("engines.llm.svc", 50051)


def test_times_and_limits_of_all_this_are_flags() -> None:
    config = RouterConfig.from_args(
        (
            *(*MODEL, "--engines-dns", "e:1", "--discovery-dns-period-s", "2", "--session-max-connecting", "3"),
            *("--discovery-kubernetes-relist-s", "60", "--discovery-kubernetes-watch-s", "30"),
            *("--hold-without-engine-s", "120", "--hold-max-per-model", "7", "--hold-max-per-tenant", "5"),
            *("--leader-lease", "llm/router", "--leader-lease-s", "30", "--leader-renew-s", "20"),
            *("--max-model-len", "a=32768"),
        )
    )
    assert config.models == (ModelSource("a", Path("/models/a"), max_model_len=32768),)
    assert (config.discovery.dns.period_s, config.session.max_connecting) == (2.0, 3)
    assert (config.discovery.kubernetes.relist_s, config.discovery.kubernetes.watch_s) == (60.0, 30.0)
    assert (config.hold.without_engine_s, config.hold.max_per_model, config.hold.max_per_tenant) == (120.0, 7, 5)
    assert config.leader_lease == ("llm", "router")
    assert (config.leader.lease_s, config.leader.renew_s) == (30.0, 20.0)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((), "one of the arguments --engines --engines-dns --engines-kubernetes is required"),
        (("--engines", "h:1", "--engines-dns", "e:1"), "not allowed with argument --engines"),
        (("--engines-dns", "e:1", "--engines-kubernetes", "llm/e"), "not allowed with argument --engines-dns"),
        (("--engines-dns", "engines"), "'engines' is not host:port"),
        (("--engines-dns", "engines..svc:1"), "'engines..svc:1' is not host:port"),
        (("--engines-dns", f"{'e' * 64}.svc:1"), "is not host:port"),
        (("--engines-kubernetes", "engines"), "'engines' is not NAMESPACE/SERVICE"),
        (("--engines", "h:1", "--leader-lease", "router"), "is not NAMESPACE/NAME"),
        (("--engines", "h:1", "--leader-renew-s", "15"), "--leader-renew-s must be below lease_s"),
        (("--engines", "h:1", "--hold-max-per-tenant", "0"), "--hold-max-per-tenant must be at least 1"),
        (("--engines", "h:1", "--session-max-connecting", "0"), "--session-max-connecting must be at least 1"),
        (("--engines", "h:1", "--max-model-len", "a=0"), "'a=0' is not NAME=TOKENS"),
        (("--engines", "h:1", "--max-model-len", "b=5"), "--max-model-len names b"),
    ],
)
def test_a_bad_flag_is_refused_by_name(args: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        RouterConfig.from_args((*MODEL, *args))
    assert named in capsys.readouterr().err

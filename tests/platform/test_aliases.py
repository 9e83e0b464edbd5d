"""Other names for models, and a new version that few sessions meet."""

import re

import pytest

from rempart_platform.aliases import Alias, Share, parse_alias
from rempart_platform.apis.testing import tiny_model
from rempart_platform.config import ConfigError, RouterConfig
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.models import ModelCatalog

SESSIONS = [f"tenant session-{number}" for number in range(2000)]


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("chat=v3.2", (Share("v3.2"),)),
        ("chat=v3.2:95,next:5", (Share("v3.2", 95), Share("next", 5))),
        ("chat=org/m:free,n:0", (Share("org/m:free"), Share("n", 0))),
        ("chat=a, b", (Share("a"), Share("b"))),
    ],
)
def test_an_alias_names_models_with_weights(text: str, shares: tuple[Share, ...]) -> None:
    assert parse_alias(text) == Alias("chat", shares)


@pytest.mark.parametrize("text", ["", "chat", "=a", "chat=", "chat=a,", "chat=a,a:2", "chat=a:0", "chat=a:0,b:0"])
def test_what_is_malformed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_alias(text)


def test_sessions_meet_models_by_weight_and_stay_with_theirs() -> None:
    alias = parse_alias("chat=old:90,new:10")
    met = {session: alias.choose(session) for session in SESSIONS}
    assert met == {session: alias.choose(session) for session in SESSIONS}
    assert list(met.values()).count("new") / len(SESSIONS) == pytest.approx(0.1, abs=0.03)


def test_a_weight_that_grows_moves_only_sessions_to_the_new_model() -> None:
    before, after = parse_alias("chat=old:95,new:5"), parse_alias("chat=old:80,new:20")
    moved = {(before.choose(session), after.choose(session)) for session in SESSIONS}
    assert moved == {("old", "old"), ("old", "new"), ("new", "new")}


def test_weight_0_is_never_met() -> None:
    alias = parse_alias("chat=a:0,b:1,c:0")
    assert {alias.choose(session) for session in SESSIONS} == {"b"}


def test_who_names_no_session_meets_the_heaviest_model() -> None:
    assert parse_alias("chat=new:5,old:95,older:95").heaviest == "old"


def test_the_catalog_resolves_aliases_and_lists_them_as_models() -> None:
    models = [tiny_model("old", max_model_len=512), tiny_model("new", max_model_len=256)]
    catalog = ModelCatalog(models, [parse_alias("chat=old:1,new:1"), parse_alias("only=new")])
    assert {catalog.get("chat", session).name for session in SESSIONS} == {"old", "new"}
    assert catalog.get("only").name == "new"
    assert catalog.get("chat").name == "old", "the first of the heaviest, where nobody names a session"
    assert [(model.name, model.max_model_len) for model in catalog.listed()] == [
        ("chat", 256),
        ("new", 256),
        ("old", 512),
        ("only", 256),
    ]
    assert [model.name for model in catalog.all()] == ["new", "old"]
    with pytest.raises(RempartError) as caught:
        catalog.get("other")
    assert caught.value.kind is ErrorKind.MODEL_NOT_FOUND


def test_a_router_takes_aliases_of_its_models_only() -> None:
    flags = ["--model", "a=/a", "--model", "b=/b", "--engines", "e:1"]
    config = RouterConfig.from_args([*flags, "--alias", "chat=a:9,b:1", "--alias", "old=a"])
    assert [alias.name for alias in config.aliases] == ["chat", "old"]
    for aliases, message in [
        (["chat=c"], "names c, which no --model does"),
        (["a=b"], "is the name of a model or of another alias"),
        (["chat=a", "chat=b"], "is the name of a model or of another alias"),
    ]:
        with pytest.raises(ConfigError, match=message):
            RouterConfig(config.models, ("e:1",), aliases=tuple(map(parse_alias, aliases)))
    with pytest.raises(SystemExit):
        RouterConfig.from_args([*flags, "--alias", "chat"])

"""Whose tokens a router accepts beside its own API keys."""

from dataclasses import dataclass

from rempart_platform.bounds import require_positive

SAFE_ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
"""Those with a private and a public key: what checks a token cannot make one."""


@dataclass(frozen=True, slots=True)
class OidcConfig:
    """One issuer of tokens (OpenID Connect, JWT).

    Raises:
        ValueError: something is missing or makes no sense, with the name of its flag.
    """

    issuer: str = ""
    """Its URL, as the claim `iss` has it. "" accepts API keys alone."""
    audience: str = ""
    """What a token's claim `aud` must name."""
    jwks_url: str = ""
    """Where its keys are; found in the issuer's discovery document when not given."""
    tenant_claim: str = "tenant"
    """The claim that names the tenant; `a.b` is b inside a, as for roles."""
    roles_claim: str = "roles"
    """The claim that lists the caller's roles."""
    admin_role: str = ""
    """Who has it may call the Admin service; "" lets the admin key alone do that."""
    algorithms: str = "RS256,ES256,EdDSA"
    """Of signatures that are accepted, with commas between."""
    leeway_s: float = 30.0
    """How far the issuer's clock may be from ours."""
    refresh_s: float = 600.0
    """How often keys are fetched."""
    min_refresh_s: float = 10.0
    """How often at most, also when tokens name keys that nobody knows."""
    max_key_age_s: float = 3600.0
    """For how long the keys of an issuer that is away are good."""
    fetch_timeout_s: float = 5.0
    """For a document of the issuer."""
    max_document_bytes: int = 256 * 1024
    """Of a document of the issuer."""
    max_keys: int = 64
    """Keys of the issuer that are kept."""
    max_token_bytes: int = 8192
    """Of a token."""
    memory_s: float = 5.0
    """How long it is remembered that a token is valid, never beyond its end, and that a tenant exists."""

    def __post_init__(self) -> None:
        require_positive(self, or_zero=("leeway_s", "memory_s"))
        if not self.issuer:
            return
        for name in ("issuer", "jwks_url"):
            url = getattr(self, name)
            if url and not url.startswith(("https://", "http://")):
                raise ValueError(f"{_flag(name)} must be https:// or, inside the cluster, http://")
        for name in ("audience", "tenant_claim", "roles_claim"):
            if not getattr(self, name):
                raise ValueError(f"{_flag(name)} must not be empty when --oidc-issuer is given")
        unsafe = sorted(set(self.allowed) - SAFE_ALGORITHMS)
        if unsafe or not self.allowed:
            raise ValueError(f"--oidc-algorithms must be of {', '.join(sorted(SAFE_ALGORITHMS))}, not {unsafe}")
        if self.max_key_age_s < self.refresh_s:
            raise ValueError("--oidc-max-key-age-s must not be below --oidc-refresh-s, or tokens are refused between")

    @property
    def allowed(self) -> tuple[str, ...]:
        """`algorithms`, one by one."""
        return tuple(name.strip() for name in self.algorithms.split(",") if name.strip())


def _flag(name: str) -> str:
    return "--oidc-" + name.replace("_", "-")

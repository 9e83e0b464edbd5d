"""Every Redis key of the product.

Keys of one tenant share the hash tag `{tenant}`, so that a script that changes several of them touches one slot of a
cluster. Names of tenants hold no braces (see tenants.py), so the tag is the name.

    rempart:tenants                 set     names of tenants
    rempart:key:<key id>            hash    tenant, digest, created_s
    rempart:{t}:tenant              hash    created_s and the limits that are set
    rempart:{t}:keys                zset    key id → created_s
    rempart:{t}:window              zset    reservation id → time of admission, µs
    rempart:{t}:amounts             hash    reservation id → tokens it counts for in the window
    rempart:{t}:spent               string  sum of the amounts
    rempart:{t}:leases              zset    reservation id → end of its lease, µs
    rempart:{t}:settled             zset    reservation id → time of settling, µs
    rempart:{t}:usage               hash    "<UTC day> <counter> <model>" → count
"""

from dataclasses import dataclass

TENANTS = "rempart:tenants"


def api_key_record(key_id: str) -> str:
    return f"rempart:key:{key_id}"


@dataclass(frozen=True, slots=True)
class TenantKeys:
    """The keys of one tenant."""

    name: str

    def _key(self, part: str) -> str:
        return f"rempart:{{{self.name}}}:{part}"

    @property
    def tenant(self) -> str:
        return self._key("tenant")

    @property
    def api_keys(self) -> str:
        return self._key("keys")

    @property
    def usage(self) -> str:
        return self._key("usage")

    @property
    def ledger(self) -> tuple[str, ...]:
        """KEYS of every ledger script, in the order in which `scripts/ledger.lua` names them."""
        return tuple(self._key(part) for part in ("tenant", "window", "amounts", "spent", "leases", "settled", "usage"))

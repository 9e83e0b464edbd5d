"""Every Redis key of tenants and of the audit log; `queue_keys.py` and `batch_keys.py` have the others.

Keys of one tenant share the hash tag `{tenant}`, so that a script that changes several of them touches one slot of a
cluster. Names of tenants hold no braces (see names.py), so the tag is the name.

    rempart:tenants                 set     names of tenants
    rempart:plans                   set     names of plans, some of them gone
    rempart:plan:<name>             hash    created_s, limits and standing that are set (fields: limits.py,
                                            standing.py), "removing" while somebody does that (plans.py)
    rempart:seeds                   hash    "plan <name>", "tenant <name>", "prices" → digest of what a file said last;
                                            "key <tenant> <name>" → key id and digest of that
    rempart:prices                  hash    "currency"; "model <model>" → its price of input, cached and output tokens
    rempart:audit:heads             hash    chain → number of its last sealed record, link of that segment
    rempart:audit:beginnings        zset    chain → number of the first record that is not removed for its age
    rempart:key:<key id>            hash    tenant, digest, created_s, expires_s
    rempart:{t}:tenant              hash    created_s, plan, limits and standing that are set, limits of its keys too,
                                            "next_plan" while it is moved (plans.py)
    rempart:{t}:keys                zset    key id → created_s
    rempart:{t}:settled             zset    reservation id → time of settling, µs
    rempart:{t}:usage               hash    "<UTC day> <counter> <model>" → count

And of each account, where the tenant's own has no suffix and the others have ":model:<model>" or ":key:<key id>":

    rempart:{t}:window              zset    reservation id → time of admission, µs
    rempart:{t}:amounts             hash    reservation id → tokens it counts for in the window
    rempart:{t}:spent               string  sum of the amounts
    rempart:{t}:leases              zset    reservation id → end of its lease, µs
    rempart:{t}:held                hash    reservation id → "<tokens> <money>" in flight; " tokens", " money" → sums
    rempart:{t}:budgets             hash    what was settled, as day, day_tokens, day_money and the same of month
"""

from dataclasses import dataclass

TENANTS = "rempart:tenants"
PLANS = "rempart:plans"
PRICES = "rempart:prices"
SEEDS = "rempart:seeds"
AUDIT_HEADS = "rempart:audit:heads"
AUDIT_BEGINNINGS = "rempart:audit:beginnings"


def plan_record(name: str) -> str:
    return f"rempart:plan:{name}"


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

    def ledger_of(self, model: str = "", key_id: str = "") -> tuple[str, ...]:
        """KEYS of a ledger script, in the order in which `scripts/ledger.lua` names them.

        With the accounts of a model and of a key, where these are given.
        """
        keys = *self._shared, *self._account()
        if model:
            keys += self._account(f":model:{model}")
        if key_id:
            keys += self._account(f":key:{key_id}")
        return keys

    def account(self, model: str = "", key_id: str = "") -> tuple[str, ...]:
        """KEYS of a ledger script for the one account of a model, of a key, or of the tenant when neither is given."""
        suffix = f":key:{key_id}" if key_id else f":model:{model}" if model else ""
        return (*self._shared, *self._account(suffix))

    @property
    def _shared(self) -> tuple[str, ...]:
        return tuple(self._key(part) for part in ("tenant", "settled", "usage"))

    def _account(self, suffix: str = "") -> tuple[str, ...]:
        parts = ("window", "amounts", "spent", "leases", "held", "budgets")
        return tuple(self._key(part + suffix) for part in parts)

"""Every Redis key of the fair queue.

Keys of one model share the hash tag `{model:<name>}`, in which the name is percent-encoded and so holds no braces.
Sorted sets "by name" have equal scores. Before each: rempart:{model:<name>}:queue:<format>

    :state           hash    room in the engines, what of it is reserved and granted, floors, counters, sums
    :waiting         hash    request id → entry (MessagePack)
    :order           zset    "<class><tenant> <rank> <request id>", by name
    :ages            zset    request id → when it counts as the class above, µs
    :routers         zset    router → until when it is known to live, µs
    :owned           zset    "<router> w <request id>", "<router> g <request id> <fence>"; by name
    :leases          hash    request id → entry that was granted (MessagePack)
    :service         hash    tenant → tokens per weight in this minute
    :running         hash    "<class><tenant> " → charge of its leases, per weight; "rows <tenant>",
                             "tokens <tenant>" → what all its leases hold
    :inbox:<router>  list    "<request id> <fence>" of grants that the router has not taken yet
    :ready:<class>   zset    tenants with entries → virtual time
    :idle:<class>    zset    tenants without that are ahead of the floor → virtual time

While routers of two formats run, as during an update, each format has a queue of its own: engines may be given the work
of both, and shares hold within each. What the older format leaves behind may be deleted.
"""

from dataclasses import dataclass
from urllib.parse import quote

FORMAT = 2
"""Of the values: it grows when routers of the version before would misread one."""
_PARTS = ("state", "waiting", "order", "ages", "routers", "owned", "leases", "service", "running", "inbox:")


@dataclass(frozen=True, slots=True)
class ModelKeys:
    """The keys of one model."""

    name: str

    def _key(self, part: str) -> str:
        return f"rempart:{{model:{quote(self.name)}}}:queue:{FORMAT}:{part}"

    @property
    def queue(self) -> tuple[str, ...]:
        """KEYS of every script of the fair queue, in the order in which `scripts/queue_common.lua` names them."""
        flows = (f"{kind}:{service_tier}" for kind in ("ready", "idle") for service_tier in range(1, 5))
        return tuple(self._key(part) for part in (*_PARTS, *flows))

    def inbox(self, router: str) -> str:
        """Where grants for a router's requests are put."""
        return self._key(f"inbox:{router}")

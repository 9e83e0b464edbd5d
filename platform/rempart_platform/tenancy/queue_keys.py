"""Every Redis key of the fair queue.

Keys of one model share the hash tag `{model:<name>}`, in which the name is percent-encoded and so holds no braces.
Sorted sets "by name" have equal scores. Before each: rempart:{model:<name>}.

    :queue:state           hash    room in the engines, what of it is reserved and granted, floors, counters, sums
    :queue:waiting         hash    request id → entry (MessagePack)
    :queue:order           zset    "<class><tenant> <rank> <request id>", by name
    :queue:ages            zset    request id → when it counts as the class above, µs
    :queue:routers         zset    router → until when it is known to live, µs
    :queue:owned           zset    "<router> w <request id>", "<router> g <request id> <fence>"; by name
    :queue:leases          hash    request id → entry that was granted (MessagePack)
    :queue:service         hash    tenant → tokens per weight in this minute
    :queue:running         hash    "<class><tenant> " → charge of its leases, per weight; "rows <tenant>",
                                   "tokens <tenant>" → what all its leases hold
    :queue:inbox:<router>  list    "<request id> <fence>" of grants that the router has not taken yet
    :queue:ready:<class>   zset    tenants with entries → virtual time
    :queue:idle:<class>    zset    tenants without that are ahead of the floor → virtual time
"""

from dataclasses import dataclass
from urllib.parse import quote

_PARTS = ("state", "waiting", "order", "ages", "routers", "owned", "leases", "service", "running", "inbox:")


@dataclass(frozen=True, slots=True)
class ModelKeys:
    """The keys of one model."""

    name: str

    def _key(self, part: str) -> str:
        return f"rempart:{{model:{quote(self.name)}}}:queue:{part}"

    @property
    def queue(self) -> tuple[str, ...]:
        """KEYS of every script of the fair queue, in the order in which `scripts/queue_common.lua` names them."""
        flows = (f"{kind}:{service_tier}" for kind in ("ready", "idle") for service_tier in range(1, 5))
        return tuple(self._key(part) for part in (*_PARTS, *flows))

    def inbox(self, router: str) -> str:
        """Where grants for a router's requests are put."""
        return self._key(f"inbox:{router}")

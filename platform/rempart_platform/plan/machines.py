"""GPUs and machines, read from one editable file, and what Rempart runs on today."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rempart_platform.plan.errors import PlanError
from rempart_platform.plan.fields import UNKNOWN, Fields, read_toml

MACHINES_FILE = Path(__file__).parent / "machines.toml"
_SUPPORT_FILE = Path(__file__).parent / "support.toml"
_GPU_FIELDS = ("memory_gb", "bandwidth_gb_per_s", "bf16_tflops", "fp8_tflops", "int8_tops", "host_link_gb_per_s")
_PRICE_FIELDS = ("currency", "price_source", "price_date")
_MACHINE_FIELDS = (
    *("name", "gpu", "num_gpus", "provider", "type", "host_memory_gb", "host_bandwidth_gb_per_s"),
    *("network_gbit_per_s", "price_per_hour", *_PRICE_FIELDS, "note"),
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """Bytes, bytes/s and dense FLOP/s. None is unknown, but for fp8: no such hardware."""

    name: str
    memory_bytes: float
    bandwidth: float
    bf16_rate: float
    fp8_rate: float | None
    int8_rate: float | None
    host_link: float | None
    """Bytes/s, one way."""

    @property
    def has_fp8(self) -> bool:
        return self.fp8_rate is not None


@dataclass(frozen=True, slots=True)
class Price:
    """Per machine and hour."""

    amount: float
    currency: str
    source: str
    date: str
    """ISO date, or "unknown"."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One server, or one offer of a provider. None is unknown."""

    name: str
    gpu: Gpu
    num_gpus: int
    host_memory_bytes: float | None = None
    host_bandwidth: float | None = None
    network_bits_per_s: float | None = None
    price: Price | None = None
    provider: str = ""
    type: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Support:
    """What Rempart's engine runs on today."""

    gpus: tuple[str, ...]
    note: str


def read_machines(path: Path = MACHINES_FILE) -> tuple[Machine, ...]:
    """Raises PlanError naming the file and the field."""
    file = read_toml(path)
    file.refuse_others(("gpus", "machines"))
    gpus = {name: _gpu(name, fields) for name, fields in file.section("gpus").sections().items()}
    machines = tuple(_machine(fields, gpus) for fields in file.listed("machines"))
    names = [machine.name for machine in machines]
    for name in names:
        if names.count(name) > 1:
            raise file.error("machines", f"has {name!r} twice")
    return machines


def choose_machines(machines: Sequence[Machine], names: Sequence[str]) -> tuple[Machine, ...]:
    """Those of the names, in their order.

    Raises:
        PlanError: a name is not known; the message lists those that are.
    """
    by_name = {machine.name: machine for machine in machines}
    for name in names:
        if name not in by_name:
            raise PlanError(f"--machine {name!r} is not known; known: {', '.join(by_name)}")
    return tuple(by_name[name] for name in names)


def read_support(path: Path = _SUPPORT_FILE) -> Support:
    file = read_toml(path)
    return Support(gpus=file.texts("gpus"), note=file.text("note"))


def _gpu(name: str, fields: Fields) -> Gpu:
    fields.refuse_others(_GPU_FIELDS)
    return Gpu(
        name=name,
        memory_bytes=fields.number("memory_gb") * 1e9,
        bandwidth=fields.number("bandwidth_gb_per_s") * 1e9,
        bf16_rate=fields.number("bf16_tflops") * 1e12,
        fp8_rate=None if fields.values.get("fp8_tflops") == 0 else fields.number("fp8_tflops") * 1e12,
        int8_rate=_scaled(fields, "int8_tops", 1e12),
        host_link=_scaled(fields, "host_link_gb_per_s", 1e9),
    )


def _machine(fields: Fields, gpus: dict[str, Gpu]) -> Machine:
    fields.refuse_others(_MACHINE_FIELDS)
    gpu = fields.text("gpu")
    if gpu not in gpus:
        raise fields.error("gpu", f"{gpu!r} is not known; known: {', '.join(gpus)}")
    return Machine(
        name=fields.text("name"),
        gpu=gpus[gpu],
        num_gpus=fields.count("num_gpus"),
        host_memory_bytes=_scaled(fields, "host_memory_gb", 1e9),
        host_bandwidth=_scaled(fields, "host_bandwidth_gb_per_s", 1e9),
        network_bits_per_s=_scaled(fields, "network_gbit_per_s", 1e9),
        price=_price(fields),
        provider=fields.text("provider", ""),
        type=fields.text("type", ""),
        note=fields.text("note", ""),
    )


def _price(fields: Fields) -> Price | None:
    amount = fields.known_number("price_per_hour")
    if amount is None:
        return None
    return Price(amount, fields.text("currency"), fields.text("price_source"), fields.text("price_date", UNKNOWN))


def _scaled(fields: Fields, name: str, scale: float) -> float | None:
    number = fields.known_number(name)
    return None if number is None else number * scale

"""What a machine can do for a model: what fits, in which layout, how fast at most, at what cost."""

from collections.abc import Sequence

from rempart_platform.plan.bounds import (
    Bound,
    cost_formula,
    cost_per_million,
    decode_step,
    experts_touched,
    prefill,
    touched_formula,
)
from rempart_platform.plan.fields import UNKNOWN
from rempart_platform.plan.lines import Line, Section, Unit, write, write_amount
from rempart_platform.plan.machines import Machine, Support
from rempart_platform.plan.offload import Offload
from rempart_platform.plan.offload_report import offload_lines
from rempart_platform.plan.placement import (
    MOST_MACHINES,
    Placement,
    best,
    formats_by_worth,
    placements,
    roomiest,
    smallest,
)
from rempart_platform.plan.question import Question
from rempart_platform.plan.weights import WeightFormat

_FEW_GBIT = 100
"""Below this, a network between machines slows every layer of expert parallelism far below its bound."""


def overview(question: Question, machines: Sequence[Machine], support: Support) -> Section:
    """One line for each machine: the contexts that fit, in the best format, on as few machines as it takes."""
    return Section(
        "machines",
        f"Contexts of {question.longest:,} tokens that fit, in the best format, on as few machines as it takes",
        tuple(_overview_line(question, machine, support) for machine in machines),
    )


def machine_sections(question: Question, machine: Machine, support: Support) -> tuple[Section, ...]:
    """Everything about one machine."""
    sections = [_section("machine", machine, "", _facts(machine, support)), _fit_section(question, machine)]
    chosen = _choose(question, machine)
    if question.model.num_experts and (chosen is None or chosen.num_machines > 1):
        title = ": one of it, routed experts in host memory"
        sections.append(
            _section("offload", machine, title, offload_lines(Offload(question.model, machine, question.setup)))
        )
    if chosen is not None:
        layouts = placements(question.model, machine, chosen.weight_format, chosen.num_machines, question.setup)
        title = f"{chosen.weight_format} weights on {_how_many(chosen)}"
        sections.append(_section("layout", machine, f": layouts, {title}", _layouts(question, layouts)))
        sections.append(_section("prefill", machine, f": prefill bounds, {title}", _prefill(question, layouts)))
        sections.append(_section("decode", machine, f": decode bounds, {title}", _decode(question, layouts)))
    return tuple(sections)


def _section(key: str, machine: Machine, title: str, lines: tuple[Line, ...]) -> Section:
    return Section(key, f"{machine.name}{title}", lines, machine.name)


def _choose(question: Question, machine: Machine) -> Placement | None:
    model, setup, wanted = question.model, question.setup, question.weight_format
    if wanted is None:
        return best(model, machine, setup, question.longest)
    return smallest(model, machine, wanted, setup, question.longest)


def _how_many(placement: Placement) -> str:
    return "one" if placement.num_machines == 1 else f"{placement.num_machines} of it"


def _overview_line(question: Question, machine: Machine, support: Support) -> Line:
    chosen = _choose(question, machine)
    label = f"{machine.num_gpus} x {machine.gpu.name}"
    today = "Rempart runs on it" if _runs_today(machine, support) else "Rempart: not yet"
    if chosen is None:
        note = f"does not fit on {MOST_MACHINES} of them; {_price_text(machine)}; {today}"
        return Line(machine.name, label, None, Unit.COUNT, "", note)
    note = f"{chosen.weight_format} on {_how_many(chosen)}; {chosen.layout}; {_price_text(machine)}; {today}"
    contexts = chosen.num_contexts(question.longest)
    return Line(machine.name, label, contexts, Unit.COUNT, chosen.contexts_formula(question.longest), note)


def _facts(machine: Machine, support: Support) -> tuple[Line, ...]:
    gpu = machine.gpu
    fp8 = f"{write_amount(gpu.fp8_rate, 'FLOP/s')} fp8" if gpu.fp8_rate else "no fp8 hardware"
    int8 = f"{write_amount(gpu.int8_rate, 'OP/s')} int8" if gpu.int8_rate else "int8 unknown"
    rates = f"{write_amount(gpu.bf16_rate, 'FLOP/s')} bf16, {fp8}, {int8}"
    memory = f"{write_amount(gpu.memory_bytes, 'B')} at {write_amount(gpu.bandwidth, 'B/s')}"
    host = "unknown" if machine.host_memory_bytes is None else write_amount(machine.host_memory_bytes, "B")
    offer = " ".join(part for part in (machine.provider, machine.type) if part)

    def line(key: str, label: str, value: str, note: str = "") -> Line:
        return Line(key, label, value, Unit.WORDS, "", note)

    today = "yes" if _runs_today(machine, support) else "no"
    return (
        line("gpus", "GPUs", f"{machine.num_gpus} x {gpu.name}: {memory}", rates),
        line("host", "Host memory", host),
        line("price", "Price", _price_text(machine), "; ".join(part for part in (offer, machine.note) if part)),
        line("today", "Rempart runs on it today", today, "" if today == "yes" else support.note),
    )


def _runs_today(machine: Machine, support: Support) -> bool:
    return machine.gpu.name in support.gpus


def _price_text(machine: Machine) -> str:
    price = machine.price
    if price is None:
        return "price unknown"
    date = "date unknown" if price.date == UNKNOWN else price.date
    return f"{price.amount:.2f} {price.currency} per hour ({price.source}, {date})"


def _fit_section(question: Question, machine: Machine) -> Section:
    title = f": contexts of {question.longest:,} tokens that fit on one, and machines needed"
    lines = [
        line
        for weight_format in formats_by_worth(question.model, machine.gpu)
        for line in _fit(question, machine, weight_format)
    ]
    return _section("fit", machine, title, tuple(lines))


def _fit(question: Question, machine: Machine, weight_format: WeightFormat) -> tuple[Line, ...]:
    model, context = question.model, question.longest
    lines = []
    one = roomiest(placements(model, machine, weight_format, 1, question.setup), context)
    note = one.layout
    if weight_format is WeightFormat.FP8 and not machine.gpu.has_fp8:
        note += "; no fp8 hardware: bytes of fp8, decoded to bf16 for each multiplication"
    count, formula = one.num_contexts(context), one.contexts_formula(context)
    lines.append(Line(weight_format.value, f"{weight_format} weights", count, Unit.COUNT, formula, note))
    if count:
        return tuple(lines)
    found = smallest(model, machine, weight_format, question.setup, context)
    key, label = f"{weight_format.value}-machines", f"machines needed, {weight_format}"
    if found is None:
        return (*lines, Line(key, label, None, Unit.COUNT, "", f"does not fit on {MOST_MACHINES}"))
    note = f"least number with a context: {found.contexts_formula(context)} = {found.num_contexts(context)}"
    lines.append(Line(key, label, found.num_machines, Unit.COUNT, "", f"{found.layout}; {note}{_network(machine)}"))
    return tuple(lines)


def _network(machine: Machine) -> str:
    bits = machine.network_bits_per_s
    if bits is None:
        return "; network between machines unknown"
    slow = ": far too slow for the bound to be near" if bits < _FEW_GBIT * 1e9 else ""
    return f"; network of {bits / 1e9:g} Gbit/s{slow}"


def _layouts(question: Question, layouts: Sequence[Placement]) -> tuple[Line, ...]:
    """Bytes on a GPU, and contexts."""
    lines = []
    for each in layouts:
        held, key = each.held, each.sharing.name.lower()
        text = each.outside_experts_formula
        if held.experts:
            text += f" + {write_amount(held.experts, 'B')} routed experts"
        lines.append(Line(f"{key}-weights", f"{each.layout}: weights on a GPU", held.total, Unit.BYTES, text))
        contexts, formula = each.num_contexts(question.longest), each.contexts_formula(question.longest)
        label = f"{each.layout}: contexts of {question.longest:,}"
        lines.append(Line(f"{key}-contexts", label, contexts, Unit.COUNT, formula))
    return tuple(lines)


def _prefill(question: Question, layouts: Sequence[Placement]) -> tuple[Line, ...]:
    """In the layout that is fastest."""
    lines: list[Line] = []
    for context in question.contexts:
        fitting = [each for each in layouts if each.num_contexts(context)]
        layout = max(fitting, key=lambda each: prefill(each, context).tokens_per_s)
        prompts = f"{layout.num_groups} prompts" if layout.num_groups > 1 else "one prompt"
        label = f"Prefill, {prompts} of {context:,}"
        lines += _bound_lines(question, layout, f"{context}", label, prefill(layout, context))
        if question.model.attention.is_sparse:
            lines.append(_dense_line(f"{context}", prefill(layout, context, dense=True)))
    return tuple(lines)


def _decode(question: Question, layouts: Sequence[Placement]) -> tuple[Line, ...]:
    """For each load in the layout that is fastest among those with room for it."""
    lines: list[Line] = []
    for context in question.contexts:
        most = max(layout.num_contexts(context) for layout in layouts)
        for batch in question.batches or tuple(sorted({each for each in (1, 16, most) if each <= most})):
            if batch > most:
                note = f"does not fit: at most {most:,} sequences at once"
                label = f"Decode step, {batch:,} at {context:,}"
                lines.append(Line(f"{context}-{batch}", label, None, Unit.SECONDS, "", note))
                continue
            lines += _decode_lines(question, layouts, batch, context)
    return tuple(lines)


def _decode_lines(question: Question, layouts: Sequence[Placement], batch: int, context: int) -> tuple[Line, ...]:
    model = question.model
    fitting = [each for each in layouts if each.num_contexts(context) >= batch]
    layout = min(fitting, key=lambda each: decode_step(each, batch, context).seconds)
    key = f"{context}-{batch}"
    label = f"Decode step, {batch:,} at {context:,}"
    lines = [*_bound_lines(question, layout, key, label, decode_step(layout, batch, context))]
    if model.attention.is_sparse:
        lines.append(_dense_line(key, decode_step(layout, batch, context, dense=True)))
    if model.num_experts:
        touched = experts_touched(model, batch)
        text = f"{model.num_experts} * {touched_formula(model, batch)}"
        lines.append(Line(f"{key}-experts", "  experts of a layer touched", touched, Unit.RATIO, text))
    return tuple(lines)


def _dense_line(key: str, bound: Bound) -> Line:
    return Line(f"{key}-dense", "  were attention dense", bound.seconds, Unit.SECONDS, bound.formula)


def _bound_lines(question: Question, layout: Placement, key: str, label: str, bound: Bound) -> tuple[Line, ...]:
    """Least time, most tokens/s, and the cost at the assumed utilisation."""
    rate = bound.tokens_per_s
    rate_text = f"{bound.num_tokens:,} tokens / {write(bound.seconds, Unit.SECONDS)}"
    lines = (
        Line(key, f"{label}, at least", bound.seconds, Unit.SECONDS, bound.formula, layout.layout),
        Line(f"{key}-rate", "  tokens/s, at most", rate, Unit.TOKENS_PER_SECOND, rate_text),
    )
    price = layout.machine.price
    if price is None:
        unknown = "no price is known for this machine"
        return (*lines, Line(f"{key}-cost", "  cost per million tokens", None, Unit.MONEY, "", unknown))
    per_hour = price.amount * layout.num_machines
    cost = cost_per_million(per_hour, rate, question.utilisation)
    text = cost_formula(per_hour, rate, question.utilisation)
    label = f"  {price.currency} per million tokens, at {question.utilisation:.0%}"
    return (*lines, Line(f"{key}-cost", label, cost, Unit.MONEY, text))

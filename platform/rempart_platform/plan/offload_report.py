"""What a machine can do whose GPUs are too small: lines for routed experts in host memory."""

from rempart_platform.plan.lines import Line, Unit, write_amount
from rempart_platform.plan.offload import ASSUMED_HOST_BANDWIDTHS, EXPERT_FORMATS, Offload
from rempart_platform.plan.weights import WeightFormat


def offload_lines(offload: Offload) -> tuple[Line, ...]:
    """What stays on the GPUs, and for each format of the experts: host memory, decode, a prefill pass."""
    machine = offload.machine
    gpu_bytes, free = offload.gpu_bytes, offload.gpu_free_bytes
    memory, overhead = machine.gpu.memory_bytes, offload.setup.overhead_bytes
    lines = [
        Line(
            key="gpu",
            label=f"On each GPU, {offload.gpu_format}",
            value=gpu_bytes,
            unit=Unit.BYTES,
            formula=offload.gpu_placement.outside_experts_formula,
        ),
        Line(
            key="gpu-free",
            label="left there for caches",
            value=free,
            unit=Unit.BYTES,
            formula=(
                f"{write_amount(memory, 'B')} - {write_amount(overhead, 'B')} overhead - "
                f"{write_amount(gpu_bytes, 'B')} weights"
            ),
            note="" if free > 0 else "does not fit: not even this way",
        ),
    ]
    if free > 0:
        for expert_format in EXPERT_FORMATS:
            lines += _expert_lines(offload, expert_format)
    return tuple(lines)


def _expert_lines(offload: Offload, expert_format: WeightFormat) -> tuple[Line, ...]:
    model, machine = offload.model, offload.machine
    host, token = offload.host_bytes(expert_format), offload.token_bytes(expert_format)
    experts = write_amount(host, "B")
    room = machine.host_memory_bytes
    if room is None:
        fits = "host memory unknown: it needs that and room for the system"
    elif room < host:
        fits = f"does not fit in {write_amount(room, 'B')} of host memory"
    else:
        fits = f"of {write_amount(room, 'B')}"
    lines = [Line(f"{expert_format}-host", f"Host memory, {expert_format} experts", host, Unit.BYTES, experts, fits)]
    if room is not None and room < host:
        return tuple(lines)
    share = f"{model.num_experts_per_token} / {model.num_experts}"
    key, label = f"{expert_format}-traffic", f"  experts read per token, {expert_format}"
    lines.append(Line(key, label, token, Unit.BYTES, f"{experts} * {share}"))
    known = machine.host_bandwidth
    for bandwidth in (known,) if known else ASSUMED_HOST_BANDWIDTHS:
        key, at = f"{expert_format}-decode-{bandwidth / 1e9:.0f}", f"at {write_amount(bandwidth, 'B/s')} of the host"
        host_text = f"{write_amount(token, 'B')} / {write_amount(bandwidth, 'B/s')}"
        gpu_text = f"{write_amount(offload.gpu_read_bytes, 'B')} / {write_amount(machine.gpu.bandwidth, 'B/s')}"
        note = "" if known else "host bandwidth unknown: this one is assumed"
        ceiling = offload.host_tokens_per_s(expert_format, bandwidth)
        rate = offload.decode_tokens_per_s(expert_format, bandwidth)
        lines += [
            Line(f"{key}-host", f"  ceiling {at}", ceiling, Unit.TOKENS_PER_SECOND, f"1 / ({host_text})", note),
            Line(key, "  with the GPU's part", rate, Unit.TOKENS_PER_SECOND, f"1 / ({host_text} + {gpu_text})"),
        ]
    seconds, link = offload.pass_seconds(expert_format), machine.gpu.host_link
    key, label = f"{expert_format}-pass", f"  one prefill pass, {expert_format} experts"
    if seconds is None or link is None:
        return (*lines, Line(key, label, None, Unit.SECONDS, "", "host link unknown"))
    text = f"{experts} / ({machine.num_gpus} * {write_amount(link, 'B/s')})"
    note = "streams every expert, so a pass should carry many thousands of tokens"
    return (*lines, Line(key, label, seconds, Unit.SECONDS, text, note))

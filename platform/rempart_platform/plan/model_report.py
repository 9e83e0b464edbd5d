"""What is true of a model on any machine: parameters, weights, cache, and sparse against dense attention."""

from collections.abc import Sequence

from rempart_platform.plan.attention import Attention, AttentionFlop, CacheFormat
from rempart_platform.plan.lines import Line, Section, Unit, write_amount, write_params
from rempart_platform.plan.shapes import ModelShape
from rempart_platform.plan.tensors import Choice, Part, num_params
from rempart_platform.plan.weights import WeightFormat, num_tensors, weight_bytes


def model_sections(model: ModelShape, contexts: Sequence[int], cache_format: CacheFormat) -> tuple[Section, ...]:
    """`contexts`: lengths to show the work of attention at."""
    return (
        Section("parameters", f"{model.name}: parameters", _parameters(model)),
        Section("weights", "Weights by format", _weights(model)),
        Section("cache", "Cache per token", _cache(model)),
        Section("attention", "Work of attention, for one sequence", _attention(model, contexts, cache_format)),
    )


def _parameters(model: ModelShape) -> tuple[Line, ...]:
    groups = model.tensors

    def of(choice: Choice) -> int:
        return num_params(groups, choice)

    def line(key: str, label: str, value: float, formula: str, note: str = "") -> Line:
        return Line(key, label, value, Unit.PARAMS, formula, note)

    parts = dict.fromkeys(Part, 0)
    for group in groups:
        if not group.is_mtp:
            parts[group.part] += group.num_params
    main, mtp = sum(parts.values()), of(lambda group: group.is_mtp)
    copies = of(lambda group: group.is_mtp and group.part in (Part.EMBEDDING, Part.HEAD))
    experts = parts[Part.ROUTED_EXPERTS]
    share = f" * {model.num_experts_per_token} / {model.num_experts}" if model.num_experts else ""
    active = experts * model.num_experts_per_token / model.num_experts if model.num_experts else 0.0
    lines = [
        line(part.name.lower(), part.capitalize(), parts[part], _sum_of_groups(model, part))
        for part in Part
        if parts[part]
    ]
    lines.append(line("main", "Main model", main, " + ".join(write_params(each) for each in parts.values() if each)))
    if mtp:
        lines.append(
            line(
                *("mtp", "MTP", mtp, f"{write_params(mtp - copies)} own + {write_params(copies)} copies"),
                note="copies of embedding and head need no memory",
            )
        )
    lines.append(line("total", "Checkpoint", main + mtp, f"{write_params(main)} main + {write_params(mtp)} MTP"))
    others, head = parts[Part.OTHER], parts[Part.HEAD]
    text = f"{write_params(experts)} experts{share} + " if experts else ""
    text += f"{write_params(others)} other + {write_params(head)} head"
    lines.append(line("active", "Active per token", active + others + head, text))
    tensors = num_tensors(groups, model.published)
    linear = sum(group.count for group in groups if group.is_linear)
    scales = f" + {linear:,} scales" if tensors > sum(group.count for group in groups) else ""
    count_text = f"{sum(group.count for group in groups):,} weights{scales}"
    lines.append(Line("tensors", "Tensors", tensors, Unit.COUNT, count_text, f"as published, in {model.published}"))
    return tuple(lines)


def _sum_of_groups(model: ModelShape, part: Part) -> str:
    """Rows, columns and counts; what many small groups add up to is left to the sum."""
    groups = [group for group in model.tensors if group.part is part and not group.is_mtp]
    large = [group for group in groups if group.is_linear or group.part in (Part.EMBEDDING, Part.HEAD)]
    rest = sum(group.num_params for group in groups) - sum(group.num_params for group in large)
    shown = [f"{group.count:,} * {group.rows} * {group.columns}" for group in large]
    return " + ".join(shown + ([f"{write_params(rest)} router and norms"] if rest else []))


def _weights(model: ModelShape) -> tuple[Line, ...]:
    lines = []
    for weight_format in WeightFormat:
        total, main, mtp, copies, outside = (
            weight_bytes(model.tensors, weight_format, choice)
            for choice in (
                lambda group: True,
                lambda group: not group.is_mtp,
                lambda group: group.is_mtp and group.part in (Part.ROUTED_EXPERTS, Part.OTHER),
                lambda group: group.is_mtp and group.part in (Part.EMBEDDING, Part.HEAD),
                lambda group: not group.is_mtp and group.part is not Part.ROUTED_EXPERTS,
            )
        )
        text = " + ".join(
            f"{write_amount(amount, 'B')} {name}"
            for amount, name in ((main, "main"), (mtp, "MTP"), (copies, "copies"))
            if amount
        )
        note = f"as published; {total / 2**30:.1f} GiB" if weight_format is model.published else ""
        lines.append(Line(weight_format.value, f"Checkpoint, {weight_format}", total, Unit.BYTES, text, note))
        experts = main - outside
        if not experts:
            continue
        key, label = f"{weight_format.value}-experts", f"of it routed experts, {weight_format}"
        lines.append(Line(key, label, experts, Unit.BYTES, _expert_formula(model, weight_format), "without MTP's"))
        key, label = f"{weight_format.value}-other", f"all but routed experts, {weight_format}"
        text = f"{write_amount(main, 'B')} main - {write_amount(experts, 'B')} routed experts"
        lines.append(Line(key, label, outside, Unit.BYTES, text, "what attention data parallelism repeats on each GPU"))
    return tuple(lines)


def _expert_formula(model: ModelShape, weight_format: WeightFormat) -> str:
    params = num_params(model.tensors, lambda group: group.part is Part.ROUTED_EXPERTS and not group.is_mtp)
    each = {
        WeightFormat.FP8: "(1 B + 4 B / (128 * 128))",
        WeightFormat.BF16: "2 B",
        WeightFormat.INT8: "(1 B + 2 B / 128)",
        WeightFormat.INT4: "(0.5 B + 2 B / 128)",
    }
    return f"{write_params(params)} * {each[weight_format]}"


def _cache(model: ModelShape) -> tuple[Line, ...]:
    attention = model.attention
    lines = []
    for cache_format in CacheFormat:
        value = attention.cache_bytes(cache_format)
        text = attention.cache_formula(cache_format)
        lines.append(Line(cache_format.value, f"Cache, {cache_format}", value, Unit.BYTES, text))
        if model.num_mtp_layers:
            value = attention.cache_bytes(cache_format, with_mtp=True)
            text = attention.cache_formula(cache_format, with_mtp=True)
            key, label = f"{cache_format.value}-mtp", f"Cache, {cache_format}, with MTP"
            lines.append(Line(key, label, value, Unit.BYTES, text))
    return tuple(lines)


def _attention(model: ModelShape, contexts: Sequence[int], cache_format: CacheFormat) -> tuple[Line, ...]:
    attention = model.attention
    return tuple(line for context in contexts for line in _attention_at(attention, context, cache_format))


def _attention_at(attention: Attention, context: int, cache_format: CacheFormat) -> tuple[Line, ...]:
    lines = []
    kinds = (False, True) if attention.is_sparse else (True,)
    for dense in kinds:
        kind = "dense" if dense else "sparse"
        at = f"at {context:,}, {kind}"
        lines += [
            Line(
                key=f"read-{context}-{kind}",
                label=f"Cache read per token {at}",
                value=attention.read_bytes(cache_format, context, dense=dense),
                unit=Unit.BYTES,
                formula=attention.read_formula(cache_format, context, dense=dense),
            ),
            Line(
                key=f"decode-{context}-{kind}",
                label=f"Decode, one token {at}",
                value=_sum(attention.decode_flop(context, dense=dense)),
                unit=Unit.FLOP,
                formula=attention.decode_flop_formula(context, dense=dense),
            ),
            Line(
                key=f"prefill-{context}-{kind}",
                label=f"Prefill, whole prompt {at}",
                value=_sum(attention.prefill_flop(context, dense=dense)),
                unit=Unit.FLOP,
                formula=attention.prefill_flop_formula(context, dense=dense),
            ),
        ]
    return tuple(lines)


def _sum(flop: AttentionFlop) -> int:
    return flop.attend + flop.index

"""How many tokens of a step's budget each running sequence gets."""

from collections.abc import Sequence as OrderedSequence
from typing import NamedTuple

from rempart_engine.core.sequence import Order, Sequence
from rempart_engine.core.speculation import num_usable_drafts


class Allotment(NamedTuple):
    """One sequence's share of a step."""

    sequence: Sequence
    num_new_tokens: int
    num_drafts: int = 0
    """To be verified beside its new tokens; they cost as much."""


def allot_tokens(
    running: OrderedSequence[Sequence], max_step_tokens: int, next_waiting: Sequence | None, max_drafts: int
) -> tuple[list[Allotment], int]:
    """Divide the budget among `running` (in order); what is left is for admission.

    Who lacks one token (it decodes) goes first, for it costs little and a client sees every pause. Then those who lack
    more (they prefill) take what they can, in order. So that neither starves the other when there are more decoding
    sequences than tokens, a quarter of the budget is held back for prefill if there is any, and the decoding take
    turns. Drafts, at most `max_drafts` a sequence, take what decoding leaves of its part of the budget. Prefill of
    lower priority than `next_waiting`, a sequence that could be admitted at once, sits out.
    """
    decoding = [sequence for sequence in running if sequence.num_remaining_tokens == 1]
    prefilling = [sequence for sequence in running if sequence.num_remaining_tokens > 1]
    has_prefill = bool(prefilling) or next_waiting is not None
    decode_budget = max_step_tokens - max(1, max_step_tokens // 4) if has_prefill else max_step_tokens
    if len(decoding) > decode_budget:
        decoding = sorted(decoding, key=_turn)[:decode_budget]
    for_drafts = decode_budget - len(decoding)
    allotted = []
    for sequence in decoding:
        num_drafts = num_usable_drafts(sequence, min(max_drafts, for_drafts))
        for_drafts -= num_drafts
        allotted.append(Allotment(sequence, 1, num_drafts))
    left = max_step_tokens - sum(1 + allotment.num_drafts for allotment in allotted)
    for sequence in prefilling:
        if left == 0 or (next_waiting is not None and next_waiting.order[0] < sequence.order[0]):
            break
        allotted.append(Allotment(sequence, min(sequence.num_remaining_tokens, left)))
        left -= allotted[-1].num_new_tokens
    allotted.sort(key=lambda allotment: allotment.sequence.order)
    return allotted, left


def _turn(sequence: Sequence) -> tuple[int, int, Order]:
    return -sequence.request.priority, sequence.last_step, sequence.order

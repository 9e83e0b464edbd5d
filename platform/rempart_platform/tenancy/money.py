"""Money is counted in billionths of the operator's currency and written as a decimal."""

from decimal import Decimal, InvalidOperation, Overflow

NANOS = 10**9
_PRICED_TOKENS = 10**6


def format_money(nanos: int) -> str:
    """Billionths as a decimal, at least in hundredths: "12.50", "0.000000123"."""
    whole, rest = divmod(nanos, NANOS)
    return f"{whole}.{f'{rest:09d}'.rstrip('0'):0<2}"


def parse_money(text: str) -> int:
    """A decimal as billionths.

    Raises:
        ValueError: no such number, negative, or finer than a billionth.
    """
    try:
        nanos = Decimal(text) * NANOS
    except (InvalidOperation, Overflow):
        raise ValueError(f"{text!r} is no amount of money") from None
    if not nanos.is_finite() or nanos < 0 or nanos != int(nanos):
        raise ValueError(f"{text!r} is no amount of money")
    return int(nanos)


def format_price(nanos_per_token: int) -> str:
    """A price of one token as that of a million."""
    return format_money(nanos_per_token * _PRICED_TOKENS)


def parse_price(text: str) -> int:
    """A price of a million tokens as billionths per token.

    Raises:
        ValueError: no such number, negative, or finer than a thousandth.
    """
    nanos, rest = divmod(parse_money(text), _PRICED_TOKENS)
    if rest:
        raise ValueError(f"{text!r}: a price per million tokens has at most three decimals")
    return nanos

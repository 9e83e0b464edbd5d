"""What tokens cost, per model, in one currency that the operator names.

A price of 1.234 per million tokens is 1,234 billionths of the currency per token, so costs are whole numbers and exact.
"""

from dataclasses import dataclass, field

from rempart_platform.errors import invalid_request
from rempart_platform.generation import Usage
from rempart_platform.tenancy.keyspace import PRICES
from rempart_platform.tenancy.redis_client import RedisClient

# A whole context at the highest price stays exact in Lua, whose numbers are doubles.
MAX_NANOS_PER_TOKEN = 10**7
_MAX_CURRENCY_CHARS = 15
_PREFIX = "model "


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """Billionths of the currency per token, which is thousandths of it per million tokens.

    Raises:
        RempartError: INVALID_REQUEST for a price out of range, or cached tokens dearer than others: then the worst case
            would not be the one that is reserved.
    """

    input: int = 0
    cached: int = 0
    output: int = 0

    def __post_init__(self) -> None:
        for name in ("input", "cached", "output"):
            if not 0 <= getattr(self, name) <= MAX_NANOS_PER_TOKEN:
                text = f"'{name}' must be between 0 and {MAX_NANOS_PER_TOKEN} billionths per token."
                raise invalid_request(text, f"price.{name}")
        if self.cached > self.input:
            raise invalid_request("Cached input tokens cannot cost more than others.", "price.cached")

    def worst_cost(self, tokens: int, prompt_tokens: int) -> int:
        """Cost of a request that uses all of `tokens`, of which the prompt has `prompt_tokens` and none is cached."""
        return prompt_tokens * self.input + (tokens - prompt_tokens) * self.output

    def cost(self, usage: Usage) -> int:
        uncached = usage.prompt_tokens - usage.cached_tokens
        return uncached * self.input + usage.cached_tokens * self.cached + usage.completion_tokens * self.output


FREE = ModelPrice()


@dataclass(frozen=True, slots=True)
class PriceList:
    """All prices; a model that is not in it is free."""

    currency: str = ""
    of_models: dict[str, ModelPrice] = field(default_factory=dict)

    def of(self, model: str) -> ModelPrice:
        return self.of_models.get(model, FREE)


class PriceRegistry:
    """Reads and changes prices. What was settled keeps the cost it had.

    Raises:
        RempartError: INVALID_REQUEST; UNAVAILABLE when Redis does not answer.
    """

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    async def read(self) -> PriceList:
        stored = await self._redis.read_hash(PRICES)
        of_models = {
            name.removeprefix(_PREFIX): _parse(value)
            for name, value in sorted(stored.items())
            if name.startswith(_PREFIX)
        }
        return PriceList(stored.get("currency", ""), of_models)

    async def set_price(self, model: str, price: ModelPrice, currency: str | None = None) -> None:
        """And the currency with it, when one is given."""
        if not model:
            raise invalid_request("A price needs a model.", "model")
        fields = {} if currency is None else _currency_field(currency)
        fields[_PREFIX + model] = f"{price.input} {price.cached} {price.output}"
        await self._redis.write_hash(PRICES, fields)

    async def set_currency(self, currency: str) -> None:
        await self._redis.write_hash(PRICES, _currency_field(currency))


def _currency_field(currency: str) -> dict[str, str]:
    if not 0 < len(currency) <= _MAX_CURRENCY_CHARS or not currency.isprintable():
        raise invalid_request(f"A currency has 1 to {_MAX_CURRENCY_CHARS} characters.", "currency")
    return {"currency": currency}


def _parse(stored: str) -> ModelPrice:
    return ModelPrice(*map(int, stored.split(" ")))

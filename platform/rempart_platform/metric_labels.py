"""Metrics by their labels, in a tenth of the time that prometheus_client takes: a request asks some thirty times."""

import functools
from collections.abc import Callable
from typing import TypeVar

from prometheus_client.metrics import MetricWrapperBase

_Metric = TypeVar("_Metric", bound=MetricWrapperBase)


def by_labels(metric: _Metric) -> Callable[..., _Metric]:
    """`by_labels(metric)("a", "b")` is `metric.labels("a", "b")`. Of a metric whose labels are never removed."""
    return functools.cache(metric.labels)

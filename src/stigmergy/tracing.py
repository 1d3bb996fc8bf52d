"""Tracing: a span and a duration for each operation, by OpenTelemetry's conventions for database clients.

Needs the extra `otel`. Nothing is recorded until the program sets up an OpenTelemetry SDK.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

try:
    from opentelemetry import context
    from opentelemetry.metrics import MeterProvider, get_meter
    from opentelemetry.trace import (
        Link,
        Span,
        SpanKind,
        StatusCode,
        Tracer,
        TracerProvider,
        get_current_span,
        get_tracer,
        set_span_in_context,
    )
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise ImportError("tracing needs OpenTelemetry: pip install 'stigmergy[otel]'") from error

from stigmergy.checks import check_writes
from stigmergy.flow import Commit, Flow, GetEntry, OpenWatch, Operation, Scan
from stigmergy.middleware import Middleware
from stigmergy.model import Change, Check, Write
from stigmergy.watch import Watch

__all__ = ["with_tracing"]

_NAME = "stigmergy"
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""In seconds: what the conventions advise."""
_propagator = TraceContextTextMapPropagator()


def with_tracing(
    *, keys: bool = False, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
) -> Middleware:
    """Return a middleware that records every operation: a client span, and `db.client.operation.duration` in seconds.

    Both have `db.system.name` ("stigmergy"), `db.operation.name` and, if it failed, `error.type`, the name of the
    error's class; of a commit of several writes also `db.operation.batch.size`. Values and the messages of errors are
    never recorded, keys only with `keys=True`, in `stigmergy.keys`, and never in the metric.

    The context of the writer's span travels in `meta` of what it writes. Whoever takes such a change out of a watch
    that was opened under this middleware gets a consumer span with a link to it. Without providers the global ones are
    used. The conventions: "Semantic conventions for database client spans" and "... metrics", stable since 1.33.
    """
    tracer = get_tracer(_NAME, tracer_provider=tracer_provider)
    duration = get_meter(_NAME, meter_provider=meter_provider).create_histogram(
        "db.client.operation.duration",
        unit="s",
        description="Duration of database client operations.",
        explicit_bucket_boundaries_advisory=_BUCKETS,
    )

    def trace(operation: Operation[Any]) -> Flow[Any]:
        attributes = _attributes(operation)
        noted = {**attributes, "stigmergy.keys": _keys(operation)} if keys else attributes
        span = tracer.start_span(attributes["db.operation.name"], kind=SpanKind.CLIENT, attributes=noted)
        token = context.attach(set_span_in_context(span))
        started = perf_counter()
        try:
            result = yield _carrying(operation, span) if isinstance(operation, Commit) else operation
        except BaseException as error:
            attributes["error.type"] = type(error).__qualname__
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            duration.record(perf_counter() - started, attributes)
            context.detach(token)
            span.end()
        if isinstance(result, Watch):
            return result.map(lambda change: _received(change, tracer, keys))
        return result

    return trace


def _attributes(operation: Operation[Any]) -> dict[str, Any]:
    name = getattr(operation, "name", type(operation).__name__)
    attributes: dict[str, Any] = {"db.system.name": _NAME, "db.operation.name": name}
    if isinstance(operation, Commit) and len(operation.writes) > 1:
        attributes["db.operation.batch.size"] = len(operation.writes)
    return attributes


def _keys(operation: Operation[Any]) -> tuple[str, ...]:
    if isinstance(operation, GetEntry):
        return (operation.key,)
    if isinstance(operation, Commit):
        return tuple(write.key for write in operation.writes)
    if isinstance(operation, (Scan, OpenWatch)):
        return operation.keys or (f"{operation.prefix or ''}*",)
    return ()


def _carrying(operation: Commit, span: Span) -> Commit:
    """The same commit, each write with the context of `span` in its `meta`."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, set_span_in_context(span))
    return Commit([_stamped(write, carrier) for write in operation.writes]) if carrier else operation


def _stamped(write: Write, carrier: Mapping[str, str]) -> Write:
    if isinstance(write, Check):
        return write
    stamped = write._replace(meta={**carrier, **(write.meta or {})})
    try:
        check_writes([stamped])
    except ValueError:  # no room is left in `meta`: tracing makes no write fail
        return write
    return stamped


def _received(change: Change, tracer: Tracer, keys: bool) -> Change:
    writer = get_current_span(_propagator.extract(change.meta or {}, context.Context())).get_span_context()
    if writer.is_valid:
        attributes: dict[str, Any] = {"db.system.name": _NAME, "db.operation.name": "receive"}
        if keys:
            attributes["stigmergy.keys"] = (change.key,)
        tracer.start_span("receive", kind=SpanKind.CONSUMER, links=[Link(writer)], attributes=attributes).end()
    return change

"""Tracing, with a real SDK that keeps what it is told in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from opentelemetry import context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from stigmergy import Check, Flow, MemoryStore, Operation, RevisionConflict, Set, apply_middleware
from stigmergy.testing import Colour
from stigmergy.tracing import with_tracing


class Sdk(NamedTuple):
    spans: InMemorySpanExporter
    metrics: InMemoryMetricReader
    options: dict[str, Any]

    def finished(self) -> list[ReadableSpan]:
        done = list(self.spans.get_finished_spans())
        self.spans.clear()
        return done

    def points(self) -> list[Any]:
        data = self.metrics.get_metrics_data()
        assert data is not None
        (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
        assert (metric.name, metric.unit) == ("db.client.operation.duration", "s")
        return list(metric.data.data_points)


@pytest.fixture
def sdk() -> Iterator[Sdk]:
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    meters = MeterProvider([reader])
    yield Sdk(spans, reader, {"tracer_provider": tracers, "meter_provider": meters})
    tracers.shutdown()
    meters.shutdown()


def traced(store: Any, colour: Colour, sdk: Sdk, **options: Any) -> Any:
    raw = colour.raw(store)
    face = raw.aio if colour.name == "async" else raw
    return colour.face(apply_middleware(face, with_tracing(**sdk.options, **options)))


async def test_each_operation_is_a_client_span_and_a_duration(store: Any, colour: Colour, sdk: Sdk) -> None:
    handle = traced(store, colour, sdk)
    await handle.set("secret-key", "secret-value")
    await handle.get("secret-key")
    await handle.scan()
    await handle.commit(Set("a", 1), Check("b", 0))

    spans = sdk.finished()
    assert [span.name for span in spans] == ["commit", "get_entry", "scan", "commit"]
    assert {span.kind for span in spans} == {SpanKind.CLIENT}
    assert dict(spans[0].attributes or {}) == {"db.system.name": "stigmergy", "db.operation.name": "commit"}
    assert (spans[3].attributes or {})["db.operation.batch.size"] == 2
    assert {span.status.status_code for span in spans} == {StatusCode.UNSET}
    points = sdk.points()
    assert sum(point.count for point in points) == 4
    assert all(point.explicit_bounds[:2] == (0.001, 0.005) for point in points)
    assert "secret" not in repr([span.to_json() for span in spans]) + repr(points)


async def test_a_failure_is_told_by_its_type_only(store: Any, colour: Colour, sdk: Sdk) -> None:
    handle = traced(store, colour, sdk)
    with pytest.raises(RevisionConflict):
        await handle.set("secret-key", "secret-value", if_revision=3)

    (span,) = sdk.finished()
    assert (span.attributes or {})["error.type"] == "RevisionConflict"
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is None
    assert span.events == ()
    assert "secret" not in span.to_json()
    (point,) = sdk.points()
    assert point.attributes["error.type"] == "RevisionConflict"


async def test_keys_are_told_on_request_and_never_in_the_metric(store: Any, colour: Colour, sdk: Sdk) -> None:
    handle = traced(store, colour, sdk, keys=True)
    await handle.set("a", 1)
    await handle.get("b")
    await handle.scan("p")
    await handle.scan(keys=["c", "d"])
    (await handle.watch("e")).close()
    (await handle.watch(prefix="f")).close()

    told = [(span.attributes or {})["stigmergy.keys"] for span in sdk.finished()]
    assert told == [("a",), ("b",), ("p*",), ("c", "d"), ("e",), ("f*",)]
    assert all("stigmergy.keys" not in point.attributes for point in sdk.points())


async def test_whoever_watches_gets_a_link_to_whoever_wrote(store: Any, colour: Colour, sdk: Sdk) -> None:
    handle = traced(store, colour, sdk, keys=True)
    watch = await handle.watch("a")
    await handle.commit(Set("a", 1, meta={"mine": "kept"}))
    await store.set("a", 2)
    changes = await colour.drain(watch)

    assert changes[0].meta is not None
    assert changes[0].meta["mine"] == "kept"
    assert changes[1].meta is None
    spans = {span.name: span for span in sdk.finished()}
    received, commit = spans["receive"], spans["commit"]
    assert received.kind is SpanKind.CONSUMER
    assert [link.context.span_id for link in received.links] == [commit.context.span_id]  # type: ignore[union-attr]
    assert (received.attributes or {})["stigmergy.keys"] == ("a",)


async def test_spans_are_children_of_the_current_one_in_each_task() -> None:
    spans = InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    tracer = tracers.get_tracer("test")
    async with MemoryStore().aio as store:
        handle = apply_middleware(store, with_tracing(tracer_provider=tracers))

        async def work(name: str) -> None:
            with tracer.start_as_current_span(name):
                await handle.update(name, lambda value: name)

        await asyncio.gather(work("one"), work("two"))

    by_name = {span.name: span for span in spans.get_finished_spans()}
    for span in spans.get_finished_spans():
        if span.name in ("get_entry", "commit"):
            assert span.parent is not None
            assert span.parent.span_id in {by_name[name].context.span_id for name in ("one", "two")}  # type: ignore[union-attr]
    tracers.shutdown()


async def test_tracing_makes_no_write_fail(store: Any, colour: Colour, sdk: Sdk) -> None:
    handle = traced(store, colour, sdk)
    inbound = TraceState([(f"v{number}", "x" * 200) for number in range(6)])
    parent = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1), trace_state=inbound)
    token = context.attach(set_span_in_context(NonRecordingSpan(parent)))
    try:
        await handle.set("a", 1)
        await handle.commit(Set("a", 2, meta={"note": "x" * 1000}))
    finally:
        context.detach(token)
    entry = await store.get_entry("a")
    assert entry.meta == {"note": "x" * 1000}


class Ping(Operation[int]):
    __slots__ = ()

    def apply(self, store: Any) -> Any:
        return 1


def test_an_operation_of_an_unknown_kind_goes_through(sdk: Sdk) -> None:
    def ping() -> Flow[int]:
        return (yield Ping())

    with MemoryStore() as store:
        assert apply_middleware(store, with_tracing(keys=True, **sdk.options)).run(ping()) == 1
    (span,) = sdk.finished()
    assert span.name == "Ping"


def test_without_an_sdk_nothing_is_recorded_or_stamped() -> None:
    with MemoryStore() as store:
        handle = apply_middleware(store, with_tracing())
        handle.set("a", 1)
        entry = store.get_entry("a")
        assert entry is not None
        assert entry.meta is None
        assert handle.get("a") == 1

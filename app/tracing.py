"""Traces, for who has OpenTelemetry: from the request through the job into the call of a model.

Off unless the extra `otel` is installed and OpenTelemetry's own variables name a receiver; then a
span costs one comparison, and nothing of OpenTelemetry is imported. The one rule: a span holds what
a log line may hold, ids and figures, and of an error its class alone.

Between the processes the trace travels with the job (`jobs.traceparent`, as W3C Trace Context
writes it); the ticket names only the job.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

log = logging.getLogger("baton.tracing")

Kind = Literal["server", "client", "producer", "consumer", "internal"]

_TRACEPARENT = re.compile("00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_tracer: Any = None  # of opentelemetry.trace, once `start` has made it


class Span:
    """What the body of `span` may say of what it does, which is nothing when nobody traces."""

    def __init__(self, made: Any = None) -> None:
        self._made = made

    def set(self, name: str, value: Any) -> None:
        """Say something, by a name of OpenTelemetry's semantic conventions."""
        if self._made is not None:
            self._made.set_attribute(name, value)

    def rename(self, name: str) -> None:
        """Call it by another name: the route of a request is known late."""
        if self._made is not None:
            self._made.update_name(name)

    def fail(self, kind: str) -> None:
        """It failed; `kind` is a word for how."""
        if self._made is not None:
            from opentelemetry.trace import Status, StatusCode

            self._made.set_attribute("error.type", kind)
            self._made.set_status(Status(StatusCode.ERROR))


_UNTRACED = Span()


def start(service: str, version: str, *, processor: "SpanProcessor | None" = None) -> None:
    """Trace from now on, and until the process ends, which sends what is left.

    Args:
        service: what this process is called unless OTEL_SERVICE_NAME says otherwise.
        processor: takes the spans in place of a sender to OTEL_EXPORTER_OTLP_ENDPOINT.
    """
    global _tracer
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:  # the variables may be there for everybody's sake
        log.warning("not traced", extra={"cause": "the extra otel is not installed"})
        return
    named = Resource.create().attributes.get("service.name", "")
    words = {"service.version": version}
    if str(named).startswith("unknown_service"):
        words["service.name"] = service
    provider = TracerProvider(resource=Resource.create(words))
    provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = provider.get_tracer("baton", version)


def on() -> bool:
    """Does anybody trace?"""
    return _tracer is not None


def stop() -> None:
    """Trace no more."""
    global _tracer
    _tracer = None


@contextmanager
def span(
    name: str,
    kind: Kind = "internal",
    attributes: Mapping[str, Any] | None = None,
    *,
    parent: str | None = None,
) -> Iterator[Span]:
    """Trace the body; it is part of what is traced around it, if anything is.

    Args:
        parent: the traceparent of what it is a part of in another process; not if it is malformed.
    """
    if _tracer is None:
        yield _UNTRACED
        return
    from opentelemetry.trace import SpanKind

    with _tracer.start_as_current_span(
        name,
        context=_context(parent),
        kind=SpanKind[kind.upper()],
        attributes=attributes,
        record_exception=False,  # its message may quote what a client or a model said
        set_status_on_exception=False,
    ) as made:
        told = Span(made)
        try:
            yield told
        except BaseException as error:
            told.fail(type(error).__name__)
            raise


def traceparent() -> str | None:
    """What is traced right now, for another process; None when nothing is."""
    if _tracer is None:
        return None
    from opentelemetry.trace import get_current_span

    context = get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _context(parent: str | None) -> Any:
    """The context of a traceparent; None: the current one."""
    found = _TRACEPARENT.fullmatch(parent) if parent else None
    if found is None:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    told = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags & 1))
    return set_span_in_context(NonRecordingSpan(told), Context())

//! W3C trace context of one session attempt, from client through broker to connector and application.

use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// The `traceparent` of a span: that of OpenTelemetry when it is set up, else one of our own that is not sampled.
pub(crate) fn traceparent(span: &Span) -> String {
    let context = span.context();
    let span_context = context.span().span_context().clone();
    if span_context.is_valid() {
        let flags = span_context.trace_flags().to_u8();
        return format!("00-{}-{}-{flags:02x}", span_context.trace_id(), span_context.span_id());
    }
    format!("00-{:032x}-{:016x}-00", rand::random::<u128>().max(1), rand::random::<u64>().max(1))
}

/// Makes `span` a child of the span that a peer named. What does not parse is left out.
pub(crate) fn follow(span: &Span, traceparent: &str) {
    if let Some(context) = parse(traceparent) {
        let parent = opentelemetry::Context::new().with_remote_span_context(context);
        // Fails when OpenTelemetry is not set up; then the id is in the log line alone.
        let _ = span.set_parent(parent);
    }
}

/// **Source** W3C Trace Context, section 3.2.
fn parse(traceparent: &str) -> Option<SpanContext> {
    let mut parts = traceparent.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    if version != "00" || parts.next().is_some() || trace.len() != 32 || span.len() != 16 || flags.len() != 2 {
        return None;
    }
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::new(u8::from_str_radix(flags, 16).ok()?),
        true,
        TraceState::default(),
    );
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_of_our_own_parses() {
        let text = traceparent(&Span::none());
        assert_eq!(text.len(), 55);
        assert!(parse(&text).is_some(), "{text}");
    }

    #[test]
    fn odd_traceparents_are_left_out() {
        let zero = format!("00-{:032x}-{:016x}-00", 0, 1);
        for text in ["", "00", "00-1-2-3", &zero, "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "ü-ü-ü-ü"]
        {
            assert!(parse(text).is_none(), "{text}");
        }
    }
}

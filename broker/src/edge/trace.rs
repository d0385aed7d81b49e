//! Trace context of an attempt, as the ends send it.

use aws_lc_rs::rand;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// The `traceparent` that an end sent, when it is one; otherwise one that begins here.
///
/// **Source** W3C Trace Context, section 3.2.
pub(super) fn accept(traceparent: &str) -> String {
    if parts(traceparent).is_some() {
        return traceparent.to_owned();
    }
    let mut random = [0; 24];
    // Without randomness the trace has an id that says nothing; the session's own id fails then.
    let _ = rand::fill(&mut random);
    format!("00-{}-{}-00", hex::encode(&random[..16]), hex::encode(&random[16..]))
}

/// The trace id of an accepted `traceparent`.
pub(super) fn trace_id(traceparent: &str) -> String {
    parts(traceparent).map(|(trace, ..)| trace.to_string()).unwrap_or_default()
}

/// Makes the attempt the parent of a span.
pub(super) fn follow(span: &tracing::Span, traceparent: &str) {
    if let Some((trace, parent, flags)) = parts(traceparent) {
        let remote = SpanContext::new(trace, parent, flags, true, TraceState::default());
        let _ = span.set_parent(opentelemetry::Context::new().with_remote_span_context(remote));
    }
}

/// What a message that the current span sends on carries: that span when it is recorded, otherwise what was accepted.
pub(super) fn onward(accepted: &str) -> String {
    let context = tracing::Span::current().context();
    let span = context.span().span_context().clone();
    if !span.is_valid() {
        return accepted.to_owned();
    }
    format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8())
}

fn parts(traceparent: &str) -> Option<(TraceId, SpanId, TraceFlags)> {
    let mut fields = traceparent.split('-');
    let (version, trace, parent, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let well_formed =
        traceparent.len() == 55 && version == "00" && traceparent.bytes().all(|b| !b.is_ascii_uppercase());
    let (trace, parent) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(parent).ok()?);
    let fine = well_formed && trace != TraceId::INVALID && parent != SpanId::INVALID;
    fine.then_some((trace, parent, TraceFlags::new(u8::from_str_radix(flags, 16).ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_trace_context_is_replaced() {
        let sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(accept(sent), sent);
        assert_eq!(trace_id(sent), "0af7651916cd43dd8448eb211c80319c");
        for wrong in ["", "00-00000000000000000000000000000000-b7ad6b7169203331-01", "junk", &sent.to_uppercase()] {
            assert_ne!(accept(wrong), wrong);
            assert_eq!(trace_id(&accept(wrong)).len(), 32);
        }
    }
}

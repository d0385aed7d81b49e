//! Names of the web listener's metrics.

/// Requests answered, by surface (`api`, `scim`, `enrol`, `other`) and status class.
pub const REQUESTS_TOTAL: &str = "selvedge_web_requests_total";
/// From a request's head to its answer's head.
pub const REQUEST_SECONDS: &str = "selvedge_web_request_seconds";
/// Connections open now.
pub const CONNECTIONS: &str = "selvedge_web_connections";
/// Connections refused or given up, by reason (`cap`, `prefix_cap`, `handshake`, `timeout`).
pub const CONNECTIONS_REFUSED_TOTAL: &str = "selvedge_web_connections_refused_total";
/// Requests refused before a handler saw them, by reason (`rate`, `busy`, `body`, `credential`, `role`).
pub const REQUESTS_REFUSED_TOTAL: &str = "selvedge_web_requests_refused_total";
/// Loads of the operator's certificate files, by outcome (`loaded`, `failed`).
pub const CERTIFICATE_LOADS_TOTAL: &str = "selvedge_web_certificate_loads_total";

/// Until the end of the certificate that the listener shows; negative when it has ended.
pub const CERTIFICATE_LEFT_SECONDS: &str = "selvedge_web_certificate_left_seconds";

pub(super) fn describe() {
    metrics::describe_counter!(REQUESTS_TOTAL, "requests answered, by surface and status class");
    metrics::describe_histogram!(REQUEST_SECONDS, metrics::Unit::Seconds, "from a request's head to its answer's head");
    metrics::describe_gauge!(CONNECTIONS, "connections open now");
    metrics::describe_counter!(CONNECTIONS_REFUSED_TOTAL, "connections refused or given up, by reason");
    metrics::describe_counter!(REQUESTS_REFUSED_TOTAL, "requests refused before a handler saw them, by reason");
    metrics::describe_gauge!(
        CERTIFICATE_LEFT_SECONDS,
        metrics::Unit::Seconds,
        "until the end of the web listener's certificate"
    );
    for outcome in ["loaded", "failed"] {
        // Counted from the start, so that the first of them is seen as a rise.
        metrics::counter!(CERTIFICATE_LOADS_TOTAL, "outcome" => outcome).increment(0);
    }
    metrics::describe_counter!(CERTIFICATE_LOADS_TOTAL, "loads of the operator's certificate files, by outcome");
}

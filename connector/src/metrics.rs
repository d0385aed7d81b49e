//! Names of this crate's metrics.

/// Gauge: control streams that are attached.
pub(crate) const CONTROL_STREAMS: &str = "selvedge_end_control_streams";
/// Gauge: sessions that are open at this end.
pub(crate) const SESSIONS: &str = "selvedge_end_sessions";
/// Counter: sessions that ended or did not begin, by `code`.
pub(crate) const SESSIONS_ENDED: &str = "selvedge_end_sessions_ended_total";
/// Counter: application bytes, by `direction` (`up` is towards the application).
pub(crate) const BYTES: &str = "selvedge_end_bytes_total";
/// Gauge: hops that are parked at brokers.
pub(crate) const PARKED_HOPS: &str = "selvedge_connector_parked_hops";
/// Counter: local connections refused by a front end, by `reason`.
pub(crate) const FRONT_REFUSED: &str = "selvedge_client_front_refused_total";

//! Names of what the edge counts, and the few calls that count it.

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

pub(super) const CONNECTIONS_PENDING: &str = "selvedge_edge_connections_pending";
const REFUSED: &str = "selvedge_edge_connections_refused_total";
const CONTROL_STREAMS: &str = "selvedge_edge_control_streams";
const CONTROL_QUEUE_FULL: &str = "selvedge_edge_control_queue_full_total";
const CONTROL_CLOSED: &str = "selvedge_edge_control_streams_closed_total";
const TICKETS: &str = "selvedge_edge_tickets";
pub(super) const SESSIONS: &str = "selvedge_edge_sessions";
const OPENS: &str = "selvedge_edge_opens_total";
const OPEN_SECONDS: &str = "selvedge_edge_open_seconds";
const DIALS: &str = "selvedge_edge_dials_total";
const CUTS: &str = "selvedge_edge_cuts_total";
const CUT_UNCONFIRMED: &str = "selvedge_edge_cuts_unconfirmed_total";
const FENCES_WAITED_FOR: &str = "selvedge_edge_fences_waited_for_total";
const SECOND_CHOICES: &str = "selvedge_edge_second_choices_total";
const RESOLVES: &str = "selvedge_edge_resolves_total";
const LIMITED: &str = "selvedge_edge_limited_total";
const JUDGED: &str = "selvedge_edge_sessions_judged_again_total";
const PARKED: &str = "selvedge_edge_parked_hops";

pub(super) fn describe() {
    describe_gauge!(CONNECTIONS_PENDING, "connections that have shown neither knock nor ticket yet");
    describe_counter!(REFUSED, "connections closed without an answer, by reason");
    describe_gauge!(CONTROL_STREAMS, "control streams, by role");
    describe_counter!(CONTROL_QUEUE_FULL, "control streams closed because their queue was full");
    describe_counter!(CONTROL_CLOSED, "control streams that ended, by why");
    describe_gauge!(TICKETS, "live tickets");
    describe_gauge!(SESSIONS, "sessions of this broker");
    describe_counter!(OPENS, "attempts to open a session, by outcome");
    describe_histogram!(OPEN_SECONDS, "seconds from `Open` to `Opened`");
    describe_counter!(DIALS, "dials of connectors, by outcome");
    describe_counter!(CUTS, "sessions cut, by why");
    describe_counter!(CUT_UNCONFIRMED, "cuts that the connector did not confirm in time");
    describe_counter!(FENCES_WAITED_FOR, "cuts by a change that no connector confirmed before its fence was over");
    describe_counter!(SECOND_CHOICES, "sessions that were given to their second connector");
    describe_counter!(RESOLVES, "names resolved, by outcome");
    describe_counter!(LIMITED, "requests refused by a limit, by limit");
    describe_counter!(JUDGED, "sessions judged again after a change");
    describe_gauge!(PARKED, "connectors' hops that wait for a session");
}

pub(super) fn refused(reason: &'static str) {
    counter!(REFUSED, "reason" => reason).increment(1);
}

pub(super) fn control_streams(role: &'static str, by: f64) {
    gauge!(CONTROL_STREAMS, "role" => role).increment(by);
}

pub(super) fn control_queue_full() {
    counter!(CONTROL_QUEUE_FULL).increment(1);
}

pub(super) fn control_closed(why: &'static str) {
    counter!(CONTROL_CLOSED, "why" => why).increment(1);
}

pub(super) fn tickets(live: usize) {
    gauge!(TICKETS).set(live as f64);
}

pub(super) fn parked(hops: usize) {
    gauge!(PARKED).set(hops as f64);
}

pub(super) fn sessions(live: usize) {
    gauge!(SESSIONS).set(live as f64);
}

pub(super) fn open(outcome: &'static str) {
    counter!(OPENS, "outcome" => outcome).increment(1);
}

pub(super) fn opened(after: std::time::Duration) {
    histogram!(OPEN_SECONDS).record(after);
}

pub(super) fn dial(outcome: &'static str) {
    counter!(DIALS, "outcome" => outcome).increment(1);
}

pub(super) fn cut(why: &'static str) {
    counter!(CUTS, "why" => why).increment(1);
}

pub(super) fn cut_unconfirmed() {
    counter!(CUT_UNCONFIRMED).increment(1);
}

pub(super) fn fence_waited_for() {
    counter!(FENCES_WAITED_FOR).increment(1);
}

pub(super) fn second_choice() {
    counter!(SECOND_CHOICES).increment(1);
}

pub(super) fn resolve(outcome: &'static str) {
    counter!(RESOLVES, "outcome" => outcome).increment(1);
}

pub(super) fn limited(limit: &'static str) {
    counter!(LIMITED, "limit" => limit).increment(1);
}

pub(super) fn judged(sessions: usize) {
    counter!(JUDGED).increment(sessions as u64);
}

//! Names of what the relay counts, and the few calls that count it.

use metrics::{counter, describe_counter, describe_gauge, gauge};

use super::Why;

pub(super) const FLOWS: &str = "selvedge_relay_flows";
pub(super) const FLOWS_HELD: &str = "selvedge_relay_flows_held";
const CLOSED: &str = "selvedge_relay_closed_total";
const BYTES: &str = "selvedge_relay_bytes_total";
const PIPES: &str = "selvedge_relay_pipes";
const PIPES_IDLE: &str = "selvedge_relay_pipes_idle";
const PIPES_REFUSED: &str = "selvedge_relay_pipes_refused_total";
const PIPE_GROWTH_REFUSED: &str = "selvedge_relay_pipe_growth_refused_total";

pub(super) fn describe() {
    describe_gauge!(FLOWS, "flows that are being relayed");
    describe_gauge!(FLOWS_HELD, "directions of flows that wait for the freshness lease");
    gauge!(FLOWS_HELD).increment(0.0);
    describe_counter!(CLOSED, "flows that ended, by why");
    describe_counter!(BYTES, "bytes forwarded, by direction");
    describe_gauge!(PIPES, "kernel pipes that exist");
    describe_gauge!(PIPES_IDLE, "kernel pipes that no flow has borrowed");
    describe_counter!(PIPES_REFUSED, "busy flows that got no pipe and were copied, by why");
    describe_counter!(PIPE_GROWTH_REFUSED, "pipes that the system did not let grow");
}

pub(super) fn closed(why: Why) {
    counter!(CLOSED, "why" => why.as_str()).increment(1);
}

/// The gauges of the pool.
pub(super) struct Pipes {
    open: metrics::Gauge,
    idle: metrics::Gauge,
}

impl Pipes {
    pub(super) fn new() -> Self {
        Self { open: gauge!(PIPES), idle: gauge!(PIPES_IDLE) }
    }

    pub(super) fn set(&self, open: usize, idle: usize) {
        self.open.set(open as f64);
        self.idle.set(idle as f64);
    }
}

/// The counter of bytes forwarded in one direction.
pub(super) fn bytes(direction: &'static str) -> metrics::Counter {
    counter!(BYTES, "direction" => direction)
}

pub(super) fn pipe_refused(why: &'static str) {
    counter!(PIPES_REFUSED, "why" => why).increment(1);
}

pub(super) fn pipe_growth_refused() {
    counter!(PIPE_GROWTH_REFUSED).increment(1);
}

/// Counts one more in a gauge for as long as it lives.
pub(super) struct Counted(metrics::Gauge);

impl Counted {
    pub(super) fn new(name: &'static str) -> Self {
        let gauge = gauge!(name);
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

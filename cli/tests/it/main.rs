//! The binary as its users run it. Nothing here knows the inside of a crate.

mod access;
mod bad_input;
mod commands;
mod drain;
mod durability;
mod front_ends;
mod installation;
mod machines;
mod membership;
mod operators;
mod page;
mod records;
mod reference;
mod regions;
mod restore;
mod shop;
mod syslog;
mod telemetry;
#[expect(dead_code, reason = "the benchmarks use more of it")]
mod world;

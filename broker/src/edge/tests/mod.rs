//! The edge on a real listener, by subject.

mod carry;
mod changes;
mod drain;
mod lease;
mod opens;
mod strangers;
mod world;

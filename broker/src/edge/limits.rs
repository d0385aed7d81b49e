//! What the edge admits at most; may change while it runs.

/// What the edge admits at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sessions of this broker; further ones are `busy`.
    pub sessions: u32,
    /// Sessions of one principal at this broker; further ones are `busy`.
    pub sessions_per_principal: u32,
    /// Control streams at one broker; further ones are refused.
    pub control_streams: u32,
    /// `Open`s of one control stream per second, and how many at once after a pause.
    pub opens_per_second: u32,
    /// Names that one control stream may ask for per second, and at once.
    pub resolves_per_second: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions: 50_000,
            sessions_per_principal: 2_000,
            control_streams: 20_000,
            opens_per_second: 200,
            resolves_per_second: 100,
        }
    }
}

impl Limits {
    /// Each with the name that a configuration file has for it.
    pub fn named(self) -> [(&'static str, u32); 5] {
        [
            ("limits.sessions", self.sessions),
            ("limits.sessions_per_principal", self.sessions_per_principal),
            ("limits.control_streams", self.control_streams),
            ("limits.opens_per_second", self.opens_per_second),
            ("limits.resolves_per_second", self.resolves_per_second),
        ]
    }
}

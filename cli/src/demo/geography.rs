//! Where the demo's brokers stand, and how far apart.

use std::time::Duration;

use selvedge_domain::path::Place;

/// Light in a cable as cables are laid: 200 km in a millisecond on a way that is 1.4 times as long as the great circle.
const MS_PER_KM: f64 = 1.4 / 200.0;
/// Inside a region.
const LOCAL_MS: f64 = 1.0;

/// A region with its broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Region {
    Frankfurt,
    Virginia,
    Singapore,
}

impl Region {
    /// In the order in which the brokers start.
    pub const ALL: [Self; 3] = [Self::Frankfurt, Self::Virginia, Self::Singapore];

    /// Also the broker's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Frankfurt => "frankfurt",
            Self::Virginia => "virginia",
            Self::Singapore => "singapore",
        }
    }

    /// Place in [`Self::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// By name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|region| region.name() == name)
    }

    pub fn place(self) -> Place {
        let (latitude, longitude) = match self {
            Self::Frankfurt => (50.11, 8.68),
            Self::Virginia => (38.95, -77.45),
            Self::Singapore => (1.35, 103.82),
        };
        Place { latitude, longitude }
    }

    /// One way to another region.
    pub fn delay_to(self, other: Self) -> Duration {
        let km = self.place().distance_km(other.place());
        Duration::from_secs_f64((km * MS_PER_KM).max(LOCAL_MS) / 1_000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_the_globe() {
        let ms = |a: Region, b: Region| a.delay_to(b).as_millis();
        assert_eq!(ms(Region::Frankfurt, Region::Frankfurt), 1);
        assert!((43..=48).contains(&ms(Region::Frankfurt, Region::Virginia)));
        assert!((68..=76).contains(&ms(Region::Frankfurt, Region::Singapore)));
        assert!((104..=114).contains(&ms(Region::Virginia, Region::Singapore)));
    }
}

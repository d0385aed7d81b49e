//! Choosing the path of a session: which broker stitches, which connector dials. Pure scoring.
//!
//! Cost of a pair = RTT(client, broker) + RTT(broker, connector) + what the connector's own words add to it. Measured
//! RTT wins; where there is none it is estimated from the great-circle distance.
//!
//! **Invariants:** a draining or stale broker is never chosen; a connector that no broker heard within the last minute is
//! never chosen; what a connector says of its own load and application RTT is clamped and compared only with what the
//! other connectors of its group say, so that a lie moves sessions within its group and never between groups.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::Id;

/// A connector that no broker heard for so long is not a candidate, milliseconds.
pub const HEARD_AGE_MS_MAX: u64 = 60_000;
/// The most that a connector's word of its application RTT may add, milliseconds.
pub const APP_RTT_MS_MAX: f64 = 250.0;
/// What a fully loaded connector adds, milliseconds.
pub const LOAD_PENALTY_MS_MAX: f64 = 50.0;
/// The application RTT of a connector that has not said one, milliseconds.
pub const APP_RTT_MS_UNKNOWN: f64 = 1.0;
/// A longer RTT is taken as this one, milliseconds.
pub const RTT_MS_MAX: f64 = 10_000.0;
/// The RTT between two places of which one is unknown, milliseconds.
pub const RTT_MS_UNKNOWN: f64 = 150.0;
/// The shortest RTT that is estimated, milliseconds.
pub const RTT_MS_ESTIMATED_MIN: f64 = 1.0;
/// Cables are longer than great circles by this factor.
pub const DETOUR_FACTOR: f64 = 1.5;
/// Light in fibre (2/3 c), kilometres per millisecond.
pub const FIBRE_KM_PER_MS: f64 = 200.0;
/// Pairs within this of the best are as good as the best, milliseconds.
pub const NEAR_TIE_MS: f64 = 2.0;
/// Pairs within this share of the best are as good as the best.
pub const NEAR_TIE_SHARE: f64 = 0.05;
/// Another broker is better only when it saves at least so much, milliseconds.
pub const BETTER_BY_MS_MIN: f64 = 10.0;
/// Another broker is better only when it saves at least this share.
pub const BETTER_BY_SHARE_MIN: f64 = 0.2;

const EARTH_RADIUS_KM: f64 = 6_371.0;

/// A place on Earth.
///
/// **Units** degrees north and east.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    /// Degrees north.
    pub latitude: f64,
    /// Degrees east.
    pub longitude: f64,
}

impl Place {
    /// Great-circle distance in kilometres (haversine).
    pub fn distance_km(self, other: Self) -> f64 {
        let (from, to) = (self.latitude.to_radians(), other.latitude.to_radians());
        let half_lat = (to - from) / 2.0;
        let half_lon = (other.longitude - self.longitude).to_radians() / 2.0;
        let h = half_lat.sin().powi(2) + from.cos() * to.cos() * half_lon.sin().powi(2);
        2.0 * EARTH_RADIUS_KM * h.clamp(0.0, 1.0).sqrt().asin()
    }
}

/// The RTT between two places where none was measured, milliseconds.
pub fn estimated_rtt_ms(from: Option<Place>, to: Option<Place>) -> f64 {
    match (from, to) {
        (Some(from), Some(to)) => {
            let rtt = 2.0 * from.distance_km(to) * DETOUR_FACTOR / FIBRE_KM_PER_MS;
            if rtt.is_finite() { rtt.max(RTT_MS_ESTIMATED_MIN) } else { RTT_MS_UNKNOWN }
        }
        _ => RTT_MS_UNKNOWN,
    }
}

/// What is known of a broker.
#[derive(Clone, Debug, PartialEq)]
pub struct Broker {
    /// Node id.
    pub node: u64,
    /// Name.
    pub name: String,
    /// Where its region is.
    pub place: Option<Place>,
    /// It takes no new sessions.
    pub draining: bool,
    /// It holds a freshness lease, as far as the deciding broker knows.
    pub fresh: bool,
    /// Measured RTT to the client, milliseconds.
    pub client_rtt_ms: Option<f64>,
}

/// What is known of a connector of a group that reaches the segment.
#[derive(Clone, Debug, PartialEq)]
pub struct Connector {
    /// Id.
    pub id: Id,
    /// Name.
    pub name: String,
    /// Its group.
    pub group: Id,
    /// Where its group's region is.
    pub place: Option<Place>,
    /// Why it cannot take a session for this endpoint (`target does not answer`, `not connected`); none when it can.
    pub unhealthy: Option<String>,
    /// What each broker measured of it.
    pub links: Vec<Link>,
    /// What it says the RTT to the application is, milliseconds.
    pub app_rtt_ms: Option<f64>,
    /// What it says its load is, 0 to 1.
    pub load: f64,
}

/// A broker's measurement of a connector.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Node id of the broker.
    pub broker: u64,
    /// The broker heard the connector so long ago, milliseconds.
    pub heard_age_ms: u64,
    /// Measured RTT, milliseconds.
    pub rtt_ms: Option<f64>,
}

/// A question: who carries this session?
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// The broker that holds the client's control stream, and decides.
    pub at: u64,
    /// Where the client is, when that is known.
    pub client: Option<Place>,
    /// Brokers.
    pub brokers: Vec<Broker>,
    /// Connectors of the groups that reach the segment.
    pub connectors: Vec<Connector>,
    /// Draws between pairs that are as good as each other.
    pub seed: u64,
}

/// The answer, with everything that was weighed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Choice {
    /// The connector that dials.
    pub chosen: Option<Pair>,
    /// The connector that is tried when the first fails.
    pub second: Option<Pair>,
    /// Another broker that would be better by more than the margin.
    pub better_broker: Option<BetterBroker>,
    /// Every pair, the best first; those that cannot be chosen last.
    pub candidates: Vec<Candidate>,
}

/// A broker and a connector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct Pair {
    /// Node id of the broker that stitches.
    pub broker: u64,
    /// The connector.
    #[schema(value_type = String)]
    pub connector: Id,
}

/// A broker that the client should rather hold its control stream at.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BetterBroker {
    /// Node id.
    pub node: u64,
    /// Saved per round trip, milliseconds; 0 when the deciding broker has no path at all.
    pub saves_ms: f64,
}

/// A pair that was weighed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Candidate {
    /// Broker and connector.
    pub pair: Pair,
    /// The broker's name.
    pub broker_name: String,
    /// The connector's name.
    pub connector_name: String,
    /// What it costs.
    pub cost: Cost,
    /// What became of it.
    pub fate: Fate,
}

/// Parts of a cost. The total is `client_broker_ms + broker_connector_ms + app_over_group_ms + load_over_group_ms`.
///
/// **Units** milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Cost {
    /// RTT between client and broker.
    pub client_broker_ms: f64,
    /// It was measured, not estimated.
    pub client_broker_measured: bool,
    /// RTT between broker and connector.
    pub broker_connector_ms: f64,
    /// It was measured, not estimated.
    pub broker_connector_measured: bool,
    /// RTT between connector and application, as the connector says, clamped.
    pub connector_app_ms: f64,
    /// How much of it exceeds the least in its group.
    pub app_over_group_ms: f64,
    /// How much its load exceeds the least in its group, as a penalty.
    pub load_over_group_ms: f64,
    /// The total.
    pub total_ms: f64,
}

/// What became of a candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "fate", rename_all = "snake_case")]
pub enum Fate {
    /// It carries the session.
    Chosen,
    /// It is tried when the first fails.
    Second,
    /// As good as the chosen one; the draw or the lighter load went the other way.
    NearTie,
    /// It costs more than the chosen one.
    Costlier {
        /// By so much, milliseconds.
        by_ms: f64,
    },
    /// The client holds no control stream at that broker.
    OtherBroker,
    /// The broker takes no new sessions.
    BrokerDraining,
    /// The broker holds no freshness lease.
    BrokerStale,
    /// No broker heard the connector within the last minute.
    Unheard,
    /// The connector cannot take this session.
    Unhealthy {
        /// Why.
        why: String,
    },
}

impl std::fmt::Display for Fate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Chosen => f.write_str("chosen"),
            Self::Second => f.write_str("second choice"),
            Self::NearTie => f.write_str("as good as the chosen one; lost the draw"),
            Self::Costlier { by_ms } => write!(f, "{by_ms:.1} ms slower than the chosen one"),
            Self::OtherBroker => f.write_str("at another broker than the client's"),
            Self::BrokerDraining => f.write_str("the broker is draining"),
            Self::BrokerStale => f.write_str("the broker is stale"),
            Self::Unheard => f.write_str("no broker heard the connector within the last minute"),
            Self::Unhealthy { why } => f.write_str(why),
        }
    }
}

/// Weighs every pair and chooses.
pub fn choose(question: &Question) -> Choice {
    let mut candidates = weigh(question);
    candidates.sort_by(|a, b| {
        is_out(&a.fate)
            .cmp(&is_out(&b.fate))
            .then(a.cost.total_ms.total_cmp(&b.cost.total_ms))
            .then(a.pair.cmp(&b.pair))
    });
    let able = |c: &&Candidate| !is_out(&c.fate);
    let here: Vec<Candidate> =
        candidates.iter().filter(able).filter(|c| c.pair.broker == question.at).cloned().collect();
    let chosen = draw(&here, question.seed);
    let rest: Vec<Candidate> = here.iter().filter(|c| Some(c.pair) != chosen).cloned().collect();
    let second = draw(&rest, question.seed.rotate_left(17));

    let best_here = here.first().map(|c| c.cost.total_ms);
    let elsewhere = candidates.iter().filter(able).find(|c| c.pair.broker != question.at);
    let better_broker = elsewhere.and_then(|other| {
        let Some(best) = best_here else { return Some(BetterBroker { node: other.pair.broker, saves_ms: 0.0 }) };
        let saves_ms = best - other.cost.total_ms;
        (saves_ms > BETTER_BY_MS_MIN.max(best * BETTER_BY_SHARE_MIN))
            .then_some(BetterBroker { node: other.pair.broker, saves_ms })
    });

    let chosen_ms = candidates.iter().find(|c| Some(c.pair) == chosen).map(|c| c.cost.total_ms);
    for candidate in candidates.iter_mut().filter(|c| !is_out(&c.fate)) {
        let over_ms = candidate.cost.total_ms - chosen_ms.unwrap_or_default();
        candidate.fate = match Some(candidate.pair) {
            pair if pair == chosen => Fate::Chosen,
            pair if pair == second => Fate::Second,
            _ if candidate.pair.broker != question.at => Fate::OtherBroker,
            _ if best_here.is_some_and(|best| is_near(candidate.cost.total_ms, best)) => Fate::NearTie,
            _ => Fate::Costlier { by_ms: over_ms },
        };
    }
    Choice { chosen, second, better_broker, candidates }
}

/// Every pair with its cost; those that can be chosen have the fate `NearTie` for now.
fn weigh(question: &Question) -> Vec<Candidate> {
    let groups = GroupLeast::of(&question.connectors);
    let mut candidates = Vec::with_capacity(question.brokers.len() * question.connectors.len());
    for connector in &question.connectors {
        let heard = connector.links.iter().any(|link| link.heard_age_ms <= HEARD_AGE_MS_MAX);
        for broker in &question.brokers {
            let fate = match &connector.unhealthy {
                _ if broker.draining => Fate::BrokerDraining,
                _ if !broker.fresh => Fate::BrokerStale,
                Some(why) => Fate::Unhealthy { why: why.clone() },
                None if !heard => Fate::Unheard,
                None => Fate::NearTie,
            };
            candidates.push(Candidate {
                pair: Pair { broker: broker.node, connector: connector.id },
                broker_name: broker.name.clone(),
                connector_name: connector.name.clone(),
                cost: groups.cost(question, broker, connector),
                fate,
            });
        }
    }
    candidates
}

fn is_out(fate: &Fate) -> bool {
    !matches!(fate, Fate::NearTie | Fate::Chosen | Fate::Second)
}

/// The least that the healthy connectors of each group say of themselves.
struct GroupLeast(BTreeMap<Id, (f64, f64)>);

impl GroupLeast {
    fn of(connectors: &[Connector]) -> Self {
        let mut least = BTreeMap::new();
        for connector in connectors.iter().filter(|c| c.unhealthy.is_none()) {
            let (app, load) = least.entry(connector.group).or_insert((f64::INFINITY, f64::INFINITY));
            *app = app.min(app_rtt_ms(connector));
            *load = load.min(load_ms(connector));
        }
        Self(least)
    }

    fn cost(&self, question: &Question, broker: &Broker, connector: &Connector) -> Cost {
        let measured_to_client = broker.client_rtt_ms.and_then(sane_rtt_ms);
        let measured_to_connector = connector
            .links
            .iter()
            .find(|link| link.broker == broker.node && link.heard_age_ms <= HEARD_AGE_MS_MAX)
            .and_then(|link| link.rtt_ms)
            .and_then(sane_rtt_ms);
        let client_broker_ms = measured_to_client
            .unwrap_or_else(|| estimated_rtt_ms(question.client.or(place_of(question)), broker.place));
        let broker_connector_ms =
            measured_to_connector.unwrap_or_else(|| estimated_rtt_ms(broker.place, connector.place));
        let connector_app_ms = app_rtt_ms(connector);
        let (least_app, least_load) =
            self.0.get(&connector.group).copied().unwrap_or((connector_app_ms, load_ms(connector)));
        let app_over_group_ms = (connector_app_ms - least_app).max(0.0);
        let load_over_group_ms = (load_ms(connector) - least_load).max(0.0);
        Cost {
            client_broker_ms,
            client_broker_measured: measured_to_client.is_some(),
            broker_connector_ms,
            broker_connector_measured: measured_to_connector.is_some(),
            connector_app_ms,
            app_over_group_ms,
            load_over_group_ms,
            total_ms: client_broker_ms + broker_connector_ms + app_over_group_ms + load_over_group_ms,
        }
    }
}

/// A client of unknown place is taken to be near the broker that it measured as nearest.
fn place_of(question: &Question) -> Option<Place> {
    question
        .brokers
        .iter()
        .filter_map(|broker| Some((broker.client_rtt_ms.and_then(sane_rtt_ms)?, broker.place?)))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, place)| place)
}

fn sane_rtt_ms(rtt_ms: f64) -> Option<f64> {
    (rtt_ms.is_finite() && rtt_ms >= 0.0).then_some(rtt_ms.min(RTT_MS_MAX))
}

fn app_rtt_ms(connector: &Connector) -> f64 {
    connector.app_rtt_ms.and_then(sane_rtt_ms).unwrap_or(APP_RTT_MS_UNKNOWN).min(APP_RTT_MS_MAX)
}

fn load_ms(connector: &Connector) -> f64 {
    let load = if connector.load.is_finite() { connector.load.clamp(0.0, 1.0) } else { 1.0 };
    load * LOAD_PENALTY_MS_MAX
}

fn is_near(total_ms: f64, best_ms: f64) -> bool {
    total_ms <= best_ms + NEAR_TIE_MS.max(best_ms * NEAR_TIE_SHARE)
}

/// Power of two choices: two of the pairs that are as good as the best, by seed, and the lighter loaded of them.
///
/// `sorted` is sorted by cost.
fn draw(sorted: &[Candidate], seed: u64) -> Option<Pair> {
    let best_ms = sorted.first()?.cost.total_ms;
    let near = &sorted[..sorted.iter().take_while(|c| is_near(c.cost.total_ms, best_ms)).count()];
    let count = near.len() as u64;
    let first = splitmix(seed) % count;
    let second = match count {
        1 => first,
        _ => (first + 1 + splitmix(seed ^ u64::MAX) % (count - 1)) % count,
    };
    let (first, second) = (&near[first as usize], &near[second as usize]);
    let lighter = second.cost.load_over_group_ms < first.cost.load_over_group_ms;
    Some(if lighter { second.pair } else { first.pair })
}

/// **Source** Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
fn splitmix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRANKFURT: Place = Place { latitude: 50.1, longitude: 8.7 };
    const VIRGINIA: Place = Place { latitude: 38.9, longitude: -77.4 };
    const TOKYO: Place = Place { latitude: 35.7, longitude: 139.7 };

    fn broker(node: u64, place: Place, client_rtt_ms: Option<f64>) -> Broker {
        Broker { node, name: format!("b{node}"), place: Some(place), draining: false, fresh: true, client_rtt_ms }
    }

    fn connector(seq: u64, group: u64, place: Place, rtts_ms: &[(u64, f64)]) -> Connector {
        Connector {
            id: Id::new(1, seq),
            name: format!("c{seq}"),
            group: Id::new(1, 100 + group),
            place: Some(place),
            unhealthy: None,
            links: rtts_ms.iter().map(|&(broker, rtt)| Link { broker, heard_age_ms: 0, rtt_ms: Some(rtt) }).collect(),
            app_rtt_ms: None,
            load: 0.0,
        }
    }

    fn question(brokers: Vec<Broker>, connectors: Vec<Connector>) -> Question {
        Question { at: 1, client: None, brokers, connectors, seed: 7 }
    }

    fn chosen(question: &Question) -> Option<u64> {
        choose(question).chosen.map(|pair| pair.connector.seq)
    }

    fn fate_of(choice: &Choice, broker: u64, connector: u64) -> Fate {
        let pair = Pair { broker, connector: Id::new(1, connector) };
        choice.candidates.iter().find(|c| c.pair == pair).map(|c| c.fate.clone()).unwrap()
    }

    #[test]
    fn the_measured_rtt_wins_over_geography() {
        let q = question(
            vec![broker(1, FRANKFURT, Some(5.0))],
            vec![connector(1, 1, FRANKFURT, &[(1, 80.0)]), connector(2, 2, TOKYO, &[(1, 20.0)])],
        );
        assert_eq!(chosen(&q), Some(2));
        assert!(matches!(fate_of(&choose(&q), 1, 1), Fate::Second));
    }

    #[test]
    fn geography_decides_where_nothing_is_measured() {
        let mut near = connector(1, 1, FRANKFURT, &[(1, 0.0)]);
        let mut far = connector(2, 2, TOKYO, &[(1, 0.0)]);
        near.links[0].rtt_ms = None;
        far.links[0].rtt_ms = None;
        let choice = choose(&question(vec![broker(1, FRANKFURT, None)], vec![far, near]));
        assert_eq!(choice.chosen.unwrap().connector.seq, 1);
        assert!(!choice.candidates[0].cost.broker_connector_measured);
        let across = estimated_rtt_ms(Some(FRANKFURT), Some(VIRGINIA));
        assert!((60.0..130.0).contains(&across), "{across}");
    }

    #[test]
    fn unhealthy_and_unheard_connectors_are_never_chosen() {
        let mut sick = connector(1, 1, FRANKFURT, &[(1, 0.1)]);
        sick.unhealthy = Some("target does not answer".into());
        let mut silent = connector(2, 1, FRANKFURT, &[(1, 0.1)]);
        silent.links[0].heard_age_ms = HEARD_AGE_MS_MAX + 1;
        let far = connector(3, 1, TOKYO, &[(1, 200.0)]);
        let choice = choose(&question(vec![broker(1, FRANKFURT, Some(1.0))], vec![sick, silent, far]));
        assert_eq!(choice.chosen.unwrap().connector.seq, 3);
        assert_eq!(choice.second, None);
        assert_eq!(fate_of(&choice, 1, 1), Fate::Unhealthy { why: "target does not answer".into() });
        assert_eq!(fate_of(&choice, 1, 2), Fate::Unheard);
    }

    #[test]
    fn draining_and_stale_brokers_are_never_chosen_nor_recommended() {
        let mut brokers =
            vec![broker(1, FRANKFURT, Some(100.0)), broker(2, VIRGINIA, Some(1.0)), broker(3, TOKYO, Some(1.0))];
        brokers[1].draining = true;
        brokers[2].fresh = false;
        let mut q = question(brokers, vec![connector(1, 1, FRANKFURT, &[(1, 1.0), (2, 1.0), (3, 1.0)])]);
        let choice = choose(&q);
        assert_eq!(choice.chosen.unwrap().broker, 1);
        assert_eq!(choice.better_broker, None);
        assert_eq!(fate_of(&choice, 2, 1), Fate::BrokerDraining);
        assert_eq!(fate_of(&choice, 3, 1), Fate::BrokerStale);
        q.brokers[0].draining = true;
        assert_eq!(chosen(&q), None);
    }

    #[test]
    fn another_broker_is_named_only_when_it_is_better_by_more_than_the_margin() {
        let at = |other_ms| {
            let brokers = vec![broker(1, FRANKFURT, Some(50.0)), broker(2, VIRGINIA, Some(other_ms))];
            choose(&question(brokers, vec![connector(1, 1, VIRGINIA, &[(1, 50.0), (2, 10.0)])]))
        };
        assert_eq!(at(30.0).better_broker, Some(BetterBroker { node: 2, saves_ms: 60.0 }));
        assert_eq!(at(75.0).better_broker, None, "15 ms of 100 ms is within the margin");
        assert_eq!(at(30.0).chosen.unwrap().broker, 1, "the broker that is asked decides and stitches");
        assert_eq!(fate_of(&at(30.0), 2, 1), Fate::OtherBroker);
    }

    #[test]
    fn near_ties_spread_over_seeds_and_lean_to_the_lighter_load() {
        let connectors = |loads: [f64; 3]| -> Vec<Connector> {
            (1..=3)
                .zip(loads)
                .map(|(seq, load)| Connector { load, ..connector(seq, 1, FRANKFURT, &[(1, 10.0 + seq as f64 / 10.0)]) })
                .collect()
        };
        let spread = |loads: [f64; 3]| {
            let mut counts = [0; 4];
            for seed in 0..300 {
                let q = Question { seed, ..question(vec![broker(1, FRANKFURT, Some(5.0))], connectors(loads)) };
                counts[chosen(&q).unwrap() as usize] += 1;
            }
            counts
        };
        assert!(spread([0.0; 3])[1..].iter().all(|&count| count > 60));
        let leaning = spread([0.03, 0.0, 0.03]);
        assert!(leaning[2] > 160 && leaning[1] > 20 && leaning[3] > 20, "{leaning:?}");
    }

    #[test]
    fn a_connectors_own_words_count_only_within_its_group_and_within_bounds() {
        let liar = Connector { app_rtt_ms: Some(-5.0), load: -3.0, ..connector(1, 1, TOKYO, &[(1, 30.0)]) };
        let honest = Connector { app_rtt_ms: Some(200.0), load: 0.9, ..connector(2, 2, FRANKFURT, &[(1, 10.0)]) };
        assert_eq!(chosen(&question(vec![broker(1, FRANKFURT, Some(1.0))], vec![liar, honest])), Some(2));

        let slow = Connector { app_rtt_ms: Some(f64::MAX), load: f64::NAN, ..connector(1, 1, FRANKFURT, &[(1, 10.0)]) };
        let quick = Connector { app_rtt_ms: Some(3.0), ..connector(2, 1, FRANKFURT, &[(1, 40.0)]) };
        let choice = choose(&question(vec![broker(1, FRANKFURT, Some(1.0))], vec![slow, quick]));
        assert_eq!(choice.chosen.unwrap().connector.seq, 2);
        assert!(choice.candidates.iter().all(|c| c.cost.total_ms.is_finite()));
    }

    #[test]
    fn a_connector_that_another_broker_hears_is_a_candidate_by_geography() {
        let q = question(
            vec![broker(1, FRANKFURT, Some(1.0)), broker(2, TOKYO, None)],
            vec![connector(1, 1, TOKYO, &[(2, 1.0)])],
        );
        let choice = choose(&q);
        assert_eq!(choice.chosen, Some(Pair { broker: 1, connector: Id::new(1, 1) }));
    }

    #[test]
    fn nobody_to_ask_is_no_path() {
        assert_eq!(choose(&question(vec![], vec![])).chosen, None);
        assert_eq!(chosen(&question(vec![broker(1, FRANKFURT, None)], vec![])), None);
    }
}

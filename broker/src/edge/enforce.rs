//! Enforces a change: what it touches is judged again, and what is refused is cut, before the position moves.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use selvedge_cluster::{Confirmation, Enforcer};
use selvedge_domain::event::{Deleted, Envelope, Event};
use selvedge_domain::policy::Principal;
use selvedge_domain::rows::{Connector, User};
use selvedge_domain::state::{IndexKey, Table};
use selvedge_domain::{Id, State};
use selvedge_proto::frame::SessionCode;
use selvedge_proto::identity::{Kind, SpiffeId};
use selvedge_proto::relay::relay_server::RelayServer;
use tokio::task::JoinHandle;

use super::ends::End;
use super::relay_service::RelayService;
use super::sessions::{Session, Touched};
use super::standing::Unfit;
use super::{Edge, boottime_ms, dial, metrics, standing};

/// Stands in for the edge where the cluster must be told of it before it exists: the cluster calls it, and until
/// [`Hook::set`] there is nothing to enforce and nothing to relay.
#[derive(Clone, Default)]
pub struct Hook(Arc<OnceLock<Arc<Edge>>>);

impl Hook {
    /// A hook without an edge.
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on calls go to this edge. Only the first one counts.
    pub fn set(&self, edge: Arc<Edge>) {
        let _ = self.0.set(edge);
    }

    /// The relay service for the peer listener.
    pub fn relay_service(&self) -> RelayServer<RelayService> {
        RelayServer::new(RelayService(self.clone()))
    }

    pub(super) fn edge(&self) -> Option<&Arc<Edge>> {
        self.0.get()
    }
}

impl Enforcer for Hook {
    fn enforce(&self, state: &Arc<State>, events: &[Envelope]) -> Confirmation {
        self.edge()?.enforce(state, events)
    }

    fn replaced(&self, state: &Arc<State>) -> Confirmation {
        self.edge()?.enforce_touched(state, &Touched { all: true, ..Touched::default() }, true)
    }
}

impl Edge {
    /// Judges again everything that these events touch; when it returns, nothing that is no longer allowed is forwarded.
    /// What it answers ends when the connectors of the sessions that it cut have confirmed, or their fences are over.
    ///
    /// Blocks: to be called from a thread that may.
    pub fn enforce(self: &Arc<Self>, state: &Arc<State>, events: &[Envelope]) -> Confirmation {
        let found = Found::in_events(state, self.anchors.trust_domain(), events);
        self.enforce_touched(state, &found.touched, found.ends)
    }

    fn enforce_touched(self: &Arc<Self>, state: &Arc<State>, touched: &Touched, ends: bool) -> Confirmation {
        if ends {
            self.check_ends(state);
        }
        if touched.is_nothing() {
            return None;
        }
        let sessions = self.sessions.touched(touched);
        if sessions.is_empty() {
            return None;
        }
        metrics::judged(sessions.len());
        // The newest state: it is at least as strict as what happens to be enforced now.
        let newest = self.ground.state();
        let mut cut: Vec<Arc<Session>> =
            sessions.into_iter().filter(|session| self.judge_again(session, &newest, false)).collect();
        // What does not carry yet looks at the cut between saying that it carries and its first byte.
        cut.retain(|session| session.carried.load(Ordering::Acquire));
        if cut.is_empty() {
            return None;
        }
        tracing::info!(sessions = cut.len(), position = %state.position(), "sessions are cut by a change");
        let confirmed: Vec<_> = cut.iter().filter_map(|session| self.confirmed(session, &newest)).collect();
        // Waited for to the end, however long that takes: a broker that cannot stop what it carries keeps no lease.
        self.runtime.block_on(futures::future::join_all(cut.iter().map(|session| session.over.cancelled())));
        if confirmed.is_empty() {
            return None;
        }
        Some(Box::pin(async {
            // One that panicked is a bug that the log tells; its session's hops are reset in any case.
            futures::future::join_all(confirmed).await;
        }))
    }

    /// Ends that no longer stand lose their control stream, and with it their tickets and parked hops.
    fn check_ends(&self, state: &State) {
        let now_ms = self.ground.now_ms();
        for end in self.ends.all() {
            if let Err(unfit) = standing::check(state, &end.peer, now_ms) {
                self.expel(&end, unfit);
            }
        }
    }

    /// Closes the control stream of an end that does not stand any more, and forgets its tickets and parked hops.
    pub(super) fn expel(&self, end: &End, unfit: Unfit) {
        tracing::info!(end = %end.peer.id, reason = unfit.as_str(), "a control stream is closed: its end does not stand");
        end.close(unfit.as_str());
        self.tickets.close_stream(end.key);
    }

    /// Tells a session's connector of the cut until it confirms, but no longer than its fence can last. None when its
    /// word is worth nothing: then it was cut off itself.
    fn confirmed(self: &Arc<Self>, session: &Arc<Session>, state: &State) -> Option<JoinHandle<()>> {
        let connector = session.connector()?;
        state.by_id::<Connector>(connector).filter(|row| !row.revoked)?;
        let owing = self.owed.enter(connector, boottime_ms() + self.ground.lease_left_ms());
        let fence = Duration::from_millis(self.ground.lease_told_over_ms());
        let (edge, session) = (self.clone(), session.clone());
        Some(self.runtime.spawn(async move {
            let code = session.cut_code().unwrap_or(SessionCode::Revoked);
            let confirmed = async {
                while !dial::cut(&edge, connector, session.id, code).await {
                    tokio::time::sleep(CUT_RETRY).await;
                }
            };
            if tokio::time::timeout(fence, confirmed).await.is_err() {
                metrics::fence_waited_for();
                tracing::warn!(%connector, session = session.name(), "a connector did not confirm a cut; its fence is over");
            }
            drop(owing);
        }))
    }
}

/// Between two attempts to tell a connector of a cut.
const CUT_RETRY: Duration = Duration::from_millis(200);

/// What events touch.
struct Found<'a> {
    state: &'a State,
    trust_domain: &'a str,
    touched: Touched,
    /// Control streams are to be checked.
    ends: bool,
}

impl<'a> Found<'a> {
    fn in_events(state: &'a State, trust_domain: &'a str, events: &[Envelope]) -> Self {
        let mut found = Self { state, trust_domain, touched: Touched::default(), ends: false };
        for event in events.iter().filter_map(|envelope| envelope.event.as_ref()) {
            found.take(event);
        }
        found
    }

    fn take(&mut self, event: &Event) {
        match event {
            Event::PolicyPut(_)
            | Event::SegmentPut(_)
            | Event::SegmentGroupPut(_)
            | Event::ZonePut(_)
            | Event::ConnectorGroupPut(_)
            | Event::ClusterPut(_) => self.touched.all = true,
            Event::UserPut(user) => self.user(user.id()),
            Event::MembersChanged(changed) => {
                let numbers = changed.added.iter().chain(&changed.removed);
                let users: Vec<Id> = numbers
                    .filter_map(|n| self.state.find::<User>(IndexKey::Number(*n)))
                    .map(|user| user.id())
                    .collect();
                users.into_iter().for_each(|id| self.user(id));
            }
            Event::DevicePut(device) => self.presenter(Kind::Client, device.id()),
            Event::WorkloadPut(workload) => {
                self.touched.principals.insert(Principal::Workload(workload.id()));
                self.presenter(Kind::Workload, workload.id());
            }
            Event::ConnectorPut(connector) => {
                self.ends = true;
                self.touched.connectors.insert(connector.id());
            }
            Event::CertificatePut(certificate) => {
                // A new certificate takes nothing away.
                if certificate.revoked {
                    self.ends = true;
                    self.touched.presenters.insert(certificate.subject.clone());
                }
            }
            Event::Deleted(deleted) => self.deleted(deleted),
            Event::BrokerPut(_)
            | Event::RegionPut(_)
            | Event::ReceiverPut(_)
            | Event::TokenPut(_)
            | Event::DirectoryPut(_)
            | Event::GroupPut(_)
            | Event::EnrolKeyPut(_)
            | Event::Enrolled(_)
            | Event::AvailabilityPut(_)
            | Event::ClientPut(_)
            | Event::JournalCompacted(_)
            | Event::EpochBegan(_)
            | Event::TimeSet(_) => {}
        }
    }

    fn deleted(&mut self, deleted: &Deleted) {
        let table = u8::try_from(deleted.table).ok().and_then(Table::from_number);
        let id = deleted.id.unwrap_or_default();
        match table {
            Some(Table::User) => self.user(id),
            Some(Table::Device) => self.presenter(Kind::Client, id),
            Some(Table::Workload) => {
                self.touched.principals.insert(Principal::Workload(id));
                self.presenter(Kind::Workload, id);
            }
            Some(Table::Connector) => {
                self.ends = true;
                self.touched.connectors.insert(id);
            }
            Some(
                Table::Region
                | Table::Receiver
                | Table::Token
                | Table::Directory
                | Table::EnrolKey
                | Table::Enrolment
                | Table::Availability
                | Table::Client
                | Table::Idempotency
                | Table::Cursor,
            ) => {}
            // A group's members, the policy set, or something that this version does not know.
            _ => self.touched.all = true,
        }
    }

    fn user(&mut self, id: Id) {
        self.touched.principals.insert(Principal::User(id));
    }

    fn presenter(&mut self, kind: Kind, id: Id) {
        self.ends = true;
        if let Ok(id) = SpiffeId::new(self.trust_domain, kind, &id.to_string()) {
            self.touched.presenters.insert(id.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use selvedge_domain::event::MembersChanged;
    use selvedge_domain::rows;

    use super::*;

    fn touched(event: Event) -> (Touched, bool) {
        let envelope = Envelope { event: Some(event), ..Envelope::default() };
        let state = State::default();
        let found = Found::in_events(&state, "demo.test", &[envelope]);
        (found.touched, found.ends)
    }

    #[test]
    fn a_policy_or_segment_touches_every_session() {
        assert!(touched(Event::PolicyPut(rows::Policy::default())).0.all);
        assert!(touched(Event::SegmentPut(rows::Segment::default())).0.all);
        let deleted = |table: Table| touched(Event::Deleted(Deleted { table: table as u32, ..Deleted::default() }));
        assert!(deleted(Table::Policy).0.all && deleted(Table::Group).0.all);
    }

    #[test]
    fn a_person_touches_their_sessions_and_a_device_also_its_stream() {
        let id = Some(Id::new(1, 7));
        let (user, ends) = touched(Event::UserPut(rows::User { id, ..Default::default() }));
        assert_eq!(user.principals, BTreeSet::from([Principal::User(Id::new(1, 7))]));
        assert!(!user.all && !ends);
        let (device, ends) = touched(Event::DevicePut(rows::Device { id, ..Default::default() }));
        assert_eq!(device.presenters, BTreeSet::from(["spiffe://demo.test/client/1-7".to_owned()]));
        assert!(ends);
    }

    #[test]
    fn what_gives_and_what_is_soft_touches_nothing() {
        for event in [
            Event::CertificatePut(rows::Certificate::default()),
            Event::AvailabilityPut(rows::Availability::default()),
            Event::Enrolled(rows::Enrolment::default()),
            Event::MembersChanged(MembersChanged::default()),
        ] {
            let (touched, ends) = touched(event);
            assert!(touched.is_nothing() && !ends);
        }
    }
}

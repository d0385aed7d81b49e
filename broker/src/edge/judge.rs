//! Judges a session on a state: the same questions at its `Open`, after a change, and when its verdict's time is over.

use std::sync::atomic::Ordering;

use selvedge_domain::policy::{Reason, Verdict};
use selvedge_domain::rows::{Connector, Segment};
use selvedge_domain::{Id, State};
use selvedge_proto::frame::SessionCode;

use super::Edge;
use super::sessions::Session;

/// Why a session may not be, or be any longer.
#[derive(Debug)]
pub(super) enum Refusal {
    /// Something about the caller itself, which it may be told.
    Caller(SessionCode),
    /// The policy; told to nobody but the auditor.
    Policy(Box<Verdict>),
}

impl Edge {
    /// Whether a session may be in this state. A session that may has its `good_until` set.
    pub(super) fn judge(&self, session: &Session, state: &State) -> Result<Verdict, Refusal> {
        let now_ms = self.ground.now_ms();
        session.caller.check(state, now_ms).map_err(Refusal::Caller)?;
        let context = session.caller.context(now_ms, &self.region, session.program.clone());
        let verdict = self.decider.decide(state, session.caller.principal, &session.endpoint, &context);
        if !verdict.allowed {
            return Err(Refusal::Policy(Box::new(verdict)));
        }
        let good_until_ms = verdict.good_until_ms.min(session.caller.good_until_ms());
        if session.good_until_ms.swap(good_until_ms, Ordering::Relaxed) != good_until_ms {
            session.good_until_moved.notify_one();
        }
        Ok(verdict)
    }

    /// Judges again; a session that is refused is cut. True when it was.
    pub(super) fn judge_again(&self, session: &Session, state: &State, because_of_time: bool) -> bool {
        let code = match self.judge(session, state) {
            Ok(verdict) => match carrier(session, &verdict, state) {
                Ok(()) => return false,
                Err(code) => code,
            },
            Err(_) if because_of_time => SessionCode::Expired,
            Err(Refusal::Caller(SessionCode::Reauthenticate)) => SessionCode::Expired,
            Err(Refusal::Caller(code)) => code,
            Err(Refusal::Policy(verdict)) => match verdict.reason {
                Reason::PrincipalUnknown
                | Reason::PrincipalInactive
                | Reason::PrincipalRevoked
                | Reason::DeviceRevoked
                | Reason::Restored => SessionCode::Revoked,
                _ => SessionCode::PolicyChanged,
            },
        };
        session.cut_for(code);
        true
    }
}

/// Whether what carries a session is still what its verdict asks for.
fn carrier(session: &Session, verdict: &Verdict, state: &State) -> Result<(), SessionCode> {
    if let Some(connector) = session.connector() {
        let connector: Option<Connector> = state.by_id(connector);
        let connector = connector.filter(|row| !row.revoked).ok_or(SessionCode::Revoked)?;
        let groups = verdict.segment.and_then(|id| state.by_id::<Segment>(id)).map(|row| row.connector_groups);
        if !serves(connector.group, groups.as_deref().unwrap_or_default()) {
            return Err(SessionCode::PolicyChanged);
        }
    }
    match session.segment() {
        Some(before) if verdict.segment != Some(before) => Err(SessionCode::PolicyChanged),
        _ => Ok(()),
    }
}

fn serves(group: Option<Id>, groups: &[Id]) -> bool {
    group.is_some_and(|group| groups.contains(&group))
}

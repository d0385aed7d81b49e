//! Asks the policy, with its indexes kept for as long as the policy set stays the same.
//!
//! **Invariant:** a verdict is made from indexes of the very revision of the state that it is asked for.

use std::sync::Arc;

use parking_lot::Mutex;
use selvedge_domain::State;
use selvedge_domain::policy::{self, Context, Explanation, PolicyIndex, Principal, Request, Verdict};
use selvedge_domain::segment::{Endpoint, SegmentIndex};

/// Segments and policies of one revision, arranged for looking up.
#[derive(Debug, Default)]
pub struct Indexes {
    epoch: u32,
    /// Segments and zones.
    pub segments: SegmentIndex,
    /// Policies.
    pub policies: PolicyIndex,
}

impl Indexes {
    fn are_of(&self, state: &State) -> bool {
        let revision = policy::revision(state);
        (self.epoch, self.segments.revision(), self.policies.revision()) == (state.position().epoch, revision, revision)
    }
}

/// Decides requests and explains decisions. Shared by sessions, relayed dials and the admin API.
#[derive(Debug, Default)]
pub struct Decider {
    newest: Mutex<Arc<Indexes>>,
}

impl Decider {
    /// A decider that has seen no state.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The indexes of a state; built when the policy set has changed since the last call.
    pub fn indexes(&self, state: &State) -> Arc<Indexes> {
        let before = self.newest.lock().clone();
        if before.are_of(state) {
            return before;
        }
        // Built outside the lock: two threads may do it at once, and both results are right.
        let built = Arc::new(Indexes {
            epoch: state.position().epoch,
            segments: SegmentIndex::build(state),
            policies: before.policies.rebuild(state),
        });
        let mut newest = self.newest.lock();
        let order = |indexes: &Indexes| (indexes.epoch, indexes.segments.revision());
        if order(&newest) <= order(&built) {
            *newest = built.clone();
        }
        built
    }

    /// Decides a request on a state. Default is deny.
    pub fn decide(&self, state: &State, principal: Principal, endpoint: &Endpoint, context: &Context) -> Verdict {
        let indexes = self.indexes(state);
        let request = Request { principal, endpoint: endpoint.clone(), context: context.clone() };
        policy::decide(state, &indexes.segments, &indexes.policies, &request)
    }

    /// Says why [`Decider::decide`] decides as it does.
    pub fn explain(&self, state: &State, principal: Principal, endpoint: &Endpoint, context: &Context) -> Explanation {
        let indexes = self.indexes(state);
        let request = Request { principal, endpoint: endpoint.clone(), context: context.clone() };
        policy::explain(state, &indexes.segments, &indexes.policies, &request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use selvedge_domain::Id;
    use selvedge_domain::name::Host;
    use selvedge_domain::rows::Transport;

    #[test]
    fn an_empty_state_denies_everything() {
        let decider = Decider::new();
        let endpoint = Endpoint { host: Host::parse("crm.internal").unwrap(), port: 80, transport: Transport::Tcp };
        let verdict = decider.decide(&State::default(), Principal::User(Id::new(1, 1)), &endpoint, &Context::default());
        assert!(!verdict.allowed);
    }
}

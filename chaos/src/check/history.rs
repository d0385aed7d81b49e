//! What was observed of a cluster, and what can be told at once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use selvedge_domain::{Envelope, Event, Id};

/// What became of one attempt to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Done, at this position.
    Done(Id),
    /// Nobody knows.
    Maybe,
    /// Certainly not done.
    Never,
}

/// A write of a value that no other write has.
#[derive(Clone, Debug)]
pub struct Write {
    /// The register.
    pub key: usize,
    /// The value.
    pub value: String,
    /// Position and moment of its acknowledgement.
    pub acknowledged: Option<(Id, u64)>,
    /// An attempt was left without an answer, or with none that says.
    pub unknown: bool,
    /// Where an attempt is open.
    pub open_at: Option<u64>,
}

impl Write {
    /// Every attempt was answered, and each as not done.
    pub fn never(&self) -> bool {
        self.acknowledged.is_none() && !self.unknown && self.open_at.is_none()
    }
}

/// A read that was answered.
#[derive(Clone, Debug)]
pub struct Read {
    /// The register.
    pub key: usize,
    /// What was read; empty before the first write.
    pub value: String,
    /// Of the state that was read.
    pub position: Id,
    /// When it was asked for.
    pub invoked: u64,
    /// When it was answered.
    pub returned: u64,
}

/// An event as a follower was sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Tells contents apart.
    pub content: u64,
    /// A register's row, and its value.
    pub written: Option<(usize, String)>,
    /// A token's name.
    pub token: Option<String>,
}

impl Seen {
    /// What is kept of an event.
    pub fn of(event: &Envelope, content: u64) -> Self {
        let (mut written, mut token) = (None, None);
        match &event.event {
            Some(Event::UserPut(user)) if !user.display_name.is_empty() => {
                let key = user.user_name.strip_prefix("key-").and_then(|key| key.parse().ok());
                written = key.map(|key| (key, user.display_name.clone()));
            }
            Some(Event::TokenPut(put)) => token = Some(put.name.clone()),
            _ => {}
        }
        Self { content, written, token }
    }
}

/// Hashes of state and journal after an entry.
pub type Hashes = ([u8; 32], Vec<u8>);

/// What was observed of a cluster. Moments are numbered in the order in which they were.
#[derive(Default)]
pub struct History {
    moment: u64,
    /// What was seen at once not to hold.
    pub violations: Vec<String>,
    /// Writes, acknowledged or not.
    pub writes: Vec<Write>,
    orphans: VecDeque<usize>,
    /// Reads that were answered.
    pub reads: Vec<Read>,
    /// What followers were sent, by sequence number.
    pub journal: BTreeMap<u64, Seen>,
    /// Tokens in the journal, by name.
    pub tokens: BTreeMap<String, u64>,
    /// Tokens that were acknowledged.
    pub tokens_made: Vec<(String, Id)>,
    tokens_asked: u64,
    followers: BTreeMap<u64, u64>,
    hashes: BTreeMap<u64, Hashes>,
    /// The newest position of which somebody was told that it is enforced everywhere.
    pub enforced: Id,
    served: BTreeMap<u64, Id>,
    terms: BTreeMap<(u64, u64), u64>,
    /// All faults are over.
    pub healed: bool,
    /// Nothing more is asked for.
    pub quiet: bool,
    /// Brokers through which a write and a read succeeded after that.
    pub served_again: BTreeSet<u64>,
}

impl History {
    /// Numbers this moment.
    pub fn tick(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    /// A new write to a register.
    pub fn new_write(&mut self, key: usize) -> usize {
        let value = format!("write-{}", self.writes.len() + 1);
        self.writes.push(Write { key, value, acknowledged: None, unknown: false, open_at: None });
        self.writes.len() - 1
    }

    /// An attempt begins; answers what to write.
    pub fn invoke(&mut self, op: usize, node: u64) -> (usize, String) {
        self.tick();
        let write = &mut self.writes[op];
        write.open_at = Some(node);
        (write.key, write.value.clone())
    }

    /// An attempt was answered.
    pub fn answer(&mut self, op: usize, attempt: Attempt) {
        let moment = self.tick();
        let write = &mut self.writes[op];
        write.open_at = None;
        match attempt {
            Attempt::Done(position) => {
                let again = write.acknowledged.replace((position, moment));
                if again.is_some_and(|(first, _)| first != position) {
                    let value = &write.value;
                    self.violations.push(format!("I2: `{value}` was acknowledged at two positions"));
                }
                write.acknowledged = again.or(write.acknowledged);
            }
            Attempt::Maybe => write.unknown = true,
            Attempt::Never => {}
        }
    }

    /// A process ended: whatever it had not answered, nobody knows.
    pub fn died(&mut self, node: u64) {
        for (op, write) in self.writes.iter_mut().enumerate() {
            if write.open_at == Some(node) {
                write.open_at = None;
                write.unknown = true;
                self.orphans.push_back(op);
            }
        }
    }

    /// A write that lost its client.
    pub fn adopt(&mut self) -> Option<usize> {
        self.orphans.pop_front()
    }

    /// The name of a new token.
    pub fn new_token(&mut self) -> String {
        self.tokens_asked += 1;
        format!("token-{}", self.tokens_asked)
    }

    /// A token was acknowledged.
    pub fn token_made(&mut self, name: String, position: Id) {
        self.tokens_made.push((name, position));
    }

    /// A read was answered.
    pub fn read(&mut self, key: usize, value: String, position: Id, invoked: u64) {
        let returned = self.tick();
        self.reads.push(Read { key, value, position, invoked, returned });
    }

    /// Register writes in the journal: sequence number, register, value.
    pub fn written(&self) -> impl Iterator<Item = (u64, usize, &str)> {
        let mut last: BTreeMap<usize, &str> = BTreeMap::new();
        self.journal.iter().filter_map(move |(seq, seen)| {
            let (key, value) = seen.written.as_ref()?;
            // A row that changed in something else is no write of its value.
            (last.insert(*key, value) != Some(value)).then_some((*seq, *key, &**value))
        })
    }

    /// Where the follower at a broker goes on.
    pub fn follower_at(&self, node: u64) -> u64 {
        self.followers.get(&node).copied().unwrap_or(1)
    }

    /// The follower at a broker has whole commands up to before `next`.
    pub fn followed(&mut self, node: u64, next: u64) {
        self.followers.insert(node, next);
    }

    /// I4: whoever is sent an event is sent the same one.
    pub fn saw(&mut self, node: u64, id: Id, seen: Seen) {
        if let Some(name) = &seen.token {
            self.tokens.entry(name.clone()).or_insert(id.seq);
        }
        let first = self.journal.entry(id.seq).or_insert_with(|| seen.clone());
        if *first != seen {
            self.violations.push(format!("I4: the follower at b{node} was sent another event {id}"));
        }
    }

    /// I5: state and journal are equal after equal entries.
    pub fn applied(&mut self, node: u64, index: u64, hashes: Hashes) {
        let first = self.hashes.entry(index).or_insert_with(|| hashes.clone());
        if *first != hashes {
            self.violations.push(format!("I5: after entry {index}, b{node} holds another state or journal"));
        }
    }

    /// I6: a term never goes back within a process.
    pub fn in_term(&mut self, node: u64, boot: u64, term: u64) {
        let known = self.terms.entry((node, boot)).or_default();
        if term < *known {
            self.violations.push(format!("I6: b{node} went back from term {known} to {term}"));
        }
        *known = term.max(*known);
    }

    /// I6: what a broker serves (it does while it holds its lease) is never below what it has served, over restarts.
    pub fn serves(&mut self, node: u64, position: Id) {
        let known = self.served.entry(node).or_default();
        if position < *known {
            self.violations.push(format!("I6: b{node} served {known}, and now serves {position}"));
        }
        *known = position.max(*known);
    }

    /// I8: nobody holds a lease for a state that is older than a change which is enforced everywhere.
    pub fn holds_lease(&mut self, node: u64, enforces: Id) {
        if enforces < self.enforced {
            let enforced = self.enforced;
            self.violations
                .push(format!("I8: b{node} holds a lease at {enforces}; {enforced} was enforced everywhere"));
        }
    }

    /// Somebody was told that a change is enforced everywhere.
    pub fn enforced_everywhere(&mut self, position: Id) {
        self.enforced = self.enforced.max(position);
    }
}

//! What a data directory knows that an earlier state does not: what was taken away since.

use std::collections::BTreeMap;
use std::path::Path;

use selvedge_domain::command::Subject;
use selvedge_domain::decide::Beyond;
use selvedge_domain::rows::{Certificate, Connector, Device, Group, User, Workload};
use selvedge_domain::{Id, State};
use selvedge_storage::inspect;

use super::{Error, replayed};

/// What the directory of a stopped broker holds beyond a state. Nothing when it is not further. Blocks.
///
/// **Errors**: [`Error::InUse`], [`Error::Directory`]; [`Error::OtherCluster`].
pub fn in_directory(path: &Path, earlier: &State) -> Result<Beyond, Error> {
    if let Some(pid) = inspect::holder(path) {
        return Err(Error::InUse { path: path.to_owned(), pid });
    }
    let (later, ..) = replayed(path)?;
    let id = |state: &State| state.cluster().map(|row| hex::encode(row.cluster_id)).unwrap_or_default();
    if id(&later) != id(earlier) {
        return Err(Error::OtherCluster { path: path.to_owned(), found: id(&later), expected: id(earlier) });
    }
    Ok(between(earlier, &later))
}

/// What was taken away between two states of one cluster.
fn between(earlier: &State, later: &State) -> Beyond {
    let mut beyond = Beyond::default();
    if later.position() <= earlier.position() {
        return beyond;
    }
    for old in earlier.rows::<Device>().filter(|row| !row.revoked) {
        let new = later.by_id::<Device>(old.id());
        if new.is_none_or(|new| new.revoked || new.generation > old.generation) {
            beyond.revoked.push(Subject::Device(old.id()));
        }
    }
    for old in earlier.rows::<Workload>().filter(|row| !row.revoked) {
        let new = later.by_id::<Workload>(old.id());
        if new.is_none_or(|new| new.revoked || new.generation > old.generation) {
            beyond.revoked.push(Subject::Workload(old.id()));
        }
    }
    for old in earlier.rows::<Connector>().filter(|row| !row.revoked) {
        let new = later.by_id::<Connector>(old.id());
        if new.is_none_or(|new| new.revoked || new.generation > old.generation) {
            beyond.revoked.push(Subject::Connector(old.id()));
        }
    }
    let mut left = BTreeMap::<Id, Vec<Id>>::new();
    for old in earlier.rows::<User>() {
        let new = later.by_id::<User>(old.id());
        if old.active && new.as_ref().is_none_or(|new| !new.active || new.generation > old.generation) {
            beyond.disabled.push(old.id());
        }
        for group in earlier.groups_of(&old) {
            let number = later.by_id::<Group>(group.id()).map(|group| group.number);
            let is_in = |new: &User| number.is_some_and(|number| new.groups.contains(&number));
            if !new.as_ref().is_some_and(is_in) {
                left.entry(group.id()).or_default().push(old.id());
            }
        }
    }
    beyond.left = left.into_iter().collect();
    let unknown = |row: &Certificate| earlier.row::<Certificate>(row.serial.as_bytes()).is_none();
    beyond.certificates = later.rows::<Certificate>().filter(unknown).collect();
    beyond
}

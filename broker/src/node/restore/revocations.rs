//! What was taken away after a state was saved, from whatever is left: data directories, lines of events, lines of audit
//! records.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use selvedge_cluster::restore::in_directory;
use selvedge_domain::command::Subject;
use selvedge_domain::decide::Beyond;
use selvedge_domain::rows::{Connector, Device, Group, User, Workload};
use selvedge_domain::state::IndexKey;
use selvedge_domain::{Id, State};
use serde_json::Value;

use super::Error;

/// Bytes of a line that is read; no event or record is longer.
const LINE_BYTES_MAX: usize = 16 << 20;

/// Adds what a path holds beyond a state. What the state does not know is left to whoever applies it.
pub(super) fn merge(path: &Path, state: &State, beyond: &mut Beyond) -> Result<(), Error> {
    if path.is_dir() {
        let found = in_directory(path, state)?;
        beyond.revoked.extend(found.revoked);
        beyond.disabled.extend(found.disabled);
        beyond.left.extend(found.left);
        beyond.certificates.extend(found.certificates);
        return Ok(());
    }
    let failed = |source| Error::file(path, source);
    let mut lines = BufReader::new(File::open(path).map_err(failed)?);
    let (mut line, mut number, mut known) = (Vec::new(), 0_usize, 0_usize);
    loop {
        line.clear();
        number += 1;
        if std::io::Read::take(&mut lines, LINE_BYTES_MAX as u64).read_until(b'\n', &mut line).map_err(failed)? == 0 {
            break;
        }
        // A record that came by syslog has a header before its object.
        let object = line.iter().position(|byte| *byte == b'{').and_then(|at| serde_json::from_slice(&line[at..]).ok());
        let object: Value = match object {
            Some(object) => object,
            None if line.trim_ascii().is_empty() => continue,
            None => return Err(Error::Damaged(path.to_owned(), format!("line {number} is neither event nor record"))),
        };
        known += usize::from(take_event(&object, state, beyond) || take_record(&object, state, beyond));
    }
    if known == 0 {
        return Err(Error::Damaged(path.to_owned(), "it has neither events nor audit records".to_owned()));
    }
    Ok(())
}

fn id(value: &Value) -> Option<Id> {
    value.as_str()?.parse().ok()
}

/// A line of `selvedge events --json`. False when it is none.
fn take_event(line: &Value, state: &State, beyond: &mut Beyond) -> bool {
    let (Some(at), Some(event)) = (id(&line["id"]), line["event"].as_str()) else { return false };
    if at <= state.position() {
        return true;
    }
    let row = &line["row"];
    let Some(of) = id(&row["id"]).or_else(|| id(&row["group"])) else { return true };
    let generation = row["generation"].as_u64().unwrap_or(0);
    let revoked = row["revoked"] == true;
    match event {
        "device.put" if revoked || state.by_id::<Device>(of).is_some_and(|old| generation > old.generation) => {
            beyond.revoked.push(Subject::Device(of));
        }
        "workload.put" if revoked || state.by_id::<Workload>(of).is_some_and(|old| generation > old.generation) => {
            beyond.revoked.push(Subject::Workload(of));
        }
        "connector.put" if revoked || state.by_id::<Connector>(of).is_some_and(|old| generation > old.generation) => {
            beyond.revoked.push(Subject::Connector(of));
        }
        "user.put"
            if row["active"] == false || state.by_id::<User>(of).is_some_and(|old| generation > old.generation) =>
        {
            beyond.disabled.push(of);
        }
        "deleted" if row["table"] == "user" => beyond.disabled.push(of),
        "deleted" if row["table"] == "group" => {
            let Some(group) = state.by_id::<Group>(of) else { return true };
            let members = state.rows::<User>().filter(|user| user.groups.contains(&group.number));
            beyond.left.push((of, members.map(|user| user.id()).collect()));
        }
        "members.changed" => {
            let removed = row["removed"].as_array().into_iter().flatten().filter_map(Value::as_u64);
            let users = removed.filter_map(|number| state.find::<User>(IndexKey::Number(u32::try_from(number).ok()?)));
            beyond.left.push((of, users.map(|user| user.id()).collect()));
        }
        _ => {}
    }
    true
}

/// An audit record, as it is stored or as a log receiver got it. False when it is none.
fn take_record(line: &Value, state: &State, beyond: &mut Beyond) -> bool {
    let record = if line["record"].is_object() { &line["record"] } else { line };
    let Some(kind) = record["kind"].as_str() else { return false };
    let is_later = serde_json::from_value::<Id>(record["position"].clone()).is_ok_and(|at| at > state.position());
    if kind != "admin.change" || record["outcome"] != "done" || !is_later {
        return true;
    }
    let (action, target) = (record["action"].as_str(), record["target"].as_str().unwrap_or_default());
    match (action, target.split_once('/')) {
        (Some("revoke"), Some((kind, which))) => revoke(kind, which, state, beyond),
        (Some("user.delete"), Some(("user", which))) => beyond.disabled.extend(which.parse::<Id>().ok()),
        _ => {}
    }
    true
}

/// By id, or by the name that somebody wrote: then everything of that name.
fn revoke(kind: &str, which: &str, state: &State, beyond: &mut Beyond) {
    let id = which.parse::<Id>().ok();
    match (kind, id) {
        ("device", Some(id)) => beyond.revoked.push(Subject::Device(id)),
        ("workload", Some(id)) => beyond.revoked.push(Subject::Workload(id)),
        ("connector", Some(id)) => beyond.revoked.push(Subject::Connector(id)),
        ("device", None) => {
            let named = state.rows::<Device>().filter(|row| row.name == which);
            beyond.revoked.extend(named.map(|row| Subject::Device(row.id())));
        }
        ("workload", None) => {
            let named = state.find::<Workload>(IndexKey::name(which));
            beyond.revoked.extend(named.map(|row| Subject::Workload(row.id())));
        }
        ("connector", None) => {
            let named = state.rows::<Connector>().filter(|row| row.name == which);
            beyond.revoked.extend(named.map(|row| Subject::Connector(row.id())));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use selvedge_domain::RowChange;
    use selvedge_domain::rows::Row;
    use selvedge_domain::state::Meta;

    use super::*;

    fn stored<R: Row>(row: &R) -> RowChange {
        RowChange { table: R::TABLE as u8, key: row.key(), value: Some(row.encode_to_vec().into()) }
    }

    /// At position 1-100: two devices of one name, a connector, a group of two people.
    fn state() -> State {
        let id = |seq| Some(Id::new(1, seq));
        let device = |seq| Device { id: id(seq), name: "phone".into(), generation: 1, ..Device::default() };
        let user = |seq, number, name: &str| User {
            id: id(seq),
            number,
            user_name: name.into(),
            active: true,
            groups: vec![9],
            generation: 1,
            ..User::default()
        };
        let rows = [
            stored(&device(10)),
            stored(&device(11)),
            stored(&Connector { id: id(12), name: "fra".into(), generation: 1, ..Connector::default() }),
            stored(&Group { id: id(13), number: 9, display_name: "sales".into(), ..Group::default() }),
            stored(&user(14, 1, "ann")),
            stored(&user(15, 2, "bob")),
        ];
        State::load(Meta { position: id(100), ..Meta::default() }, rows).expect("a state")
    }

    fn merged(lines: &str) -> Result<Beyond, Error> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), lines).expect("writes");
        let mut beyond = Beyond::default();
        merge(file.path(), &state(), &mut beyond).map(|()| beyond)
    }

    #[test]
    fn events_after_the_state_take_away_and_those_before_it_do_not() {
        let beyond = merged(
            r#"{"id":"1-99","event":"device.put","row":{"id":"1-10","revoked":true,"generation":2}}
{"id":"1-101","event":"connector.put","row":{"id":"1-12","revoked":true,"generation":2}}
{"id":"1-102","event":"device.put","row":{"id":"1-11","revoked":false,"generation":2}}
{"id":"1-103","event":"user.put","row":{"id":"1-14","active":false,"generation":2}}
{"id":"1-104","event":"deleted","row":{"table":"user","id":"1-15","name":"bob"}}
{"id":"1-105","event":"members.changed","row":{"group":"1-13","added":[],"removed":[2,77]}}
{"id":"1-106","event":"device.put","row":{"id":"1-10","revoked":false,"generation":1}}
{"bookmark":"1-106","state_hash":"00","journal_hash":"00"}
"#,
        )
        .expect("events");
        assert_eq!(beyond.revoked, [Subject::Connector(Id::new(1, 12)), Subject::Device(Id::new(1, 11))]);
        assert_eq!(beyond.disabled, [Id::new(1, 14), Id::new(1, 15)]);
        assert_eq!(beyond.left, [(Id::new(1, 13), vec![Id::new(1, 15)])]);
    }

    #[test]
    fn audit_records_are_read_as_they_are_stored_and_as_a_receiver_got_them() {
        let record = |action: &str, target: &str, outcome: &str, position: &str| {
            format!(
                r#"{{"kind":"admin.change","actor":"token/1-2","actor_name":"","action":"{action}","target":"{target}","outcome":"{outcome}","position":{position},"source":""}}"#
            )
        };
        let syslog = |record: &str| {
            format!(
                r#"<110>1 2026-03-01T00:00:00Z b1 selvedge - admin.change [selvedge@1 id="a/1"] {{"id":"a/1","seq":1,"record":{record}}}"#
            )
        };
        let lines = [
            record("revoke", "connector/fra", "done", "\"1-101\""),
            syslog(&record("revoke", "device/phone", "done", "\"1-102\"")),
            record("user.delete", "user/1-15", "done", "\"1-103\""),
            record("revoke", "device/1-77", "forbidden", "null"),
            record("revoke", "device/1-78", "done", "\"1-98\""),
            r#"{"kind":"session.close","session":"00"}"#.to_owned(),
        ];
        let beyond = merged(&lines.join("\n")).expect("records");
        let subjects =
            [Subject::Connector(Id::new(1, 12)), Subject::Device(Id::new(1, 10)), Subject::Device(Id::new(1, 11))];
        assert_eq!(beyond.revoked, subjects, "of a name that several have, all are");
        assert_eq!(beyond.disabled, [Id::new(1, 15)]);
    }

    #[test]
    fn a_file_of_something_else_is_refused() {
        for lines in ["", "\n\n", "kind: Region\n", "{\"a\": 1}\n", "{\"id\":\"1-1\"\n"] {
            assert!(matches!(merged(lines), Err(Error::Damaged(..))), "{lines:?}");
        }
    }
}

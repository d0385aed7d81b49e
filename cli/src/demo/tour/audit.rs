//! What the log receiver knows, and whether a journal can be trusted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::json;

use super::super::apps;
use super::super::clock::Moment;
use super::super::geography::Region;
use super::super::world::ALLOWED;
use super::{RETRY_EVERY, Tour};

/// Changes made while the receiver is away.
const CHANGES: usize = 30;
/// The receiver is away for so long at least.
const AWAY: Duration = Duration::from_secs(4);
/// Longest wait until the receiver has caught up.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(60);
/// Bytes of a frame's head in a segment: length and checksum.
const FRAME_HEAD_BYTES: u64 = 8;

impl Tour {
    pub(super) async fn receiver_away(&mut self) -> anyhow::Result<String> {
        self.world.receiver.stop().await;
        let gone = Moment::now();
        for number in 0..CHANGES {
            let web = self.world.brokers[number % self.world.brokers.len()].web;
            let name = json!(format!("Alma Allowed, change {number}"));
            self.world.directory.patch(web, &self.world.users[ALLOWED], "displayName", name).await?;
        }
        self.nc("denied", apps::CRM, b"").await?;
        self.nc("allowed-frankfurt", apps::CRM, b"GET / HTTP/1.1\r\n\r\n").await?;
        tokio::time::sleep(AWAY).await;
        let away_ms = Moment::now().ms_since(gone);
        self.world.receiver.resume().await?;
        let back = Moment::now();
        let journals = self.journal_ids()?;
        let (received, caught_up) = loop {
            let received = received(self.world.receiver.file())?;
            let caught_up = journals.iter().all(|id| received.contains_key(id));
            if caught_up || Moment::now().ms_since(back) > CATCH_UP_LIMIT.as_secs_f64() * 1_000.0 {
                break (received, caught_up);
            }
            tokio::time::sleep(RETRY_EVERY).await;
        };
        let took_ms = Moment::now().ms_since(back);
        let missing: Vec<&String> = journals.iter().filter(|id| !received.contains_key(*id)).collect();
        let dup = received.values().filter(|texts| texts.len() > 1).count();
        self.figures.audit_missing = Some(missing.len());
        self.figures.audit_dup = Some(dup);
        if !caught_up {
            bail!("{} of {} records did not come, the first is {}", missing.len(), journals.len(), missing[0]);
        }
        ensure!(dup == 0, "{dup} ids came with two different texts");
        Ok(format!(
            "away for {:.1} s; {} records of {} brokers all there {:.1} s after it came back, none twice",
            away_ms / 1_000.0,
            journals.len(),
            self.world.brokers.len(),
            took_ms / 1_000.0
        ))
    }

    pub(super) async fn journals_verified(&mut self) -> anyhow::Result<String> {
        for at in 0..self.world.brokers.len() {
            let journal = self.world.brokers[at].dir.join("audit");
            self.world.cli.ok(&["audit", "verify", &journal.display().to_string()]).await?;
        }
        let copy = self.world.dir().join("copied-journal");
        copy_tree(&self.world.broker(Region::Frankfurt).dir.join("audit"), &copy)?;
        let copied = copy.display().to_string();
        self.world.cli.ok(&["audit", "verify", &copied]).await?;
        let segment = largest_segment(&copy)?;
        let mut bytes = std::fs::read(&segment)?;
        let flipped = bytes.len() / 2;
        let begins = record_of(&bytes, flipped as u64)?;
        bytes[flipped] ^= 0x01;
        std::fs::write(&segment, &bytes)?;
        let ran = self.world.cli.run(["audit", "verify", &copied, "--json"], b"").await?;
        ensure!(ran.code == Some(1), "a flipped byte is not seen: {}{}", ran.text(), ran.err);
        let report: serde_json::Value = serde_json::from_slice(&ran.out)?;
        let found = &report["broken"][0];
        let expected =
            json!({ "stream": name_of(segment.parent()), "segment": name_of(Some(&segment)), "offset": begins });
        for (field, value) in expected.as_object().into_iter().flatten() {
            ensure!(found[field] == *value, "byte {flipped} of {expected} was flipped, and {found} is named");
        }
        Ok(format!(
            "three journals hold; byte {flipped} flipped in a copy: record {} at byte {begins} is named",
            found["seq"]
        ))
    }

    /// Ids of every record in every broker's journal.
    fn journal_ids(&self) -> anyhow::Result<BTreeSet<String>> {
        let mut ids = BTreeSet::new();
        for broker in &self.world.brokers {
            let report = selvedge_storage::audit::verify(&broker.dir.join("audit"))?.whole()?;
            for stream in report.streams {
                let numbers = stream.first_seq..stream.first_seq + stream.records;
                ids.extend(numbers.map(|number| format!("{}/{number}", stream.stream)));
            }
        }
        Ok(ids)
    }
}

/// Ids in the receiver's file, each with its different texts.
fn received(file: &Path) -> anyhow::Result<BTreeMap<String, BTreeSet<String>>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in std::fs::read_to_string(file)?.lines() {
        let id = line.split_once("\"id\":\"").and_then(|(_, rest)| rest.split_once('"')).map(|(id, _)| id.to_owned());
        let id = id.with_context(|| format!("a message without an id: `{line}`"))?;
        found.entry(id).or_default().insert(line.to_owned());
    }
    Ok(found)
}

fn name_of(path: Option<&Path>) -> String {
    path.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Where the record begins that holds a byte, by the frames before it.
fn record_of(segment: &[u8], byte: u64) -> anyhow::Result<u64> {
    let mut at = 0;
    loop {
        let head =
            segment.get(at as usize..).and_then(|rest| rest.first_chunk::<4>()).context("the byte is in no record")?;
        let next = at + FRAME_HEAD_BYTES + u64::from(u32::from_be_bytes(*head));
        if byte < next {
            return Ok(at);
        }
        at = next;
    }
}

fn largest_segment(root: &Path) -> anyhow::Result<PathBuf> {
    let mut segments = Vec::new();
    for stream in std::fs::read_dir(root)? {
        for segment in std::fs::read_dir(stream?.path())? {
            let segment = segment?;
            segments.push((segment.metadata()?.len(), segment.path()));
        }
    }
    segments.into_iter().max().map(|(_, path)| path).context("the journal is empty")
}

fn copy_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

//! A large organisation: what a person costs in memory, how long a broker takes to come back, and to save the state.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_domain::command::{ChangeGroup, Enrol, GroupFields};
use selvedge_domain::rows::EnrolKind;
use selvedge_domain::{Actor, Body, Id};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::Findings;
use crate::brokers::{Asker, BROKERS, Brokers, Client, OUTSTANDING_MAX};
use crate::machine::{Moment, cpu_seconds, rss_bytes};
use crate::scim::{self, Groups};
use crate::world::http_get;

/// Of a million users: so many groups, segments and connectors.
const GROUPS: usize = 100_000;
const SEGMENTS: usize = 20_000;
const CONNECTORS: usize = 10_000;
/// Members in one command.
const MEMBERS_PER_COMMAND: usize = 5_000;
/// Members in commands that are under way.
const MEMBERS_UNDER_WAY_MAX: usize = 15_000;
/// Segments in one `apply`.
const SEGMENTS_PER_APPLY: usize = 5_000;
/// Memory that changes by less in this time has settled.
const SETTLED_BYTES: u64 = 2 << 20;
const SETTLED_AFTER: Duration = Duration::from_secs(10);
const SETTLED_WITHIN: Duration = Duration::from_secs(180);
const RESTART_LIMIT: Duration = Duration::from_secs(600);
/// Users that are compared on every broker.
const COMPARED: usize = 200;
const BYTES_PER_USER_AIM: f64 = 1_536.0;
const RESTART_AIM_S: f64 = 10.0;

pub fn run(bin: &Path, runtime: &Runtime, users: usize, seed: u64, findings: &mut Findings) -> anyhow::Result<()> {
    let part = |of: usize| (of * users / 1_000_000).max(1);
    let groups = Groups::new(seed, users, part(GROUPS).max(2));
    println!(
        "scale: {users} users of {} bytes of SCIM JSON in {} groups with {} memberships, {} segments, {} connectors, seed {seed}",
        scim::USER_BYTES,
        groups.sizes.len(),
        groups.memberships(),
        part(SEGMENTS),
        part(CONNECTORS)
    );
    let mut ours = Brokers::start(bin, "lan")?;
    let client = Arc::new(runtime.block_on(ours.client())?);
    let empty = settled_memory(&ours)?;
    let begun = Moment::now();
    let ids = Arc::new(runtime.block_on(load_users(&client, users, seed))?);
    runtime.block_on(load_groups(&client, &groups, &ids))?;
    apply_segments(&ours, part(SEGMENTS))?;
    enrol_connectors(&ours, runtime, &client, part(CONNECTORS))?;
    println!("  loaded in {:.0} s; CPU s of the brokers {:.0?}", begun.elapsed().as_secs_f64(), cpu(&ours)?);

    let snapshot = save_snapshot(&ours);
    let loaded = settled_memory(&ours)?;
    let follower = (ours.world.leader() + 1) % BROKERS;
    for broker in 0..BROKERS {
        println!(
            "  memory of b{}: {} MiB empty, {} MiB loaded{}",
            broker + 1,
            empty[broker] >> 20,
            loaded[broker] >> 20,
            if broker == follower { ", a follower" } else { "" }
        );
    }
    let bytes_per_user = loaded[follower].saturating_sub(empty[follower]) as f64 / users as f64;

    let killed = Moment::now();
    ours.world.kill_broker(follower);
    ours.world.spawn_broker(follower);
    let ops = ours.world.brokers[follower].ops;
    while !http_get(ops, "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200")) {
        ensure!(killed.elapsed() < RESTART_LIMIT, "the broker did not come back within {RESTART_LIMIT:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    let restart = killed.elapsed().as_secs_f64();
    let again = rss_bytes(ours.world.broker_pid(follower))?;
    println!("  SIGKILL to readyz {restart:.2} s; {} MiB after it", again >> 20);
    runtime.block_on(compare(&client, &ids, seed))?;

    findings.key("bytes_per_user", bytes_per_user, 0);
    findings.key("restart_s", restart, 2);
    match snapshot {
        Ok(took) => findings.key("snapshot_s", took, 2),
        Err(error) => findings.must(false, || format!("{error:#}")),
    }
    findings.must(bytes_per_user < BYTES_PER_USER_AIM, || {
        format!("bytes_per_user is {bytes_per_user:.0}, and the aim is less than {BYTES_PER_USER_AIM:.0}")
    });
    findings.must(restart < RESTART_AIM_S, || {
        format!("restart_s is {restart:.1}, and the aim is less than {RESTART_AIM_S:.0}")
    });
    Ok(())
}

async fn load_users(client: &Arc<Client>, users: usize, seed: u64) -> anyhow::Result<Vec<Id>> {
    let mut ids = vec![Id::default(); users];
    let mut progress = Progress::new("users", users);
    let mut flight = JoinSet::new();
    let mut next = 0;
    while next < users || !flight.is_empty() {
        if next < users && flight.len() < OUTSTANDING_MAX {
            let (client, number) = (client.clone(), next);
            next += 1;
            flight.spawn(async move {
                let done = client.propose(Body::CreateUser(scim::user(seed, number))).await?;
                Ok::<_, anyhow::Error>((number, done.ids.first().copied().context("a new user has an id")?))
            });
        } else if let Some(made) = flight.join_next().await {
            let (number, id) = made.context("a task panicked")??;
            ids[number] = id;
            progress.add(1);
        }
    }
    progress.end();
    Ok(ids)
}

async fn load_groups(client: &Arc<Client>, groups: &Groups, ids: &Arc<Vec<Id>>) -> anyhow::Result<()> {
    let mut progress = Progress::new("memberships", groups.memberships());
    let room = Arc::new(Semaphore::new(MEMBERS_UNDER_WAY_MAX));
    let mut flight = JoinSet::new();
    for group in 0..groups.sizes.len() {
        while let Some(made) = flight.try_join_next() {
            progress.add(made.context("a task panicked")??);
        }
        if flight.len() >= OUTSTANDING_MAX
            && let Some(made) = flight.join_next().await
        {
            progress.add(made.context("a task panicked")??);
        }
        let members: Vec<Id> = groups.members(group).map(|number| ids[number]).collect();
        let weight = u32::try_from(members.len().clamp(MEMBERS_PER_COMMAND / 100, MEMBERS_PER_COMMAND))?;
        let place = room.clone().acquire_many_owned(weight).await?;
        let client = client.clone();
        flight.spawn(async move {
            let _place = place;
            let mut parts = members.chunks(MEMBERS_PER_COMMAND);
            let first = parts.next().unwrap_or_default().to_vec();
            let display_name = format!("group-{group:06}");
            let made = client.propose(Body::CreateGroup(GroupFields {
                display_name,
                external_id: String::new(),
                members: first,
            }));
            let id = made.await?.ids.first().copied().context("a new group has an id")?;
            for part in parts {
                let change = ChangeGroup {
                    id,
                    version: None,
                    display_name: None,
                    external_id: None,
                    members: None,
                    add: part.to_vec(),
                    remove: Vec::new(),
                };
                client.propose(Body::ChangeGroup(change)).await?;
            }
            Ok::<_, anyhow::Error>(members.len())
        });
    }
    while let Some(made) = flight.join_next().await {
        progress.add(made.context("a task panicked")??);
    }
    progress.end();
    Ok(())
}

fn apply_segments(ours: &Brokers, segments: usize) -> anyhow::Result<()> {
    let mut progress = Progress::new("segments", segments);
    let numbers: Vec<usize> = (0..segments).collect();
    for part in numbers.chunks(SEGMENTS_PER_APPLY) {
        let names: Vec<_> = part
            .iter()
            .map(|n| (format!("app-{n:05}"), format!("app-{n:05}.internal"), 1_024 + (*n % 60_000) as u16))
            .collect();
        let names: Vec<_> = names.iter().map(|(name, host, port)| (name.as_str(), host.as_str(), *port)).collect();
        ours.world.apply_segments(&names);
        progress.add(part.len());
    }
    progress.end();
    Ok(())
}

/// What enrolment proposes, without the certificates, which are not state of a connector.
fn enrol_connectors(ours: &Brokers, runtime: &Runtime, client: &Arc<Client>, connectors: usize) -> anyhow::Result<()> {
    let key = ours.world.json(&[
        "key",
        "create",
        "--kind",
        "connector",
        "--name",
        "scale",
        "--target",
        "here",
        "--uses",
        &connectors.to_string(),
        "--json",
    ]);
    let secret = key["secret"].as_str().context("a secret")?;
    let asker = Asker {
        actor: Actor::enrolment(key["id"].as_str().context("a key's id")?.parse()?),
        credential: secret.to_owned(),
    };
    let secret_sha256 = selvedge_proto::identity::sha256(secret.as_bytes());
    let mut progress = Progress::new("connectors", connectors);
    runtime.block_on(async {
        let mut flight = JoinSet::new();
        for number in 0..connectors {
            if flight.len() >= OUTSTANDING_MAX / 4
                && let Some(made) = flight.join_next().await
            {
                made.context("a task panicked")??;
                progress.add(1);
            }
            let (client, asker) = (client.clone(), asker.clone());
            flight.spawn(async move {
                let body = Body::Enrol(Enrol {
                    secret_sha256,
                    kind: EnrolKind::Connector as i32,
                    key_sha256: selvedge_proto::identity::sha256(&number.to_be_bytes()),
                    name: format!("connector-{number:05}"),
                    node: 0,
                });
                client.propose_as(&asker, body).await.map(drop)
            });
        }
        while let Some(made) = flight.join_next().await {
            made.context("a task panicked")??;
            progress.add(1);
        }
        progress.end();
        Ok(())
    })
}

/// Saves the state by the operator's command; answers how long that took.
fn save_snapshot(ours: &Brokers) -> anyhow::Result<f64> {
    let path = ours.world.path("saved.snapshot");
    let begun = Moment::now();
    let saved = ours.world.run(&["cluster", "snapshot", "save", crate::world::text(&path)]);
    let took = begun.elapsed().as_secs_f64();
    ensure!(saved.status.success(), "the snapshot was not saved: {}", String::from_utf8_lossy(&saved.stderr));
    println!("  snapshot of {} MiB saved in {took:.2} s", std::fs::metadata(&path)?.len() >> 20);
    Ok(took)
}

/// Waits until no broker's memory changes much any more.
fn settled_memory(ours: &Brokers) -> anyhow::Result<Vec<u64>> {
    let read = || ours.pids().into_iter().map(rss_bytes).collect::<anyhow::Result<Vec<_>>>();
    let begun = Moment::now();
    let mut before = read()?;
    loop {
        std::thread::sleep(SETTLED_AFTER);
        let now = read()?;
        let settled = before.iter().zip(&now).all(|(before, now)| before.abs_diff(*now) < SETTLED_BYTES);
        if settled || begun.elapsed() > SETTLED_WITHIN {
            return Ok(now);
        }
        before = now;
    }
}

fn cpu(ours: &Brokers) -> anyhow::Result<Vec<f64>> {
    ours.pids().into_iter().map(cpu_seconds).collect()
}

/// Every broker has what was drawn from the seed.
async fn compare(client: &Arc<Client>, ids: &[Id], seed: u64) -> anyhow::Result<()> {
    let step = ids.len().div_ceil(COMPARED);
    for (number, id) in ids.iter().enumerate().step_by(step) {
        let wanted = scim::user(seed, number);
        for broker in 0..BROKERS {
            let user = client.read(broker, *id).await?;
            ensure!(
                user.user_name == wanted.user_name && user.attributes == wanted.attributes && !user.groups.is_empty(),
                "b{} does not have user {number} as it was pushed",
                broker + 1
            );
        }
    }
    println!("  every broker has {} users as they were pushed", ids.len().div_ceil(step));
    Ok(())
}

/// Says how far a load has come, now and then.
struct Progress {
    what: &'static str,
    total: usize,
    done: usize,
    begun: Moment,
    said: Moment,
}

impl Progress {
    fn new(what: &'static str, total: usize) -> Self {
        Self { what, total, done: 0, begun: Moment::now(), said: Moment::now() }
    }

    fn add(&mut self, done: usize) {
        self.done += done;
        if self.said.elapsed() > Duration::from_secs(15) {
            self.said = Moment::now();
            self.say();
        }
    }

    fn say(&self) {
        let per_second = self.done as f64 / self.begun.elapsed().as_secs_f64();
        println!("  {} of {} {}, {per_second:.0}/s", self.done, self.total, self.what);
    }

    fn end(&self) {
        self.say();
    }
}

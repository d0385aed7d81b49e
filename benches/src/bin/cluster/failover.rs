//! How long writes pause when the leader dies.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::Findings;
use crate::brokers::{Attempt, BROKERS, Brokers, Client, Users};
use crate::machine::{Moment, median};
use crate::world::wait;

/// The write is sent anew so often, to the living in turn.
const RETRY_EVERY: Duration = Duration::from_millis(20);
/// A write that takes longer was not accepted.
const RECOVERY_LIMIT: Duration = Duration::from_secs(30);
/// One attempt that is not answered does not end the others.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// Two kills are so far apart at least, beside what catching up takes.
const PAUSE: Duration = Duration::from_secs(1);

pub fn run(
    bin: &Path,
    runtime: &Runtime,
    preset: &str,
    kills: usize,
    key: &'static str,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let mut ours = Brokers::start(bin, preset)?;
    let client = Arc::new(runtime.block_on(ours.client())?);
    let users = runtime.block_on(Users::make(&client, kills))?;
    let mut samples = Vec::with_capacity(kills);
    for kill in 0..kills {
        let leader = settled(&ours)?;
        std::thread::sleep(PAUSE);
        let killed = Moment::now();
        ours.world.kill_broker(leader);
        let answered = runtime.block_on(first_write(&client, &users, kill, leader))?;
        samples.push(answered.since(killed).as_secs_f64() * 1_000.0);
        ours.world.start_broker(leader);
    }
    settled(&ours)?;
    runtime.block_on(async {
        for (kill, id) in users.ids.iter().enumerate() {
            for broker in 0..BROKERS {
                let user = client.read(broker, *id).await?;
                ensure!(user.version == 2, "the write after kill {kill} was applied {} times", user.version - 1);
            }
        }
        Ok(())
    })?;
    let max = samples.iter().copied().fold(0.0, f64::max);
    let each: Vec<_> = samples.iter().map(|ms| format!("{ms:.0}")).collect();
    println!(
        "failover, preset {preset}: {kills} kills of the leader, median {:.0} ms, max {max:.0} ms ({}); each write applied once",
        median(&samples),
        each.join(" ")
    );
    findings.key(key, max, 0);
    Ok(())
}

/// Waits until every broker votes and has all of the log; answers who leads.
fn settled(ours: &Brokers) -> anyhow::Result<usize> {
    let mut leader = None;
    wait("all brokers to have caught up", || {
        let output = ours.world.run(&["cluster", "status", "--json"]);
        let Ok(status) = serde_json::from_slice::<serde_json::Value>(&output.stdout) else { return false };
        let rows = status["brokers"].as_array().map_or(&[][..], Vec::as_slice);
        let voters = rows.iter().filter(|row| row["raft"] == "voter");
        let caught_up = voters.filter(|row| row["leader"] == true || row["lag_entries"] == 0).count();
        let name = status["leader_name"].as_str().unwrap_or_default();
        leader = ours.world.brokers.iter().position(|broker| broker.name == name);
        caught_up == BROKERS && leader.is_some()
    });
    leader.context("nobody leads")
}

/// When the first write that is sent from now on was answered. Each attempt carries the same number.
async fn first_write(client: &Arc<Client>, users: &Users, kill: usize, dead: usize) -> anyhow::Result<Moment> {
    let write = Arc::new(client.repeatable(users.change(kill, 1)));
    let mut living = (0..BROKERS).filter(|broker| *broker != dead).cycle();
    let mut attempts = JoinSet::new();
    let mut ticks = tokio::time::interval(RETRY_EVERY);
    let begun = Moment::now();
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let at = living.next().context("nobody lives")?;
                let (client, write) = (client.clone(), write.clone());
                attempts.spawn(async move {
                    tokio::time::timeout(ATTEMPT_TIMEOUT, client.attempt_again(at, &write)).await
                });
            }
            // What is not done is tried again by the next tick.
            Some(Ok(Ok(Ok(Attempt::Done(_))))) = attempts.join_next() => return Ok(Moment::now()),
        }
        if begun.elapsed() > RECOVERY_LIMIT {
            bail!("no write was accepted within {RECOVERY_LIMIT:?}");
        }
    }
}

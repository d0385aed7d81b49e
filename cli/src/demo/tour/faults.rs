//! What people notice when parts die.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::json;
use tokio::task::JoinSet;

use super::super::apps;
use super::super::clock::Moment;
use super::super::geography::Region;
use super::framing::Framing;
use super::{RECOVERY_LIMIT, RETRY_EVERY, Tour, WATCH, first_answer};

/// Sessions are watched for so long after a fault that should not touch them.
const AFTERMATH: Duration = Duration::from_secs(3);
/// A session without a byte for so long has been stopped: several frames and every delay of the links.
const SILENCE_MS: f64 = 1_500.0;
/// Longest wait until a broker that is cut off has stopped: its lease of 10 s and as much again.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// The lease of a new cluster, and what may lie on the links when it ends.
const STOP_MS_MAX: f64 = 10_000.0 + 400.0;

impl Tour {
    pub(super) async fn leader_killed(&mut self) -> anyhow::Result<String> {
        let leader = self.leader().await?;
        let living: Vec<Region> = Region::ALL.into_iter().filter(|region| *region != leader).collect();
        let mut sessions = Vec::new();
        for region in &living {
            let seat = format!("allowed-{}", region.name());
            self.fresh_listener(&seat, apps::CHAT).await?;
            let (broker, _) = self.carriers(&seat).await?;
            ensure!(broker == *region, "`{seat}` is carried by {}", broker.name());
            sessions.push(self.framing(&seat).await?);
        }
        tokio::time::sleep(WATCH).await;
        let webs: Vec<SocketAddr> = living.iter().map(|region| self.world.broker(*region).web).collect();
        let killed = Moment::now();
        self.world.broker(leader).process.kill().await?;
        let failover_ms = self.first_write(&webs, killed).await?;
        self.figures.failover_ms = Some(failover_ms);
        tokio::time::sleep(AFTERMATH).await;
        for session in &sessions {
            if let Some(why) = session.ended() {
                bail!("a session on a living broker was dropped: {why}");
            }
        }
        let gap_ms = sessions.iter().map(Framing::longest_gap_ms).fold(0.0, f64::max);
        self.world.start_broker(leader).await?;
        Ok(format!(
            "{} died; the next write was answered after {failover_ms:.0} ms; {} sessions on the others went on, longest pause {gap_ms:.0} ms",
            leader.name(),
            sessions.len()
        ))
    }

    pub(super) async fn connector_killed(&mut self) -> anyhow::Result<String> {
        const SEAT: &str = "allowed-frankfurt";
        let listener = self.fresh_listener(SEAT, apps::CHAT).await?;
        let (_, best) = self.carriers(SEAT).await?;
        let killed = Moment::now();
        self.world.process(&best).context("it is one of the connectors")?.kill().await?;
        let reroute_ms = first_answer(listener, killed).await?;
        self.figures.reroute_ms = Some(reroute_ms);
        let (_, next) = self.carriers(SEAT).await?;
        ensure!(next != best, "`{best}` still carries sessions");
        self.world.process(&best).context("it is one of the connectors")?.start()?;
        Ok(format!("{best} died; the next session was answered by way of {next} after {reroute_ms:.0} ms"))
    }

    pub(super) async fn broker_killed(&mut self) -> anyhow::Result<String> {
        const SEAT: &str = "allowed-virginia";
        let listener = self.fresh_listener(SEAT, apps::CHAT).await?;
        let (broker, _) = self.carriers(SEAT).await?;
        let killed = Moment::now();
        self.world.broker(broker).process.kill().await?;
        let broker_loss_ms = first_answer(listener, killed).await?;
        self.figures.broker_loss_ms = Some(broker_loss_ms);
        let (next, _) = self.carriers(SEAT).await?;
        ensure!(next != broker, "a dead broker carries sessions");
        self.world.start_broker(broker).await?;
        Ok(format!(
            "{} died; the next session was answered by way of {} after {broker_loss_ms:.0} ms",
            broker.name(),
            next.name()
        ))
    }

    pub(super) async fn region_cut_off(&mut self) -> anyhow::Result<String> {
        let leader = self.leader().await?;
        let seat = format!("allowed-{}", leader.name());
        self.fresh_listener(&seat, apps::CHAT).await?;
        let (broker, _) = self.carriers(&seat).await?;
        ensure!(broker == leader, "`{seat}` is carried by {}", broker.name());
        let held = self.framing(&seat).await?;
        tokio::time::sleep(WATCH).await;
        let majority: Vec<Region> = Region::ALL.into_iter().filter(|region| *region != leader).collect();
        let webs: Vec<SocketAddr> = majority.iter().map(|region| self.world.broker(*region).web).collect();
        let cut = Moment::now();
        self.world.set_partition(leader, true);
        let (write_ms, stop_ms) = tokio::try_join!(self.first_write(&webs, cut), stopped(&held, cut))?;
        self.figures.isolated_stop_ms = Some(stop_ms);
        ensure!(stop_ms <= STOP_MS_MAX, "the broker that was cut off forwarded for {stop_ms:.0} ms");
        if let Some(why) = held.ended() {
            bail!("the session was cut instead of held: {why}");
        }
        let frames = held.frames();
        self.world.set_partition(leader, false);
        let healed = Moment::now();
        let resumed = async {
            while held.frames() == frames && held.ended().is_none() {
                tokio::time::sleep(RETRY_EVERY).await;
            }
        };
        tokio::time::timeout(RECOVERY_LIMIT, resumed).await.context("the held session does not go on after healing")?;
        let resume_ms = Moment::now().ms_since(healed);
        tokio::time::sleep(WATCH).await;
        if let Some(why) = held.ended() {
            bail!("the held session ended after healing: {why}");
        }
        Ok(format!(
            "{} cut off; the majority wrote after {write_ms:.0} ms; the last byte was forwarded {stop_ms:.0} ms after the cut; \
             healed, the held session went on after {resume_ms:.0} ms without a frame lost",
            leader.name()
        ))
    }

    /// The answer of the first write sent after `since` to one of these brokers, sent anew every 20 ms.
    async fn first_write(&self, webs: &[SocketAddr], since: Moment) -> anyhow::Result<f64> {
        let work = async {
            let mut attempts = JoinSet::new();
            let mut ticks = tokio::time::interval(RETRY_EVERY);
            let mut number = 0_usize;
            let mut why = None;
            loop {
                tokio::select! {
                    _ = ticks.tick() => {
                        let (administrator, web) = (self.world.administrator.clone(), webs[number % webs.len()]);
                        number += 1;
                        // Nothing refers to it, so that the write is all there is.
                        let region = json!({ "Region": { "name": "elsewhere", "latitude": 0.0, "longitude": (number % 180) as f64 } });
                        attempts.spawn(async move { administrator.apply(web, region).await });
                    }
                    Some(attempt) = attempts.join_next() => match attempt? {
                        Ok(answered) => return Ok(answered.ms_since(since)),
                        Err(error) => {
                            tracing::debug!(%error, "a write was not accepted");
                            why = Some(error);
                        }
                    }
                }
                if Moment::now().ms_since(since) > RECOVERY_LIMIT.as_secs_f64() * 1_000.0 {
                    return Err(why
                        .take()
                        .unwrap_or_else(|| anyhow::anyhow!("no answer"))
                        .context("no write was accepted"));
                }
            }
        };
        work.await
    }
}

/// The last byte of a session that falls silent, milliseconds after `since`.
async fn stopped(session: &Framing, since: Moment) -> anyhow::Result<f64> {
    let work = async {
        loop {
            tokio::time::sleep(RETRY_EVERY).await;
            let last = session.last_payload().context("there was never a byte")?;
            if Moment::now().ms_since(last) > SILENCE_MS {
                return Ok(last.ms_since(since).max(0.0));
            }
        }
    };
    tokio::time::timeout(STOP_LIMIT, work).await.context("the broker that was cut off forwards on and on")?
}

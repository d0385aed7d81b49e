//! A closed loop: so many clients, each with one request in flight.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::task::JoinSet;

use crate::machine::{Moment, cpu_seconds};

/// How long and how wide.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub clients: usize,
    pub warm_up: Duration,
    pub measured: Duration,
}

/// What one run of a load came to.
#[derive(Debug)]
pub struct Sample {
    /// Answered within the measured time.
    pub operations: usize,
    pub per_second: f64,
    /// Ascending.
    latencies_us: Vec<u32>,
    /// CPU microseconds for each operation, of each process that was asked for.
    pub cpu_us: Vec<f64>,
}

impl Sample {
    pub fn latency_ms(&self, percent: usize) -> f64 {
        let at = (self.latencies_us.len() * percent / 100).min(self.latencies_us.len().saturating_sub(1));
        f64::from(self.latencies_us.get(at).copied().unwrap_or_default()) / 1_000.0
    }
}

/// Runs `operation(client, n)` over and over in each client; the CPU of `pids` is read at both ends of the measured
/// time. One operation that fails fails the run.
pub async fn closed_loop<F, O>(load: Load, pids: &[u32], operation: F) -> anyhow::Result<Sample>
where
    F: Fn(usize, u64) -> O + Send + Sync + 'static,
    O: Future<Output = anyhow::Result<()>> + Send,
{
    let operation = Arc::new(operation);
    let (measuring, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let mut clients = JoinSet::new();
    for client in 0..load.clients {
        let (operation, measuring, ended) = (operation.clone(), measuring.clone(), ended.clone());
        clients.spawn(async move {
            let mut latencies_us = Vec::new();
            let mut n = 0;
            while !ended.load(Ordering::Relaxed) {
                let asked = Moment::now();
                operation(client, n).await?;
                n += 1;
                // What was asked during the warm-up or is answered after the end does not count.
                if measuring.load(Ordering::Relaxed) && !ended.load(Ordering::Relaxed) {
                    latencies_us.push(u32::try_from(asked.elapsed().as_micros()).unwrap_or(u32::MAX));
                }
            }
            Ok::<_, anyhow::Error>(latencies_us)
        });
    }
    let cpu = || pids.iter().map(|pid| cpu_seconds(*pid)).collect::<anyhow::Result<Vec<_>>>();
    let timed = async {
        tokio::time::sleep(load.warm_up).await;
        let (begun, before) = (Moment::now(), cpu()?);
        measuring.store(true, Ordering::Relaxed);
        tokio::time::sleep(load.measured).await;
        ended.store(true, Ordering::Relaxed);
        Ok::<_, anyhow::Error>((begun.elapsed(), before, cpu()?))
    };
    tokio::pin!(timed);
    let mut latencies_us = Vec::new();
    let mut times = None;
    loop {
        tokio::select! {
            timed = &mut timed, if times.is_none() => times = Some(timed?),
            client = clients.join_next() => match client {
                Some(client) => latencies_us.extend(client.context("a client panicked")??),
                None => break,
            },
        }
    }
    let (time, before, after) = times.context("every client ended early")?;
    ensure!(!latencies_us.is_empty(), "nothing was answered");
    latencies_us.sort_unstable();
    let operations = latencies_us.len();
    let cpu_us = after.iter().zip(before).map(|(after, before)| (after - before) * 1e6 / operations as f64).collect();
    Ok(Sample { operations, per_second: operations as f64 / time.as_secs_f64(), latencies_us, cpu_us })
}

/// A number that depends on nothing but `n`, spread over all of them (splitmix64).
pub fn spread(n: u64) -> u64 {
    let mut z = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

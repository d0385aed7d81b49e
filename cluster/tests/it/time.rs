//! Cluster time when clocks step.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use selvedge_cluster::{Clock, Cluster, ProposeError, SystemClock};
use selvedge_domain::{Body, RejectedCode};
use tempfile::TempDir;

use crate::brokers::{Broker, Setup, init};

const HOUR_MS: u64 = 3_600_000;

/// The system's clocks, of which the wall clock can be stepped.
#[derive(Default)]
struct Stepped(AtomicU64);

impl Clock for Stepped {
    fn wall_ms(&self) -> u64 {
        SystemClock.wall_ms() + self.0.load(Ordering::SeqCst)
    }

    fn boottime_ms(&self) -> u64 {
        SystemClock.boottime_ms()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cluster_time_follows_a_step_of_more_than_an_hour_only_when_an_owner_says_so() {
    let (setup, dir, clock) = (Setup::new(), TempDir::new().unwrap(), Arc::new(Stepped::default()));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut options = setup.options(dir.path(), listener, None).await;
    options.clock = clock.clone();
    let node = options.dir.node_id();
    let cluster = Cluster::start(options).await.unwrap();
    let broker = Broker { cluster, address, node, dir };
    broker.cluster.initialize(init(setup.cluster_id)).await.unwrap();
    broker.register().await;

    clock.0.store(2 * HOUR_MS, Ordering::SeqCst);
    broker.create_token("after the step").await.unwrap();
    assert!(broker.cluster.now_ms() < broker.cluster.wall_ms() - HOUR_MS, "it does not follow by itself");
    let to_ms = broker.cluster.wall_ms();
    broker.cluster.propose(broker.owner(), Body::SetTime { time_ms: to_ms }, None).await.unwrap();
    assert!(broker.cluster.now_ms() >= to_ms);
    broker.create_token("after that").await.unwrap();
    assert!(broker.cluster.now_ms().abs_diff(broker.cluster.wall_ms()) < HOUR_MS / 60, "and then it follows");

    let back = broker.cluster.propose(broker.owner(), Body::SetTime { time_ms: to_ms - HOUR_MS }, None).await;
    let Err(ProposeError::Refused(refused)) = back else { panic!("{back:?}") };
    assert_eq!(refused.code, RejectedCode::Invalid);
    broker.cluster.stop().await;
}

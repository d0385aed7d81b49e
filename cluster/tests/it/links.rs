//! Links between brokers that can be cut while they are up.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use selvedge_cluster::DialOverride;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// All links of a cluster: each broker dials the others through proxies of its own.
#[derive(Clone, Default)]
pub struct Links(Arc<Mutex<BTreeMap<(usize, u64), Link>>>);

#[derive(Clone)]
struct Link {
    address: SocketAddr,
    cut: Arc<watch::Sender<bool>>,
    /// Between two reads, microseconds.
    pause_us: Arc<AtomicU64>,
}

impl Links {
    /// A link from the broker that was started as the `from`th to a node that listens at `to_address`.
    pub async fn add(&self, from: usize, to: u64, to_address: &str) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cut = Arc::new(watch::Sender::new(false));
        let pause_us = Arc::new(AtomicU64::new(0));
        let link = Link { address: listener.local_addr().unwrap(), cut: cut.clone(), pause_us: pause_us.clone() };
        let to_address = to_address.to_owned();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(&to_address).await else { continue };
                let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
                tokio::spawn(pump(near_read, far_write, cut.subscribe(), pause_us.clone()));
                tokio::spawn(pump(far_read, near_write, cut.subscribe(), pause_us.clone()));
            }
        });
        self.0.lock().unwrap().insert((from, to), link);
    }

    /// Swallows everything between one broker and all others, both ways; or lets it pass again.
    pub fn cut(&self, at: usize, node: u64, cut: bool) {
        for ((from, to), link) in self.0.lock().unwrap().iter() {
            if *from == at || *to == node {
                link.cut.send_replace(cut);
            }
        }
    }

    /// Parts some brokers, by their places and nodes, from all others; each side goes on among itself. Or lets it pass
    /// again.
    pub fn part(&self, side: &[(usize, u64)], parted: bool) {
        for ((from, to), link) in self.0.lock().unwrap().iter() {
            if side.iter().any(|(at, _)| at == from) != side.iter().any(|(_, node)| node == to) {
                link.cut.send_replace(parted);
            }
        }
    }

    /// Slows what goes to a node: so long a pause for every 64 KiB at most.
    pub fn slow(&self, node: u64, pause: Duration) {
        for (_, link) in self.0.lock().unwrap().iter().filter(|((_, to), _)| *to == node) {
            link.pause_us.store(pause.as_micros() as u64, Ordering::Relaxed);
        }
    }

    /// What the `from`th broker dials with.
    pub fn dial(&self, from: usize) -> DialOverride {
        let links = self.0.clone();
        Arc::new(move |to| links.lock().unwrap().get(&(from, to)).map(|link| link.address.to_string()))
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut cut: watch::Receiver<bool>,
    pause_us: Arc<AtomicU64>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        if cut.wait_for(|cut| !cut).await.is_err() {
            return;
        }
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(read) => {
                let pause_us = pause_us.load(Ordering::Relaxed);
                if pause_us > 0 {
                    tokio::time::sleep(Duration::from_micros(pause_us)).await;
                }
                // What was read when the link was cut waits, as in a network that loses and sends again.
                if cut.wait_for(|cut| !cut).await.is_err() || to.write_all(&buffer[..read]).await.is_err() {
                    return;
                }
            }
        }
    }
}

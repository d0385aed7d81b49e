//! A live session that is watched: frames in both directions every 10 ms, and when the last one arrived at either end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use super::super::apps::{FRAME_EVERY, Heard};
use super::super::clock::Moment;

/// Longest wait for the first frame.
const FIRST_LIMIT: Duration = Duration::from_secs(15);

/// One watched session.
pub struct Framing {
    word: String,
    seen: Arc<Mutex<Seen>>,
    heard: Heard,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Clone, Debug, Default)]
struct Seen {
    last: Option<Moment>,
    frames: u64,
    longest_gap_ms: f64,
    ended: Option<String>,
}

impl Framing {
    /// Opens a session through a client's listener for `chat` and waits for the first frame.
    pub async fn open(listener: SocketAddr, heard: &Heard) -> anyhow::Result<Self> {
        let word = format!("{:016x}", rand::random::<u64>());
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (word_sent, seen_by) = (word.clone(), seen.clone());
        let task = tokio::spawn(async move {
            let end = match watch(listener, &word_sent, &seen_by).await {
                Ok(()) => "closed".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            seen_by.lock().ended = Some(end);
        });
        let framing = Self { word, seen, heard: heard.clone(), task };
        let first = async {
            while framing.frames() == 0 {
                if let Some(why) = framing.ended() {
                    bail!("{why}");
                }
                tokio::time::sleep(FRAME_EVERY).await;
            }
            Ok(())
        };
        tokio::time::timeout(FIRST_LIMIT, first).await.context("no frame came")??;
        Ok(framing)
    }

    /// Frames that arrived, without a hole.
    pub fn frames(&self) -> u64 {
        self.seen.lock().frames
    }

    /// Why it ended, when it did.
    pub fn ended(&self) -> Option<String> {
        self.seen.lock().ended.clone()
    }

    /// The longest time between two frames, milliseconds.
    pub fn longest_gap_ms(&self) -> f64 {
        self.seen.lock().longest_gap_ms
    }

    /// When the last payload byte arrived, at whichever end it was later.
    pub fn last_payload(&self) -> Option<Moment> {
        self.seen.lock().last.max(self.heard.last(&self.word))
    }
}

impl Drop for Framing {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn watch(listener: SocketAddr, word: &str, seen: &Mutex<Seen>) -> anyhow::Result<()> {
    let socket = TcpStream::connect(listener).await?;
    socket.set_nodelay(true)?;
    let (read, mut write) = socket.into_split();
    let mut lines = BufReader::new(read).lines();
    lines.next_line().await?.context("the session ended before the first byte")?;
    write.write_all(format!("frames {word}\n").as_bytes()).await?;
    let send = async {
        let mut ticks = tokio::time::interval(FRAME_EVERY);
        loop {
            ticks.tick().await;
            write.write_all(b"up\n").await?;
        }
    };
    let receive = async {
        while let Some(line) = lines.next_line().await? {
            let now = Moment::now();
            let mut seen = seen.lock();
            let expected = seen.frames + 1;
            if line != format!("frame {expected}") {
                bail!("`frame {expected}` was to come and `{line}` came");
            }
            if let Some(last) = seen.last {
                seen.longest_gap_ms = seen.longest_gap_ms.max(now.ms_since(last));
            }
            seen.last = Some(now);
            seen.frames = expected;
        }
        Ok(())
    };
    tokio::select! {
        result = send => result,
        result = receive => result,
    }
}

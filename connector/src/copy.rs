//! Moves bytes both ways between an application's socket and a TLS session, in the task of its caller.
//!
//! Invariants: the end of one direction is passed on and the other goes on; an error of either side ends both, and the
//! caller makes that a reset; nothing is read while the fence is closed; a quiet direction holds no buffer.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{sleep, timeout};
use tokio_util::io::poll_read_buf;
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::end::Fence;

/// Bytes of each direction's buffer while it is busy.
pub(crate) const BUFFER_BYTES: usize = 64 * 1024;

/// Bytes moved in each direction.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// From the first side to the second.
    pub(crate) forth: AtomicU64,
    /// From the second side to the first.
    pub(crate) back: AtomicU64,
}

/// How copying ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Both directions came to their end.
    Clean,
    /// The first side failed, or broke off.
    First(io::Error),
    /// The second side failed, or broke off.
    Second(io::Error),
    /// It was cut.
    Cut,
    /// The fence was closed for longer than the hold.
    LeaseOver,
    /// Nothing moved for too long.
    Idle,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clean => f.write_str("in order"),
            Self::First(error) => write!(f, "first side: {error}"),
            Self::Second(error) => write!(f, "second side: {error}"),
            Self::Cut => f.write_str("cut"),
            Self::LeaseOver => f.write_str("lease over"),
            Self::Idle => f.write_str("idle"),
        }
    }
}

/// What ends copying before its time.
#[derive(Default)]
pub(crate) struct Limits<'a> {
    /// Ends it at once.
    pub(crate) cut: Option<&'a CancellationToken>,
    /// Pauses it while closed; ends it when closed for `hold`.
    pub(crate) fence: Option<(&'a Fence, Duration)>,
    /// Ends it when nothing moved for so long.
    pub(crate) idle: Option<Duration>,
}

/// Copies until both directions have ended or something ends it.
///
/// **Cancel safety**: bytes that were read and not yet written are lost with the future.
pub(crate) async fn pump<A, B>(first: &mut A, second: &mut B, counts: &Counts, limits: Limits<'_>) -> Ended
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let Limits { cut, fence, idle } = limits;
    let mut forth = Direction::default();
    let mut back = Direction::default();
    let open = || fence.is_none_or(|(fence, _)| fence.is_open(clock::boot_ms()));
    let moving = poll_fn(|cx| {
        let forth_done = match forth.poll(cx, first, second, &counts.forth, &open) {
            Poll::Ready(Err(Failed::Read(error))) => return Poll::Ready(Ended::First(error)),
            Poll::Ready(Err(Failed::Write(error))) => return Poll::Ready(Ended::Second(error)),
            other => other.is_ready(),
        };
        let back_done = match back.poll(cx, second, first, &counts.back, &open) {
            Poll::Ready(Err(Failed::Read(error))) => return Poll::Ready(Ended::Second(error)),
            Poll::Ready(Err(Failed::Write(error))) => return Poll::Ready(Ended::First(error)),
            other => other.is_ready(),
        };
        if forth_done && back_done { Poll::Ready(Ended::Clean) } else { Poll::Pending }
    });
    // The fence is polled before the copying: so a copying that found it closed is polled again when it opens.
    tokio::select! {
        biased;
        () = cut_off(cut) => Ended::Cut,
        () = lease_over(fence) => Ended::LeaseOver,
        () = idle_over(idle, counts) => Ended::Idle,
        ended = moving => ended,
    }
}

async fn cut_off(cut: Option<&CancellationToken>) {
    match cut {
        Some(cut) => cut.cancelled().await,
        None => std::future::pending().await,
    }
}

/// Returns when the fence has been closed for as long as the hold.
pub(crate) async fn lease_over(fence: Option<(&Fence, Duration)>) {
    let Some((fence, hold)) = fence else { return std::future::pending().await };
    loop {
        let extended = fence.extended();
        tokio::pin!(extended);
        // Registered before the clock is read, so no extension is missed.
        let _ = poll_fn(|cx| Poll::Ready(extended.as_mut().poll(cx))).await;
        let now_ms = clock::boot_ms();
        if fence.is_open(now_ms) {
            sleep(Duration::from_millis(fence.until_ms().saturating_sub(now_ms).max(1))).await;
        } else if timeout(hold, extended).await.is_err() && !fence.is_open(clock::boot_ms()) {
            return;
        }
    }
}

async fn idle_over(idle: Option<Duration>, counts: &Counts) {
    let Some(idle) = idle.filter(|idle| !idle.is_zero()) else { return std::future::pending().await };
    let total = || counts.forth.load(Ordering::Relaxed) + counts.back.load(Ordering::Relaxed);
    let mut seen = (total(), Instant::now());
    loop {
        // Looked at four times in a limit, so it ends at most a quarter late.
        sleep(idle / 4).await;
        let now = total();
        if now != seen.0 {
            seen = (now, Instant::now());
        } else if seen.1.elapsed() >= idle {
            return;
        }
    }
}

enum Failed {
    Read(io::Error),
    Write(io::Error),
}

#[derive(Default)]
struct Direction {
    buffer: BytesMut,
    ended: bool,
    failed: Option<io::Error>,
    unflushed: bool,
    done: bool,
}

impl Direction {
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        count: &AtomicU64,
        open: &impl Fn() -> bool,
    ) -> Poll<Result<(), Failed>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        loop {
            while !self.buffer.is_empty() {
                match ready!(Pin::new(&mut *writer).poll_write(cx, &self.buffer)) {
                    Ok(0) => return Poll::Ready(Err(Failed::Write(io::ErrorKind::WriteZero.into()))),
                    Ok(written) => {
                        self.buffer.advance(written);
                        self.unflushed = true;
                        count.fetch_add(written as u64, Ordering::Relaxed);
                    }
                    Err(error) => return Poll::Ready(Err(Failed::Write(error))),
                }
            }
            if let Some(error) = self.failed.take() {
                return Poll::Ready(Err(Failed::Read(error)));
            }
            if self.ended {
                ready!(Pin::new(&mut *writer).poll_shutdown(cx)).map_err(Failed::Write)?;
                self.done = true;
                self.buffer = BytesMut::new();
                return Poll::Ready(Ok(()));
            }
            if open() {
                self.fill(cx, reader);
            }
            if self.buffer.is_empty() && !self.ended && self.failed.is_none() {
                if self.unflushed {
                    ready!(Pin::new(&mut *writer).poll_flush(cx)).map_err(Failed::Write)?;
                    self.unflushed = false;
                }
                self.buffer = BytesMut::new();
                return Poll::Pending;
            }
        }
    }

    /// Reads until the reader has no more or the buffer is full.
    fn fill<R: AsyncRead + Unpin>(&mut self, cx: &mut Context<'_>, reader: &mut R) {
        self.buffer.reserve(BUFFER_BYTES);
        while self.buffer.len() < BUFFER_BYTES {
            match poll_read_buf(Pin::new(&mut *reader), cx, &mut self.buffer) {
                Poll::Ready(Ok(0)) => {
                    self.ended = true;
                    return;
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => {
                    self.failed = Some(error);
                    return;
                }
                Poll::Pending => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    #[tokio::test]
    async fn one_direction_ends_and_the_other_goes_on() {
        let (mut near, mut a) = duplex(1024);
        let (mut far, mut b) = duplex(1024);
        let counts = Arc::new(Counts::default());
        let counted = counts.clone();
        let pumping = tokio::spawn(async move { pump(&mut a, &mut b, &counted, Limits::default()).await });
        near.write_all(b"question").await.unwrap();
        near.shutdown().await.unwrap();
        let mut question = String::new();
        far.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        let answer = vec![7; 300_000];
        let writing = async {
            far.write_all(&answer).await.unwrap();
            far.shutdown().await.unwrap();
        };
        let mut read = Vec::new();
        let (_, outcome) = tokio::join!(writing, near.read_to_end(&mut read));
        outcome.unwrap();
        assert!(read == answer);
        assert!(matches!(pumping.await.unwrap(), Ended::Clean));
        assert_eq!(counts.forth.load(Ordering::Relaxed), 8);
        assert_eq!(counts.back.load(Ordering::Relaxed), 300_000);
    }

    #[tokio::test]
    async fn nothing_passes_a_closed_fence_until_it_opens() {
        let (mut near, mut a) = duplex(1024);
        let (mut far, mut b) = duplex(1024);
        let fence = Arc::new(Fence::default());
        let gate = fence.clone();
        let pumping = tokio::spawn(async move {
            let limits = Limits { fence: Some((&gate, Duration::from_secs(60))), ..Limits::default() };
            pump(&mut a, &mut b, &Counts::default(), limits).await
        });
        near.write_all(b"late").await.unwrap();
        let mut read = [0; 4];
        assert!(timeout(Duration::from_millis(50), far.read_exact(&mut read)).await.is_err());
        fence.extend(clock::boot_ms() + 60_000);
        far.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"late");
        pumping.abort();
    }

    #[tokio::test]
    async fn a_fence_that_stays_closed_ends_the_session_after_the_hold() {
        let (_near, mut a) = duplex(1024);
        let (_far, mut b) = duplex(1024);
        let fence = Fence::default();
        let limits = Limits { fence: Some((&fence, Duration::from_millis(20))), ..Limits::default() };
        let ended = pump(&mut a, &mut b, &Counts::default(), limits).await;
        assert!(matches!(ended, Ended::LeaseOver));
    }

    #[tokio::test]
    async fn a_cut_ends_it_at_once_and_silence_ends_it_after_the_limit() {
        let (_near, mut a) = duplex(1024);
        let (_far, mut b) = duplex(1024);
        let cut = CancellationToken::new();
        cut.cancel();
        let limits = Limits { cut: Some(&cut), ..Limits::default() };
        assert!(matches!(pump(&mut a, &mut b, &Counts::default(), limits).await, Ended::Cut));
        let limits = Limits { idle: Some(Duration::from_millis(20)), ..Limits::default() };
        assert!(matches!(pump(&mut a, &mut b, &Counts::default(), limits).await, Ended::Idle));
    }
}

//! Kernel pipes that busy flows borrow to move bytes between two sockets without copying them.
//!
//! Invariants: a pipe is in the pool only when it is known to be empty, so one flow's bytes never reach another; no
//! more than the pool's limit exist at once.
//!
//! This module does not know what a flow is.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};

use super::metrics;

/// What a pipe should hold.
pub(super) const PIPE_BYTES: usize = 1 << 20;
/// What a pipe must hold to be better than copying; above its soft limit the kernel gives less.
const PIPE_BYTES_MIN: usize = 64 << 10;
/// How long the system is not asked again after it gave none.
const PIPE_RETRY: Duration = Duration::from_secs(1);

/// How many pipes there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pipes {
    /// All of them.
    pub open: usize,
    /// Those in the pool.
    pub idle: usize,
}

pub(super) struct Pool {
    pipes_max: usize,
    state: Mutex<State>,
    gauges: metrics::Pipes,
}

#[derive(Default)]
struct State {
    open: usize,
    idle: Vec<Pipe>,
    refused_at: Option<Instant>,
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
}

impl Pool {
    pub(super) fn new(pipes_max: usize) -> Arc<Self> {
        Arc::new(Self { pipes_max, state: Mutex::default(), gauges: metrics::Pipes::new() })
    }

    /// An empty pipe, or `None` when the limit is reached or the system gives none that is worth it.
    pub(super) fn borrow(self: &Arc<Self>) -> Option<Borrowed> {
        let idle = {
            let mut state = self.state.lock();
            let idle = state.idle.pop();
            if idle.is_none() {
                if state.open == self.pipes_max {
                    metrics::pipe_refused("limit");
                    return None;
                }
                if state.refused_at.is_some_and(|at| at.elapsed() < PIPE_RETRY) {
                    metrics::pipe_refused("system");
                    return None;
                }
                state.refused_at = None;
                state.open += 1;
            }
            idle
        };
        match idle.map_or_else(Pipe::open, Ok) {
            Ok(pipe) => {
                let borrowed = Borrowed { pipe: Some(pipe.grown()), held: 0, broken: false, pool: self.clone() };
                self.publish();
                Some(borrowed)
            }
            Err(error) => {
                {
                    let mut state = self.state.lock();
                    state.open -= 1;
                    state.refused_at = Some(Instant::now());
                }
                metrics::pipe_refused("system");
                tracing::debug!(%error, "no pipe, the flow is copied");
                None
            }
        }
    }

    pub(super) fn pipes(&self) -> Pipes {
        let state = self.state.lock();
        Pipes { open: state.open, idle: state.idle.len() }
    }

    fn publish(&self) {
        let Pipes { open, idle } = self.pipes();
        self.gauges.set(open, idle);
    }
}

impl Pipe {
    fn open() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let capacity = fcntl_getpipe_size(&write)?;
        let pipe = Self { read, write, capacity }.grown();
        if pipe.capacity < PIPE_BYTES_MIN {
            return Err(io::Error::other("the system gives small pipes only"));
        }
        Ok(pipe)
    }

    /// The same pipe at its full size, or as it is when the system refuses.
    fn grown(mut self) -> Self {
        if self.capacity < PIPE_BYTES {
            match fcntl_setpipe_size(&self.write, PIPE_BYTES) {
                Ok(capacity) => self.capacity = capacity,
                Err(_) => metrics::pipe_growth_refused(),
            }
        }
        self
    }
}

/// A pipe and what it holds. Dropped, it goes back to the pool if it is empty and is closed if not.
pub(super) struct Borrowed {
    pipe: Option<Pipe>,
    held: usize,
    broken: bool,
    pool: Arc<Pool>,
}

impl Borrowed {
    /// How many bytes lie in the pipe.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Moves what the socket has into the pipe, which must be empty: only then does `WouldBlock` speak of the socket.
    /// Zero is the socket's end.
    pub(super) fn fill(&mut self, socket: impl AsFd) -> io::Result<usize> {
        debug_assert_eq!(self.held, 0);
        let pipe = self.pipe.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let moved = splice(socket, None, &pipe.write, None, pipe.capacity, SpliceFlags::MOVE | SpliceFlags::NONBLOCK);
        self.note(moved, |held, moved| held + moved)
    }

    /// Moves what the pipe holds to the socket. `more` promises that more follows at once.
    pub(super) fn drain(&mut self, socket: impl AsFd, more: bool) -> io::Result<usize> {
        let pipe = self.pipe.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let mut flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        flags.set(SpliceFlags::MORE, more);
        let moved = splice(&pipe.read, None, socket, None, self.held, flags);
        self.note(moved, |held, moved| held - moved)
    }

    /// Keeps the account exact; after an error other than "not now" it is not, and the pipe is not used again.
    fn note(&mut self, moved: rustix::io::Result<usize>, held: impl Fn(usize, usize) -> usize) -> io::Result<usize> {
        match moved {
            Ok(moved) => self.held = held(self.held, moved),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => self.broken = true,
        }
        Ok(moved?)
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        {
            let mut state = self.pool.state.lock();
            match self.pipe.take() {
                Some(pipe) if self.held == 0 && !self.broken => state.idle.push(pipe),
                _ => state.open -= 1,
            }
        }
        self.pool.publish();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_an_empty_pipe_goes_back() {
        let pool = Pool::new(1);
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(b"secret").unwrap();
        let mut pipe = pool.borrow().unwrap();
        assert!(pool.borrow().is_none(), "the limit is kept");
        assert_eq!(pipe.fill(&far).unwrap(), 6);
        drop(pipe);
        assert_eq!(pool.pipes(), Pipes { open: 0, idle: 0 });

        near.write_all(b"answer").unwrap();
        let mut pipe = pool.borrow().unwrap();
        assert_eq!(pipe.fill(&far).unwrap(), 6);
        assert_eq!(pipe.drain(&far, false).unwrap(), 6);
        drop(pipe);
        assert_eq!(pool.pipes(), Pipes { open: 1, idle: 1 });
        let mut answer = [0; 6];
        near.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
    }
}

//! A terminal with one program in it: what a person types, reads and closes.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

/// Longest wait for anything that should happen.
const DEADLINE: Duration = Duration::from_secs(120);
/// Between two looks at what is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A terminal, and the program that was started in it.
pub struct Terminal {
    screen: File,
    said: String,
    program: Child,
}

impl Terminal {
    /// Opens a terminal and runs `command` in it, as the leader of its session.
    pub fn open(command: &Command) -> Self {
        let (ours, theirs) = open_pty();
        let side = || theirs.try_clone().expect("a descriptor");
        let mut session = Command::new("setsid");
        session.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => session.env(name, value),
                None => session.env_remove(name),
            };
        }
        session.stdin(side()).stdout(side()).stderr(side());
        let program = session.spawn().expect("a program in a terminal");
        Self { screen: File::from(ours), said: String::new(), program }
    }

    /// Reads until `text` stands on the screen; everything that was said so far.
    pub fn read_until(&mut self, text: &str) -> &str {
        let begun = Instant::now();
        while !self.said.contains(text) {
            assert!(begun.elapsed() < DEADLINE, "`{text}` was not said:\n{}", self.said);
            let mut ready = [PollFd::new(&self.screen, PollFlags::IN)];
            let wait = Timespec { tv_sec: 1, tv_nsec: 0 };
            if poll(&mut ready, Some(&wait)).expect("a terminal can be waited for") == 0 {
                continue;
            }
            let mut bytes = [0; 4_096];
            match self.screen.read(&mut bytes) {
                Ok(count) => self.said.push_str(&String::from_utf8_lossy(&bytes[..count]).replace('\r', "")),
                // Nobody has the other side any more.
                Err(error) => panic!("the program ended before it said `{text}` ({error}):\n{}", self.said),
            }
        }
        &self.said
    }

    /// Ctrl-C.
    pub fn interrupt(&mut self) {
        self.screen.write_all(&[3]).expect("the terminal takes keys");
    }

    /// Closes the terminal under the program; how the program ended.
    pub fn close(self) -> ExitStatus {
        let Self { screen, mut program, .. } = self;
        drop(screen);
        ended(&mut program)
    }

    /// How the program ended.
    pub fn ended(&mut self) -> ExitStatus {
        ended(&mut self.program)
    }
}

fn ended(program: &mut Child) -> ExitStatus {
    let begun = Instant::now();
    loop {
        if let Some(status) = program.try_wait().expect("a child can be waited for") {
            return status;
        }
        if begun.elapsed() > DEADLINE {
            let _ = program.kill();
            panic!("the program does not end");
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The two sides of a new terminal: ours, and the program's.
#[expect(unsafe_code, reason = "the standard library has no terminals")]
fn open_pty() -> (OwnedFd, OwnedFd) {
    let (mut ours, mut theirs) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: both descriptors are written before they are read; name and settings may be null.
    let made = unsafe { libc::openpty(&raw mut ours, &raw mut theirs, none, std::ptr::null(), std::ptr::null()) };
    assert_eq!(made, 0, "a terminal: {}", std::io::Error::last_os_error());
    // SAFETY: the call above succeeded, so both are open and nobody else has them.
    let sides = unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
    // A program that is started must not keep our side: the terminal could then not be closed.
    rustix::io::fcntl_setfd(&sides.0, rustix::io::FdFlags::CLOEXEC).expect("a flag");
    rustix::io::fcntl_setfd(&sides.1, rustix::io::FdFlags::CLOEXEC).expect("a flag");
    sides
}

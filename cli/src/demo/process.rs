//! Child processes of the demo: real ones, of this same binary, that cannot outlive it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal};
use tokio::process::{Child, Command};

/// A process that can be killed, stopped, and started again as it was.
pub struct Process {
    name: String,
    arguments: Vec<OsString>,
    env: Vec<(String, OsString)>,
    log: PathBuf,
    child: Option<Child>,
    stopped: bool,
}

impl Process {
    /// Not started yet. Output is appended to `log`.
    pub fn new(name: impl Into<String>, arguments: Vec<OsString>, log: PathBuf) -> Self {
        Self { name: name.into(), arguments, env: Vec::new(), log, child: None, stopped: false }
    }

    /// An environment variable of its own.
    pub fn with_env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Starts it, when it does not run.
    pub fn start(&mut self) -> anyhow::Result<()> {
        if self.is_running() {
            return Ok(());
        }
        let out = std::fs::OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut command = command(&self.arguments);
        command
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out);
        self.child = Some(command.spawn().with_context(|| format!("cannot start `{}`", self.name))?);
        self.stopped = false;
        Ok(())
    }

    /// SIGKILL, and waits until it is gone.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().await.with_context(|| format!("cannot kill `{}`", self.name))?;
        }
        self.stopped = false;
        Ok(())
    }

    /// SIGSTOP: it is there and does nothing.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::STOP)?;
        self.stopped = true;
        Ok(())
    }

    /// SIGCONT.
    pub fn cont(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::CONT)?;
        self.stopped = false;
        Ok(())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its output.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The end of its output, for an error message.
    pub fn last_words(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    /// It has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// One word for people.
    pub fn state(&mut self) -> &'static str {
        match (self.is_running(), self.stopped) {
            (true, false) => "runs",
            (true, true) => "stopped",
            (false, _) => "down",
        }
    }

    fn signal(&mut self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.child.as_ref().and_then(Child::id).and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let Some(pid) = pid.filter(|_| self.is_running()) else { bail!("`{}` does not run", self.name) };
        rustix::process::kill_process(pid, signal).with_context(|| format!("cannot signal `{}`", self.name))
    }
}

/// A command of this binary that dies with the demo, however the demo dies.
#[allow(unsafe_code)]
pub fn command(arguments: &[OsString]) -> Command {
    let parent = rustix::process::getpid();
    // The very program that runs, also when its file was replaced by a build meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("selvedge").args(arguments).kill_on_drop(true);
    // What the environment says of another cluster is not meant for this one.
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_of_another_cluster(name)) {
        command.env_remove(name);
    }
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the line above.
            if rustix::process::getppid() == Some(parent) { Ok(()) } else { Err(std::io::ErrorKind::BrokenPipe.into()) }
        });
    }
    command
}

/// A variable of this binary, except those that say where logs and traces go.
fn is_of_another_cluster(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name.starts_with("SELVEDGE_") && !name.starts_with("SELVEDGE_LOG") && name != "SELVEDGE_OTLP_ENDPOINT"
}

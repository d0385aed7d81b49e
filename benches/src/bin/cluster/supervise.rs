//! A run leaves nothing behind, however it ends: the measurements and every server they start are one group of
//! processes with one directory, and this is who ends the group and removes the directory.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitCode};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::signal::unix::{SignalKind, signal};

/// Runs this program's measurements to their end, or until a signal.
pub fn run() -> ExitCode {
    match supervised() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("bench-cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn supervised() -> anyhow::Result<u8> {
    let dir = tempfile::Builder::new().prefix("selvedge-bench-").tempdir()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1)).arg("--inner").env("TMPDIR", dir.path()).process_group(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Signals are watched before there is anything to clean up.
    let (mut interrupt, mut terminate) = {
        let _in = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    let mut inner = command.spawn().context("the measurements cannot be started")?;
    let group = Pid::from_child(&inner);
    let code = runtime.block_on(async {
        loop {
            if let Some(code) = ended(&mut inner)? {
                return Ok::<_, anyhow::Error>(code);
            }
            tokio::select! {
                _ = interrupt.recv() => return Ok(130),
                _ = terminate.recv() => return Ok(143),
                () = tokio::time::sleep(std::time::Duration::from_millis(100)) => {}
            }
        }
    });
    // Fails when everybody is gone already.
    let _ = kill_process_group(group, Signal::KILL);
    inner.wait()?;
    dir.close()?;
    code
}

fn ended(inner: &mut Child) -> anyhow::Result<Option<u8>> {
    let status = inner.try_wait()?;
    Ok(status.map(|status| status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

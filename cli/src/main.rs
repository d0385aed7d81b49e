//! The one binary: `selvedge broker`, `selvedge connector`, `selvedge client`, and the administrator's commands.
//!
//! **Invariant:** administrators' commands speak the admin API and nothing else; only `broker` and `cluster init|join`
//! touch a data directory, `cluster doctor` reads one, and `audit verify` reads a journal.
//! **Exit codes:** 0 yes or done, 1 no (denied, different, broken, not yet enforced), 2 it could not be found out.

mod api;
mod args;
mod command;
mod context;
mod demo;
mod diff;
mod duration;
mod objects;
mod output;
mod seen;
mod shutdown;
mod telemetry;

use std::process::ExitCode;

use clap::Parser as _;

use args::Args;

/// A broker keeps millions of small rows, made on one thread and dropped on another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exit code of an answer that is no.
const NO: u8 = 1;
/// Exit code of a command that could not do its work.
const FAILED: u8 = 2;

fn main() -> ExitCode {
    selvedge_proto::tls::install_provider();
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&error.into()),
    };
    let code = runtime.block_on(async {
        match command::run(args).await {
            Ok(code) => code,
            Err(error) => report(&error),
        }
    });
    // What still reads standard input must not keep the process.
    runtime.shutdown_background();
    code
}

fn report(error: &anyhow::Error) -> ExitCode {
    use std::io::Write as _;
    let broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    };
    if error.downcast_ref::<output::Unwritable>().is_some() && error.chain().any(broken_pipe) {
        return ExitCode::SUCCESS;
    }
    // A terminal that is gone is told nothing.
    let _ = writeln!(std::io::stderr(), "error: {}", output::chain(error));
    match error.downcast_ref::<selvedge_connector::client::Error>() {
        Some(refused) => ExitCode::from(refused.exit_code()),
        None => ExitCode::from(FAILED),
    }
}

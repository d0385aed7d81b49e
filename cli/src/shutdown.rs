//! Ending on SIGINT and SIGTERM.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that the first SIGINT or SIGTERM cancels; the second ends the process at once.
pub fn on_signal() -> anyhow::Result<CancellationToken> {
    let (first, second) = on_signals()?;
    tokio::spawn(async move {
        second.cancelled().await;
        std::process::exit(EXIT_CODE);
    });
    Ok(first)
}

/// Tokens that the first and the second SIGINT or SIGTERM cancel; the third ends the process at once.
pub fn on_signals() -> anyhow::Result<(CancellationToken, CancellationToken)> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let tokens = (CancellationToken::new(), CancellationToken::new());
    let (first, second) = tokens.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if second.is_cancelled() {
                std::process::exit(EXIT_CODE);
            } else if first.is_cancelled() {
                second.cancel();
            } else {
                first.cancel();
            }
        }
    });
    Ok(tokens)
}

/// What shells use for a process that SIGINT ended.
const EXIT_CODE: i32 = 130;

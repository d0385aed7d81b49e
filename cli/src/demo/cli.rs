//! The demo as a user of the command line: every administrative step is a command of this same binary.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;

use super::process;

/// Longest time that a command may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// Runs commands with one `SELVEDGE_HOME`.
#[derive(Clone)]
pub struct Cli {
    home: PathBuf,
}

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Exit code; none when a signal ended it.
    pub code: Option<i32>,
    pub out: Vec<u8>,
    pub err: String,
}

impl Ran {
    /// Its output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }
}

impl Cli {
    /// With the context kept in `home`.
    pub fn new(home: PathBuf) -> Self {
        Self { home }
    }

    /// Where the context is.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Runs a command to its end, with `input` on its standard input.
    pub async fn run<A: Into<OsString>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        input: &[u8],
    ) -> anyhow::Result<Ran> {
        let arguments: Vec<OsString> = arguments.into_iter().map(Into::into).collect();
        let shown = arguments.iter().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" ");
        let mut command = process::command(&arguments);
        let mut child = command
            .env("SELVEDGE_HOME", &self.home)
            .env("NO_COLOR", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run `selvedge {shown}`"))?;
        let stdin = child.stdin.take();
        let write = async {
            if let Some(mut stdin) = stdin {
                // A command that ends without reading its input says why by its exit code.
                let _ = stdin.write_all(input).await;
            }
        };
        let ((), output) = tokio::time::timeout(COMMAND_LIMIT, async { tokio::join!(write, child.wait_with_output()) })
            .await
            .with_context(|| format!("`selvedge {shown}` does not end"))?;
        let output = output?;
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok(Ran { code: output.status.code(), out: output.stdout, err })
    }

    /// Runs a command that must succeed; its output.
    pub async fn ok<A: AsRef<str>>(&self, arguments: &[A]) -> anyhow::Result<String> {
        let ran = self.run(arguments.iter().map(AsRef::as_ref), b"").await?;
        if ran.code != Some(0) {
            let shown = arguments.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" ");
            bail!("`selvedge {shown}` failed: {}{}", ran.err.trim_end(), ran.text().trim_end());
        }
        Ok(ran.text())
    }

    /// Runs a command that must succeed and print JSON.
    pub async fn json<A: AsRef<str>>(&self, arguments: &[A]) -> anyhow::Result<Value> {
        let text = self.ok(arguments).await?;
        serde_json::from_str(&text)
            .with_context(|| format!("not JSON: `{}`", text.chars().take(200).collect::<String>()))
    }
}

//! `selvedge context`

use std::io::BufRead as _;
use std::process::ExitCode;

use anyhow::Context as _;
use selvedge_proto::identity::Pin;
use serde_json::json;
use zeroize::Zeroizing;

use crate::context::{Context, Contexts, Token};
use crate::{api, output};

/// Bytes of a secret on standard input.
const SECRET_BYTES_MAX: u64 = 4_096;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Add a cluster, or replace what is known of it; the first one becomes the current one
    Add {
        /// Name of your choice
        name: String,
        /// Web listener of a broker; several are tried in this order
        #[arg(long, required = true, value_parser = api::endpoint, value_name = "https://HOST:PORT")]
        endpoint: Vec<String>,
        /// Pin of the cluster's issuer; `cluster init` prints it
        #[arg(long, value_name = "HEX")]
        pin: Pin,
        /// Token of an administrator; `-` reads it from standard input
        #[arg(long)]
        token: String,
    },
    /// All contexts, without their tokens
    List {
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a context the current one
    Use {
        /// Name
        name: String,
    },
    /// Forget a context
    Remove {
        /// Name
        name: String,
    },
}

pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    let mut stored = Contexts::load()?;
    match command {
        Command::Add { name, endpoint, pin, token } => {
            let token = Token::new(secret(&token)?.as_str());
            stored.contexts.insert(name.clone(), Context { endpoints: endpoint, pin, token });
            stored.current.get_or_insert(name);
            stored.store()?;
        }
        Command::Use { name } => {
            stored.contexts.get(&name).with_context(|| format!("there is no context `{name}`"))?;
            stored.current = Some(name);
            stored.store()?;
        }
        Command::Remove { name } => {
            stored.contexts.remove(&name).with_context(|| format!("there is no context `{name}`"))?;
            stored.current = stored.current.filter(|current| *current != name);
            stored.store()?;
        }
        Command::List { json: true } => {
            let contexts = stored.contexts.iter().map(|(name, context)| {
                let current = stored.current.as_ref() == Some(name);
                json!({ "name": name, "current": current, "endpoints": context.endpoints, "pin": context.pin })
            });
            output::json(&json!({ "contexts": contexts.collect::<Vec<_>>() }))?;
        }
        Command::List { json: false } => {
            let rows = stored.contexts.iter().map(|(name, context)| {
                let mark = if stored.current.as_ref() == Some(name) { "*" } else { "" };
                vec![mark.to_owned(), name.clone(), context.endpoints.join(" "), context.pin.to_string()]
            });
            output::table(&["", "name", "endpoints", "pin"], rows)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A secret argument; `-` means the first line of standard input.
pub fn secret(argument: &str) -> anyhow::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(argument.to_owned());
    if argument == "-" {
        text.clear();
        let stdin = std::io::Read::take(std::io::stdin().lock(), SECRET_BYTES_MAX);
        std::io::BufReader::new(stdin).read_line(&mut text).context("cannot read the secret from standard input")?;
    }
    let text = Zeroizing::new(text.trim().to_owned());
    anyhow::ensure!(!text.is_empty(), "the secret is empty");
    Ok(text)
}

//! `selvedge token`, `directory`, `key` and `code`: secrets that are shown once.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::{Client, Wait};
use crate::args::Global;
use crate::{duration, output};

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Role {
    /// Reads everything but secrets
    Auditor,
    /// Changes policy, identity and keys
    Admin,
    /// Also makes and revokes administrators and changes the cluster
    Owner,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Auditor => "auditor",
            Self::Admin => "admin",
            Self::Owner => "owner",
        }
    }
}

#[derive(Debug, clap::Subcommand)]
pub enum Token {
    /// Make a token; it is shown once
    Create {
        /// Unique name
        name: String,
        /// What it may do
        #[arg(long, value_enum)]
        role: Role,
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// All tokens, without their secrets
    List {
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// Revoke a token
    Revoke {
        /// Id
        id: String,
        /// JSON
        #[arg(long)]
        json: bool,
    },
}

pub async fn token(command: Token, global: &Global) -> anyhow::Result<ExitCode> {
    let client = super::client(global)?;
    match command {
        Token::Create { name, role, json } => {
            let body = json!({ "name": name, "role": role.name() });
            let answer = client.change(Method::POST, "/api/v1/tokens", &body, Wait::Committed).await?;
            secret(&answer, "token", json)
        }
        Token::List { json } => {
            let answer: Value = client.read("/api/v1/tokens", &[]).await?;
            let columns = [("id", "/id"), ("name", "/name"), ("role", "/role"), ("revoked", "/revoked")];
            output::list(&answer, "tokens", &columns, json)?;
            Ok(ExitCode::SUCCESS)
        }
        Token::Revoke { id, json } => {
            let path = format!("/api/v1/tokens/{}", super::segment(&id)?);
            let answer = client.change(Method::DELETE, &path, &Value::Null, Wait::Committed).await?;
            super::changed(&answer, "revoked", json)
        }
    }
}

#[derive(Debug, clap::Subcommand)]
pub enum Directory {
    /// Make a directory, or replace the token of one; its SCIM token is shown once
    Create {
        /// Unique name
        name: String,
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// All directories
    List {
        /// JSON
        #[arg(long)]
        json: bool,
    },
}

pub async fn directory(command: Directory, global: &Global) -> anyhow::Result<ExitCode> {
    let client = super::client(global)?;
    match command {
        Directory::Create { name, json } => {
            let body = json!({ "name": name });
            let answer = client.change(Method::POST, "/api/v1/directories", &body, Wait::Committed).await?;
            if !json {
                output::line(format_args!("SCIM endpoint: https://BROKER{}", output::cell(answer.get("scim_path"))))?;
            }
            secret(&answer, "token", json)
        }
        Directory::List { json } => {
            let answer: Value = client.read("/api/v1/directories", &[]).await?;
            let columns = [
                ("id", "/id"),
                ("name", "/name"),
                ("users", "/users"),
                ("groups", "/groups"),
                ("generation", "/generation"),
            ];
            output::list(&answer, "directories", &columns, json)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Kind {
    /// A connector, into a connector group
    Connector,
    /// An instance of a workload
    Workload,
    /// A person's device
    Device,
    /// A broker
    Broker,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Connector => "connector",
            Self::Workload => "workload",
            Self::Device => "device",
            Self::Broker => "broker",
        }
    }
}

#[derive(Debug, clap::Subcommand)]
pub enum Key {
    /// Make an enrolment secret; it is shown once
    Create {
        /// What it makes
        #[arg(long, value_enum)]
        kind: Kind,
        /// Connector group, workload, `userName` (`directory/userName`), or for brokers their roles; all when not given
        #[arg(long, default_value = "")]
        target: String,
        /// For people; the target when not given
        #[arg(long)]
        name: Option<String>,
        /// How often it may be used
        #[arg(long, default_value_t = 1)]
        uses: u32,
        /// How long it is valid
        #[arg(long, value_parser = duration::parse, default_value = "24h")]
        life: Duration,
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// All enrolment secrets, without the secrets
    List {
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// Revoke an enrolment secret; what was enrolled with it stays
    Revoke {
        /// Id
        id: String,
        /// JSON
        #[arg(long)]
        json: bool,
    },
}

pub async fn key(command: Key, global: &Global) -> anyhow::Result<ExitCode> {
    match command {
        Key::Create { kind, target, name, uses, life, json } => {
            create(kind, target, name, uses, life, json, global).await
        }
        Key::List { json } => {
            let answer: Value = super::client(global)?.read("/api/v1/keys", &[]).await?;
            if json {
                output::json(&answer)?;
                return Ok(ExitCode::SUCCESS);
            }
            let headers = ["id", "kind", "name", "target", "uses", "valid until", "revoked"];
            let row = |key: &Value| {
                let text = |name: &str| output::cell(key.get(name));
                let until = key["expires_ms"].as_u64().map(output::moment).unwrap_or_default();
                let uses = format!("{} of {}", text("uses"), text("uses_max"));
                vec![text("id"), text("kind"), text("name"), text("target"), uses, until, text("revoked")]
            };
            output::table(&headers, answer["keys"].as_array().into_iter().flatten().map(row))?;
            Ok(ExitCode::SUCCESS)
        }
        Key::Revoke { id, json } => {
            let path = format!("/api/v1/keys/{}", super::segment(&id)?);
            let answer = super::client(global)?.change(Method::DELETE, &path, &Value::Null, Wait::Committed).await?;
            super::changed(&answer, "revoked", json)
        }
    }
}

#[derive(Debug, clap::Subcommand)]
pub enum Code {
    /// Make a one-time code with which a person enrols a device
    Create {
        /// The person's `userName`, or `directory/userName`
        #[arg(long)]
        user: String,
        /// How long it is valid
        #[arg(long, value_parser = duration::parse, default_value = "1h")]
        life: Duration,
        /// JSON
        #[arg(long)]
        json: bool,
    },
}

pub async fn code(command: Code, global: &Global) -> anyhow::Result<ExitCode> {
    let Code::Create { user, life, json } = command;
    create(Kind::Device, user, None, 1, life, json, global).await
}

/// A join token, printed.
pub(super) async fn join_token(
    name: String,
    roles: String,
    life: Duration,
    json: bool,
    global: &Global,
) -> anyhow::Result<ExitCode> {
    create(Kind::Broker, roles, Some(name), 1, life, json, global).await
}

/// A join token for one broker that joins at once.
pub(super) async fn new_join_token(client: &Client, name: &str, roles: &str) -> anyhow::Result<String> {
    let body = json!({ "kind": "broker", "name": name, "target": roles, "uses": 1, "life_s": 600 });
    let answer = client.change(Method::POST, "/api/v1/keys", &body, Wait::Committed).await?;
    answer["secret"].as_str().map(str::to_owned).context("the answer has no secret")
}

async fn create(
    kind: Kind,
    target: String,
    name: Option<String>,
    uses: u32,
    life: Duration,
    as_json: bool,
    global: &Global,
) -> anyhow::Result<ExitCode> {
    let named = if target.is_empty() { kind.name().to_owned() } else { target.clone() };
    let body = json!({
        "kind": kind.name(), "name": name.unwrap_or(named), "target": target, "uses": uses, "life_s": life.as_secs(),
    });
    let answer = super::client(global)?.change(Method::POST, "/api/v1/keys", &body, Wait::Committed).await?;
    if !as_json {
        let until = answer["expires_ms"].as_u64().map(output::moment).unwrap_or_default();
        output::line(format_args!("valid until {until}, for {uses} use(s)"))?;
    }
    secret(&answer, "secret", as_json)
}

/// Prints an answer with a secret that is not shown again.
fn secret(answer: &Value, field: &str, as_json: bool) -> anyhow::Result<ExitCode> {
    if as_json {
        output::json(answer)?;
    } else {
        output::line(format_args!(
            "id     {}\n{field:<6} {}",
            output::cell(answer.get("id")),
            output::cell(answer.get(field))
        ))?;
        output::line("It is not shown again.")?;
    }
    Ok(ExitCode::SUCCESS)
}

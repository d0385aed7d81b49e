//! `selvedge client`: what a person or a workload runs.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use selvedge_connector::client::{self, Client, Options, Report};
use selvedge_connector::enrol::{self, EnrolKind};
use selvedge_connector::state::State;
use serde_json::json;
use tracing::level_filters::LevelFilter;

use crate::args::Global;
use crate::{context, output, shutdown};

/// The longest wait for a first control stream.
const READY_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Enrol this device with a one-time code, or this machine as a workload
    Enrol(Enrol),
    /// Listen on this machine; each connection reaches one application
    Connect {
        /// The application
        #[arg(value_name = "HOST:PORT", value_parser = target)]
        target: (String, u16),
        /// Loopback address to listen on; port 0 takes a free one
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
        listen: SocketAddr,
        /// Packets instead of connections: all that is sent to the port is one session
        #[arg(long)]
        udp: bool,
        #[command(flatten)]
        seat: Seat,
    },
    /// Join standard input and output with an application (ssh's ProxyCommand)
    Nc {
        /// Host
        host: String,
        /// Port
        port: u16,
        #[command(flatten)]
        seat: Seat,
    },
    /// Listen on this machine as a SOCKS5 and HTTP CONNECT proxy, for this user only
    Proxy {
        /// Loopback address to listen on; port 0 takes a free one
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:1080")]
        listen: SocketAddr,
        #[command(flatten)]
        seat: Seat,
    },
    /// Who this is, which brokers it is attached to, which zones are private
    Status {
        #[command(flatten)]
        seat: Seat,
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// The address that stands for a private name here: the same for denied and unknown, none
    Resolve {
        /// The name
        host: String,
        #[command(flatten)]
        seat: Seat,
    },
    /// What happens to a name here: whether it is private, and whether it is reachable
    Why {
        /// The application
        #[arg(value_name = "HOST[:PORT]")]
        target: String,
        #[command(flatten)]
        seat: Seat,
    },
}

/// Which enrolled client.
#[derive(Debug, clap::Args)]
pub struct Seat {
    /// Where `enrol` put the identity; `client` beside the contexts when not given
    #[arg(long, env = "SELVEDGE_STATE", value_name = "DIR")]
    state: Option<PathBuf>,
    /// Dial another address than a broker's advertised one (`HOST:PORT=ADDR`)
    #[arg(long, value_name = "BROKER=ADDR", value_parser = via)]
    via: Vec<(String, String)>,
}

#[derive(Debug, clap::Args)]
pub struct Enrol {
    /// Web listener of a broker
    #[arg(long, value_name = "HOST:PORT")]
    web: String,
    /// One-time code of a person; `-` reads it from standard input
    #[arg(long, conflicts_with = "secret", required_unless_present = "secret")]
    code: Option<String>,
    /// Provisioning key of a workload; `-` reads it from standard input
    #[arg(long)]
    secret: Option<String>,
    /// What is enrolled; a device with `--code`, a workload with `--secret` when not given
    #[arg(long, value_enum)]
    kind: Option<Kind>,
    /// Name of this device or instance; the host's name when not given
    #[arg(long)]
    name: Option<String>,
    /// Where its identity is kept (made with mode 0700); `client` beside the contexts when not given
    #[arg(long, env = "SELVEDGE_STATE", value_name = "DIR")]
    state: Option<PathBuf>,
    /// JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Device,
    Workload,
}

pub async fn run(command: Command, global: &Global) -> anyhow::Result<ExitCode> {
    // What goes wrong is told once, by the command itself.
    let telemetry = super::logs(global, LevelFilter::ERROR, "selvedge-client")?;
    let result = act(command).await;
    telemetry.stop().await;
    result
}

async fn act(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Enrol(args) => enrol(args, false).await,
        Command::Connect { target: (host, port), listen, udp, seat } => {
            let (client, shutdown) = (start(seat).await?, shutdown::on_signal()?);
            let result = if udp {
                client::connect_udp(&client, &host, port, listen, shutdown, report).await
            } else {
                client::connect(&client, &host, port, listen, shutdown, report).await
            };
            client.stop().await;
            result?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Nc { host, port, seat } => {
            let (client, shutdown) = (start(seat).await?, shutdown::on_signal()?);
            let result = tokio::select! {
                result = client::nc(&client, &host, port) => result,
                () = shutdown.cancelled() => Ok(()),
            };
            client.stop().await;
            result?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Proxy { listen, seat } => {
            let (client, shutdown) = (start(seat).await?, shutdown::on_signal()?);
            let result = client::proxy(&client, listen, shutdown, report).await;
            client.stop().await;
            result?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Status { seat, json } => {
            let client = start(seat).await?;
            // It says by itself when nothing is attached.
            let _ = client.ready(READY_WITHIN).await;
            let status = client.status().await;
            client.stop().await;
            let status = status?;
            if json {
                output::json(&status)?
            } else {
                output::line(output::clean(status.to_string().trim_end()))?
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Resolve { host, seat } => {
            let client = start(seat).await?;
            client.ready(READY_WITHIN).await?;
            let address = client.resolve(&host).await;
            client.stop().await;
            output::line(address?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Why { target, seat } => {
            let (host, port) = match self::target(&target) {
                Ok(target) => target,
                Err(_) => (target, 443),
            };
            let client = start(seat).await?;
            client.ready(READY_WITHIN).await?;
            let why = client.why(&host, port).await;
            client.stop().await;
            output::line(output::clean(why?.trim_end()))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn start(seat: Seat) -> anyhow::Result<Client> {
    let via: BTreeMap<String, String> = seat.via.into_iter().collect();
    Ok(Client::start(Options { state_dir: state_dir(seat.state)?, via }).await?)
}

fn state_dir(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    match given {
        Some(dir) => Ok(dir),
        None => Ok(context::home()?.join("client")),
    }
}

fn report(report: Report) {
    use std::io::Write as _;
    let text = match report {
        Report::Listening(address) => format!("listening on {address}"),
        Report::Failed { target, error } => format!("{target}: {}", output::chain(&error.into())),
    };
    // A terminal that is gone is told nothing; the listener goes on.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Enrols a device or a workload.
pub async fn enrol(args: Enrol, workload: bool) -> anyhow::Result<ExitCode> {
    let kind = match (args.kind, workload || args.secret.is_some()) {
        (Some(Kind::Workload), _) | (None, true) => EnrolKind::Workload,
        (Some(Kind::Device), _) | (None, false) => EnrolKind::Device,
    };
    let secret = args.code.or(args.secret).context("neither a code nor a secret was given")?;
    let secret = super::context::secret(&secret)?.to_string();
    let name = match args.name {
        Some(name) => name,
        None => std::fs::read_to_string("/proc/sys/kernel/hostname")
            .context("give this device a `--name`")?
            .trim()
            .to_owned(),
    };
    let dir = state_dir(args.state)?;
    let options = enrol::Options { web: args.web, secret, kind, name, state_dir: dir.clone() };
    let state = enrol::enrol(options).await?;
    say_enrolled(&state, &dir, args.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints what was enrolled.
pub fn say_enrolled(state: &State, dir: &Path, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        return output::json(&json!({
            "kind": state.kind, "name": state.name, "id": state.id, "spiffe": state.spiffe.to_string(),
            "state": dir.display().to_string(),
        }));
    }
    output::line(format_args!(
        "enrolled {} `{}` as {}\nstate    {}",
        state.kind,
        state.name,
        state.spiffe,
        dir.display()
    ))
}

fn target(text: &str) -> Result<(String, u16), String> {
    let wrong = || format!("`{text}` is not HOST:PORT");
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
    if host.is_empty() { Err(wrong()) } else { Ok((host.to_owned(), port)) }
}

fn via(text: &str) -> Result<(String, String), String> {
    let (broker, address) = text.split_once('=').ok_or_else(|| format!("`{text}` is not BROKER=ADDR"))?;
    Ok((broker.to_owned(), address.to_owned()))
}

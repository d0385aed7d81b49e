//! `selvedge config`: a broker's configuration file, checked and explained on any machine; and put into force on its own.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use selvedge_broker::config::{Config, Loaded, Origin, Sources};
use serde_json::{Value, json};

use crate::args::Global;
use crate::{FAILED, output};

/// Longest wait for a broker that reads its configuration again.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Say everything that is wrong with a broker's configuration; exits 2 when there is something
    Check {
        #[command(flatten)]
        of: File,
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// Show every value that holds, also those that nobody wrote
    Show {
        #[command(flatten)]
        of: File,
        /// Where each comes from: the default, FILE:LINE, a variable, a flag
        #[arg(long)]
        origin: bool,
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// Have the broker on this machine read its configuration again, as SIGHUP does: certificates, log level and limits
    Reload {
        #[command(flatten)]
        of: File,
        /// JSON
        #[arg(long)]
        json: bool,
    },
}

/// A file that is the subject of a command.
#[derive(Debug, clap::Args)]
pub struct File {
    /// Configuration (TOML)
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    flags: Flags,
}

/// A broker's configuration, for commands that work with one.
#[derive(Debug, clap::Args)]
pub struct OfBroker {
    /// Configuration (TOML)
    #[arg(long, env = "SELVEDGE_BROKER_CONFIG", value_name = "FILE")]
    pub config: PathBuf,
    #[command(flatten)]
    flags: Flags,
}

/// Values that go before the file and the environment.
#[derive(Debug, clap::Args)]
pub struct Flags {
    /// A value that goes before file and environment, e.g. `edge.bind=0.0.0.0:443`; may be given several times
    #[arg(long, value_name = "FIELD=VALUE", value_parser = field_and_value)]
    set: Vec<(String, String)>,
}

impl OfBroker {
    /// Where the values come from.
    pub fn sources(&self, global: &Global) -> Sources {
        self.flags.sources(&self.config, global)
    }

    /// Reads and checks it.
    pub fn load(&self, global: &Global) -> anyhow::Result<Loaded> {
        Ok(Config::read(&self.sources(global))?)
    }
}

impl Flags {
    fn sources(&self, file: &std::path::Path, global: &Global) -> Sources {
        let mut sources = Sources::environment(file);
        let set = self.set.iter().map(|(field, value)| (format!("--set {field}"), field.clone(), value.clone()));
        sources.flags.extend(set);
        // What every command takes; a value that the environment gave is the environment's.
        for (flag, field, value) in
            [("--log", "log", &global.log), ("--otlp-endpoint", "otlp_endpoint", &global.otlp_endpoint)]
        {
            let variable = format!("SELVEDGE_{}", field.to_uppercase());
            let by_variable = |value: &String| std::env::var(&variable).is_ok_and(|set| set == *value);
            if let Some(value) = value.as_ref().filter(|value| !by_variable(value)) {
                sources.flags.push((flag.to_owned(), field.to_owned(), value.clone()));
            }
        }
        sources
    }
}

pub async fn run(command: Command, global: &Global) -> anyhow::Result<ExitCode> {
    match command {
        Command::Check { of, json } => check(&of, global, json),
        Command::Show { of, origin, json } => show(&of, global, origin, json),
        Command::Reload { of, json } => reload(&of, global, json).await,
    }
}

fn check(of: &File, global: &Global, as_json: bool) -> anyhow::Result<ExitCode> {
    let read = Config::read(&of.flags.sources(&of.file, global));
    let problems = match &read {
        Ok(_) => &Vec::new(),
        Err(error) => &error.problems,
    };
    if as_json {
        let problems: Vec<Value> =
            problems.iter().map(|problem| json!({ "at": problem.at, "message": problem.message })).collect();
        output::json(&json!({ "ok": read.is_ok(), "problems": problems }))?;
    } else {
        for problem in problems {
            output::line(output::clean(&problem.to_string()))?;
        }
        match problems.len() {
            0 => output::line(format_args!("{}: nothing is wrong", of.file.display()))?,
            1 => output::line("1 problem")?,
            more => output::line(format_args!("{more} problems"))?,
        }
    }
    Ok(if read.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

fn show(of: &File, global: &Global, origin: bool, as_json: bool) -> anyhow::Result<ExitCode> {
    let loaded = Config::read(&of.flags.sources(&of.file, global))?;
    if as_json {
        let values = loaded.shown.iter().map(|shown| {
            json!({ "field": shown.field, "value": shown.value, "origin": shown.origin.to_string(),
                "default": shown.origin == Origin::Default })
        });
        output::json(&json!({ "values": values.collect::<Vec<_>>() }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let width = |of: &dyn Fn(&str, &str) -> usize| {
        loaded.shown.iter().map(|shown| of(&shown.field, shown.value.as_deref().unwrap_or_default())).max().unwrap_or(0)
    };
    let (fields, values) = (width(&|field, _| field.chars().count()), width(&|_, value| value.chars().count()));
    for shown in &loaded.shown {
        let line = match (&shown.value, origin) {
            // As a file may have it.
            (Some(value), false) => format!("{} = {value}", shown.field),
            (None, false) => format!("# {} =", shown.field),
            (value, true) => {
                let value = value.as_deref().unwrap_or("-");
                format!("{:<fields$}  {value:<values$}  {}", shown.field, shown.origin)
            }
        };
        output::line(output::clean(&line))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn reload(of: &File, global: &Global, as_json: bool) -> anyhow::Result<ExitCode> {
    let ops = Config::read(&of.flags.sources(&of.file, global))?.config.ops.bind;
    let client = reqwest::Client::builder().timeout(RELOAD_TIMEOUT).no_proxy().build()?;
    let answer = client.post(format!("http://{ops}/reload")).send().await;
    let answer = answer.with_context(|| format!("no broker answers at `{ops}`, the `ops` listener of this file"))?;
    let (status, text) = (answer.status(), answer.text().await?);
    anyhow::ensure!(status.is_success(), "the broker changed nothing: {}", text.trim_end());
    let reloaded: Value = serde_json::from_str(&text).context("the broker's answer cannot be read")?;
    if as_json {
        output::json(&reloaded)?;
        return Ok(ExitCode::SUCCESS);
    }
    let list = |name: &str| reloaded[name].as_array().cloned().unwrap_or_default();
    for (name, what) in [("changed", "in force now"), ("needs_restart", "needs a restart")] {
        for change in list(name) {
            let [field, from, to] = ["field", "from", "to"].map(|name| output::cell(change.get(name)));
            output::line(output::clean(&format!("{what}: {field} = {to} (was {from})")))?;
        }
    }
    if reloaded["certificate"] == true {
        output::line("in force now: the web listener's certificate")?;
    } else if list("changed").is_empty() && list("needs_restart").is_empty() {
        output::line("nothing is different")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn field_and_value(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(field, _)| !field.is_empty());
    let (field, value) = pair.ok_or_else(|| format!("`{text}` is not FIELD=VALUE"))?;
    Ok((field.trim().to_owned(), value.trim().to_owned()))
}

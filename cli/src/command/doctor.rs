//! `selvedge cluster doctor`

use std::process::ExitCode;

use selvedge_broker::ops::doctor::{self, Level};
use serde_json::json;

use super::config::OfBroker;
use crate::args::Global;
use crate::{FAILED, NO, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    of: OfBroker,
    /// Only what is not as it should be
    #[arg(long, short)]
    quiet: bool,
    /// JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let report = doctor::examine(&args.of.sources(global)).await;
    let (warnings, errors) = (report.count(Level::Warning), report.count(Level::Error));
    if args.json {
        let mut value = json!(report);
        value["warnings"] = warnings.into();
        value["errors"] = errors.into();
        output::json(&value)?;
    } else {
        let quiet = |level: Level| args.quiet && level <= Level::Note;
        for finding in report.findings.iter().filter(|finding| !quiet(finding.level)) {
            let doctor::Finding { level, code, check, message, next } = finding;
            output::line(output::clean(&format!("{level:<8} {check:<16} {message}")))?;
            if let Some(next) = next {
                output::line(output::clean(&format!("{:<25} {code}: {next}", "")))?;
            }
        }
        let plural = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        let sum = format!("{}, {}", plural(errors, "error"), plural(warnings, "warning"));
        let pages = if errors + warnings > 0 { "; each code has its page in docs/runbooks" } else { "" };
        output::line(format_args!("{sum}{pages}"))?;
    }
    Ok(match report.worst() {
        Level::Fine | Level::Note => ExitCode::SUCCESS,
        Level::Warning => ExitCode::from(NO),
        Level::Error => ExitCode::from(FAILED),
    })
}

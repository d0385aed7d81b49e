//! Printing for people (tables) and for scripts (JSON).

use std::fmt;
use std::io::{IsTerminal as _, Write as _};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use serde_json::Value;

/// Standard output cannot be written to; when its reader went away, that is no failure.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output")]
pub struct Unwritable(#[from] std::io::Error);

/// Prints a text as it is.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Unwritable)?;
    Ok(())
}

/// Prints one line.
pub fn line(text: impl fmt::Display) -> anyhow::Result<()> {
    print(&format!("{text}\n"))
}

/// Prints JSON over several lines.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string_pretty(value)?)
}

/// Prints JSON on one line.
pub fn json_line(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string(value)?)
}

/// Prints a table. Wrapped to the terminal; in a pipe, one row is one line.
pub fn table(headers: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> anyhow::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(headers.iter().map(|header| header.to_uppercase()));
    let terminal = std::io::stdout().is_terminal();
    if let (true, Ok(size)) = (terminal, rustix::termios::tcgetwinsize(std::io::stdout())) {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(size.ws_col.max(40));
    }
    for row in rows {
        table.add_row(row.iter().map(|cell| clean(cell)));
    }
    // The first column's own padding is left out.
    let flush = |line: String| format!("{}\n", line.strip_prefix(' ').unwrap_or(&line).trim_end());
    print(&table.lines().map(flush).collect::<String>())
}

/// A list that the API answered: as JSON whole, or as a table with one column for each (header, JSON pointer).
pub fn list(answer: &Value, key: &str, columns: &[(&str, &str)], as_json: bool) -> anyhow::Result<()> {
    if as_json {
        return json(answer);
    }
    let headers: Vec<&str> = columns.iter().map(|(header, _)| *header).collect();
    let empty = Vec::new();
    let rows = answer[key].as_array().unwrap_or(&empty);
    table(&headers, rows.iter().map(|row| columns.iter().map(|(_, pointer)| cell(row.pointer(pointer))).collect()))?;
    if answer["more"] == true {
        line("... and more; narrow it by name")?;
    }
    Ok(())
}

/// A value in a table.
pub fn cell(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Bool(true)) => "yes".to_owned(),
        Some(Value::Bool(false)) => "no".to_owned(),
        Some(Value::Array(items)) => items.iter().map(|item| cell(Some(item))).collect::<Vec<_>>().join(", "),
        Some(other) => other.to_string(),
    }
}

/// A moment of cluster time as people read it, in UTC.
pub fn moment(ms: u64) -> String {
    let timestamp = i64::try_from(ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    timestamp.map_or_else(|| ms.to_string(), |timestamp| timestamp.to_string())
}

/// Text that came from elsewhere, without what would steer a terminal.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// An error with its causes, those that the text before says already left out.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    clean(&text)
}

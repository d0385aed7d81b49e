//! Where values come from: a TOML file, then variables, then flags; the later goes before the earlier.
//!
//! Reading notes every mistake with its place and goes on, so that all of them are told at once. This module does not
//! know which fields there are.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Bytes of the longest file that is read.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Every variable that begins so is a value of a broker's configuration, or a mistake.
pub const VARIABLE_PREFIX: &str = "SELVEDGE_BROKER_";
/// What a variable of that prefix may be besides: the file itself.
pub const FILE_VARIABLE: &str = "SELVEDGE_BROKER_CONFIG";

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said it.
    Default,
    /// A file.
    File {
        /// Which.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
    },
    /// A variable of the environment.
    Variable(String),
    /// A flag, as it is written.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => f.write_str(name),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where it was made; the file where the line is not known.
    pub at: String,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.message)
    }
}

/// What a configuration is read from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The file (TOML).
    pub file: PathBuf,
    /// Variables of the environment; those that are none of ours are passed over.
    pub variables: Vec<(String, String)>,
    /// Flags: how each is written, the field and the value.
    pub flags: Vec<(String, String, String)>,
}

impl Sources {
    /// A file alone.
    pub fn file(path: &Path) -> Self {
        Self { file: path.to_owned(), ..Self::default() }
    }

    /// A file and this process's environment.
    pub fn environment(path: &Path) -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self { variables: std::env::vars_os().filter_map(text).collect(), ..Self::file(path) }
    }
}

/// A value as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Its field, with dots.
    pub field: String,
    /// As TOML writes it; none when there is no value.
    pub value: Option<String>,
    /// Where it came from.
    pub origin: Origin,
}

/// A value that can be written in a file, a variable and a flag.
pub(super) trait Value: Sized {
    /// What it must be, for whoever wrote something else.
    const WHAT: &'static str;
    /// Reads it.
    fn read(text: &Text) -> Option<Self>;
    /// As TOML writes it.
    fn show(&self) -> String;
}

/// A value as it was written.
pub(super) struct Text {
    text: String,
    /// Of a file it is known whether it was a string or something else; a variable or flag may be either.
    kind: Option<Kind>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    String,
    Integer,
    Other,
}

impl Text {
    /// The text, when it may be a string.
    pub(super) fn string(&self) -> Option<&str> {
        self.kind.is_none_or(|kind| kind == Kind::String).then_some(&*self.text)
    }

    /// The number, when it may be one.
    pub(super) fn number<T: FromStr>(&self) -> Option<T> {
        self.kind.is_none_or(|kind| kind == Kind::Integer).then(|| self.text.replace('_', "").parse().ok())?
    }
}

struct Given {
    origin: Origin,
    text: Text,
}

type Field = Vec<String>;

/// Values by field, and the mistakes found so far.
pub(super) struct Layers {
    file: PathBuf,
    values: BTreeMap<Field, Given>,
    variables: BTreeMap<String, String>,
    flags: Vec<(String, String, String)>,
    tables: BTreeMap<Field, Origin>,
    /// Every field that was asked for, for guesses at what a wrong one was meant to be.
    known: Vec<String>,
    shown: Vec<Shown>,
    problems: Vec<Problem>,
}

impl Layers {
    /// Reads the file. What it cannot read is a problem, and the rest goes on.
    pub(super) fn open(sources: &Sources) -> Self {
        let mut layers = Self {
            file: sources.file.clone(),
            values: BTreeMap::new(),
            variables: sources.variables.iter().cloned().collect(),
            flags: sources.flags.clone(),
            tables: BTreeMap::new(),
            known: Vec::new(),
            shown: Vec::new(),
            problems: Vec::new(),
        };
        layers.variables.remove(FILE_VARIABLE);
        match read(&sources.file) {
            Ok(text) => layers.take_file(&text),
            Err(why) => layers.problem(layers.file.display().to_string(), why),
        }
        layers
    }

    fn take_file(&mut self, text: &str) {
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            let at = error.span().map_or(self.file.display().to_string(), |span| self.place(text, span.start));
            // A second report of the same line says less than the first.
            if self.problems.last().is_none_or(|last| last.at != at) {
                self.problem(at, error.message().to_owned());
            }
        }
        self.take_table(text, &[], table.get_ref());
    }

    fn take_table(&mut self, text: &str, above: &[String], table: &DeTable<'_>) {
        for (key, value) in table {
            let field: Field = above.iter().cloned().chain([key.get_ref().to_string()]).collect();
            let line = line(text, key.span().start);
            let origin = Origin::File { path: self.file.clone(), line };
            if let DeValue::Table(table) = value.get_ref() {
                self.tables.insert(field.clone(), origin);
                self.take_table(text, &field, table);
            } else {
                self.values.insert(field, Given { origin, text: written(text, value) });
            }
        }
    }

    /// A value, if there is one and it can be read; it is a problem when it cannot.
    pub(super) fn optional<T: Value>(&mut self, field: &str) -> Option<T> {
        let value = self.take(field);
        self.show(field, value.as_ref().map(|(value, _): &(T, _)| value.show()), value.as_ref().map(|(_, at)| at));
        value.map(|(value, _)| value)
    }

    /// A value that somebody must give.
    pub(super) fn required<T: Value>(&mut self, field: &str) -> Option<T> {
        let (problems, given) = (self.problems.len(), self.optional::<T>(field));
        if given.is_none() && self.problems.len() == problems {
            let (section, at) = match field.rsplit_once('.') {
                Some((section, _)) => (section, self.tables.get(&vec![section.to_owned()]).map(Origin::to_string)),
                None => ("", None),
            };
            let at = at.unwrap_or_else(|| self.file.display().to_string());
            let of = if section.is_empty() { String::new() } else { format!(" of `[{section}]`") };
            self.problem(at, format!("`{field}`{of} is missing: {}", T::WHAT));
        }
        given
    }

    /// A value, or what holds without one.
    pub(super) fn or<T: Value>(&mut self, field: &str, default: T) -> T {
        let value = self.take(field);
        let (value, origin) = value.unwrap_or((default, Origin::Default));
        self.show(field, Some(value.show()), Some(&origin));
        value
    }

    /// A table whose keys are free; as one text, `from=to` divided by commas.
    pub(super) fn pairs(&mut self, field: &str) -> BTreeMap<String, String> {
        self.known.push(field.to_owned());
        self.tables.remove(&vec![field.to_owned()]);
        let mut pairs = BTreeMap::new();
        let in_file: Vec<Field> = self.values.keys().filter(|key| key.len() == 2 && key[0] == field).cloned().collect();
        for key in in_file {
            let Some(given) = self.values.remove(&key) else { continue };
            match given.text.string() {
                Some(to) => {
                    self.shown.push(Shown {
                        field: format!("{field}.{}", quoted(&key[1])),
                        value: Some(quoted(to)),
                        origin: given.origin,
                    });
                    pairs.insert(key[1].clone(), to.to_owned());
                }
                None => self.problem(given.origin.to_string(), format!("`{}` must be a text", key[1])),
            }
        }
        if let Some(given) = self.later(field) {
            self.shown.retain(|shown| !shown.field.starts_with(&format!("{field}.")));
            pairs.clear();
            for pair in given.text.text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
                match pair.split_once('=') {
                    Some((from, to)) => {
                        self.shown.push(Shown {
                            field: format!("{field}.{}", quoted(from)),
                            value: Some(quoted(to)),
                            origin: given.origin.clone(),
                        });
                        pairs.insert(from.to_owned(), to.to_owned());
                    }
                    None => {
                        let at = given.origin.to_string();
                        self.problem(at, format!("`{pair}` of `{field}` must be `FROM=TO`"));
                    }
                }
            }
        }
        pairs
    }

    /// Where a field's value came from, for a problem that is found later.
    pub(super) fn place_of(&self, field: &str) -> String {
        let of = |field: &str| {
            let shown = self.shown.iter().rev().find(|shown| shown.field == field)?;
            (shown.origin != Origin::Default).then(|| shown.origin.to_string())
        };
        of(field).unwrap_or_else(|| self.file.display().to_string())
    }

    pub(super) fn problem(&mut self, at: String, message: String) {
        self.problems.push(Problem { at, message });
    }

    /// Whatever was given and never asked for is a mistake; answers everything that was shown, or all mistakes.
    pub(super) fn finish(mut self) -> (Vec<Shown>, Vec<Problem>) {
        for (field, given) in std::mem::take(&mut self.values) {
            self.unknown(given.origin.to_string(), &field.join("."), "field");
        }
        for (field, origin) in std::mem::take(&mut self.tables) {
            let name = field.join(".");
            if !self.known.iter().any(|known| known.starts_with(&format!("{name}."))) {
                let told = format!("unknown field `{name}.");
                if !self.problems.iter().any(|problem| problem.message.starts_with(&told)) {
                    self.unknown(origin.to_string(), &name, "field");
                }
            }
        }
        for name in std::mem::take(&mut self.variables).into_keys() {
            if let Some(field) = name.strip_prefix(VARIABLE_PREFIX) {
                let field = field.to_lowercase();
                let near = self.nearest(&field, |known| known.replace('.', "_")).map(variable_of);
                let near = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
                self.problem(name.clone(), format!("no field has this variable{near}"));
            }
        }
        for (flag, field, _) in std::mem::take(&mut self.flags) {
            self.unknown(flag, &field, "field");
        }
        // In the order of the file, whatever was noticed first.
        let order = |problem: &Problem| {
            let (at, line) = problem.at.rsplit_once(':').unwrap_or((&problem.at, ""));
            (at != self.file.display().to_string(), line.parse::<usize>().unwrap_or(0), problem.at.clone())
        };
        self.problems.sort_by_key(order);
        (self.shown, self.problems)
    }

    fn unknown(&mut self, at: String, field: &str, what: &str) {
        let near = self.nearest(field, str::to_owned);
        let near = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
        self.problem(at, format!("unknown {what} `{field}`{near}"));
    }

    fn nearest(&self, field: &str, written: impl Fn(&str) -> String) -> Option<&str> {
        let near = self.known.iter().map(|known| (distance(field, &written(known)), known.as_str()));
        near.min().filter(|(distance, _)| *distance <= 2).map(|(_, known)| known)
    }

    fn take<T: Value>(&mut self, field: &str) -> Option<(T, Origin)> {
        self.known.push(field.to_owned());
        let in_file = self.values.remove(&field.split('.').map(str::to_owned).collect::<Field>());
        let table = self.tables.remove(&field.split('.').map(str::to_owned).collect::<Field>());
        let later = self.later(field);
        if let (None, Some(table)) = (&later, table) {
            self.problem(table.to_string(), format!("`{field}` must be {}, not a table", T::WHAT));
        }
        let given = later.or(in_file)?;
        match T::read(&given.text) {
            Some(value) => Some((value, given.origin)),
            None => {
                let at = given.origin.to_string();
                self.problem(at, format!("`{field}` must be {}, not `{}`", T::WHAT, given.text.text));
                None
            }
        }
    }

    /// What a variable says, or a flag; the last flag holds.
    fn later(&mut self, field: &str) -> Option<Given> {
        let variable = variable_of(field);
        // An empty variable is one that nobody set.
        let text = self.variables.remove(&variable).filter(|text| !text.is_empty());
        let variable = text.map(|text| Given { origin: Origin::Variable(variable), text: Text { text, kind: None } });
        let mut last = variable;
        self.flags.retain(|(flag, of, text)| {
            if of != field {
                return true;
            }
            let text = Text { text: text.clone(), kind: None };
            last = Some(Given { origin: Origin::Flag(flag.clone()), text });
            false
        });
        last
    }

    fn show(&mut self, field: &str, value: Option<String>, origin: Option<&Origin>) {
        let origin = origin.cloned().unwrap_or(Origin::Default);
        self.shown.push(Shown { field: field.to_owned(), value, origin });
    }

    fn place(&self, text: &str, at: usize) -> String {
        format!("{}:{}", self.file.display(), line(text, at))
    }
}

/// The variable of a field. Two are those of every command.
pub(super) fn variable_of(field: &str) -> String {
    match field {
        "log" => "SELVEDGE_LOG".to_owned(),
        "otlp_endpoint" => "SELVEDGE_OTLP_ENDPOINT".to_owned(),
        _ => format!("{VARIABLE_PREFIX}{}", field.replace('.', "_").to_uppercase()),
    }
}

/// A text as TOML writes it.
pub(super) fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn read(path: &Path) -> Result<String, String> {
    use std::io::Read as _;
    let file = std::fs::File::open(path).map_err(|error| format!("cannot be read: {error}"))?;
    let mut text = String::new();
    let size = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
    let size = size.map_err(|error| format!("cannot be read: {error}"))?;
    if size as u64 > FILE_BYTES_MAX {
        return Err("is larger than 1 MiB".to_owned());
    }
    Ok(text)
}

fn written(text: &str, value: &Spanned<DeValue<'_>>) -> Text {
    match value.get_ref() {
        DeValue::String(string) => Text { text: string.to_string(), kind: Some(Kind::String) },
        DeValue::Integer(number) if number.radix() == 10 => {
            Text { text: number.as_str().to_owned(), kind: Some(Kind::Integer) }
        }
        _ => {
            let written = text.get(value.span()).unwrap_or_default();
            Text { text: written.lines().next().unwrap_or_default().to_owned(), kind: Some(Kind::Other) }
        }
    }
}

fn line(text: &str, at: usize) -> usize {
    1 + text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count()
}

/// Edits from one text to another, of one character each.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut left_above = row[0];
        row[0] = i + 1;
        for (j, b) in other.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if a == *b { left_above } else { 1 + left_above.min(above).min(row[j]) };
            left_above = above;
        }
    }
    row[other.len()]
}

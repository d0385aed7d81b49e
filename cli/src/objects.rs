//! Configuration files: YAML documents, each with `kind` and the fields of that kind.
//!
//! **Invariant:** what is written here reads back as the same objects.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use selvedge_domain::limits::APPLY_OBJECTS_MAX;
use selvedge_domain::spec::{Key, Kind, Object};
use serde::de::DeserializeOwned;
use serde_yaml_ng::{Mapping, Value};

/// Bytes of all files together; the broker takes no larger transaction.
pub const BYTES_MAX: u64 = 8 << 20;

/// Every kind, as `kind:` has it.
pub const KINDS: [Kind; 7] =
    [Kind::Region, Kind::Zone, Kind::ConnectorGroup, Kind::SegmentGroup, Kind::Segment, Kind::Policy, Kind::Receiver];

/// Why files are not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read `{path}`")]
    Read {
        /// File or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Nothing is there.
    #[error("there is no `*.yaml` or `*.yml` in `{0}`")]
    Empty(PathBuf),
    /// More than a transaction may have.
    #[error("`{0}` and what was read before it is more than {limit} bytes", limit = BYTES_MAX)]
    TooLarge(String),
    /// More objects than a transaction may have.
    #[error("more than {limit} objects", limit = APPLY_OBJECTS_MAX)]
    TooMany,
    /// A document is not an object.
    #[error("{0}: {1}")]
    Wrong(Place, String),
    /// An object stands there twice.
    #[error("{second}: {kind:?} `{name}` stands at {first} already", kind = key.kind, name = key.name)]
    Twice {
        /// Which.
        key: Key,
        /// Here first.
        first: Place,
        /// And here.
        second: Place,
    },
}

/// Where in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// File, or `-`.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// Reads files, the `*.yaml` and `*.yml` of directories in the order of their names, and standard input (`-`).
pub fn read(paths: &[PathBuf]) -> Result<Vec<Object>, Error> {
    let mut found: BTreeMap<Key, Place> = BTreeMap::new();
    let (mut objects, mut left) = (Vec::new(), BYTES_MAX);
    for path in paths {
        for (name, text) in texts(path, &mut left)? {
            for (place, object) in parse(&name, &text)? {
                let key = object.key();
                let folded = Key { kind: key.kind, name: key.name.to_lowercase() };
                if let Some(first) = found.get(&folded) {
                    return Err(Error::Twice { key, first: first.clone(), second: place });
                }
                found.insert(folded, place);
                objects.push(object);
                if objects.len() > APPLY_OBJECTS_MAX {
                    return Err(Error::TooMany);
                }
            }
        }
    }
    Ok(objects)
}

fn texts(path: &Path, left: &mut u64) -> Result<Vec<(String, String)>, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    if path == Path::new("-") {
        return Ok(vec![("-".to_owned(), text(path, std::io::stdin().lock(), left)?)]);
    }
    if !path.is_dir() {
        let file = std::fs::File::open(path).map_err(failed)?;
        return Ok(vec![(path.display().to_string(), text(path, file, left)?)]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        if file.extension().is_some_and(|extension| extension == "yaml" || extension == "yml") {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::Empty(path.to_owned()));
    }
    let read = |file: PathBuf| {
        let opened = std::fs::File::open(&file).map_err(|source| Error::Read { path: file.clone(), source })?;
        Ok((file.display().to_string(), text(&file, opened, left)?))
    };
    files.into_iter().map(read).collect()
}

fn text(path: &Path, input: impl std::io::Read, left: &mut u64) -> Result<String, Error> {
    let mut text = String::new();
    input.take(*left + 1).read_to_string(&mut text).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    *left = left.checked_sub(text.len() as u64).ok_or_else(|| Error::TooLarge(path.display().to_string()))?;
    Ok(text)
}

/// The objects of one file.
pub fn parse(file: &str, text: &str) -> Result<Vec<(Place, Object)>, Error> {
    let mut objects = Vec::new();
    for (first_line, document) in documents(text) {
        let document = Document { file, first_line, text: document };
        objects.extend(document.object()?);
    }
    Ok(objects)
}

/// The documents of a text, each with the number of its first line. A line that begins with `---` divides documents
/// wherever it stands, also inside a block of text.
fn documents(text: &str) -> Vec<(usize, String)> {
    let mut documents = vec![(1, String::new())];
    for (at, line) in text.lines().enumerate() {
        let rest = line.strip_prefix("---").filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t']));
        match (rest, documents.last_mut()) {
            // What follows the mark on its line belongs to the document; the spaces keep its column.
            (Some(rest), _) => documents.push((at + 1, format!("   {rest}\n"))),
            (None, Some((_, document))) if line.trim_end() != "..." => document.extend([line, "\n"]),
            (None, Some((_, document))) => document.push('\n'),
            (None, None) => {}
        }
    }
    documents
}

struct Document<'a> {
    file: &'a str,
    first_line: usize,
    text: String,
}

impl Document<'_> {
    /// The object; none when there are only comments.
    fn object(&self) -> Result<Option<(Place, Object)>, Error> {
        let value: Value = match self.text.trim().is_empty() {
            true => Value::Null,
            false => serde_yaml_ng::from_str(&self.text).map_err(|error| self.yaml(&error))?,
        };
        let mut fields = match value {
            Value::Null => return Ok(None),
            Value::Mapping(fields) => fields,
            _ => return Err(self.wrong(self.begins(), "an object is written as `kind: ...` and its fields")),
        };
        let Some(kind) = fields.remove("kind") else {
            return Err(self.wrong(self.begins(), "`kind` is missing"));
        };
        let kind_line = self.text.lines().position(|line| line.starts_with("kind:"));
        let line = kind_line.unwrap_or(self.begins());
        let known = || KINDS.map(|kind| format!("{kind:?}")).join(", ");
        let kind = kind.as_str().ok_or_else(|| self.wrong(line, &format!("`kind` is one of {}", known())))?;
        let Some(kind) = KINDS.into_iter().find(|known| format!("{known:?}") == kind) else {
            return Err(self.wrong(line, &format!("`{kind}` is no kind; there are {}", known())));
        };
        let object = match kind {
            Kind::Region => Object::Region(self.fields(kind_line, fields)?),
            Kind::Zone => Object::Zone(self.fields(kind_line, fields)?),
            Kind::ConnectorGroup => Object::ConnectorGroup(self.fields(kind_line, fields)?),
            Kind::SegmentGroup => Object::SegmentGroup(self.fields(kind_line, fields)?),
            Kind::Segment => Object::Segment(self.fields(kind_line, fields)?),
            Kind::Policy => Object::Policy(self.fields(kind_line, fields)?),
            Kind::Receiver => Object::Receiver(self.fields(kind_line, fields)?),
        };
        Ok(Some((self.place(line), object)))
    }

    /// The fields besides `kind`. Read from the text where that can be done, because only there errors have lines.
    fn fields<T: DeserializeOwned>(&self, kind_line: Option<usize>, fields: Mapping) -> Result<T, Error> {
        if let (Some(kind_line), false) = (kind_line, fields.is_empty()) {
            let kept = self.text.lines().enumerate().map(|(at, line)| if at == kind_line { "" } else { line });
            let text: String = kept.flat_map(|line| [line, "\n"]).collect();
            return serde_yaml_ng::from_str(&text).map_err(|error| self.yaml(&error));
        }
        serde_yaml_ng::from_value(Value::Mapping(fields)).map_err(|error| self.yaml(&error))
    }

    fn yaml(&self, error: &serde_yaml_ng::Error) -> Error {
        let message = error.to_string();
        match error.location() {
            Some(at) => {
                let position = format!(" at line {} column {}", at.line(), at.column());
                self.wrong(at.line().saturating_sub(1), &message.replace(&position, ""))
            }
            None => self.wrong(self.begins(), &message),
        }
    }

    /// The first line that says something, counted from 0.
    fn begins(&self) -> usize {
        let says = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
        self.text.lines().position(says).unwrap_or_default()
    }

    fn place(&self, line: usize) -> Place {
        Place { file: self.file.to_owned(), line: self.first_line + line }
    }

    fn wrong(&self, line: usize, message: &str) -> Error {
        Error::Wrong(self.place(line), message.to_owned())
    }
}

/// An object as a document, without the fields that have their default.
pub fn yaml(object: &Object) -> anyhow::Result<String> {
    let fields = match object {
        Object::Region(object) => serde_yaml_ng::to_value(object),
        Object::Zone(object) => serde_yaml_ng::to_value(object),
        Object::ConnectorGroup(object) => serde_yaml_ng::to_value(object),
        Object::SegmentGroup(object) => serde_yaml_ng::to_value(object),
        Object::Segment(object) => serde_yaml_ng::to_value(object),
        Object::Policy(object) => serde_yaml_ng::to_value(object),
        Object::Receiver(object) => serde_yaml_ng::to_value(object),
    }?;
    let mut document = Mapping::new();
    document.insert("kind".into(), format!("{:?}", object.key().kind).into());
    if let Value::Mapping(fields) = fields {
        document
            .extend(fields.into_iter().filter(|(name, value)| !is_default(name.as_str().unwrap_or_default(), value)));
    }
    Ok(serde_yaml_ng::to_string(&document)?)
}

fn is_default(name: &str, value: &Value) -> bool {
    match value {
        // A segment that no connector group reaches must say so.
        Value::Sequence(items) => items.is_empty() && name != "connector_groups",
        Value::Bool(set) => !set,
        Value::Number(number) => name.ends_with("_timeout_s") && number.as_u64() == Some(0),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// An object as JSON with `kind` among its fields, as in YAML.
pub fn json(object: &Object) -> anyhow::Result<serde_json::Value> {
    let mut flat = serde_json::Map::from_iter([("kind".to_owned(), format!("{:?}", object.key().kind).into())]);
    if let serde_json::Value::Object(tagged) = serde_json::to_value(object)? {
        flat.extend(tagged.into_iter().filter_map(|(_, fields)| fields.as_object().cloned()).flatten());
    }
    Ok(flat.into())
}

/// A kind as people write it: `segment`, `Segments`, `connector-group`.
pub fn kind(text: &str) -> Result<Kind, String> {
    let plain = |text: &str| text.to_lowercase().replace(['-', '_'], "");
    let wanted = plain(text);
    let plural = |name: &str| name.strip_suffix('y').map_or(format!("{name}s"), |stem| format!("{stem}ies"));
    let is = |kind: &Kind| {
        let name = plain(&format!("{kind:?}"));
        wanted == name || wanted == plural(&name)
    };
    let known = || KINDS.map(|kind| format!("{kind:?}")).join(", ");
    KINDS.into_iter().find(is).ok_or_else(|| format!("`{text}` is no kind; there are {}", known()))
}

#[cfg(test)]
mod tests {
    use selvedge_domain::spec::{Policy, Segment, Zone};

    use super::*;

    const FILE: &str = "# zones\n---\nkind: Zone\nname: internal\n---\nkind: Segment\nname: crm\nhosts: [crm.internal]\ntcp: [\"8080\"]\nconnector_groups: [eu]\n--- # last\nname: sales\nkind: Policy\ncedar: |\n  permit(principal,\n    action, resource);\n";

    fn fails(text: &str) -> String {
        parse("f.yaml", text).expect_err("refused").to_string()
    }

    #[test]
    fn documents_are_read_in_order_with_their_lines() {
        let read = parse("f.yaml", FILE).unwrap();
        let lines: Vec<usize> = read.iter().map(|(place, _)| place.line).collect();
        assert_eq!(lines, [3, 6, 13]);
        assert_eq!(read[0].1, Object::Zone(Zone { name: "internal".to_owned() }));
        let Object::Policy(Policy { cedar, .. }) = &read[2].1 else { panic!("{:?}", read[2]) };
        assert_eq!(cedar, "permit(principal,\n  action, resource);\n");
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        let objects: Vec<Object> = parse("f", FILE).unwrap().into_iter().map(|(_, object)| object).collect();
        let text: Vec<String> = objects.iter().map(|object| yaml(object).unwrap()).collect();
        let back: Vec<Object> =
            parse("f", &text.join("---\n")).unwrap().into_iter().map(|(_, object)| object).collect();
        assert_eq!(objects, back);
        assert!(!text[1].contains("networks") && !text[1].contains("idle"), "{}", text[1]);
        let Object::Segment(Segment { connector_groups, .. }) = &back[1] else { panic!("{:?}", back[1]) };
        assert_eq!(connector_groups, &["eu"]);
    }

    #[test]
    fn errors_name_file_and_line() {
        assert_eq!(
            fails("kind: Zone\nname: a\n---\n\nkind: Zone\nnome: b\n"),
            "f.yaml:6: unknown field `nome`, expected `name`"
        );
        assert!(fails("\nkind: Nonsense\nname: x\n").starts_with("f.yaml:2: `Nonsense` is no kind"));
        assert!(fails("# nothing\nname: x\n").starts_with("f.yaml:2: `kind` is missing"));
        assert!(fails("kind: Zone\n").contains("missing field `name`"));
        assert!(fails("kind: Zone\nname: [\n").starts_with("f.yaml:"));
        assert!(fails("- kind: Zone\n").starts_with("f.yaml:1: an object"));
        assert!(fails("kind: Zone\nname: a\nname: b\n").starts_with("f.yaml:"));
        assert!(fails("kind: Segment\nname: x\ntcp: [[80]]\nconnector_groups: []\n").starts_with("f.yaml:3: "));
        assert!(fails("{kind: Zone, nome: x}\n").contains("nome"));
    }

    #[test]
    fn nothing_but_comments_is_no_object() {
        assert!(parse("f", "").unwrap().is_empty());
        assert!(parse("f", "# a\n---\n# b\n...\n").unwrap().is_empty());
    }

    #[test]
    fn an_object_that_stands_twice_and_too_many_bytes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.yaml"), "kind: Zone\nname: internal\n").unwrap();
        std::fs::write(dir.path().join("b.yml"), "kind: Zone\nname: Internal\n").unwrap();
        std::fs::write(dir.path().join("c.txt"), "not read").unwrap();
        let error = read(&[dir.path().to_owned()]).unwrap_err().to_string();
        assert!(error.contains("b.yml:1") && error.contains("a.yaml:1"), "{error}");
        std::fs::write(dir.path().join("a.yaml"), " ".repeat(usize::try_from(BYTES_MAX).unwrap() + 1)).unwrap();
        assert!(matches!(read(&[dir.path().to_owned()]), Err(Error::TooLarge(_))));
    }

    #[test]
    fn kinds_are_found_by_the_ways_in_which_people_write_them() {
        for (text, wanted) in
            [("policies", Kind::Policy), ("Segment", Kind::Segment), ("connector-groups", Kind::ConnectorGroup)]
        {
            assert_eq!(kind(text), Ok(wanted));
        }
        assert!(kind("users").is_err());
    }
}

//! Looks at the text of a policy before the parser does: Cedar's parser and validator follow nesting by recursion, and
//! text of the permitted length can be nested deeply enough to exhaust a thread's stack.

/// Open brackets in one policy at any point.
pub(super) const BRACKETS_DEPTH_MAX: usize = 32;
/// Operators, conditionals and clauses in one policy: a chain of them is as deep as it is long.
pub(super) const OPERATORS_MAX: usize = 300;

/// Whether a text is shallow enough to be parsed.
pub(super) fn is_shallow(text: &str) -> bool {
    let mut depth = 0usize;
    let mut operators = 0usize;
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let length = match next {
            '"' => string_length(rest),
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            c if c.is_alphanumeric() || c == '_' => {
                let word_length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                let operator = ["if", "has", "like", "in", "is", "when", "unless"].contains(&&rest[..word_length]);
                operators += usize::from(operator);
                word_length
            }
            '(' | '[' | '{' => {
                depth += 1;
                1
            }
            ')' | ']' | '}' => {
                depth = depth.saturating_sub(1);
                1
            }
            '&' | '|' | '=' if rest[1..].starts_with(next) => {
                operators += 1;
                2
            }
            '!' | '-' | '+' | '*' | '/' | '%' | '<' | '>' | '.' | '&' | '|' | '@' => {
                operators += 1;
                1
            }
            other => other.len_utf8(),
        };
        if depth > BRACKETS_DEPTH_MAX || operators > OPERATORS_MAX {
            return false;
        }
        rest = &rest[length..];
    }
    true
}

/// The length of the string literal that a text begins with.
fn string_length(text: &str) -> usize {
    let mut escaped = false;
    let end = text.char_indices().skip(1).find(|&(_, c)| {
        let closes = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        closes
    });
    end.map_or(text.len(), |(at, _)| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_and_operators_count_only_outside_strings_and_comments() {
        assert!(is_shallow(&format!("\"{}\\\"{}\" // {}\n", "(".repeat(99), "&&".repeat(999), "((!".repeat(999))));
        assert!(is_shallow(&"User::\"x\", ".repeat(2_000)));
        assert!(is_shallow(&"()".repeat(999)));
        assert!(!is_shallow(&"(".repeat(BRACKETS_DEPTH_MAX + 1)));
        for operator in ["||", "!", ".a", " if x", "unless"] {
            assert!(!is_shallow(&format!("{operator} ").repeat(OPERATORS_MAX + 1)), "{operator}");
        }
        assert!(is_shallow("\"unterminated"));
    }
}

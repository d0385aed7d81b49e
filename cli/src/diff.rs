//! The lines in which two texts differ.

/// Beyond so many pairs of lines the whole texts are shown.
const PAIRS_MAX: usize = 4_000_000;
/// Unchanged lines that are shown around a change.
const AROUND: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sign {
    Same,
    Gone,
    New,
}

/// Lines of `old` and `new` with ` `, `-` and `+` before them; unchanged lines far from a change are left out.
pub fn lines(old: &str, new: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    let marked = mark(&old, &new);
    let changed = |at: usize| marked.get(at).is_some_and(|(sign, _)| *sign != Sign::Same);
    let mut text = String::new();
    let mut skipping = false;
    for (at, (sign, line)) in marked.iter().enumerate() {
        let near = (at.saturating_sub(AROUND)..=at + AROUND).any(changed);
        if !near {
            skipping = true;
            continue;
        }
        if std::mem::take(&mut skipping) && !text.is_empty() {
            text.push_str("  ...\n");
        }
        let sign = match sign {
            Sign::Same => ' ',
            Sign::Gone => '-',
            Sign::New => '+',
        };
        text.extend([sign.to_string().as_str(), " ", line, "\n"]);
    }
    text
}

/// By the longest common subsequence.
fn mark<'a>(old: &[&'a str], new: &[&'a str]) -> Vec<(Sign, &'a str)> {
    if old.len().saturating_mul(new.len()) > PAIRS_MAX {
        let gone = old.iter().map(|line| (Sign::Gone, *line));
        return gone.chain(new.iter().map(|line| (Sign::New, *line))).collect();
    }
    let width = new.len() + 1;
    let mut common = vec![0_u32; (old.len() + 1) * width];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i * width + j] = if old[i] == new[j] {
                common[(i + 1) * width + j + 1] + 1
            } else {
                common[(i + 1) * width + j].max(common[i * width + j + 1])
            };
        }
    }
    let (mut i, mut j, mut marked) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            marked.push((Sign::Same, old[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || (i < old.len() && common[(i + 1) * width + j] >= common[i * width + j + 1]) {
            marked.push((Sign::Gone, old[i]));
            i += 1;
        } else {
            marked.push((Sign::New, new[j]));
            j += 1;
        }
    }
    marked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_line_stands_between_its_neighbours() {
        assert_eq!(lines("a\nb\nc\nd\ne\nf\n", "a\nb\nc\nx\ne\nf\n"), "  b\n  c\n- d\n+ x\n  e\n  f\n");
        assert_eq!(lines("", "a\nb\n"), "+ a\n+ b\n");
        assert_eq!(lines("a\n", "a\n"), "");
    }

    #[test]
    fn changes_that_are_far_apart_are_told_apart() {
        let old: String = (0..20).map(|n| format!("{n}\n")).collect();
        let new = old.replace("\n1\n", "\none\n").replace("\n18\n", "\neighteen\n");
        let text = lines(&old, &new);
        assert_eq!(text.matches("  ...\n").count(), 1);
        assert!(text.contains("- 1\n+ one\n") && text.contains("- 18\n+ eighteen\n"), "{text}");
    }
}

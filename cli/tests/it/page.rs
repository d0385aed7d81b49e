//! A how-to page as something that can be carried out: its fenced blocks, in order.
//!
//! A block whose first line is `# FILE on MACHINE, ..` is a file of these machines; one that begins with `# on MACHINE` is
//! commands for it, one a line. Other blocks are for the reader.

/// What a page asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A file on some machines.
    File { path: String, machines: Vec<String>, text: String },
    /// A command on a machine.
    Command { machine: String, line: String },
}

/// The steps of a page, in its order.
pub fn steps(page: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    // Every second part is inside a fence.
    for block in page.split("\n```").skip(1).step_by(2) {
        let (_language, text) = block.split_once('\n').expect("a fence has lines");
        let Some((comment, rest)) = text.split_once('\n') else { continue };
        let Some(place) = comment.strip_prefix("# ") else { continue };
        if let Some(machine) = place.strip_prefix("on ") {
            let lines = rest.lines().filter(|line| !line.is_empty());
            steps.extend(lines.map(|line| Step::Command { machine: machine.to_owned(), line: line.to_owned() }));
        } else if let Some((path, machines)) = place.split_once(" on ") {
            let machines = machines.split(", ").map(str::to_owned).collect();
            steps.push(Step::File { path: path.to_owned(), machines, text: format!("{rest}\n") });
        }
    }
    steps
}

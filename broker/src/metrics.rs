//! What this process uses of its machine, and the description of every metric that a broker has.

use metrics::{Unit, describe_gauge, gauge};
use rustix::process::{Resource, getrlimit};

/// Files and sockets that this process has open.
pub const OPEN_FILES: &str = "selvedge_process_open_files";
/// How many it may have open.
pub const OPEN_FILES_LIMIT: &str = "selvedge_process_open_files_limit";

/// Describes what is not described where its part starts.
pub(crate) fn describe() {
    selvedge_storage::metrics::describe();
    describe_gauge!(OPEN_FILES, Unit::Count, "files and sockets that this process has open");
    describe_gauge!(OPEN_FILES_LIMIT, Unit::Count, "files and sockets that this process may have open");
}

/// Measures now. Blocks.
pub(crate) fn measure() {
    if let Some(open) = open_files() {
        gauge!(OPEN_FILES).set(open as f64);
    }
    gauge!(OPEN_FILES_LIMIT).set(getrlimit(Resource::Nofile).current.map_or(f64::INFINITY, |limit| limit as f64));
}

fn open_files() -> Option<u64> {
    let dir = "/proc/self/fd";
    // Newer kernels say the number as the directory's size.
    match std::fs::metadata(dir).ok()?.len() {
        0 => u64::try_from(std::fs::read_dir(dir).ok()?.count()).ok(),
        size => Some(size),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_opened_file_is_counted() {
        let before = super::open_files().unwrap();
        let files: Vec<_> = (0..50).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        let after = super::open_files().unwrap();
        assert!(after >= before + 40, "{before} and then {after}, with {} more", files.len());
    }
}

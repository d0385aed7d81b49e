//! What the machine gives: room and speed of the data disk, open files, a right clock.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, getrlimit};
use selvedge_storage::room::{FULL_PERCENT, Usage};

use super::{Report, bytes, chain, span};
use crate::config::{Config, Valid};

/// From here on a disk is worth a look.
const DISK_WARN_PERCENT: u64 = 85;
/// Synced writes that time the disk.
const SYNCS: usize = 40;
/// Bytes of each.
const SYNC_BYTES: usize = 4 << 10;
/// A disk whose slowest hundredth takes longer delays every write of the cluster.
const SYNC_WARN: Duration = Duration::from_millis(100);
/// A leader whose log waits for so long hands over.
const SYNC_ERROR: Duration = Duration::from_secs(2);
/// What a broker has open besides sessions and control streams: databases, segments, pipes, peers.
const FILES_BESIDES: u64 = 2_560;
/// Fewer than this, and it does not even start well.
const FILES_MIN: u64 = 4_096;
/// Flows are held when a clock steps by more than this.
const CLOCK_WARN_MS: u64 = 1_000;
/// A leader that is further off hands over.
const CLOCK_ERROR_MS: u64 = 30_000;

/// `offsets_ms` are the other brokers' clocks minus this one's.
pub(super) fn examine(config: &Valid<Config>, pid: Option<u32>, offsets_ms: &[i64], report: &mut Report) {
    clock(offsets_ms, report);
    if config.data_dir.exists() {
        room(&config.data_dir, report);
        speed(&config.data_dir, report);
    }
    open_files(config, pid, report);
}

fn clock(offsets_ms: &[i64], report: &mut Report) {
    const CODE: &str = "SE0403";
    let mut sorted = offsets_ms.to_vec();
    sorted.sort_unstable();
    let next = "run a time service (chrony, systemd-timesyncd) on every broker";
    let Some(median) = sorted.get(sorted.len() / 2) else {
        return match kept_by_a_service() {
            Some(true) => report.fine(CODE, "clock", "kept by a time service; no other broker to compare it with"),
            Some(false) => report.warn(CODE, "clock", "no time service keeps it, and no other broker answered", next),
            None => report.note(CODE, "clock", "no other broker to compare it with"),
        };
    };
    let message = format!("{median:+} ms from the median of {} other broker(s)", sorted.len());
    match median.unsigned_abs() {
        CLOCK_ERROR_MS.. => report.error(CODE, "clock", message, next),
        CLOCK_WARN_MS.. => report.warn(CODE, "clock", message, next),
        _ => report.fine(CODE, "clock", message),
    }
}

/// Whether the kernel says that its clock is synchronised.
///
/// **Source** adjtimex(2).
#[expect(unsafe_code, reason = "there is no other way to ask the kernel")]
fn kept_by_a_service() -> Option<bool> {
    // SAFETY: all zeros is a valid `timex`, and means that nothing is to be changed.
    let mut time: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `time` lives through the call, which only writes into it.
    let state = unsafe { libc::adjtimex(&raw mut time) };
    (state >= 0).then_some(state != libc::TIME_ERROR && time.status & libc::STA_UNSYNC == 0)
}

fn room(dir: &Path, report: &mut Report) {
    const CODE: &str = "SE0404";
    let usage = match Usage::of(dir) {
        Ok(usage) => usage,
        Err(error) => {
            let next = "see whether the disk is mounted";
            return report.error(error.code().unwrap_or(CODE), "disk room", chain(&error), next);
        }
    };
    let message = format!("{} % of {} used, {} free", usage.percent, bytes(usage.total_bytes), bytes(usage.free_bytes));
    let next = format!("free space on the disk of `{}`; at {FULL_PERCENT} % writes are refused", dir.display());
    match usage.percent {
        FULL_PERCENT.. => report.error(CODE, "disk room", message, next),
        DISK_WARN_PERCENT.. => report.warn(CODE, "disk room", message, next),
        _ => report.fine(CODE, "disk room", message),
    }
}

fn speed(dir: &Path, report: &mut Report) {
    const CODE: &str = "SE0405";
    let mut took = match time_syncs(dir) {
        Ok(took) => took,
        Err(error) => {
            let message = format!("no file can be written and synced in `{}`: {error}", dir.display());
            let code = if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem { "SE0115" } else { CODE };
            return report.error(code, "disk speed", message, "see the runbook; the broker will not start");
        }
    };
    took.sort_unstable();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100];
    let ms = |time: Duration| time.as_secs_f64() * 1_000.0;
    let (p50, p99, max) = (at(50), at(99), at(100));
    let message =
        format!("a synced write takes {:.1} ms (p50), {:.1} ms (p99), {:.1} ms at most", ms(p50), ms(p99), ms(max));
    let next = "give the log a disk with a cache that survives a loss of power; take other writers off this one";
    if max >= SYNC_ERROR {
        report.error(CODE, "disk speed", message, next);
    } else if p99 >= SYNC_WARN {
        report.warn(CODE, "disk speed", message, next);
    } else {
        report.fine(CODE, "disk speed", message);
    }
}

/// Writes and syncs into a file that has no name and goes away with this process.
fn time_syncs(dir: &Path) -> std::io::Result<Vec<Duration>> {
    let file = rustix::fs::open(dir, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?;
    let mut file = File::from(file);
    let block = [0x5a; SYNC_BYTES];
    let mut took = Vec::with_capacity(SYNCS);
    for _ in 0..SYNCS {
        let begun = Instant::now();
        file.write_all(&block)?;
        file.sync_data()?;
        took.push(begun.elapsed());
    }
    Ok(took)
}

fn open_files(config: &Valid<Config>, pid: Option<u32>, report: &mut Report) {
    const CODE: &str = "SE0406";
    let of_process = pid.and_then(limit_of);
    // A broker raises what it is given to what it may have.
    let (limit, whose) = match of_process {
        Some(limit) => (limit, "the running broker"),
        None => (getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX), "a broker started from here"),
    };
    let limits = config.limits;
    let needed = FILES_BESIDES + 2 * u64::from(limits.sessions) + u64::from(limits.control_streams);
    let message = format!("{whose} may have {limit} open; its limits need {needed}");
    let next = format!("raise it (systemd: `LimitNOFILE={needed}`; shell: `ulimit -n`), or lower `limits.sessions`");
    if limit < FILES_MIN {
        report.error(CODE, "open files", message, next);
    } else if limit < needed {
        report.warn(CODE, "open files", message, next);
    } else {
        report.fine(CODE, "open files", message);
    }
}

/// The soft limit of another process.
///
/// **Source** proc_pid_limits(5).
fn limit_of(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let soft = line.split_whitespace().next()?;
    if soft == "unlimited" { Some(u64::MAX) } else { soft.parse().ok() }
}

/// How long ago a file or directory was changed.
pub(super) fn age(path: &Path) -> Option<(u64, String)> {
    let changed = std::fs::metadata(path).ok()?.modified().ok()?;
    let ms = u64::try_from(changed.elapsed().unwrap_or_default().as_millis()).unwrap_or(u64::MAX);
    Some((ms, span(ms)))
}

#[cfg(test)]
mod tests {
    use super::super::{Level, Report};

    #[test]
    fn a_clock_is_judged_by_the_median_of_the_others() {
        let judged = |offsets: &[i64]| {
            let mut report = Report::default();
            super::clock(offsets, &mut report);
            report.findings[0].level
        };
        assert_eq!(judged(&[-3, 2]), Level::Fine);
        assert_eq!(judged(&[3_600_000, 4, -2]), Level::Fine, "one that is off is not this one");
        assert_eq!(judged(&[-1_500, -1_400]), Level::Warning);
        assert_eq!(judged(&[40_000, 41_000]), Level::Error);
    }

    #[test]
    fn the_data_disk_is_timed_without_leaving_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let took = super::time_syncs(dir.path()).unwrap();
        assert_eq!(took.len(), super::SYNCS);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_limit_of_a_process_is_read() {
        assert_eq!(super::limit_of(std::process::id()), rustix::process::getrlimit(super::Resource::Nofile).current);
    }
}

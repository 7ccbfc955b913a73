//! How internal snapshots are listed, by `snapshot -l` and by `info`.

use blockplex::drivers::qcow2::snapshot_table::SnapshotEntry;
use chrono::{DateTime, Local};

use crate::tool::json::{Json, shown};
use crate::tool::size;

/// The line above the rows.
pub const HEADING: &str =
    "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT";

/// A line about one snapshot.
pub fn row(entry: &SnapshotEntry) -> String {
    let text = |bytes: &[u8]| shown(&String::from_utf8_lossy(bytes));
    let date = DateTime::from_timestamp(entry.date_seconds.into(), 0).unwrap_or_default();
    let date = date.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S");
    let clock = clock(entry.vm_clock_nanoseconds);
    let count = entry.instruction_count.map_or_else(|| "--".to_owned(), |count| count.to_string());
    format!(
        "{:<7} {:<16} {:>8} {date:>19} {clock:>15} {count:>10}",
        text(&entry.id),
        text(&entry.name),
        size::human(entry.vm_state_size),
    )
}

fn clock(nanoseconds: u64) -> String {
    let seconds = nanoseconds / 1_000_000_000;
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let thousandths = nanoseconds / 1_000_000 % 1000;
    format!("{hours:04}:{minutes:02}:{:02}.{thousandths:03}", seconds % 60)
}

/// The same for `--output=json`.
pub fn json(entry: &SnapshotEntry) -> Json {
    let text = |bytes: &[u8]| Json::from(String::from_utf8_lossy(bytes).into_owned());
    let mut members = Vec::new();
    members.extend(entry.instruction_count.map(|count| ("icount", count.into())));
    members.push(("vm-clock-nsec", (entry.vm_clock_nanoseconds % 1_000_000_000).into()));
    members.push(("name", text(&entry.name)));
    members.push(("date-sec", entry.date_seconds.into()));
    members.push(("date-nsec", entry.date_nanoseconds.into()));
    members.push(("vm-clock-sec", (entry.vm_clock_nanoseconds / 1_000_000_000).into()));
    members.push(("id", text(&entry.id)));
    members.push(("vm-state-size", entry.vm_state_size.into()));
    Json::Object(members)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_show_hours_to_thousandths() {
        assert_eq!(clock(0), "0000:00:00.000");
        assert_eq!(clock(3_723_004_999_999), "0001:02:03.004");
    }
}

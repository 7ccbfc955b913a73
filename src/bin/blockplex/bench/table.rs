//! A report for people: a line that says what was measured, and a table with a
//! row for each iothread and one for all.

use std::time::Duration;

use super::report::{Figures, Report};
use crate::units;

const HEADINGS: [&str; 10] =
    ["iothread", "IOPS", "MiB/s", "ns/request", "mean", "p50", "p90", "p99", "p99.9", "max"];

/// The report as text that ends with a line end.
pub fn render(report: &Report) -> String {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    for (index, figures) in report.iothreads.iter().enumerate() {
        rows.push(row(index.to_string(), figures));
    }
    // One iothread alone is all there is; no need to say everything twice.
    if report.iothreads.len() != 1 {
        rows.push(row("all".to_owned(), &report.all));
    }
    let mut text = description(report);
    text.push('\n');
    let widths = std::array::from_fn(|column| {
        rows.iter().map(|row| width(&row[column])).max().unwrap_or_default()
    });
    for row in &rows {
        push_aligned(&mut text, row, widths);
    }
    text
}

/// Appends one row, its cells flush right in columns of these widths.
fn push_aligned(text: &mut String, row: &[String; 10], widths: [usize; 10]) {
    for (column, (cell, columns)) in row.iter().zip(widths).enumerate() {
        if column > 0 {
            text.push_str("  ");
        }
        text.extend(std::iter::repeat_n(' ', columns - width(cell)));
        text.push_str(cell);
    }
    text.push('\n');
}

/// The columns a cell takes on a terminal; every character here takes one.
fn width(cell: &str) -> usize {
    cell.chars().count()
}

fn description(report: &Report) -> String {
    let run = &report.description;
    let images = match run.images.as_slice() {
        [] => String::new(),
        [image] => format!(": {image}"),
        [first, others @ ..] => format!(": {first} and {} more", others.len()),
    };
    let wall = Duration::try_from_secs_f64(report.seconds).unwrap_or_default();
    let iothreads = match report.iothreads.len() {
        1 => "1 iothread".to_owned(),
        count => format!("{count} iothreads"),
    };
    format!(
        "{}, {} blocks, {iothreads} with {} in flight each, {} of disk, {}{}, {} requests in {}{images}\n",
        run.rw,
        units::size(run.bs),
        run.depth,
        units::size(run.size),
        run.engine,
        if run.direct { " past the page cache" } else { "" },
        report.all.requests,
        units::seconds(wall),
    )
}

fn row(name: String, figures: &Figures) -> [String; 10] {
    let missing = || "-".to_owned();
    let latency = |pick: fn(&super::report::Latencies) -> f64| {
        figures.latency_ns.as_ref().map_or_else(missing, |values| units::latency(pick(values)))
    };
    [
        name,
        units::count(figures.iops),
        units::count(figures.mib_per_s),
        figures.ns_per_request.map_or_else(missing, units::count),
        latency(|values| values.mean),
        latency(|values| values.p50 as f64),
        latency(|values| values.p90 as f64),
        latency(|values| values.p99 as f64),
        latency(|values| values.p99_9 as f64),
        latency(|values| values.max as f64),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::report::{Tally, example, steady};
    use super::*;

    #[test]
    fn columns_line_up_and_name_their_units() {
        let text = render(&example(&[steady(3000, 100), steady(50, 12_345_678)]));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            "randread, 4 KiB blocks, 2 iothreads with 32 in flight each, 64 MiB of disk, io_uring, \
             3050 requests in 2.00 s: disk.qcow2"
        );
        let table = &lines[2..];
        assert_eq!(table.len(), 4);
        let widths: Vec<usize> = table.iter().map(|line| width(line)).collect();
        assert!(widths.iter().all(|&each| each == widths[0]), "{text}");
        assert!(table[0].trim_start().starts_with("iothread"));
        assert!(table[2].contains("12.35 ms"), "{text}");
        assert!(table[3].trim_start().starts_with("all"));
    }

    #[test]
    fn one_iothread_needs_one_row() {
        let text = render(&example(&[steady(10, 100)]));
        assert_eq!(text.lines().count(), 4);
        assert!(text.contains("1 iothread with"));
    }

    #[test]
    fn what_was_not_measured_is_a_dash() {
        let text = render(&example(&[steady(10, 100), Tally::default()]));
        let row = text.lines().nth(4).unwrap();
        assert_eq!(row.matches(" -").count(), 7, "{row}");
    }
}

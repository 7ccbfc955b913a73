//! A measurement as one SVG picture with two panels: how latencies are
//! distributed, and the course of IOPS.
//!
//! The upper panel answers "what share of requests took at most this long".
//! Its vertical axis gives every further nine (90 %, 99 %, 99.9 % …) the same
//! room, because the slowest requests are what one looks for; its horizontal
//! axis is logarithmic. The curve is drawn from the histogram's buckets as they
//! are, without smoothing. The lower panel shows the `timeline`.
//!
//! The picture needs nothing but itself: no fonts, scripts or styles from
//! elsewhere. `axis` places values, `svg` writes elements.

mod axis;
mod svg;

use super::histogram::Histogram;
use super::report::{Report, Tally};
use super::timeline::Timeline;
use crate::units;
use axis::{Axis, Tick};
use svg::{Anchor, Canvas};

const WIDTH: f64 = 920.0;
const HEIGHT: f64 = 760.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = WIDTH - 28.0;
/// Top and bottom of the panels.
const LATENCY: (f64, f64) = (112.0, 400.0);
const COURSE: (f64, f64) = (492.0, 700.0);

/// The most iothreads that get a line each; of more, the busiest and the
/// idlest are shown.
const LINES_MAX: usize = 8;
/// Colours that people with any colour vision can tell apart.
const COLOURS: [&str; LINES_MAX] =
    ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a6d3b", "#7b61a8"];
const ALL_COLOUR: &str = "#222222";
/// Percentiles that are marked on the curve of all iothreads.
const MARKED: [f64; 4] = [50.0, 90.0, 99.0, 99.9];

/// One line in each panel.
struct Series {
    name: String,
    colour: &'static str,
    width: f64,
    latencies: Histogram,
    /// Which iothreads it adds up.
    iothreads: Vec<usize>,
}

/// The picture, as the text of an SVG file. `tallies` and `timeline` are those
/// the report was made from.
pub fn render(report: &Report, tallies: &[Tally], timeline: &Timeline) -> String {
    let series = series(tallies);
    let mut canvas = Canvas::new(WIDTH, HEIGHT);
    heading(&mut canvas, report);
    legend(&mut canvas, &series);
    latency_panel(&mut canvas, &series);
    course_panel(&mut canvas, &series, timeline);
    canvas.finish()
}

/// The lines to draw, the one of all iothreads last so that it lies on top.
fn series(tallies: &[Tally]) -> Vec<Series> {
    let busy = |index: &usize| tallies[*index].latencies.total();
    let mut shown: Vec<(usize, String)> = Vec::new();
    if tallies.len() <= LINES_MAX {
        shown.extend((0..tallies.len()).map(|index| (index, format!("iothread {index}"))));
    } else {
        let busiest = (0..tallies.len()).max_by_key(busy);
        let idlest = (0..tallies.len()).min_by_key(busy);
        shown.extend(busiest.map(|index| (index, format!("iothread {index} (most requests)"))));
        shown.extend(idlest.map(|index| (index, format!("iothread {index} (fewest)"))));
    }
    let mut series: Vec<Series> = shown
        .into_iter()
        .zip(COLOURS)
        .map(|((index, name), colour)| Series {
            name,
            colour,
            width: 1.4,
            latencies: tallies[index].latencies.clone(),
            iothreads: vec![index],
        })
        .collect();
    if tallies.len() > 1 {
        let mut latencies = Histogram::default();
        for tally in tallies {
            latencies.merge(&tally.latencies);
        }
        let iothreads = (0..tallies.len()).collect();
        let name = format!("all {}", tallies.len());
        series.push(Series { name, colour: ALL_COLOUR, width: 2.2, latencies, iothreads });
    }
    series
}

fn heading(canvas: &mut Canvas, report: &Report) {
    let run = &report.description;
    let title = format!(
        "{} · {} blocks · {} in flight · {} IOPS",
        run.rw,
        units::size(run.bs),
        run.depth,
        units::count(report.all.iops)
    );
    canvas.text((LEFT, 34.0), Anchor::Start, 18.0, "#111111", &title);
    let images = run.images.join(", ");
    let mut subtitle: String = images.chars().take(100).collect();
    if subtitle.len() < images.len() {
        subtitle.push('…');
    }
    subtitle.push_str(&format!(" · {}", run.engine));
    canvas.text((LEFT, 54.0), Anchor::Start, 12.0, "#555555", &subtitle);
}

/// Names the colours, in one or two rows.
fn legend(canvas: &mut Canvas, series: &[Series]) {
    let columns = series.len().clamp(1, 5);
    let step = (RIGHT - LEFT) / columns as f64;
    for (index, line) in series.iter().enumerate() {
        let x = LEFT + step * (index % columns) as f64;
        let y = 74.0 + 16.0 * (index / columns) as f64;
        canvas.line((x, y), (x + 22.0, y), line.colour, line.width + 0.6);
        canvas.text((x + 28.0, y + 4.0), Anchor::Start, 12.0, "#222222", &line.name);
    }
}

fn latency_panel(canvas: &mut Canvas, series: &[Series]) {
    let counted = series.iter().filter_map(|line| Some((line, line.latencies.least()?)));
    let least = counted.clone().map(|(_, least)| least).min();
    let most = series.iter().filter_map(|line| line.latencies.most()).max();
    let (Some(least), Some(most)) = (least, most) else {
        frame(canvas, LATENCY, "latency", "requests that took at most this long");
        let middle = ((LEFT + RIGHT) / 2.0, (LATENCY.0 + LATENCY.1) / 2.0);
        canvas.text(middle, Anchor::Middle, 14.0, "#555555", "no requests");
        return;
    };
    let requests = series.iter().map(|line| line.latencies.total()).max().unwrap_or(1);
    let x = Axis::logarithmic((least.max(1) as f64, most.max(1) as f64), (LEFT, RIGHT));
    let y = Axis::linear_exact((0.0, nines_of(requests)), (LATENCY.1, LATENCY.0));
    grid(canvas, LATENCY, (&x, &x.decades()), (&y, &share_ticks(nines_of(requests))));
    frame(canvas, LATENCY, "latency", "requests that took at most this long");
    for (line, least) in counted {
        let start = (x.place(least.max(1) as f64), y.place(0.0));
        let total = line.latencies.total();
        let mut seen = 0;
        let curve = line.latencies.buckets().map(|bucket| {
            seen += bucket.count;
            let high = bucket.high.clamp(1, most.max(1)) as f64;
            (x.place(high), y.place(nines(seen, total)))
        });
        let points: Vec<_> = std::iter::once(start).chain(curve).collect();
        canvas.polyline(&points, line.colour, line.width);
    }
    if let Some(line) = series.last() {
        marks(canvas, line, &x, &y);
    }
}

/// Dots with the latency at well-known percentiles.
fn marks(canvas: &mut Canvas, line: &Series, x: &Axis, y: &Axis) {
    for percent in MARKED {
        let Some(latency) = line.latencies.percentile(percent) else { continue };
        let height = -(1.0 - percent / 100.0).log10();
        if height > y.end() {
            continue;
        }
        let at = (x.place(latency.max(1) as f64), y.place(height));
        canvas.dot(at, line.colour);
        let text = format!("p{percent}: {}", units::latency(latency as f64));
        // Beside the dot, on the side that has room.
        let (anchor, offset) =
            if at.0 > (LEFT + RIGHT) / 2.0 { (Anchor::End, -8.0) } else { (Anchor::Start, 8.0) };
        canvas.text((at.0 + offset, at.1 - 6.0), anchor, 12.0, "#222222", &text);
    }
}

/// How many nines the share `seen` of `total` has: 0.9 has one, 0.99 two. The
/// last request, whose share is 1, is given those of the last but one.
fn nines(seen: u64, total: u64) -> f64 {
    let beyond = total.saturating_sub(seen).max(1);
    (total as f64 / beyond as f64).log10()
}

/// The height of the upper panel, in nines: enough for the slowest of so many.
fn nines_of(requests: u64) -> f64 {
    (requests.max(2) as f64).log10().clamp(1.0, 12.0)
}

/// 0 %, 50 %, 90 %, 99 % …
fn share_ticks(top: f64) -> Vec<Tick> {
    let mut ticks = vec![
        Tick { value: 0.0, label: "0 %".to_owned() },
        Tick { value: 2_f64.log10(), label: "50 %".to_owned() },
    ];
    for nines in 1..=(top.floor() as usize) {
        let label = match nines {
            1 => "90 %".to_owned(),
            2 => "99 %".to_owned(),
            more => format!("99.{} %", "9".repeat(more - 2)),
        };
        ticks.push(Tick { value: nines as f64, label });
    }
    ticks
}

fn course_panel(canvas: &mut Canvas, series: &[Series], timeline: &Timeline) {
    let stretches = timeline.stretches();
    // For each stretch its middle and length in seconds.
    let mut start = 0.0;
    let mut times = Vec::with_capacity(stretches.len());
    for stretch in stretches {
        let end = stretch.end.as_secs_f64();
        times.push(((start + end) / 2.0, end - start));
        start = end;
    }
    let rate = |line: &Series, index: usize| {
        let requests = &stretches[index].requests;
        let sum: u64 = line.iothreads.iter().filter_map(|&each| requests.get(each)).sum();
        sum as f64 / times[index].1
    };
    let lines: Vec<(&Series, Vec<f64>)> = series
        .iter()
        .map(|line| (line, (0..stretches.len()).map(|index| rate(line, index)).collect()))
        .collect();
    let most = lines.iter().flat_map(|(_, rates)| rates).copied().fold(1.0, f64::max);
    let x = Axis::linear_exact((0.0, start.max(1e-3)), (LEFT, RIGHT));
    let y = Axis::linear((0.0, most), (COURSE.1, COURSE.0));
    let counts = y.steps(round_count);
    grid(canvas, COURSE, (&x, &x.steps(|value| format!("{value}"))), (&y, &counts));
    frame(canvas, COURSE, "seconds since the start", "IOPS");
    for (line, rates) in lines {
        let mut points: Vec<_> = times
            .iter()
            .zip(&rates)
            .map(|(&(middle, _), &rate)| (x.place(middle), y.place(rate)))
            .collect();
        // The first and last half stretches; a single stretch becomes a line.
        if let (Some(&first), Some(&last)) = (points.first(), points.last()) {
            points.insert(0, (x.place(0.0), first.1));
            points.push((x.place(start), last.1));
        }
        canvas.polyline(&points, line.colour, line.width);
    }
}

/// A round count, without the zeros that say how exact it is: `90k`.
fn round_count(value: f64) -> String {
    let text = units::count(value);
    match text.split_once('.') {
        Some((whole, rest)) => {
            let unit = rest.trim_start_matches(|c: char| c.is_ascii_digit());
            let digits = rest[..rest.len() - unit.len()].trim_end_matches('0');
            let point = if digits.is_empty() { "" } else { "." };
            format!("{whole}{point}{digits}{unit}")
        }
        None => text,
    }
}

/// Grid lines and their labels.
fn grid(canvas: &mut Canvas, panel: (f64, f64), x: (&Axis, &[Tick]), y: (&Axis, &[Tick])) {
    for tick in x.1 {
        let at = x.0.place(tick.value);
        canvas.line((at, panel.0), (at, panel.1), "#e4e4e4", 1.0);
        canvas.text((at, panel.1 + 18.0), Anchor::Middle, 12.0, "#444444", &tick.label);
    }
    for tick in y.1 {
        let at = y.0.place(tick.value);
        canvas.line((LEFT, at), (RIGHT, at), "#e4e4e4", 1.0);
        canvas.text((LEFT - 8.0, at + 4.0), Anchor::End, 12.0, "#444444", &tick.label);
    }
}

/// The border of a panel and the names of its axes.
fn frame(canvas: &mut Canvas, panel: (f64, f64), below: &str, above: &str) {
    canvas.line((LEFT, panel.1), (RIGHT, panel.1), "#888888", 1.0);
    canvas.line((LEFT, panel.0), (LEFT, panel.1), "#888888", 1.0);
    let middle = (LEFT + RIGHT) / 2.0;
    canvas.text((middle, panel.1 + 38.0), Anchor::Middle, 13.0, "#222222", below);
    canvas.text((LEFT, panel.0 - 10.0), Anchor::Start, 13.0, "#222222", above);
}

#[cfg(test)]
mod tests;

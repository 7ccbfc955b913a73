//! Pictures of whole measurements.

use std::time::Duration;

use super::super::report::{example, steady};
use super::*;
use crate::random::Random;

/// Checks that tags are closed in order and that every number is one; gives the
/// number of elements of a name.
fn elements(picture: &str, name: &str) -> usize {
    let mut open = Vec::new();
    let mut found = 0;
    for tag in picture.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').expect("a tag ends");
        let word = tag.split([' ', '/']).find(|word| !word.is_empty()).unwrap();
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(word));
            continue;
        }
        found += usize::from(word == name);
        if !tag.ends_with('/') {
            open.push(word);
        }
    }
    assert!(open.is_empty(), "{open:?}");
    assert!(!picture.contains("NaN") && !picture.contains("inf"), "{picture}");
    found
}

/// Some iothreads with latencies around 30 µs and a tail, and their course.
fn measurement(iothreads: usize) -> (Vec<Tally>, Timeline) {
    let mut random = Random::new(11, 0);
    let mut tallies = vec![Tally::default(); iothreads];
    let mut timeline = Timeline::new(iothreads);
    let mut counters = vec![0; iothreads];
    for step in 1..=20_u64 {
        for (index, tally) in tallies.iter_mut().enumerate() {
            for _ in 0..random.below(100) + 100 * (index as u64 % 3) {
                let tail = if random.percent(2) { random.below(1_000_000) } else { 0 };
                tally.latencies.record_nanoseconds(25_000 + random.below(10_000) + tail);
                tally.reads += 1;
            }
            counters[index] = tally.reads;
        }
        timeline.sample(Duration::from_millis(100 * step), &counters);
    }
    (tallies, timeline)
}

fn picture(iothreads: usize) -> String {
    let (tallies, timeline) = measurement(iothreads);
    render(&example(&tallies), &tallies, &timeline)
}

#[test]
fn each_iothread_and_their_sum_have_a_line_in_both_panels() {
    let picture = picture(3);
    assert_eq!(elements(&picture, "polyline"), 2 * (3 + 1));
    for text in ["iothread 0", "iothread 2", "all 3", "latency", "IOPS", "p99.9: ", "90 %"] {
        assert!(picture.contains(text), "{text}");
    }
}

#[test]
fn one_iothread_is_drawn_once() {
    let picture = picture(1);
    assert_eq!(elements(&picture, "polyline"), 2);
    assert!(!picture.contains("all 1"));
}

#[test]
fn a_crowd_is_shown_by_its_extremes() {
    let picture = picture(40);
    assert_eq!(elements(&picture, "polyline"), 2 * (2 + 1));
    assert!(picture.contains("(most requests)") && picture.contains("(fewest)"));
    assert!(picture.len() < 1 << 20);
}

#[test]
fn a_measurement_without_requests_is_still_a_picture() {
    let tallies = [Tally::default()];
    let picture = render(&example(&tallies), &tallies, &Timeline::new(1));
    assert_eq!(elements(&picture, "polyline"), 0);
    assert!(picture.contains("no requests"));
}

#[test]
fn extreme_latencies_stay_inside_the_panel() {
    let mut tally = steady(1, 0);
    tally.latencies.record_nanoseconds(u64::MAX);
    let tallies = [tally];
    let mut timeline = Timeline::new(1);
    timeline.sample(Duration::from_nanos(1), &[2]);
    let picture = render(&example(&tallies), &tallies, &timeline);
    elements(&picture, "line");
    let points = picture
        .split("points=\"")
        .skip(1)
        .flat_map(|rest| rest.split_once('"').expect("an attribute ends").0.split_whitespace());
    for point in points {
        let (x, y) = point.split_once(',').unwrap();
        let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
        assert!((LEFT - 0.1..=RIGHT + 0.1).contains(&x), "{point}");
        assert!((LATENCY.0 - 0.1..=COURSE.1 + 0.1).contains(&y), "{point}");
    }
}

#[test]
fn a_hostile_image_name_cannot_add_markup() {
    let (tallies, timeline) = measurement(1);
    let mut report = example(&tallies);
    report.description.images = vec!["<script>alert(1)</script>".repeat(10)];
    let picture = render(&report, &tallies, &timeline);
    assert_eq!(elements(&picture, "script"), 0);
}

#[test]
fn round_counts_have_no_needless_zeros() {
    for (value, text) in [(0.0, "0"), (500.0, "500"), (90_000.0, "90k"), (2_500_000.0, "2.5M")] {
        assert_eq!(round_count(value), text);
    }
}

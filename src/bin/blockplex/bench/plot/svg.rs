//! Writes SVG elements. All coordinates are in pixels, y downwards.

use std::fmt::Write as _;

/// Which part of a text stands at its place.
#[derive(Clone, Copy, Debug)]
pub(super) enum Anchor {
    /// Its start.
    Start,
    /// Its middle.
    Middle,
    /// Its end.
    End,
}

/// A picture being drawn.
#[derive(Debug)]
pub(super) struct Canvas {
    text: String,
}

impl Canvas {
    /// An empty white picture.
    pub(super) fn new(width: f64, height: f64) -> Self {
        let mut canvas = Self { text: String::new() };
        canvas.push(format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"system-ui, sans-serif\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
        ));
        canvas
    }

    /// A straight line.
    pub(super) fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str, width: f64) {
        self.push(format_args!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" \
             stroke-width=\"{width:.1}\"/>\n",
            from.0, from.1, to.0, to.1
        ));
    }

    /// A line through several points; none for fewer than two.
    pub(super) fn polyline(&mut self, points: &[(f64, f64)], colour: &str, width: f64) {
        if points.len() < 2 {
            return;
        }
        self.text.push_str("<polyline points=\"");
        for (x, y) in points {
            self.push(format_args!("{x:.1},{y:.1} "));
        }
        self.push(format_args!(
            "\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width:.1}\" \
             stroke-linejoin=\"round\"/>\n"
        ));
    }

    /// A dot.
    pub(super) fn dot(&mut self, at: (f64, f64), colour: &str) {
        self.push(format_args!(
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{colour}\"/>\n",
            at.0, at.1
        ));
    }

    /// A text, whatever characters it has, with a white rim that keeps it
    /// readable on top of lines.
    pub(super) fn text(
        &mut self,
        at: (f64, f64),
        anchor: Anchor,
        size: f64,
        colour: &str,
        text: &str,
    ) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        self.push(format_args!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\" \
             fill=\"{colour}\" stroke=\"#ffffff\" stroke-width=\"3\" paint-order=\"stroke\">{}\
             </text>\n",
            at.0,
            at.1,
            escape(text)
        ));
    }

    /// The finished picture.
    pub(super) fn finish(mut self) -> String {
        self.text.push_str("</svg>\n");
        self.text
    }

    fn push(&mut self, arguments: std::fmt::Arguments<'_>) {
        // Writing to a `String` cannot fail.
        let _infallible = self.text.write_fmt(arguments);
    }
}

/// Text as XML wants it. Characters that XML has no form for are replaced.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\u{fffe}' | '\u{ffff}' => escaped.push(char::REPLACEMENT_CHARACTER),
            other if other.is_control() => escaped.push(char::REPLACEMENT_CHARACTER),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(escape("<a&b>\u{0}\n"), "&lt;a&amp;b&gt;\u{fffd}\u{fffd}");
    }

    #[test]
    fn a_single_point_draws_nothing() {
        let mut canvas = Canvas::new(1.0, 1.0);
        canvas.polyline(&[(0.0, 0.0)], "#000000", 1.0);
        assert!(!canvas.finish().contains("polyline"));
    }
}

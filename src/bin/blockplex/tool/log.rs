//! What the library says while a tool works: errors, and what QEMU's tools would say, in their words.

use std::fmt::Debug;

use blockplex::drivers::qcow2::notice;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{EnvFilter, FilterExt as _, LevelFilter, filter_fn};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Sends it to stderr; `RUST_LOG` asks for more or less.
pub fn install() {
    let level = LevelFilter::ERROR.into();
    let filter = EnvFilter::builder().with_default_directive(level).from_env_lossy();
    let is_notice = |metadata: &tracing::Metadata<'_>| notice::TARGETS.contains(&metadata.target());
    let other = filter.and(filter_fn(move |metadata| !is_notice(metadata)));
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_filter(other);
    registry().with(log).with(Notices.with_filter(filter_fn(is_notice))).init();
}

/// Prints notices as QEMU does.
struct Notices;

impl<S: Subscriber> Layer<S> for Notices {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        match event.metadata().target() {
            notice::CORRUPT => {
                // Where, the peer does not say.
                let error = match text.error.split_once(") at ") {
                    Some((what, _)) if what.starts_with("Preventing ") => format!("{what})"),
                    _ => text.error,
                };
                let (marking, further) = match text.fatal {
                    true => ("Marking image as corrupt", ""),
                    false => ("Image is corrupt", "non-fatal "),
                };
                eprintln!(
                    "qcow2: {marking}: {error}; further {further}corruption events will be suppressed"
                );
            }
            _ => eprintln!("{}", text.message),
        }
    }
}

#[derive(Default)]
struct Text {
    message: String,
    error: String,
    fatal: bool,
}

impl Visit for Text {
    fn record_bool(&mut self, field: &Field, value: bool) {
        if field.name() == "fatal" {
            self.fatal = value;
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let text = match field.name() {
            "message" => &mut self.message,
            "error" => &mut self.error,
            _ => return,
        };
        text.push_str(&format!("{value:?}"));
    }
}

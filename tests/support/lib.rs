//! Shared fixtures of the scenario tests.
//!
//! * [`Probe`]: a driver whose requests stop at named points, fail on demand, and are counted.
//! * [`Narrow`]: a driver with stricter limits, which insists on them.
//! * [`Bench`] and [`Door`]: disks of a whole layer, asked through each of its three doors.
//! * [`Stage`]: a graph with loops and a control thread; [`Hooks`] counts what an origin is told.
//! * [`image`]: images of the peer, patches that damage them, and the peer's judgement.
//! * [`patience`]: waits that end after 30 seconds in a panic, never in a hang.
//! * [`structure`]: a graph as text, to see that nothing has changed.
#![deny(missing_docs)]

mod doors;
pub mod image;
mod narrow;
pub mod patience;
mod probe;
mod stage;
mod structure;

pub use doors::{Bench, Door};
pub use narrow::Narrow;
pub use probe::{Point, Probe, ProbeHandle};
pub use stage::{Hooks, Stage, pattern, reader, sharing_writer, writer};
pub use structure::structure;

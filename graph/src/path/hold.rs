//! What a request holds on to until its last operation has left the kernel (R4).

use super::view::{NodeIndex, QueueView};
use crate::driver::Pin;
use blockplex_io::lock::RangeToken;
use smallvec::SmallVec;
use std::cell::RefCell;
use std::rc::Rc;

/// Pins of drivers, and ranges of nodes whose writes are ordered.
#[derive(Default)]
pub(crate) struct Holds {
    /// The first pin: nearly no request has another.
    pin: Option<(NodeIndex, Pin)>,
    more_pins: Vec<(NodeIndex, Pin)>,
    ranges: SmallVec<[(NodeIndex, RangeToken); 1]>,
}

impl Holds {
    /// Adds the pin that the driver of `node` gave.
    #[inline]
    pub(crate) fn add_pin(&mut self, node: NodeIndex, pin: Pin) {
        if self.pin.is_none() {
            self.pin = Some((node, pin));
        } else {
            self.more_pins.push((node, pin));
        }
    }

    /// Adds a range of the writes of `node`.
    pub(crate) fn add_range(&mut self, node: NodeIndex, token: RangeToken) {
        self.ranges.push((node, token));
    }

    /// Gives everything back. Must come before the view of the request goes.
    #[inline]
    pub(crate) fn release(&mut self, view: &QueueView, loop_index: usize) {
        if let Some((node, pin)) = self.pin.take() {
            view.node(node).view.driver().unpin(loop_index, pin);
        }
        if !self.more_pins.is_empty() || !self.ranges.is_empty() {
            self.release_more(view, loop_index);
        }
    }

    #[inline(never)]
    fn release_more(&mut self, view: &QueueView, loop_index: usize) {
        for (node, pin) in self.more_pins.drain(..) {
            view.node(node).view.driver().unpin(loop_index, pin);
        }
        for (node, token) in self.ranges.drain(..) {
            view.node(node).view.node().writes.release(token);
        }
    }
}

/// Holds that several operations share; given back with the last of them.
pub(crate) struct SharedHolds {
    view: Rc<QueueView>,
    loop_index: usize,
    holds: RefCell<Holds>,
}

impl SharedHolds {
    pub(crate) fn new(view: Rc<QueueView>, loop_index: usize, holds: Holds) -> Rc<SharedHolds> {
        Rc::new(SharedHolds { view, loop_index, holds: RefCell::new(holds) })
    }

    pub(crate) fn with<R>(&self, change: impl FnOnce(&mut Holds) -> R) -> R {
        change(&mut self.holds.borrow_mut())
    }
}

impl Drop for SharedHolds {
    fn drop(&mut self) {
        self.holds.get_mut().release(&self.view, self.loop_index);
    }
}

//! What everything that runs for one request shares.

use super::hold::{Holds, SharedHolds};
use super::view::{NodeIndex, QueueView};
use crate::debug_event::DebugEvent;
use blockplex_io::event_loop::Local;
use std::rc::Rc;

/// The admission of a request, which ends when this is dropped.
pub(crate) trait Admission {}

/// What everything that runs for one request shares. Cloning is three non-atomic counts.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) view: Rc<QueueView>,
    pub(crate) local: Local,
    /// The request's admission; none for the control plane.
    #[expect(dead_code, reason = "held, not read: the admission lasts as long as the context")]
    pub(crate) ticket: Option<Rc<dyn Admission>>,
}

impl Context {
    pub(crate) fn holds(&self) -> Rc<SharedHolds> {
        SharedHolds::new(self.view.clone(), self.local.index(), Holds::default())
    }
}

/// Announces a step to the driver of `node`, if it listens.
pub(super) async fn announce(context: &Context, node: NodeIndex, event: DebugEvent) {
    let view = &context.view.node(node).view;
    if view.listens
        && let Some(listener) = view.driver().debug_listener()
    {
        listener.announce(&context.local, event).await;
    }
}

//! The table of requests that have left the hot path, or wait at the gate.

use crate::error::Result;
use crate::path::hold::{Holds, SharedHolds};
use crate::path::leaf::Transfer;
use crate::path::queue::core::Ticket;
use crate::path::view::{NodeIndex, QueueView};
use crate::request::{Completion, Outcome, Request};
use blockplex_io::buffer::IoVector;
use smallvec::SmallVec;
use std::rc::Rc;
use std::task::Waker;

/// Who gets the result.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Door {
    Cookie(u64),
    Future,
    Nobody,
}

#[derive(Default)]
pub(crate) struct Table {
    pub(super) entries: Vec<Entry>,
    pub(super) free: Vec<u32>,
}

pub(crate) struct Entry {
    pub(super) request: Request,
    pub(super) door: Door,
    pub(super) view: Option<Rc<QueueView>>,
    pub(super) ticket: Option<Rc<Ticket>>,
    pub(super) ops: SmallVec<[Op; 1]>,
    pub(super) left: u32,
    pub(super) result: Result<Outcome>,
    pub(super) ended: Option<Completion>,
    pub(super) waker: Option<Waker>,
}

pub(crate) struct Op {
    /// The node whose file it goes to.
    pub(super) node: NodeIndex,
    pub(super) transfer: Transfer,
    /// The part of the request's vector that it is about, when that cannot be told from the whole.
    pub(super) part: Option<IoVector>,
    /// Given back with this operation, not with the request: a request that held one range while
    /// it waited for the next could wait for itself.
    pub(super) holds: Holds,
    /// The same, where the node's largest transfer made several operations of one piece.
    pub(super) shared: Option<Rc<SharedHolds>>,
}

/// Where a piece of a request is: in a file, and in the request's memory.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(super) node: NodeIndex,
    pub(super) fd: i32,
    pub(super) offset: u64,
    pub(super) position: usize,
    pub(super) length: u64,
}

impl Table {
    pub(super) fn entry(&mut self, index: u32) -> &mut Entry {
        &mut self.entries[index as usize]
    }
}

/// A token names an operation of an entry.
pub(super) fn token_of(index: u32, op: usize) -> u64 {
    u64::from(index) | (op as u64) << 32
}

pub(super) fn op_of(token: u64) -> usize {
    (token >> 32) as usize
}

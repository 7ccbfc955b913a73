//! `blkdebug`: passes requests on to its child, and makes them fail, wait or come in other sizes as
//! its rules say. The rules, events and options are QEMU's; what begins with `x-` is ours.
//!
//! ```text
//!   format driver ── announce(event) ──► rules ──► state, active injections, suspended requests
//!        │                                               │
//!        └────────── request ──► check ◄─────────────────┘
//!                                  │ no injection for it
//!                                  ▼
//!                                child
//! ```
//!
//! An injection becomes *active* when its event comes in its state, and then fails the requests
//! that it matches, until another event makes others active instead. Writes that reach the node
//! announce `pwritev` (or `pwritev_zero`) and `pwritev_done` to it by themselves.
//!
//! A breakpoint ([`Blkdebug::break_at`]) keeps the next one who announces its event waiting until
//! [`Blkdebug::resume`]. While it waits its request is in flight: a drain waits, too.

mod breakpoints;
mod config_file;
mod options;
mod rules;
#[cfg(test)]
mod tests;

pub use breakpoints::{BreakpointError, Notice};
pub use options::BlkdebugOptions;
pub use rules::{Injection, IoKinds, Rule};

use blockplex_graph::driver::{AccessChange, Driver, LocalFuture, Map, MapRequest, Pin, Role};
use blockplex_graph::{
    Access, Child, DebugEvent, DebugListener, Error, ErrorKind, Limits, NodeIo, NodeView, Outcome,
    Request, RequestFlags, RequestKind, Result,
};
use blockplex_io::buffer::IoVector;
use blockplex_io::event_loop::{Local, yield_now};
use breakpoints::Breakpoints;
use parking_lot::Mutex;
use rules::{Rules, Verdict};

/// The index of the only child.
const CHILD: usize = 0;
/// The most zeros written at once, where a write-zeroes is too small to be passed on.
const ZEROS: u64 = 1 << 20;

/// The `blkdebug` driver. See the page of this module.
pub struct Blkdebug {
    options: BlkdebugOptions,
    rules: Mutex<Rules>,
    breakpoints: Breakpoints,
}

impl Blkdebug {
    /// With these options, above a child whose requests are aligned to `child_alignment`.
    pub fn new(options: BlkdebugOptions, child_alignment: u32) -> Result<Blkdebug> {
        options.check(child_alignment)?;
        let rules = Mutex::new(Rules::new(options.rules.clone(), options.seed));
        Ok(Blkdebug { options, rules, breakpoints: Breakpoints::default() })
    }

    /// The state that its rules are in; 1 at first.
    pub fn state(&self) -> u32 {
        self.rules.lock().state()
    }

    /// How often each of the injections, in the order of the options, has met a request.
    pub fn injections_met(&self) -> Vec<u64> {
        self.rules.lock().met()
    }

    /// Keeps the next one who announces `event` waiting, under the name `tag`.
    pub fn break_at(&self, event: DebugEvent, tag: &str) {
        self.breakpoints.add(event, tag);
    }

    /// Takes away the breakpoints named `tag`, and lets all go on that wait under that name.
    ///
    /// # Errors
    ///
    /// There are none.
    pub fn remove_break(&self, tag: &str) -> Result<(), BreakpointError> {
        self.breakpoints.remove(tag)
    }

    /// Lets the first one go on that waits under the name `tag`.
    ///
    /// # Errors
    ///
    /// Nobody waits.
    pub fn resume(&self, tag: &str) -> Result<(), BreakpointError> {
        self.breakpoints.resume(tag)
    }

    /// Whether somebody waits under the name `tag`.
    pub fn is_suspended(&self, tag: &str) -> bool {
        self.breakpoints.is_suspended(tag)
    }

    /// Lets everybody go on that waits, and takes all breakpoints away.
    pub fn release_all(&self) {
        self.breakpoints.release_all();
    }

    /// Waits until somebody waits under the name `tag`, or without one, under any.
    pub async fn wait_suspended(&self, tag: Option<&str>) {
        self.breakpoints.wait_suspended(tag).await;
    }

    /// Has `watcher` told whenever somebody is suspended or goes on.
    pub fn watch(&self, watcher: impl Fn(Notice<'_>) + Send + Sync + 'static) {
        self.breakpoints.watch(Box::new(watcher));
    }

    async fn announced(&self, event: DebugEvent) {
        self.rules.lock().event(event);
        self.breakpoints.pass(event).await;
    }

    /// Does to one piece of a request what the active injections say: gives how many bytes of it
    /// are still to be passed on before it fails, and the error.
    async fn check(
        &self,
        io: &NodeIo,
        (kind, offset, length): (RequestKind, u64, u64),
    ) -> Result<(), Failure> {
        let verdict = self.rules.lock().judge(kind, offset, length);
        let Some(Verdict { errno, immediately, delay, short }) = verdict else { return Ok(()) };
        if !delay.is_zero() {
            io.local().sleep(delay).await;
        } else if !immediately {
            yield_now().await;
        }
        if errno == 0 {
            return Ok(());
        }
        let error = Error::from_errno(errno);
        Err(Failure { error, passed_on: short.min(length) })
    }

    async fn serve_request(&self, io: &NodeIo, request: Request) -> Result<Outcome> {
        let child = io.child(CHILD)?;
        let Request { kind, offset, length, .. } = request;
        match kind {
            RequestKind::Read => self.transfer(io, &child, &request).await?,
            RequestKind::Write => {
                self.announced(DebugEvent::Pwritev).await;
                let result = self.transfer(io, &child, &request).await;
                self.announced(DebugEvent::PwritevDone).await;
                result?;
            }
            RequestKind::WriteZeroes => {
                self.announced(DebugEvent::PwritevZero).await;
                let result = self.erase(io, &child, &request).await;
                self.announced(DebugEvent::PwritevDone).await;
                result?;
            }
            RequestKind::Discard => self.erase(io, &child, &request).await?,
            RequestKind::Flush => {
                self.check(io, (kind, 0, 0)).await?;
                child.flush().await?;
            }
            RequestKind::BlockStatus => {
                self.check(io, (kind, offset, length)).await?;
                return child.block_status(offset, length).await.map(Outcome::from);
            }
            RequestKind::Truncate => {
                child.truncate_with(offset, request.flags.preallocation).await?;
            }
        }
        Ok(Outcome::Done)
    }

    /// Reads or writes, in pieces no longer than `max-transfer`.
    async fn transfer(&self, io: &NodeIo, child: &Child, request: &Request) -> Result<()> {
        let Request { kind, flags, offset, length, ref vector } = *request;
        let most = non_zero_or(self.options.max_transfer, u64::MAX);
        let mut done = 0;
        while done < length {
            let count = (length - done).min(most);
            let checked = self.check(io, (kind, offset + done, count)).await;
            let passed_on = checked.as_ref().map_or_else(|failure| failure.passed_on, |()| count);
            if passed_on > 0 {
                let part = vector.slice(done as usize, passed_on as usize);
                if kind == RequestKind::Read {
                    child.read(offset + done, part).await?;
                } else {
                    child.write(offset + done, part, flags).await?;
                }
            }
            checked?;
            done += count;
        }
        Ok(())
    }

    /// Discards or writes zeros, in pieces that begin and end at multiples of the preferred
    /// alignment. What is left of them is written out; discards are passed on as far as they suit
    /// the alignment of requests.
    async fn erase(&self, io: &NodeIo, child: &Child, request: &Request) -> Result<()> {
        let Request { kind, flags, offset, length, .. } = *request;
        let zeroes = kind == RequestKind::WriteZeroes;
        let (align, most) = if zeroes {
            (self.options.opt_write_zero, self.options.max_write_zero)
        } else {
            (self.options.opt_discard, self.options.max_discard)
        };
        let align = non_zero_or(align, 1);
        let most = non_zero_or(most, u64::MAX);
        let most = if most < align { most } else { most - most % align };
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let to_boundary = align - at % align;
            let aligned = at % align == 0 && end - at >= align;
            let count = if aligned {
                ((end - at) / align).saturating_mul(align).min(most)
            } else {
                to_boundary.min(end - at)
            };
            if aligned && zeroes {
                self.check(io, (kind, at, count)).await?;
                child.write_zeroes(at, count, flags).await?;
            } else if zeroes {
                self.write_zeros(io, child, (at, count), flags).await?;
            } else if let Some((start, length)) = self.whole_blocks(at, count) {
                self.check(io, (kind, start, length)).await?;
                child.discard(start, length).await?;
            }
            at += count;
        }
        Ok(())
    }

    /// What of a range suits the alignment of requests.
    fn whole_blocks(&self, offset: u64, length: u64) -> Option<(u64, u64)> {
        let block = non_zero_or(self.options.align, 1);
        let start = offset.checked_next_multiple_of(block)?;
        let end = (offset + length) / block * block;
        (start < end).then(|| (start, end - start))
    }

    async fn write_zeros(
        &self,
        io: &NodeIo,
        child: &Child,
        (offset, length): (u64, u64),
        flags: RequestFlags,
    ) -> Result<()> {
        if flags.no_fallback {
            let text = "the range is smaller than 'opt-write-zero'";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        let mut done = 0;
        while done < length {
            let count = (length - done).min(ZEROS);
            let zeros = Request::write(offset + done, IoVector::zeroed(count as usize));
            self.transfer(io, child, &zeros).await?;
            done += count;
        }
        Ok(())
    }
}

/// An injected failure.
struct Failure {
    error: Error,
    /// Bytes that are transferred before.
    passed_on: u64,
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        failure.error
    }
}

fn non_zero_or(value: u64, otherwise: u64) -> u64 {
    if value == 0 { otherwise } else { value }
}

impl std::fmt::Debug for Blkdebug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blkdebug").field("options", &self.options).finish_non_exhaustive()
    }
}

impl DebugListener for Blkdebug {
    fn announce<'a>(&'a self, _local: &'a Local, event: DebugEvent) -> LocalFuture<'a, ()> {
        Box::pin(self.announced(event))
    }
}

impl Driver for Blkdebug {
    fn driver_name(&self) -> &'static str {
        "blkdebug"
    }

    fn length(&self, node: &NodeView) -> u64 {
        node.child(CHILD).map_or(0, |child| child.length())
    }

    fn limits(&self) -> Limits {
        let BlkdebugOptions {
            align,
            max_transfer,
            opt_write_zero,
            max_write_zero,
            opt_discard,
            max_discard,
            ..
        } = self.options;
        // `check` bounds them all to 31 bits.
        Limits {
            request_alignment: non_zero_or(align, 1) as u32,
            max_transfer: max_transfer as u32,
            write_zeroes_alignment: opt_write_zero as u32,
            max_write_zeroes: max_write_zero,
            discard_alignment: opt_discard as u32,
            max_discard,
            ..Limits::UNLIMITED
        }
    }

    fn child_access(&self, _role: Role, parents: Access) -> Access {
        Access {
            needed: parents.needed | self.options.take_child_perms,
            shared: parents.shared & !self.options.unshare_child_perms,
        }
    }

    fn access_changed(&self, _change: AccessChange) -> Result<()> {
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn map(&self, _node: &NodeView, request: &MapRequest<'_>) -> Map {
        Map::Async { length: request.length }
    }

    fn unpin(&self, _loop_index: usize, _pin: Pin) {}

    fn serve<'a>(&'a self, io: &'a NodeIo, request: Request) -> LocalFuture<'a, Result<Outcome>> {
        Box::pin(self.serve_request(io, request))
    }

    fn debug_listener(&self) -> Option<&dyn DebugListener> {
        Some(self)
    }

    fn close<'a>(&'a self, _io: &'a NodeIo) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

//! The io_uring engine: one ring, built and used by one thread.
//!
//! SQEs gather in the submission queue and go to the kernel once a turn, or when the queue is
//! full. The loop's wake eventfd is watched by a one-shot poll that is armed before each sleep.
//!
//! R1. `in_flight` ≤ `limit` ≤ CQ entries − `RESERVE`; the reserve is for the wake poll and for
//!     `MAX_CANCELS` cancellations, so the completion queue cannot overflow (E5).
//! R2. Only the owner enters the ring: the type is `!Sync`, and SINGLE_ISSUER makes the kernel
//!     refuse others (W10).
//! R3. While something waits that the ring has room for, `wait` does not sleep: it offers it again,
//!     after a pause of `RETRY` if the kernel just refused (W11, W13).
#![expect(unsafe_code, reason = "pushes SQEs that carry raw memory")]

use super::slots::Slots;
use super::{EngineFeatures, OpId, RawOp, Sink, deliver};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use smallvec::SmallVec;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

/// The user data of the wake poll and of cancellations. No operation has them: an `OpId`'s lower
/// half is an index, and the slab never grows to 2³² − 2 slots.
const WAKE: u64 = u64::MAX;
const CANCEL: u64 = u64::MAX - 1;

/// Completion queue entries per submission queue entry: in-flight depth is cheap, entries are 16 B.
const CQ_FACTOR: u32 = 4;
const CQ_MIN: u32 = 64;
const RESERVE: u32 = 16;
const MAX_CANCELS: u32 = RESERVE - 2;
/// Results taken out of the ring in one go.
const BATCH: usize = 32;
/// How soon to try again when the kernel took nothing.
pub(super) const RETRY: Duration = Duration::from_millis(1);

const NEEDED_OPCODES: [u8; 9] = [
    opcode::Nop::CODE,
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
];

struct State {
    ring: IoUring,
    slots: Slots,
    /// Waits for room in the ring, in submission order.
    backlog: VecDeque<(OpId, RawOp)>,
    /// Results that the kernel has no part in.
    ready: VecDeque<(OpId, i32)>,
    /// Operations to cancel, and cancellations the kernel has.
    cancels: VecDeque<OpId>,
    cancels_in_flight: u32,
    in_flight: u32,
    /// Operations pushed since the kernel was last called.
    staged: u32,
    limit: u32,
    wake: RawFd,
    wake_armed: bool,
    #[cfg(test)]
    refusals: VecDeque<i32>,
    #[cfg(test)]
    answers: VecDeque<i32>,
}

/// The engine.
pub(crate) struct Ring {
    state: RefCell<State>,
}

/// How many operations are handed to the kernel together. A whole turn's worth would save more
/// calls (2–3 % on cached reads at depth 32), but lets a device run dry meanwhile: at depth 32 with
/// O_DIRECT, 8 is 7–20 % faster than all at once, and as fast as one by one.
const SUBMIT_BATCH: u32 = 8;

type Told = SmallVec<[(Rc<dyn Sink>, u64, i32); BATCH]>;

impl Ring {
    /// Builds a ring for the calling thread. `wake` must outlive it.
    pub(crate) fn new(entries: u32, wake: BorrowedFd<'_>) -> io::Result<(Ring, EngineFeatures)> {
        let (ring, mut features) = build(entries.max(1))?;
        check_abilities(&ring)?;
        let limit = ring.params().cq_entries().saturating_sub(RESERVE).max(1);
        features.in_flight_limit = limit;
        let state = State {
            ring,
            slots: Slots::new(),
            backlog: VecDeque::new(),
            ready: VecDeque::new(),
            cancels: VecDeque::new(),
            cancels_in_flight: 0,
            in_flight: 0,
            staged: 0,
            limit,
            wake: wake.as_raw_fd(),
            wake_armed: false,
            #[cfg(test)]
            refusals: VecDeque::new(),
            #[cfg(test)]
            answers: VecDeque::new(),
        };
        Ok((Ring { state: RefCell::new(state) }, features))
    }

    /// # Safety
    ///
    /// What `op` points to stays valid until its sink has been told.
    #[inline]
    pub(crate) unsafe fn submit(&self, op: RawOp, sink: Rc<dyn Sink>, token: u64) -> OpId {
        let state = &mut *self.state.borrow_mut();
        let id = state.slots.insert(sink, token, matches!(op, RawOp::PollAdd { .. }));
        if !state.backlog.is_empty() || !state.start(id, op) {
            state.backlog.push_back((id, op));
        }
        id
    }

    pub(crate) fn cancel(&self, id: OpId) {
        self.state.borrow_mut().cancel(id);
    }

    pub(crate) fn cancel_all(&self, only_polls: bool) {
        let state = &mut *self.state.borrow_mut();
        for id in state.slots.all_busy(only_polls) {
            state.cancel(id);
        }
    }

    pub(crate) fn flush(&self) {
        self.state.borrow_mut().flush();
    }

    pub(crate) fn reap(&self, budget: usize) -> usize {
        let mut done = 0;
        while done < budget {
            let told = self.state.borrow_mut().collect(BATCH.min(budget - done));
            if told.is_empty() {
                break;
            }
            done += told.len();
            for (sink, token, result) in told {
                deliver(&*sink, token, result);
            }
        }
        done
    }

    pub(crate) fn is_ready(&self) -> bool {
        let state = &mut *self.state.borrow_mut();
        !state.ready.is_empty()
            || !state.ring.completion().is_empty()
            || state.ring.submission().taskrun()
    }

    pub(crate) fn wait(&self, timeout: Option<Duration>) {
        let state = &mut *self.state.borrow_mut();
        state.stage();
        state.arm_wake();
        // What the kernel did not take must be offered again soon, so no sleep for it (R3).
        let all_offered = state.wake_armed && !state.has_refused();
        let sleep = if all_offered { Some(timeout) } else { None };
        if let Err(error) = state.enter(sleep) {
            state.pause(&error);
        }
    }

    /// Whether something that could have gone to the kernel has not.
    pub(crate) fn has_refused(&self) -> bool {
        let state = &mut *self.state.borrow_mut();
        state.has_refused() || !state.ring.submission().is_empty()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.state.borrow().slots.busy()
    }

    /// Has the kernel signal `event` whenever something completes. For a loop that an embedder's
    /// epoll drives: a ring's own descriptor misses events under DEFER_TASKRUN.
    pub(crate) fn register_event(&self, event: &OwnedFd) -> io::Result<()> {
        self.state.borrow().ring.submitter().register_eventfd(event.as_raw_fd())
    }

    /// The next calls into the kernel fail with these errnos.
    #[cfg(test)]
    pub(crate) fn refuse_next(&self, errnos: &[i32]) {
        self.state.borrow_mut().refusals.extend(errnos);
    }

    /// The next operations complete with these results instead of the kernel's.
    #[cfg(test)]
    pub(crate) fn answer_next(&self, results: impl IntoIterator<Item = i32>) {
        self.state.borrow_mut().answers.extend(results);
    }

    /// Completions that the kernel had no room for: 0 by R1.
    #[cfg(test)]
    pub(crate) fn overflows(&self) -> u32 {
        self.state.borrow_mut().ring.completion().overflow()
    }
}

impl State {
    /// Puts an operation into the submission queue; `false` if there is no room in the ring.
    #[inline]
    fn start(&mut self, id: OpId, op: RawOp) -> bool {
        if self.in_flight >= self.limit || !self.push(&entry(op).user_data(id.bits())) {
            return false;
        }
        self.in_flight += 1;
        self.staged += 1;
        if self.staged >= SUBMIT_BATCH && self.enter(None).is_err() {
            // The turn's end asks again, and says why it is refused if it is.
            self.staged = 0;
        }
        true
    }

    /// Pushes one SQE, handing the queue over first when it is full.
    #[inline]
    fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: what the entry points to is valid until its completion, by the promise made to
        // `Ring::submit`; entries of our own point to nothing.
        if unsafe { self.ring.submission().push(entry) }.is_ok() {
            return true;
        }
        if let Err(error) = self.enter(None) {
            report(&error);
            return false;
        }
        // SAFETY: as above.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    fn cancel(&mut self, id: OpId) {
        if !self.slots.is_busy(id) {
            return;
        }
        if let Some(place) = self.backlog.iter().position(|(waiting, _)| *waiting == id) {
            self.backlog.remove(place);
            self.ready.push_back((id, -libc::ECANCELED));
        } else if !self.ready.iter().any(|(done, _)| *done == id) {
            self.cancels.push_back(id);
        }
    }

    /// Fills the submission queue from what waits.
    fn stage(&mut self) {
        while self.cancels_in_flight < MAX_CANCELS {
            let Some(id) = self.cancels.pop_front() else { break };
            if !self.slots.is_busy(id) {
                continue;
            }
            let cancel = opcode::AsyncCancel::new(id.bits()).build().user_data(CANCEL);
            if !self.push(&cancel) {
                self.cancels.push_front(id);
                break;
            }
            self.cancels_in_flight += 1;
        }
        while let Some((id, op)) = self.backlog.front().copied() {
            if !self.start(id, op) {
                break;
            }
            self.backlog.pop_front();
        }
    }

    fn arm_wake(&mut self) {
        if !self.wake_armed {
            let poll = opcode::PollAdd::new(types::Fd(self.wake), libc::POLLIN as u32);
            self.wake_armed = self.push(&poll.build().user_data(WAKE));
        }
    }

    fn flush(&mut self) {
        self.stage();
        let submission = self.ring.submission();
        if submission.is_empty() && !submission.taskrun() && !submission.cq_overflow() {
            return;
        }
        drop(submission);
        if let Err(error) = self.enter(None) {
            report(&error);
        }
    }

    /// Whether something waits in vain although the ring has room for it.
    fn has_refused(&self) -> bool {
        (!self.backlog.is_empty() && self.in_flight < self.limit)
            || (!self.cancels.is_empty() && self.cancels_in_flight < MAX_CANCELS)
    }

    /// One call into the kernel: submits what is staged, runs deferred completions and, given
    /// `Some(timeout)`, sleeps for one completion.
    fn enter(&mut self, sleep: Option<Option<Duration>>) -> io::Result<()> {
        #[cfg(test)]
        if let Some(errno) = self.refusals.pop_front() {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.staged = 0;
        let submitter = self.ring.submitter();
        let entered = match sleep {
            None => submitter.submit(),
            Some(None) => submitter.submit_and_wait(1),
            Some(Some(timeout)) => {
                let timeout = types::Timespec::from(timeout);
                submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(&timeout))
            }
        };
        match entered.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) | Err((Some(libc::ETIME | libc::EINTR), _)) => Ok(()),
            Err((_, error)) => Err(error),
        }
    }

    /// The kernel took nothing. The SQEs stay where they are (E3) and go with the next call; this
    /// thread pauses first, unless results wait whose delivery may free what the kernel lacks.
    fn pause(&mut self, error: &io::Error) {
        report(error);
        if self.ready.is_empty() && self.ring.completion().is_empty() {
            std::thread::sleep(RETRY);
        }
    }

    /// Takes up to `room` results out and frees their slots.
    fn collect(&mut self, room: usize) -> Told {
        let mut told = Told::new();
        while told.len() < room {
            let Some((id, result)) = self.ready.pop_front() else { break };
            if let Some((sink, token)) = self.slots.take(id) {
                told.push((sink, token, result));
            }
        }
        let mut woken = false;
        // `next` by hand: a `for` would take an entry and then find no room for it.
        let mut completion = self.ring.completion();
        while told.len() < room {
            let Some(entry) = completion.next() else { break };
            match entry.user_data() {
                WAKE => woken = true,
                CANCEL => self.cancels_in_flight -= 1,
                bits => {
                    debug_assert!(!cqueue::more(entry.flags()), "no operation is multi-shot");
                    let taken = self.slots.take(OpId::from_bits(bits));
                    debug_assert!(taken.is_some(), "a completion names an operation in flight");
                    let result = entry.result();
                    #[cfg(test)]
                    let result = self.answers.pop_front().unwrap_or(result);
                    if let Some((sink, token)) = taken {
                        self.in_flight -= 1;
                        told.push((sink, token, result));
                    }
                }
            }
        }
        drop(completion);
        if woken {
            self.wake_armed = false;
            clear_event(self.wake);
        }
        told
    }
}

/// Says so when a call failed for another reason than a lack that passes.
fn report(error: &io::Error) {
    if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) {
        tracing::error!(%error, "io_uring_enter failed; the loop tries again");
    }
}

/// Reads a non-blocking eventfd down to zero. Nothing to read is as good.
pub(crate) fn clear_event(event: RawFd) {
    // SAFETY: the loop owns the descriptor and outlives the engine.
    let event = unsafe { BorrowedFd::borrow_raw(event) };
    let mut count = [0u8; 8];
    // An error can only be EAGAIN: another wake-up had read it already.
    let _ = rustix::io::read(event, &mut count);
}

fn build(entries: u32) -> io::Result<(IoUring, EngineFeatures)> {
    let cq_entries = entries.saturating_mul(CQ_FACTOR).max(CQ_MIN);
    let base = || {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_cqsize(cq_entries);
        builder
    };
    let mut best = base();
    best.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
    let best_features = EngineFeatures { defer_taskrun: true, ..EngineFeatures::default() };
    let mut good = base();
    good.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
    let good_features = EngineFeatures { coop_taskrun: true, ..EngineFeatures::default() };
    // An older kernel answers EINVAL to a flag it does not know; anything else is final.
    let is_old = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
    match best.build(entries) {
        Ok(ring) => return Ok((ring, best_features)),
        Err(error) if is_old(&error) => {}
        Err(error) => return Err(error),
    }
    match good.build(entries) {
        Ok(ring) => Ok((ring, good_features)),
        Err(error) if is_old(&error) => Ok((base().build(entries)?, EngineFeatures::default())),
        Err(error) => Err(error),
    }
}

fn check_abilities(ring: &IoUring) -> io::Result<()> {
    let lacking = |what: &str| io::Error::new(io::ErrorKind::Unsupported, what.to_owned());
    if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
        return Err(lacking("the kernel's io_uring lacks EXT_ARG or NODROP (Linux 5.11)"));
    }
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    match NEEDED_OPCODES.iter().find(|code| !probe.is_supported(**code)) {
        Some(code) => Err(lacking(&format!("the kernel's io_uring lacks opcode {code}"))),
        None => Ok(()),
    }
}

#[inline]
fn entry(op: RawOp) -> squeue::Entry {
    let write_flags = |dsync: bool| if dsync { libc::RWF_DSYNC } else { 0 };
    match op {
        RawOp::Nop => opcode::Nop::new().build(),
        RawOp::Read { fd, offset, ptr, len } => {
            opcode::Read::new(types::Fd(fd), ptr, len).offset(offset).build()
        }
        RawOp::Write { fd, offset, ptr, len, dsync } => {
            let write = opcode::Write::new(types::Fd(fd), ptr, len).offset(offset);
            write.rw_flags(write_flags(dsync)).build()
        }
        RawOp::Readv { fd, offset, iov, count } => {
            opcode::Readv::new(types::Fd(fd), iov, count).offset(offset).build()
        }
        RawOp::Writev { fd, offset, iov, count, dsync } => {
            let write = opcode::Writev::new(types::Fd(fd), iov, count).offset(offset);
            write.rw_flags(write_flags(dsync)).build()
        }
        RawOp::Fsync { fd, data_only } => {
            let mut flags = types::FsyncFlags::empty();
            flags.set(types::FsyncFlags::DATASYNC, data_only);
            opcode::Fsync::new(types::Fd(fd)).flags(flags).build()
        }
        RawOp::Fallocate { fd, mode, offset, len } => {
            opcode::Fallocate::new(types::Fd(fd), len).offset(offset).mode(mode).build()
        }
        RawOp::PollAdd { fd, events } => opcode::PollAdd::new(types::Fd(fd), events).build(),
    }
}

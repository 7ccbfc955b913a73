//! A file in memory: grows like a file, keeps a journal of what was written and flushed, and can
//! fail or stop at chosen operations.

use blockplex_graph::driver::{
    AccessChange, Driver, LocalFuture, Map, MapRequest, Pin, PreparedReopen, Role,
};
use blockplex_graph::{
    Access, BlockStatus, Error, Limits, NodeIo, NodeView, Outcome, Request, RequestKind, Result,
};
use blockplex_io::event_loop::yield_now;
use parking_lot::Mutex;
use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: usize = 4096;

static CLOCK: AtomicU64 = AtomicU64::new(0);

/// The time, which moves with every event of a journal.
pub(crate) fn now() -> u64 {
    CLOCK.load(Ordering::SeqCst)
}

/// One operation on a volume, as it took effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Truncate(u64),
    Flush,
    /// Only shown to gates: offset and length.
    Read(u64, u64),
}

/// What a test does to operations before they take effect: `Err` fails them, `Ok(true)` makes
/// them wait and asks again.
type Gate = Box<dyn FnMut(&Event) -> Result<bool, i32> + Send>;

#[derive(Default)]
struct State {
    pages: HashMap<u64, Box<[u8; PAGE]>>,
    length: u64,
    journal: Option<Vec<Event>>,
    /// When each event of the journal took effect.
    times: Vec<u64>,
    gate: Option<Gate>,
    flushes: u64,
    writes: u64,
}

/// A file in memory; cloning shares it.
#[derive(Clone, Default)]
pub(crate) struct Volume(Arc<Mutex<State>>);

impl Volume {
    pub(crate) fn new(bytes: &[u8]) -> Volume {
        let volume = Volume::default();
        volume.0.lock().apply(&Event::Write(0, bytes.to_vec()));
        volume
    }

    pub(crate) fn from_file(path: &str) -> Volume {
        Volume::new(&std::fs::read(path).unwrap())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let state = self.0.lock();
        let mut bytes = vec![0; state.length as usize];
        state.read(0, &mut bytes);
        bytes
    }

    pub(crate) fn save(&self, path: &str) {
        std::fs::write(path, self.bytes()).unwrap();
    }

    pub(crate) fn length(&self) -> u64 {
        self.0.lock().length
    }

    /// Starts a journal.
    pub(crate) fn record(&self) {
        let mut state = self.0.lock();
        state.journal = Some(Vec::new());
        state.times.clear();
    }

    pub(crate) fn journal(&self) -> Vec<Event> {
        self.0.lock().journal.clone().unwrap_or_default()
    }

    /// The journal, with the time of each event: one clock for all volumes.
    pub(crate) fn timed_journal(&self) -> Vec<(u64, Event)> {
        let state = self.0.lock();
        let events = state.journal.iter().flatten().cloned();
        state.times.iter().copied().zip(events).collect()
    }

    pub(crate) fn apply(&self, event: &Event) {
        self.0.lock().apply(event);
    }

    pub(crate) fn flushes(&self) -> u64 {
        self.0.lock().flushes
    }

    pub(crate) fn writes(&self) -> u64 {
        self.0.lock().writes
    }

    pub(crate) fn set_gate(&self, gate: impl FnMut(&Event) -> Result<bool, i32> + Send + 'static) {
        self.0.lock().gate = Some(Box::new(gate));
    }

    pub(crate) fn remove_gate(&self) {
        self.0.lock().gate = None;
    }

    pub(crate) fn driver(&self) -> Box<dyn Driver> {
        Box::new(VolumeDriver(self.clone()))
    }
}

impl State {
    fn read(&self, offset: u64, bytes: &mut [u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let within = (at % PAGE as u64) as usize;
            let count = (PAGE - within).min(bytes.len() - done);
            match self.pages.get(&(at / PAGE as u64)) {
                Some(page) => {
                    bytes[done..done + count].copy_from_slice(&page[within..within + count]);
                }
                None => bytes[done..done + count].fill(0),
            }
            done += count;
        }
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::Write(offset, bytes) => {
                self.writes += 1;
                self.length = self.length.max(offset + bytes.len() as u64);
                let mut done = 0;
                while done < bytes.len() {
                    let at = offset + done as u64;
                    let within = (at % PAGE as u64) as usize;
                    let count = (PAGE - within).min(bytes.len() - done);
                    let page = self.pages.entry(at / PAGE as u64);
                    let page = page.or_insert_with(|| Box::new([0; PAGE]));
                    page[within..within + count].copy_from_slice(&bytes[done..done + count]);
                    done += count;
                }
            }
            Event::Zero(offset, length) => {
                let end = (offset + length).min(self.length);
                let zeros = vec![0; end.saturating_sub(*offset) as usize];
                self.apply(&Event::Write(*offset, zeros));
            }
            Event::Truncate(length) => {
                if *length < self.length {
                    let (cut, old) = (*length, self.length);
                    self.apply(&Event::Write(cut, vec![0; (old - cut) as usize]));
                }
                self.length = *length;
            }
            Event::Flush => self.flushes += 1,
            Event::Read(..) => {}
        }
    }
}

struct VolumeDriver(Volume);

impl VolumeDriver {
    async fn perform(&self, event: Event) -> Result<Outcome> {
        loop {
            yield_now().await;
            let mut state = self.0.0.lock();
            let wait = match &mut state.gate {
                Some(gate) => gate(&event).map_err(Error::from_errno)?,
                None => false,
            };
            if wait {
                continue;
            }
            state.apply(&event);
            if let Some(journal) = &mut state.journal
                && !matches!(event, Event::Read(..))
            {
                journal.push(event);
                state.times.push(CLOCK.fetch_add(1, Ordering::SeqCst));
            }
            return Ok(Outcome::Done);
        }
    }
}

impl Driver for VolumeDriver {
    fn driver_name(&self) -> &'static str {
        "volume"
    }

    fn length(&self, _node: &NodeView) -> u64 {
        self.0.length()
    }

    fn limits(&self) -> Limits {
        Limits::UNLIMITED
    }

    fn child_access(&self, _role: Role, parents: Access) -> Access {
        parents
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

    fn serve<'a>(&'a self, _io: &'a NodeIo, request: Request) -> LocalFuture<'a, Result<Outcome>> {
        Box::pin(async move {
            let Request { kind, offset, length, vector, .. } = request;
            match kind {
                RequestKind::Read => {
                    self.perform(Event::Read(offset, length)).await?;
                    let mut bytes = vec![0; vector.len()];
                    self.0.0.lock().read(offset, &mut bytes);
                    vector.copy_from_slice(0, &bytes);
                    Ok(Outcome::Done)
                }
                RequestKind::Write => self.perform(Event::Write(offset, vector.to_vec())).await,
                RequestKind::Discard | RequestKind::WriteZeroes => {
                    self.perform(Event::Zero(offset, length)).await
                }
                RequestKind::Flush => self.perform(Event::Flush).await,
                RequestKind::Truncate => self.perform(Event::Truncate(offset)).await,
                RequestKind::BlockStatus => Ok(Outcome::from(BlockStatus {
                    length,
                    data: true,
                    allocated: true,
                    offset: Some(offset),
                    ..BlockStatus::default()
                })),
            }
        })
    }

    fn reopen<'a>(
        &'a self,
        _io: &'a NodeIo,
        _options: Box<dyn Any>,
    ) -> LocalFuture<'a, Result<Box<dyn PreparedReopen>>> {
        Box::pin(async { Err(Error::from_errno(libc::ENOTSUP)) })
    }

    fn close<'a>(&'a self, _io: &'a NodeIo) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

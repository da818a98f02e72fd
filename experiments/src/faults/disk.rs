//! A disk in memory that loses what was not synced, fills up, and fails.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::Rng;
use sanderling_common::init::uniform;
use sanderling_server::storage::{Disk, DiskFile};

/// A crash leaves a file whose name was not synced with this probability, and one whose removal was not.
const UNSYNCED_NAME_STAYS: f64 = 0.5;

/// What a crash leaves of unsynced bytes is damaged in its last part with this probability.
const UNSYNCED_IS_DAMAGED: f64 = 0.3;

#[derive(Debug, Default)]
struct FileState {
    synced: Vec<u8>,
    unsynced: Vec<u8>,
    /// Whether the name is synced.
    is_named: bool,
}

impl FileState {
    fn len(&self) -> usize {
        self.synced.len() + self.unsynced.len()
    }
}

#[derive(Debug)]
struct State {
    files: BTreeMap<String, FileState>,
    /// Removed, and the removal not synced.
    removed: BTreeMap<String, FileState>,
    /// Most bytes of all files.
    room: Option<usize>,
    /// Open files of before a crash are of no use any more.
    crashes: u64,
    rng: ChaCha12Rng,
}

/// A disk; clones are the same disk.
#[derive(Clone, Debug)]
pub(super) struct SimulatedDisk(Arc<Mutex<State>>);

/// What a crash did to a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Damage {
    /// Files that lost unsynced bytes, all or some.
    pub(super) torn: u64,
    /// Files of which the rest was damaged.
    pub(super) garbled: u64,
    /// Files that vanished or came back.
    pub(super) names: u64,
}

impl SimulatedDisk {
    pub(super) fn new(rng: ChaCha12Rng) -> Self {
        let state = State { files: BTreeMap::new(), removed: BTreeMap::new(), room: None, crashes: 0, rng };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nothing panics while it holds the disk")
    }

    /// From now on there is room for so many more bytes; `None`: for any number.
    pub(super) fn set_room(&self, more: Option<usize>) {
        let mut state = self.state();
        let used: usize = state.files.values().map(FileState::len).sum();
        state.room = more.map(|more| used + more);
    }

    /// The process that uses the disk is killed, and the machine is not: what was written is there still, and as unsafe as
    /// before.
    pub(super) fn kill(&self) {
        self.state().crashes += 1;
    }

    /// The machine loses its power: what was not synced may be lost, all or some, or be damaged.
    pub(super) fn crash(&self) -> Damage {
        let mut damage = Damage::default();
        let State { files, removed, crashes, rng, .. } = &mut *self.state();
        *crashes += 1;
        for (name, file) in std::mem::take(removed) {
            if uniform(rng) < UNSYNCED_NAME_STAYS {
                damage.names += 1;
                files.entry(name).or_insert(file);
            }
        }
        files.retain(|_, file| {
            let stays = file.is_named || uniform(rng) < UNSYNCED_NAME_STAYS;
            damage.names += u64::from(!stays);
            stays
        });
        for file in files.values_mut() {
            let mut rest = std::mem::take(&mut file.unsynced);
            let left = (uniform(rng) * (rest.len() + 1) as f64) as usize;
            damage.torn += u64::from(left < rest.len());
            rest.truncate(left);
            if !rest.is_empty() && uniform(rng) < UNSYNCED_IS_DAMAGED {
                damage.garbled += 1;
                let from = (uniform(rng) * rest.len() as f64) as usize;
                rng.fill_bytes(&mut rest[from..]);
            }
            file.synced.append(&mut rest);
            file.is_named = true;
        }
        damage
    }
}

fn full() -> io::Error {
    io::Error::new(io::ErrorKind::StorageFull, "no space left on the simulated disk")
}

fn absent(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("there is no {name} on the simulated disk"))
}

impl Disk for SimulatedDisk {
    type File = SimulatedFile;

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.state().files.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<SimulatedFile> {
        let mut state = self.state();
        if state.files.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        state.files.insert(name.to_owned(), FileState::default());
        Ok(SimulatedFile { disk: self.clone(), name: name.to_owned(), crashes: state.crashes })
    }

    fn replace(&self, name: &str) -> io::Result<SimulatedFile> {
        let mut state = self.state();
        let crashes = state.crashes;
        let file = state.files.get_mut(name).ok_or_else(|| absent(name))?;
        (file.synced, file.unsynced) = (Vec::new(), Vec::new());
        Ok(SimulatedFile { disk: self.clone(), name: name.to_owned(), crashes })
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let state = self.state();
        let file = state.files.get(name).ok_or_else(|| absent(name))?;
        Ok([&file.synced[..], &file.unsynced].concat())
    }

    fn truncate(&self, name: &str, bytes: u64) -> io::Result<()> {
        let mut state = self.state();
        let file = state.files.get_mut(name).ok_or_else(|| absent(name))?;
        let mut unsynced = std::mem::take(&mut file.unsynced);
        file.synced.append(&mut unsynced);
        file.synced.truncate(usize::try_from(bytes).unwrap_or(usize::MAX));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        let file = state.files.remove(name).ok_or_else(|| absent(name))?;
        if file.is_named {
            state.removed.insert(name.to_owned(), file);
        }
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut state = self.state();
        state.removed.clear();
        state.files.values_mut().for_each(|file| file.is_named = true);
        Ok(())
    }
}

/// A file that is appended to.
#[derive(Debug)]
pub(super) struct SimulatedFile {
    disk: SimulatedDisk,
    name: String,
    crashes: u64,
}

impl SimulatedFile {
    fn with<T>(&self, work: impl FnOnce(&mut FileState, Option<usize>) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.disk.state();
        assert_eq!(state.crashes, self.crashes, "a process that is gone uses {}", self.name);
        let used: usize = state.files.values().map(FileState::len).sum();
        let room = state.room.map(|room| room.saturating_sub(used));
        let file = state.files.get_mut(&self.name).ok_or_else(|| absent(&self.name))?;
        work(file, room)
    }
}

impl DiskFile for SimulatedFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.with(|file, room| {
            let fits = room.map_or(bytes.len(), |room| room.min(bytes.len()));
            file.unsynced.extend_from_slice(&bytes[..fits]);
            if fits == bytes.len() { Ok(()) } else { Err(full()) }
        })
    }

    fn sync(&mut self) -> io::Result<()> {
        self.with(|file, _| {
            let mut unsynced = std::mem::take(&mut file.unsynced);
            file.synced.append(&mut unsynced);
            Ok(())
        })
    }
}

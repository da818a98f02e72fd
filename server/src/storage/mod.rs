//! What a server keeps on disk so that a crash loses nothing that was acknowledged.

mod beyond;
mod checkpoint;
mod commit;
mod disk;
mod journal;
mod state;
mod store;

pub use checkpoint::{CHECKPOINT_VERSION, CheckpointFileError, RestoredState, StateCheckpoint};
pub use commit::{ASYNC_SYNC_EVERY, Commit, JournalFailed};
pub use disk::{Directory, Disk, DiskFile};
pub use journal::{Journal, JournalError, Position, ReadJournal, RunId, SEGMENT_BYTES, VERSION, Writer};
pub use state::{Identity, Stamp, StateError, StateFolder};
pub use store::{CHECKPOINTS_FOLDER, CHECKPOINTS_KEPT, CheckpointStore, StoreError};

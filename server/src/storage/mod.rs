//! What a server keeps on disk so that a crash loses nothing that was acknowledged.

mod disk;
mod journal;

pub use disk::{Directory, Disk, DiskFile};
pub use journal::{Journal, JournalError, Position, ReadJournal, RunId, SEGMENT_BYTES, VERSION, Writer};

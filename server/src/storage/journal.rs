//! The journal: records in the order in which they were appended, in segments, never changed once they are synced.
//!
//! A segment is a file `journal-FIRST`, FIRST the position of its first record in twenty digits. All integers are
//! little-endian.
//!
//! | bytes | content |
//! | --- | --- |
//! | 8 | `sndrjrnl` |
//! | 4 | format version, 2 |
//! | 16 | the run's id |
//! | 8 | position of the first record |
//! | 4 | CRC-32 of the above |
//!
//! Records follow, the first of a run at position 0:
//!
//! | bytes | content |
//! | --- | --- |
//! | 4 | length of the body |
//! | 4 | CRC-32 of the record's position (8 bytes) and the body |
//! | length | the body |
//!
//! The position in the checksum keeps a record that a file system shows in the wrong place from being taken for another.
//! A crash may leave anything after the last record that was synced: reading ends at the first record that is not whole,
//! and what follows is cut off, which only the last segment may need, because a segment is synced before the next one
//! begins. Where whole records follow, it may be damage to what was synced, and is left to people. Writing goes on in a new
//! segment, so a file that was read is never appended to, and there is always one.

use std::io;
use std::sync::Arc;

use super::beyond;
use super::disk::{Disk, DiskFile};

const MAGIC: &[u8; 8] = b"sndrjrnl";

/// The version of the format.
pub const VERSION: u32 = 2;

const HEADER_BYTES: usize = 8 + 4 + 16 + 8 + 4;
pub(super) const RECORD_HEADER_BYTES: usize = 4 + 4;
const PREFIX: &str = "journal-";

/// A segment that has reached this size is followed by another.
pub const SEGMENT_BYTES: u64 = 64 << 20;

/// Names a run, so that the journal of another is not taken for its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RunId(pub [u8; 16]);

/// The number of a record: how many came before it.
pub type Position = u64;

/// Why a journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system refused.
    #[error("{name}: {source}")]
    Io {
        /// The segment.
        name: String,
        /// What it said.
        source: io::Error,
    },
    /// A file that is not a segment of this format.
    #[error("{name} is not a journal segment: {what}")]
    Foreign {
        /// The file.
        name: String,
        /// What is wrong.
        what: &'static str,
    },
    /// A segment of a newer release.
    #[error("{name} has journal format {found}; this release reads {VERSION}")]
    Newer {
        /// The segment.
        name: String,
        /// Its format.
        found: u32,
    },
    /// A segment of another run.
    #[error("{name} belongs to another run")]
    OtherRun {
        /// The segment.
        name: String,
    },
    /// Records that were synced are not there any more.
    #[error("records {from} to {to} are missing from the journal, before {name}")]
    Gap {
        /// The first missing one.
        from: Position,
        /// The first one that is there.
        to: Position,
        /// The segment of the latter.
        name: String,
    },
    /// The last segment is damaged before its end.
    #[error(
        "{name} is damaged at byte {offset}, and the whole record {position} follows at byte {beyond}, which may have been \
         acknowledged; restore the file from a copy or, to go on with the run as it was before the damage, move the file's \
         bytes from {offset} on to another place"
    )]
    Midway {
        /// The segment.
        name: String,
        /// Where reading ended.
        offset: u64,
        /// A record that follows,
        position: Position,
        /// and where.
        beyond: u64,
    },
    /// The journal ends before a checkpoint, which is only written of what the journal has synced.
    #[error(
        "the journal ends at record {ends}, before the checkpoint of record {checkpoint}, so that a part of it was lost; restore \
         it from a copy or, to go on from the checkpoint without what was acknowledged after it, move the files journal-* to \
         another place and make an empty one named {empty}"
    )]
    Short {
        /// The record that would be next.
        ends: Position,
        /// The checkpoint's.
        checkpoint: Position,
        /// The name of a segment that begins at the checkpoint.
        empty: String,
    },
    /// A segment that was synced as a whole is damaged.
    #[error("{name} is damaged at byte {offset}, and records follow in later segments")]
    Damaged {
        /// The segment.
        name: String,
        /// Where reading ended.
        offset: u64,
    },
}

fn at<T>(name: &str, result: io::Result<T>) -> Result<T, JournalError> {
    result.map_err(|source| JournalError::Io { name: name.to_owned(), source })
}

fn segment_name(first: Position) -> String {
    format!("{PREFIX}{first:020}")
}

fn first_of(name: &str) -> Option<Position> {
    let digits = name.strip_prefix(PREFIX)?;
    (digits.len() == 20).then(|| digits.parse().ok()).flatten()
}

/// Whether a file of this name is a segment.
pub(super) fn is_segment(name: &str) -> bool {
    first_of(name).is_some()
}

fn header(run: RunId, first: Position) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&run.0);
    header.extend_from_slice(&first.to_le_bytes());
    header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
    header
}

/// Appends one record's bytes.
///
/// # Panics
/// If the body has 4 GiB or more; frames are bounded far below.
pub(super) fn encode_record(position: Position, body: &[u8], out: &mut Vec<u8>) {
    let length = u32::try_from(body.len()).expect("a record is shorter than 4 GiB");
    out.reserve(RECORD_HEADER_BYTES + body.len());
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&checksum(position, body).to_le_bytes());
    out.extend_from_slice(body);
}

fn checksum(position: Position, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&position.to_le_bytes());
    hasher.update(body);
    hasher.finalize()
}

/// The whole records of a segment's bytes after its header.
struct Records<'a> {
    bytes: &'a [u8],
    offset: usize,
    position: Position,
}

impl<'a> Iterator for Records<'a> {
    type Item = &'a [u8];

    /// The next record's body, unless it is not whole.
    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = &self.bytes[self.offset..];
        let (head, rest) = rest.split_at_checked(RECORD_HEADER_BYTES)?;
        let (length, sum) = head.split_at(4);
        let length = u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
        let body = rest.get(..length)?;
        if checksum(self.position, body) != u32::from_le_bytes(sum.try_into().expect("four bytes")) {
            return None;
        }
        self.offset += RECORD_HEADER_BYTES + length;
        self.position += 1;
        Some(body)
    }
}

/// What reading a journal came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadJournal {
    /// The position after the last record.
    pub next: Position,
    /// Bytes at the end that were no whole record, and were cut off.
    pub torn_bytes: u64,
}

/// A journal on a disk.
#[derive(Debug)]
pub struct Journal<D: Disk> {
    disk: Arc<D>,
    run: RunId,
    segment_bytes: u64,
}

impl<D: Disk> Journal<D> {
    /// The journal of a run; segments are closed when they have reached `segment_bytes`, as a rule [`SEGMENT_BYTES`].
    pub fn new(disk: Arc<D>, run: RunId, segment_bytes: u64) -> Self {
        Self { disk, run, segment_bytes }
    }

    /// The first positions of the segments, ascending.
    fn segments(&self) -> Result<Vec<Position>, JournalError> {
        let names = at("the journal's folder", self.disk.names())?;
        let mut firsts: Vec<Position> = names.iter().filter_map(|name| first_of(name)).collect();
        firsts.sort_unstable();
        Ok(firsts)
    }

    /// Whether there is no segment, which a server leaves from its start on.
    ///
    /// # Errors
    /// [`JournalError::Io`].
    pub fn is_empty(&self) -> Result<bool, JournalError> {
        Ok(self.segments()?.is_empty())
    }

    /// Hands the records from `start` on to `take`, in order, and cuts off what a crash left behind the last one.
    ///
    /// # Errors
    /// A [`JournalError`], or what `take` returned.
    pub fn read<E: From<JournalError>>(
        &self,
        start: Position,
        mut take: impl FnMut(Position, &[u8]) -> Result<(), E>,
    ) -> Result<ReadJournal, E> {
        let segments = self.segments()?;
        // What a checkpoint covers need not be there any more, nor be read.
        let covered = segments.iter().take_while(|&&first| first <= start).count().saturating_sub(1);
        let mut state = ReadJournal { next: start, torn_bytes: 0 };
        let short = |ends| JournalError::Short { ends, checkpoint: start, empty: segment_name(start) };
        for (place, &first) in segments.iter().enumerate().skip(covered) {
            let name = segment_name(first);
            if first > state.next {
                return Err(JournalError::Gap { from: state.next, to: first, name }.into());
            }
            let bytes = at(&name, self.disk.read(&name))?;
            let is_last = place + 1 == segments.len();
            if is_last && bytes.len() < HEADER_BYTES {
                // A crash came before the header was synced; nothing can have been acknowledged of it. Writing replaces it.
                state.torn_bytes = bytes.len() as u64;
                if first < start {
                    return Err(short(first).into());
                }
                at(&name, self.disk.truncate(&name, 0))?;
                break;
            }
            self.check_header(&name, first, &bytes)?;
            let mut records = Records { bytes: &bytes, offset: HEADER_BYTES, position: first };
            // What a writer that had lost its journal to another added behind that one's back does not count.
            let end = segments.get(place + 1).copied().unwrap_or(Position::MAX);
            while records.position < end
                && let Some(body) = records.next()
            {
                let position = records.position - 1;
                if position >= start {
                    take(position, body)?;
                }
            }
            state.next = state.next.max(records.position);
            let offset = records.offset as u64;
            state.torn_bytes = bytes.len() as u64 - offset;
            if !is_last && records.position < end {
                return Err(JournalError::Damaged { name, offset }.into());
            }
            if !is_last {
                state.torn_bytes = 0;
            }
            if is_last && let Some(found) = beyond::find(&bytes[records.offset..], records.position) {
                let (position, beyond) = (found.position, offset + found.offset as u64);
                return Err(JournalError::Midway { name, offset, position, beyond }.into());
            }
            if is_last && records.position < start {
                return Err(short(records.position).into());
            }
            if is_last {
                // Also where nothing is torn: what a killed process had written and not synced was read all the same,
                // and may still be lost with the power. From now on it is built on.
                at(&name, self.disk.truncate(&name, offset))?;
            }
        }
        Ok(state)
    }

    fn check_header(&self, name: &str, first: Position, bytes: &[u8]) -> Result<(), JournalError> {
        let foreign = |what| JournalError::Foreign { name: name.to_owned(), what };
        let found = bytes.get(..HEADER_BYTES).ok_or_else(|| foreign("it is too short"))?;
        if found[..8] != MAGIC[..] {
            return Err(foreign("it begins otherwise"));
        }
        let version = u32::from_le_bytes(found[8..12].try_into().expect("four bytes"));
        if version != VERSION {
            return Err(JournalError::Newer { name: name.to_owned(), found: version });
        }
        let expected = header(self.run, first);
        if found == expected {
            return Ok(());
        }
        if found[12..28] == expected[12..28] {
            return Err(foreign("its header is damaged"));
        }
        Err(JournalError::OtherRun { name: name.to_owned() })
    }

    /// Begins to write at `next`, in a segment of its own, which is synced before this returns.
    ///
    /// # Errors
    /// A [`JournalError`].
    pub fn write_from(&self, next: Position) -> Result<Writer<D>, JournalError> {
        let disk = self.disk.clone();
        let name = segment_name(next);
        let (run, segment_bytes) = (self.run, self.segment_bytes);
        // One of that name has no record: a server that did nothing left it, or a crash before its header was synced.
        let is_there = self.segments()?.last() == Some(&next);
        let file = at(&name, if is_there { disk.replace(&name) } else { disk.create(&name) })?;
        let (file, written_bytes) = begin_segment(&*disk, file, run, next)?;
        Ok(Writer { disk, run, segment_bytes, file, name, next, written_bytes })
    }

    /// Removes the segments of which every record comes before `position`: a checkpoint covers them.
    ///
    /// # Errors
    /// A [`JournalError`]; some may have been removed then.
    pub fn remove_before(&self, position: Position) -> Result<(), JournalError> {
        let segments = self.segments()?;
        let covered = segments.windows(2).filter(|pair| pair[1] <= position);
        let mut is_any = false;
        for pair in covered {
            let name = segment_name(pair[0]);
            at(&name, self.disk.remove(&name))?;
            is_any = true;
        }
        if is_any { at("the journal's folder", self.disk.sync_names()) } else { Ok(()) }
    }
}

fn begin_segment<D: Disk>(
    disk: &D,
    mut file: D::File,
    run: RunId,
    first: Position,
) -> Result<(D::File, u64), JournalError> {
    let name = segment_name(first);
    let header = header(run, first);
    at(&name, file.append(&header).and_then(|()| file.sync()).and_then(|()| disk.sync_names()))?;
    Ok((file, header.len() as u64))
}

/// Appends to a journal.
#[derive(Debug)]
pub struct Writer<D: Disk> {
    disk: Arc<D>,
    run: RunId,
    segment_bytes: u64,
    file: D::File,
    name: String,
    next: Position,
    written_bytes: u64,
}

impl<D: Disk> Writer<D> {
    /// The position of the next record.
    pub fn next(&self) -> Position {
        self.next
    }

    /// Appends `count` records that [`encode_record`] has put into `bytes`, the first at [`next`](Self::next). They are
    /// durable after [`sync`](Self::sync).
    ///
    /// # Errors
    /// A [`JournalError`]. Nothing more can be appended then: some of the bytes may be there.
    pub(super) fn append_encoded(&mut self, bytes: &[u8], count: u64) -> Result<(), JournalError> {
        if self.written_bytes >= self.segment_bytes {
            self.sync()?;
            self.name = segment_name(self.next);
            let file = at(&self.name, self.disk.create(&self.name))?;
            (self.file, self.written_bytes) = begin_segment(&*self.disk, file, self.run, self.next)?;
        }
        at(&self.name, self.file.append(bytes))?;
        self.written_bytes += bytes.len() as u64;
        self.next += count;
        Ok(())
    }

    /// Appends a record and returns its position. It is durable after [`sync`](Self::sync).
    ///
    /// # Errors
    /// A [`JournalError`]. Nothing more can be appended then: some of the bytes may be there.
    pub fn append(&mut self, body: &[u8]) -> Result<Position, JournalError> {
        let mut bytes = Vec::new();
        encode_record(self.next, body, &mut bytes);
        self.append_encoded(&bytes, 1)?;
        Ok(self.next - 1)
    }

    /// Makes everything that was appended durable.
    ///
    /// # Errors
    /// A [`JournalError`]; what was appended since the last call may be lost then, and nothing more can be appended.
    pub fn sync(&mut self) -> Result<(), JournalError> {
        at(&self.name, self.file.sync())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::super::disk::Directory;
    use super::*;

    const RUN: RunId = RunId([7; 16]);

    fn journal(folder: &tempfile::TempDir, segment_bytes: u64) -> Journal<Directory> {
        Journal::new(Arc::new(Directory::new(folder.path())), RUN, segment_bytes)
    }

    fn read(journal: &Journal<Directory>, start: Position) -> (Vec<(Position, Vec<u8>)>, ReadJournal) {
        let mut records = Vec::new();
        let read = journal.read::<JournalError>(start, |position, body| {
            records.push((position, body.to_vec()));
            Ok(())
        });
        (records, read.unwrap())
    }

    fn body(number: u64) -> Vec<u8> {
        vec![number as u8; (number as usize * 37) % 101]
    }

    fn write(journal: &Journal<Directory>, range: std::ops::Range<u64>) {
        let mut writer = journal.write_from(range.start).unwrap();
        for number in range {
            assert_eq!(writer.append(&body(number)).unwrap(), number);
        }
        writer.sync().unwrap();
    }

    #[test]
    fn what_is_written_is_read_from_any_position_over_any_segments() {
        let folder = tempfile::tempdir().unwrap();
        let journal = journal(&folder, 300);
        assert_eq!(read(&journal, 0), (vec![], ReadJournal { next: 0, torn_bytes: 0 }));
        write(&journal, 0..20);
        write(&journal, 20..20);
        write(&journal, 20..33);
        let all: Vec<_> = (0..33).map(|number| (number, body(number))).collect();
        assert!(fs::read_dir(folder.path()).unwrap().count() > 5);
        for start in [0, 1, 19, 20, 32, 33] {
            let (records, state) = read(&journal, start);
            assert_eq!(records, all[start as usize..]);
            assert_eq!(state, ReadJournal { next: 33, torn_bytes: 0 });
        }
        journal.remove_before(25).unwrap();
        assert_eq!(read(&journal, 25).0, all[25..]);
        let gap = journal.read::<JournalError>(0, |_, _| Ok(())).unwrap_err();
        assert!(matches!(gap, JournalError::Gap { from: 0, .. }), "{gap}");
    }

    /// However much of the last write is there, what came before it is read, and writing goes on behind it.
    #[test]
    fn a_torn_end_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let journal = journal(&folder, SEGMENT_BYTES);
        write(&journal, 0..5);
        let path = folder.path().join(segment_name(0));
        let whole = fs::read(&path).unwrap();
        let ends: Vec<usize> = (0..=5)
            .map(|count| {
                HEADER_BYTES + (0..count).map(|n| RECORD_HEADER_BYTES + body(n).len()).sum::<usize>()
            })
            .collect();
        for kept in 0..=whole.len() {
            fs::write(&path, &whole[..kept]).unwrap();
            let count = ends.iter().filter(|&&end| end <= kept).count().saturating_sub(1) as u64;
            let (records, state) = read(&journal, 0);
            assert_eq!((records.len() as u64, state.next), (count, count), "{kept} bytes");
            // A second reading finds nothing to cut.
            assert_eq!(read(&journal, 0).1, ReadJournal { next: count, torn_bytes: 0 });
            write(&journal, count..count + 2);
            let again: Vec<u64> = read(&journal, 0).0.iter().map(|(position, _)| *position).collect();
            assert_eq!(again, (0..count + 2).collect::<Vec<_>>());
            if count > 0 {
                fs::remove_file(folder.path().join(segment_name(count))).unwrap();
            }
        }
    }

    #[test]
    fn damage_before_the_end_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let journal = journal(&folder, 100);
        write(&journal, 0..9);
        let path = folder.path().join(segment_name(0));
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        let error = journal.read::<JournalError>(0, |_, _| Ok(())).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { .. }), "{error}");
    }

    /// Nothing is cut off then, whatever the damage hides.
    #[test]
    fn damage_with_whole_records_behind_it_is_an_error_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let journal = journal(&folder, SEGMENT_BYTES);
        write(&journal, 1..9);
        let path = folder.path().join(segment_name(1));
        let whole = fs::read(&path).unwrap();
        let begins = |record: u64| {
            HEADER_BYTES + (1..record).map(|n| RECORD_HEADER_BYTES + body(n).len()).sum::<usize>()
        };
        // A record's body, its checksum, its length, and all of two.
        let damages =
            [(begins(4) + 20, 1), (begins(4) + 5, 1), (begins(4) + 1, 1), (begins(4), begins(6) - begins(4))];
        for (from, count) in damages {
            let mut bytes = whole.clone();
            bytes[from..from + count].iter_mut().for_each(|byte| *byte ^= 0x55);
            fs::write(&path, &bytes).unwrap();
            let error = journal.read::<JournalError>(1, |_, _| Ok(())).unwrap_err();
            let JournalError::Midway { offset, position, beyond, .. } = error else { panic!("{error}") };
            let next = if count == 1 { 5 } else { 6 };
            assert_eq!((offset as usize, position, beyond as usize), (begins(4), next, begins(next)));
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
        // What the sentence advises works.
        fs::write(&path, &whole[..begins(4)]).unwrap();
        assert_eq!(read(&journal, 1).1, ReadJournal { next: 4, torn_bytes: 0 });
    }

    /// A checkpoint is written of what is synced, so what is missing before it was lost since.
    #[test]
    fn a_journal_that_ends_before_the_checkpoint_is_an_error_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let journal = journal(&folder, SEGMENT_BYTES);
        write(&journal, 0..6);
        assert_eq!(read(&journal, 6).1, ReadJournal { next: 6, torn_bytes: 0 });
        let path = folder.path().join(segment_name(0));
        let whole = fs::read(&path).unwrap();
        for length in [whole.len() - 3, HEADER_BYTES, HEADER_BYTES - 1, 0] {
            fs::write(&path, &whole[..length]).unwrap();
            let error = journal.read::<JournalError>(6, |_, _| Ok(())).unwrap_err();
            let JournalError::Short { ends, checkpoint: 6, empty } = &error else { panic!("{error}") };
            assert_eq!(
                (*ends, empty.as_str()),
                (if length > HEADER_BYTES { 5 } else { 0 }, &*segment_name(6))
            );
            assert_eq!(fs::read(&path).unwrap().len(), length);
        }
        // What the sentence advises works.
        fs::remove_file(&path).unwrap();
        fs::write(folder.path().join(segment_name(6)), b"").unwrap();
        assert_eq!(read(&journal, 6).1, ReadJournal { next: 6, torn_bytes: 0 });
    }

    #[test]
    fn other_runs_and_formats_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let ours = journal(&folder, SEGMENT_BYTES);
        write(&ours, 0..2);
        let other = Journal::new(Arc::new(Directory::new(folder.path())), RunId([8; 16]), SEGMENT_BYTES);
        let error = other.read::<JournalError>(0, |_, _| Ok(())).unwrap_err();
        assert!(matches!(error, JournalError::OtherRun { .. }), "{error}");
        let path = folder.path().join(segment_name(0));
        let whole = fs::read(&path).unwrap();
        let with = |place: usize, byte: u8| {
            let mut bytes = whole.clone();
            bytes[place] = byte;
            fs::write(&path, bytes).unwrap();
            ours.read::<JournalError>(0, |_, _| Ok(())).unwrap_err()
        };
        for other in [VERSION - 1, VERSION + 1] {
            let error = with(8, other as u8);
            assert!(matches!(error, JournalError::Newer { found, .. } if found == other), "{error}");
        }
        assert!(matches!(with(0, b'x'), JournalError::Foreign { .. }));
        assert!(matches!(with(HEADER_BYTES - 1, whole[HEADER_BYTES - 1] ^ 1), JournalError::Foreign { .. }));
    }

    proptest! {
        /// Whatever a segment holds, reading it is an error or records, and the second reading finds the same.
        #[test]
        fn any_bytes_can_be_read(
            noise in prop::collection::vec(any::<u8>(), 0..200),
            at in 0_usize..400,
            kept in 0_usize..400,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let journal = journal(&folder, SEGMENT_BYTES);
            write(&journal, 0..5);
            let path = folder.path().join(segment_name(0));
            let mut bytes = fs::read(&path).unwrap();
            bytes.truncate(kept);
            let at = at.min(bytes.len());
            bytes.splice(at..at, noise);
            fs::write(&path, bytes).unwrap();
            let mut count = 0;
            let result = journal.read::<JournalError>(0, |_, _| { count += 1; Ok(()) });
            if let Ok(state) = result {
                prop_assert_eq!(state.next, count);
                prop_assert_eq!(read(&journal, 0).1, ReadJournal { next: count, torn_bytes: 0 });
            }
        }
    }
}

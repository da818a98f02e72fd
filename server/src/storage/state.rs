//! The folder from which a server that was killed goes on with its run.
//!
//! | name | content |
//! | --- | --- |
//! | `lock` | locked by the server that uses the folder |
//! | `identity.json` | format version, the run's id, token, certificate and key, address, results, hash of the initial model |
//! | `run.toml` | the run, resolved |
//! | `journal-…` | the decisions: [`super::Journal`], whose records are [`Stamp`] and [`Record`](crate::core::Record) |
//! | `checkpoints/state-…` | the state at a position of the journal: [`super::StateCheckpoint`], unless they go elsewhere |
//!
//! The model, the workers' replicas and the sessions are the fold over the journal, from the initial model on, which is
//! made again of what the run names; or from the last checkpoint on. What comes before the last checkpoint but one is
//! removed.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use sanderling_common::config::{RunConfig, STATE_RUN_FILE};
use sanderling_common::folder_lock::{FolderLock, FolderLockError};

use super::journal::{self, Position, RunId};
use super::store;

/// The version of the folder's format.
const FORMAT: u32 = 1;

const IDENTITY_FILE: &str = "identity.json";

/// Why a state folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file system refused.
    #[error("cannot use {path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Another server uses it, or it cannot be used at all.
    #[error(transparent)]
    Lock(#[from] FolderLockError),
    /// Its identity cannot be read.
    #[error("{path} is not the identity of a run: {source}")]
    Identity {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A folder of a newer release.
    #[error("the state folder {path} has format {found}; this release reads {FORMAT}")]
    Newer {
        /// The folder.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// What tells whose the decisions in it are is gone.
    #[error(
        "the state folder {0} has a journal or checkpoints and no identity.json, without which nobody can go on with the run; \
         restore that file, or name another folder"
    )]
    NoIdentity(PathBuf),
    /// The journal is gone.
    #[error(
        "the state folder {path} has a checkpoint of record {position} and no journal, which every server leaves; restore the \
         missing files, or name another folder"
    )]
    NoJournal {
        /// The folder.
        path: PathBuf,
        /// Decisions that the last checkpoint covers.
        position: Position,
    },
    /// Decisions that were kept would be forgotten.
    #[error(
        "the state folder {0} keeps a run, and with durability = none that would begin anew; leave the setting out to go on \
         with the run, or name another folder"
    )]
    Kept(PathBuf),
    /// The folder's run is another.
    #[error(
        "the state folder {path} belongs to a run with {key} = {found}, not {wanted}; name another folder, or leave the \
         setting out to go on with that run"
    )]
    OtherRun {
        /// The folder.
        path: PathBuf,
        /// The setting in which they differ.
        key: String,
        /// Its value in the folder.
        found: String,
        /// The value asked for.
        wanted: String,
    },
    /// The initial model cannot be made again.
    #[error(
        "the initial model of the run in {0} cannot be made again: the checkpoint that it starts from, or this program, has \
         changed"
    )]
    OtherInitial(PathBuf),
}

/// What makes a server that is started again the same to its workers.
#[derive(Clone, serde::Serialize, serde::Deserialize)]
pub struct Identity {
    format: u32,
    /// The run.
    pub run: RunId,
    /// What admits workers.
    pub token: String,
    /// The certificate that they know it by, DER.
    pub certificate: Vec<u8>,
    /// Its key, PKCS #8.
    pub key: Vec<u8>,
    /// The address listened on.
    pub address: SocketAddr,
    /// The folder of results.
    pub results: PathBuf,
    /// `parameters_hash` of the initial model.
    pub initial_sha256: [u8; 32],
}

impl Identity {
    /// That of a new run.
    pub fn new(
        run: RunId,
        token: String,
        (certificate, key): (Vec<u8>, Vec<u8>),
        (address, results): (SocketAddr, PathBuf),
        initial_sha256: [u8; 32],
    ) -> Self {
        Self { format: FORMAT, run, token, certificate, key, address, results, initial_sha256 }
    }
}

/// Without the token and the key.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut identity = f.debug_struct("Identity");
        identity.field("format", &self.format).field("run", &self.run).field("address", &self.address);
        identity.field("results", &self.results).finish_non_exhaustive()
    }
}

/// A state folder, locked.
#[derive(Debug)]
pub struct StateFolder {
    path: PathBuf,
    _lock: FolderLock,
}

impl StateFolder {
    /// Makes the folder if it is not there, and locks it.
    ///
    /// # Errors
    /// [`StateError::Lock`].
    pub fn open(path: &Path) -> Result<Self, StateError> {
        Ok(Self { path: path.to_owned(), _lock: FolderLock::take(path)? })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it holds any decision: a segment of a journal, or a checkpoint.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn holds_decisions(&self) -> Result<bool, StateError> {
        let any = |folder: &Path, is_one: fn(&str) -> bool| match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(StateError::Io { path: folder.to_owned(), source }),
            Ok(entries) => Ok(entries.flatten().any(|entry| is_one(&entry.file_name().to_string_lossy()))),
        };
        let checkpoints = self.path.join(store::CHECKPOINTS_FOLDER);
        Ok(any(&self.path, journal::is_segment)? || any(&checkpoints, store::is_checkpoint)?)
    }

    /// The identity of the run in it; `None` if there is no run yet.
    ///
    /// # Errors
    /// [`StateError::Io`], [`StateError::Identity`], [`StateError::Newer`] or [`StateError::NoIdentity`].
    pub fn identity(&self) -> Result<Option<Identity>, StateError> {
        #[derive(serde::Deserialize)]
        struct Format {
            format: u32,
        }
        let path = self.path.join(IDENTITY_FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return match self.holds_decisions()? {
                    true => Err(StateError::NoIdentity(self.path.clone())),
                    false => Ok(None),
                };
            }
            Err(source) => return Err(StateError::Io { path, source }),
        };
        let malformed = |source| StateError::Identity { path: path.clone(), source };
        let Format { format } = serde_json::from_slice(&bytes).map_err(malformed)?;
        if format != FORMAT {
            return Err(StateError::Newer { path: self.path.clone(), found: format });
        }
        serde_json::from_slice(&bytes).map(Some).map_err(malformed)
    }

    /// Checks that the run in the folder is this one, but for what may differ from one start to the next.
    ///
    /// # Errors
    /// [`StateError::OtherRun`], or [`StateError::Io`] if its run file cannot be read.
    pub fn check_run(&self, run: &RunConfig) -> Result<(), StateError> {
        let path = self.path.join(STATE_RUN_FILE);
        let text = fs::read_to_string(&path).map_err(at(&path))?;
        let there = sanderling_common::config::parse(&text).and_then(|there| there.resolve());
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let there = there.map_err(|error| StateError::Io { path, source: invalid(error) })?;
        match there.difference(run) {
            None => Ok(()),
            Some((key, found, wanted)) => {
                Err(StateError::OtherRun { path: self.path.clone(), key, found, wanted })
            }
        }
    }

    /// Writes run and identity, durably: from now on there is a run here. The identity comes last, so that a crash before
    /// it leaves no run.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn begin(&self, run: &RunConfig, identity: &Identity) -> Result<(), StateError> {
        let mut resolved = run.clone();
        resolved.make_paths_absolute();
        self.write(STATE_RUN_FILE, resolved.to_toml().as_bytes())?;
        self.keep(identity)
    }

    /// Writes the identity, durably, in the place of the one that is there.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn keep(&self, identity: &Identity) -> Result<(), StateError> {
        let json = serde_json::to_vec_pretty(identity).expect("an identity has a JSON form");
        self.write(IDENTITY_FILE, &json)
    }

    /// Only the owner may read what is in it: the key and the token are.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let path = self.path.join(name);
        let temporary = self.path.join(format!("{name}.new"));
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let written = options.open(&temporary).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            if cfg!(unix) { File::open(&self.path)?.sync_all() } else { Ok(()) }
        });
        written.map_err(at(&path))
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> StateError + '_ {
    |source| StateError::Io { path: path.to_owned(), source }
}

/// What is known when a record is written that the core, which has no clock, does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Stamp {
    /// Seconds that servers have served the run.
    pub seconds: f64,
    /// UDP payload bytes from workers.
    pub bytes_up: u64,
    /// To workers.
    pub bytes_down: u64,
}

impl Stamp {
    /// Its length, in bytes.
    pub const BYTES: usize = 24;

    /// Appends its bytes: seconds as a float64, then both counts, little-endian.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.seconds.to_le_bytes());
        out.extend_from_slice(&self.bytes_up.to_le_bytes());
        out.extend_from_slice(&self.bytes_down.to_le_bytes());
    }

    /// A stamp and what follows it; `None` if there are too few bytes.
    pub fn split(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (stamp, rest) = bytes.split_at_checked(Self::BYTES)?;
        let word = |place: usize| stamp[8 * place..8 * place + 8].try_into().expect("eight bytes");
        let (bytes_up, bytes_down) = (u64::from_le_bytes(word(1)), u64::from_le_bytes(word(2)));
        Some((Self { seconds: f64::from_le_bytes(word(0)), bytes_up, bytes_down }, rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let address = "127.0.0.1:4433".parse().unwrap();
        let secrets = (vec![1, 2], vec![3]);
        Identity::new(RunId([5; 16]), "token".to_owned(), secrets, (address, "runs/a".into()), [6; 32])
    }

    #[test]
    fn a_folder_serves_one_server_and_one_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/state");
        let state = StateFolder::open(&path).unwrap();
        assert!(matches!(StateFolder::open(&path), Err(StateError::Lock(FolderLockError::Locked(_)))));
        assert!(state.identity().unwrap().is_none());
        let run = RunConfig::default();
        state.begin(&run, &identity()).unwrap();
        drop(state);

        let state = StateFolder::open(&path).unwrap();
        assert_eq!(state.identity().unwrap().unwrap().initial_sha256, [6; 32]);
        state.check_run(&run).unwrap();
        let mut elsewhere = run.clone();
        (elsewhere.server.listen, elsewhere.server.shards) = ("0.0.0.0:1".to_owned(), 3);
        state.check_run(&elsewhere).unwrap();
        let mut other = run;
        other.training.momentum = 0.5;
        let error = state.check_run(&other).unwrap_err().to_string();
        assert!(error.contains("momentum = ") && error.contains("0.5"), "{error}");

        let newer =
            fs::read_to_string(path.join(IDENTITY_FILE)).unwrap().replace("\"format\": 1", "\"format\": 2");
        fs::write(path.join(IDENTITY_FILE), newer).unwrap();
        assert!(matches!(state.identity(), Err(StateError::Newer { found: 2, .. })));
        fs::write(path.join(IDENTITY_FILE), "{").unwrap();
        assert!(matches!(state.identity(), Err(StateError::Identity { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn secrets_are_for_their_owner() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::open(folder.path()).unwrap();
        state.begin(&RunConfig::default(), &identity()).unwrap();
        let mode = fs::metadata(folder.path().join(IDENTITY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn an_identity_does_not_show_its_secrets() {
        let mut identity = identity();
        (identity.token, identity.key) = ("a-secret-token".to_owned(), vec![253]);
        let shown = format!("{identity:?}");
        assert!(!shown.contains("secret") && !shown.contains("253") && shown.contains("4433"), "{shown}");
    }

    #[test]
    fn a_stamp_comes_back() {
        let stamp = Stamp { seconds: 1.5, bytes_up: 7, bytes_down: u64::MAX };
        let mut bytes = Vec::new();
        stamp.encode(&mut bytes);
        bytes.extend_from_slice(b"rest");
        assert_eq!(Stamp::split(&bytes), Some((stamp, &b"rest"[..])));
        assert_eq!(Stamp::split(&bytes[..Stamp::BYTES - 1]), None);
    }
}

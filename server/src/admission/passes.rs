//! The file of who may take part, which the server reads again whenever it changes.
//!
//! TOML: the names of client certificates that were revoked, and a table of tokens by name, each by its SHA-256 alone, so
//! that whoever reads the file can join nothing.
//!
//! ```toml
//! revoked_certificates = ["node-7"]
//!
//! [tokens]
//! node-1 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sanderling_common::join::{Token, hex};
use sha2::{Digest, Sha256};

use super::Name;

/// The largest file read, in bytes: some thousand workers.
pub const PASSES_BYTES_MAX: u64 = 1 << 20;

const HEADER: &str = "\
# Who may take part in a Sanderling run; a server that has this file as its tokens_file reads it again whenever it changes.
# Written by `sanderling-server token` and `sanderling-server cert revoke`. Tokens are here by their SHA-256 only.

";

/// Why a tokens file cannot be used or changed.
#[derive(Debug, thiserror::Error)]
pub enum PassesError {
    /// The file system refused.
    #[error("cannot use the tokens file {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// There is none.
    #[error(
        "there is no tokens file {0}; `sanderling-server token add --file {0} --name NAME` makes one, with a token in it"
    )]
    Missing(PathBuf),
    /// It cannot stay its owner's.
    #[error(
        "the tokens file {path} cannot be changed and stay its owner's, whose server would not read it any more ({source}); \
         do it as the user that it belongs to"
    )]
    Owner {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// More than any tokens file has.
    #[error("the tokens file {0} has more than {PASSES_BYTES_MAX} bytes")]
    TooLarge(PathBuf),
    /// Its content makes no sense.
    #[error("the tokens file {path}, {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The place and what is wrong.
        what: String,
    },
    /// Two names for one token: revoking one of them would revoke nothing.
    #[error("the tokens file {path} has the same token for {first} and {second}")]
    Shared {
        /// The file.
        path: PathBuf,
        /// One of them.
        first: Name,
        /// The other.
        second: Name,
    },
    /// The name has a token already.
    #[error("{0} has a token already; revoke it first, or take another name")]
    Taken(Name),
    /// The name has none.
    #[error("there is no token of {name} in {path}; `sanderling-server token list` names those there are")]
    Unknown {
        /// The file.
        path: PathBuf,
        /// The name.
        name: Name,
    },
}

/// The SHA-256 of a token. Tokens are drawn at random, 128 bits each, so that it cannot be guessed from this.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TokenDigest([u8; 32]);

impl TokenDigest {
    /// That of a token.
    pub fn of(token: &str) -> Self {
        Self(Sha256::digest(token.as_bytes()).into())
    }
}

impl TryFrom<String> for TokenDigest {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut digest = [0; 32];
        let digits = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap_or(""));
        for (byte, digits) in digest.iter_mut().zip(digits) {
            *byte =
                u8::from_str_radix(digits, 16).map_err(|_| "a token's SHA-256 has 64 hexadecimal digits")?;
        }
        // Digits in one form only: the sign that from_str_radix takes, upper case and other lengths are none.
        if hex(&digest) == text {
            Ok(Self(digest))
        } else {
            Err("a token's SHA-256 has 64 hexadecimal digits")
        }
    }
}

impl From<TokenDigest> for String {
    fn from(digest: TokenDigest) -> Self {
        hex(&digest.0)
    }
}

/// Who may take part: the content of a tokens file.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Passes {
    revoked_certificates: BTreeSet<Name>,
    tokens: BTreeMap<Name, TokenDigest>,
}

impl Passes {
    /// Reads a file.
    ///
    /// # Errors
    /// A [`PassesError`] that names it.
    pub fn read(path: &Path) -> Result<Self, PassesError> {
        Self::parse(&read_text(path)?, path)
    }

    /// Reads the text of the file at `path`.
    ///
    /// # Errors
    /// [`PassesError::Malformed`] or [`PassesError::Shared`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, PassesError> {
        let malformed = |error: toml::de::Error| {
            let line = error
                .span()
                .and_then(|span| text.get(..span.start))
                .map(|before| before.matches('\n').count() + 1);
            let what = error.message().lines().collect::<Vec<_>>().join(", ");
            let what = line.map_or(what.clone(), |line| format!("line {line}: {what}"));
            PassesError::Malformed { path: path.to_owned(), what }
        };
        let passes: Self = toml::from_str(text).map_err(malformed)?;
        let mut owners = HashMap::new();
        for (name, digest) in &passes.tokens {
            if let Some(first) = owners.insert(*digest, name) {
                let (first, second) = (first.clone(), name.clone());
                return Err(PassesError::Shared { path: path.to_owned(), first, second });
            }
        }
        Ok(passes)
    }

    /// Changes the file, which need not be there, alone: another program that changes it waits. Whoever reads it sees it
    /// as it was or as it becomes, which is durable when this returns. Owner and mode stay; comments do not.
    ///
    /// # Errors
    /// A [`PassesError`]; the file is as it was then.
    pub fn edit<T>(
        path: &Path,
        change: impl FnOnce(&mut Self) -> Result<T, PassesError>,
    ) -> Result<T, PassesError> {
        let failed = |source| PassesError::Io { path: path.to_owned(), source };
        // A file of its own, because the other is replaced.
        let lock = lock_file(&named_after(path, ".lock")).map_err(failed)?;
        lock.lock().map_err(failed)?;
        let mut passes = match Self::read(path) {
            Err(PassesError::Missing(_)) => Self::default(),
            read => read?,
        };
        let changed = change(&mut passes)?;
        write(path, passes.to_toml().as_bytes())?;
        Ok(changed)
    }

    /// [`edit`](Self::edit) of a file that must be there.
    ///
    /// # Errors
    /// A [`PassesError`]; the file is as it was then, and where there is none nothing else is left either.
    pub fn edit_existing<T>(
        path: &Path,
        change: impl FnOnce(&mut Self) -> Result<T, PassesError>,
    ) -> Result<T, PassesError> {
        match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(PassesError::Missing(path.to_owned()))
            }
            _ => Self::edit(path, change),
        }
    }

    /// The text of a file that says so.
    pub fn to_toml(&self) -> String {
        format!("{HEADER}{}", toml::to_string(self).expect("passes have a TOML form"))
    }

    /// Lets whoever has this token take part.
    ///
    /// # Errors
    /// [`PassesError::Taken`].
    pub fn add(&mut self, name: &Name, token: &Token) -> Result<(), PassesError> {
        if self.tokens.contains_key(name) {
            return Err(PassesError::Taken(name.clone()));
        }
        self.tokens.insert(name.clone(), TokenDigest::of(token.reveal()));
        Ok(())
    }

    /// Takes a token away; `path` is for the error.
    ///
    /// # Errors
    /// [`PassesError::Unknown`].
    pub fn revoke(&mut self, name: &Name, path: &Path) -> Result<(), PassesError> {
        match self.tokens.remove(name) {
            Some(_) => Ok(()),
            None => Err(PassesError::Unknown { path: path.to_owned(), name: name.clone() }),
        }
    }

    /// Refuses whoever has a certificate of this name from now on; returns whether that is new.
    pub fn revoke_certificate(&mut self, name: &Name) -> bool {
        self.revoked_certificates.insert(name.clone())
    }

    /// Whose token it is.
    pub fn holder(&self, token: &str) -> Option<(&Name, TokenDigest)> {
        let shown = TokenDigest::of(token);
        self.tokens.iter().find(|(_, digest)| **digest == shown).map(|(name, digest)| (name, *digest))
    }

    /// Whether the name has this token.
    pub fn has(&self, name: &Name, digest: TokenDigest) -> bool {
        self.tokens.get(name) == Some(&digest)
    }

    /// The first of a certificate's names that was revoked.
    pub fn revoked<'a>(&self, names: &'a [String]) -> Option<&'a str> {
        names.iter().map(String::as_str).find(|name| self.revoked_certificates.contains(*name))
    }

    /// The names that have tokens.
    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.tokens.keys()
    }

    /// The names of certificates that were revoked.
    pub fn revoked_certificates(&self) -> impl Iterator<Item = &Name> {
        self.revoked_certificates.iter()
    }
}

/// The text of a tokens file.
pub(crate) fn read_text(path: &Path) -> Result<String, PassesError> {
    let failed = |source| PassesError::Io { path: path.to_owned(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => PassesError::Missing(path.to_owned()),
        _ => failed(source),
    })?;
    file.take(PASSES_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > PASSES_BYTES_MAX { Err(PassesError::TooLarge(path.to_owned())) } else { Ok(text) }
}

fn named_after(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// A file that is there only to be locked, which whoever may read it can.
fn lock_file(path: &Path) -> io::Result<File> {
    match OpenOptions::new().create(true).truncate(false).write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => File::open(path),
        opened => opened,
    }
}

/// Under another name first, and renamed, so that nobody reads half of it.
fn write(path: &Path, bytes: &[u8]) -> Result<(), PassesError> {
    let failed = |source| PassesError::Io { path: path.to_owned(), source };
    let temporary = named_after(path, ".new");
    let written = write_beside(path, &temporary, bytes).and_then(|()| {
        fs::rename(&temporary, path).map_err(failed)?;
        // What was revoked stays so when the power goes.
        sync_folder(path).map_err(failed)
    });
    written.inspect_err(|_| {
        // It may be gone already, or never have been there.
        let _ = fs::remove_file(&temporary);
    })
}

fn write_beside(path: &Path, temporary: &Path, bytes: &[u8]) -> Result<(), PassesError> {
    let failed = |source| PassesError::Io { path: path.to_owned(), source };
    let replaced = match fs::metadata(path) {
        Ok(replaced) => Some(replaced),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(failed(source)),
    };
    // One that a crash has left would keep its owner and mode.
    match fs::remove_file(temporary) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(failed(source)),
        _ => {}
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(temporary).map_err(failed)?;
    if let Some(replaced) = &replaced {
        let kept = keep_owner_and_mode(&file, replaced);
        kept.map_err(|source| PassesError::Owner { path: path.to_owned(), source })?;
    }
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)
}

/// Whoever could read the file that is replaced can read the one in its place: a server seldom runs as the user that
/// revokes.
#[cfg(unix)]
fn keep_owner_and_mode(file: &File, replaced: &Metadata) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, fchown};
    let ours = file.metadata()?;
    let changed = |theirs: u32, ours: u32| (theirs != ours).then_some(theirs);
    let (owner, group) = (changed(replaced.uid(), ours.uid()), changed(replaced.gid(), ours.gid()));
    if owner.is_some() || group.is_some() {
        fchown(file, owner, group)?;
    }
    file.set_permissions(replaced.permissions())
}

#[cfg(not(unix))]
fn keep_owner_and_mode(_file: &File, _replaced: &Metadata) -> io::Result<()> {
    Ok(())
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Elsewhere directories cannot be opened, and names need no syncing.
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn token(text: &str) -> Token {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_written_is_read_and_holds_no_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.toml");
        let (one, two) = (token("the-first-token"), token("the-second-token"));
        Passes::edit(&path, |passes| passes.add(&name("node-1"), &one)).unwrap();
        Passes::edit(&path, |passes| passes.add(&name("node-2.b"), &two)).unwrap();
        assert!(Passes::edit(&path, |passes| Ok(passes.revoke_certificate(&name("node-3")))).unwrap());
        let text = fs::read_to_string(&path).unwrap();
        assert!(!text.contains("first") && text.contains("node-2.b"), "{text}");
        let passes = Passes::read(&path).unwrap();
        let (holder, digest) = passes.holder("the-first-token").unwrap();
        assert!(holder.as_str() == "node-1" && passes.has(holder, digest));
        assert!(!passes.has(&name("node-2.b"), digest) && passes.holder("the-third-token").is_none());
        assert_eq!(passes.revoked(&["node-1".to_owned(), "node-3".to_owned()]), Some("node-3"));
        assert_eq!(passes.names().map(Name::as_str).collect::<Vec<_>>(), ["node-1", "node-2.b"]);

        let again = Passes::edit(&path, |passes| passes.add(&name("node-1"), &two)).unwrap_err();
        assert!(matches!(again, PassesError::Taken(_)), "{again}");
        Passes::edit(&path, |passes| passes.revoke(&name("node-1"), &path)).unwrap();
        let gone = Passes::edit(&path, |passes| passes.revoke(&name("node-1"), &path)).unwrap_err();
        assert!(gone.to_string().contains("node-1"), "{gone}");
        assert!(Passes::read(&path).unwrap().holder("the-first-token").is_none());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    /// A server that could read the file still can, whoever has changed it.
    #[cfg(unix)]
    #[test]
    fn owner_and_mode_stay() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.toml");
        Passes::edit(&path, |passes| passes.add(&name("node-1"), &token("the-first-token"))).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        // Only root can give files away.
        let _ = chown(&path, Some(4321), Some(4322));
        let before = fs::metadata(&path).unwrap();
        // What a crash has left is in nobody's way.
        fs::write(named_after(&path, ".new"), "half").unwrap();
        Passes::edit_existing(&path, |passes| passes.revoke(&name("node-1"), &path)).unwrap();
        let after = fs::metadata(&path).unwrap();
        assert_ne!(before.ino(), after.ino(), "it is another file");
        assert_eq!((before.mode(), before.uid(), before.gid()), (after.mode(), after.uid(), after.gid()));
        assert!(!named_after(&path, ".new").exists());
    }

    /// Two that change the file at a time both do.
    #[test]
    fn no_change_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.toml");
        std::thread::scope(|scope| {
            for half in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    for number in 0..8 {
                        let (name, token) =
                            (name(&format!("n{half}-{number}")), token(&format!("token-{half}-{number}")));
                        Passes::edit(path, |passes| passes.add(&name, &token)).unwrap();
                    }
                });
            }
        });
        assert_eq!(Passes::read(&path).unwrap().names().count(), 32);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let digest = String::from(TokenDigest::of("x"));
        let check = |text: &str, parts: &[&str]| {
            let error = Passes::parse(text, Path::new("t.toml")).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)) && !error.contains('\n'), "{error}");
        };
        check("[tokens]\na = 3", &["t.toml", "line 2"]);
        check("[tokens]\na = \"12\"", &["line 2", "64 hexadecimal"]);
        check(&format!("[tokens]\na = \"+{}\"", &digest[1..]), &["64 hexadecimal"]);
        check(&format!("[tokens]\na = \"{}ä\"", &digest[2..]), &["64 hexadecimal"]);
        check(&format!("[tokens]\nA = \"{digest}\""), &["\"A\"", "node-1"]);
        check(&format!("[tokens]\na = \"{digest}\"\nb = \"{digest}\""), &["a and b"]);
        check("tokenz = 1", &["tokenz"]);
        check("= =", &["line 1"]);
        assert_eq!(Passes::parse("", Path::new("t.toml")).unwrap(), Passes::default());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.toml");
        assert!(Passes::read(&path).unwrap_err().to_string().contains("tokens.toml"));
        fs::write(&path, vec![b'#'; PASSES_BYTES_MAX as usize + 1]).unwrap();
        assert!(matches!(Passes::read(&path), Err(PassesError::TooLarge(_))));
    }
}
